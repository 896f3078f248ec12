"""How stacked feed-forward experts are computed: ``(experts, hidden_TD, indices_TK, weights_TK) -> hidden_TD``.

``naive`` is the formula, slow and obvious, and the oracle of every test; ``sorted`` sorts slots by expert in torch and
drops nothing; ``mixtura``, the default, takes for each call ``sorted``, torch's product of all experts at once
(``grouped``) or the library (``native``), by the table in ``rules``. Slots whose index is E or more are empty: their
tokens are not touched, whatever they hold.
"""

from mixtura.nn.backends.automatic import automatic_backend
from mixtura.nn.backends.grouped import grouped_backend
from mixtura.nn.backends.naive import naive_backend
from mixtura.nn.backends.sorted import sorted_backend

BACKENDS = {"naive": naive_backend, "sorted": sorted_backend, "mixtura": automatic_backend}

__all__ = ["BACKENDS", "automatic_backend", "grouped_backend", "naive_backend", "sorted_backend"]
