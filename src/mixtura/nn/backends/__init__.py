"""How stacked feed-forward experts are computed: ``(experts, hidden_TD, indices_TK, weights_TK) -> hidden_TD``.

``naive`` is the formula, slow and obvious, and the oracle of every test; ``mixtura`` sorts slots by expert and drops
nothing; ``automatic`` takes the library of ``native`` where that can compute the call. Slots whose index is E or more
are empty: their tokens are not touched, whatever they hold.
"""

from mixtura.nn.backends.automatic import automatic_backend
from mixtura.nn.backends.naive import naive_backend
from mixtura.nn.backends.sorted import sorted_backend

BACKENDS = {"naive": naive_backend, "mixtura": sorted_backend, "automatic": automatic_backend}

__all__ = ["BACKENDS", "automatic_backend", "naive_backend", "sorted_backend"]
