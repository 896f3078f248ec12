"""Hash routing: a fixed table says for every token id which expert works; nothing is learned.

    expert(t) = table[token id of t],  weight 1                                            table (V, H) of whole numbers

"random" draws the table; "balanced" fills it by the frequency of the tokens, the most frequent first, each to the
expert that has least so far: the expected loads then differ by at most the largest frequency. With H > 1 hashes the
experts are H groups, and hash h chooses one of group h: since a feed-forward layer is the sum over its hidden units,
this is the paper's multi-hash, whose hidden layer is put together from H segments.

Neither context nor training change the routing, there is no balance loss and no gradient: the control experiment of
every learned router. The table is saved with the model. Layers differ by their seeds. The logits are 1 at the chosen
experts and 0 elsewhere; hidden states are not read, token ids are: a model that is given embeddings alone has none.

Reference: Roller et al., arXiv:2106.04426.

T tokens, V entries of the vocabulary, E experts, H hashes.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal, get_args

import torch

from mixtura.core.arrays import scatter_rows
from mixtura.core.errors import OptionError, ShapeError
from mixtura.core.registry import method
from mixtura.core.routing import Routing
from mixtura.nn.routers.base import BaseRouter, without_padding
from mixtura.nn.state import current_state

Table = Literal["random", "balanced"]


@method("hash-routing", role="router", paper="arXiv:2106.04426")
class HashRouter(BaseRouter):
    """Experts by token id; the file's docstring is its card.

    Args:
        dim: D; unused, every router has it.
        num_experts: E.
        vocabulary: V.
        table: how it is filled.
        hashes: H, experts of every token; they divide E. More than 1 with a random table.
        seed: of the random table.
        frequencies: of each token, V numbers of at least 0, for the balanced table. They are part of the
            configuration, and so of a saved model's config.json.

    Raises:
        OptionError: on a value outside of these.
    """

    table: torch.Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        vocabulary: int,
        *,
        table: Table = "random",
        hashes: int = 1,
        seed: int = 0,
        frequencies: Sequence[float] | None = None,
    ) -> None:
        super().__init__(num_experts)
        if table not in get_args(Table):
            raise OptionError(f"table must be one of 'random', 'balanced', got {table!r}")
        if vocabulary < 1:
            raise OptionError(f"vocabulary must be at least 1, got {vocabulary}")
        if hashes < 1 or num_experts % hashes:
            raise OptionError(f"hashes must divide the number of experts {num_experts}, got {hashes}")
        if (table == "balanced") != (frequencies is not None) or (table == "balanced" and hashes > 1):
            raise OptionError("table 'balanced' needs frequencies and one hash, table 'random' takes no frequencies")
        self.hashes = hashes
        if frequencies is None:
            experts_VH = _random(vocabulary, num_experts, hashes, seed)
        else:
            experts_VH = [[e] for e in balanced_table(_checked(frequencies, vocabulary), num_experts)]
        self.register_buffer("table", torch.tensor(experts_VH))

    @property
    def slots(self) -> int:
        """H."""
        return self.hashes

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens by the ids in the current ``RouterState``; padding gets empty slots.

        Raises:
            OptionError: if there are no token ids, or one lies beyond the vocabulary.
            ShapeError: if the state's ids or its mask are of another number of tokens.
        """
        indices_TH = self.table[self._ids(hidden_TD)]
        weights_TH = torch.ones(indices_TH.shape, dtype=torch.float32, device=indices_TH.device)
        logits_TE = scatter_rows(indices_TH, weights_TH, self.num_experts)
        return without_padding(Routing(logits_TE, weights_TH, indices_TH))

    def _ids(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        state = current_state()
        if state is None or state.token_T is None:
            raise OptionError(
                "hash-routing chooses by token ids, but this call has none: run the router inside of its model and "
                "give that input_ids, not inputs_embeds"
            )
        if tuple(state.token_T.shape) != (len(hidden_TD),):
            raise ShapeError(f"token_T must have shape ({len(hidden_TD)},), got {tuple(state.token_T.shape)}")
        if len(state.token_T) and int(state.token_T.max()) >= len(self.table):
            raise OptionError(f"token ids must be below vocabulary {len(self.table)}, got {int(state.token_T.max())}")
        return state.token_T


def balanced_table(frequencies: Sequence[float], num_experts: int) -> list[int]:
    """Expert of each token such that expected loads are nearly equal.

    Args:
        frequencies: of each token, at least 0.
        num_experts: E.

    Returns:
        V experts: tokens by falling frequency, each to the expert of the least load, then of the fewest tokens, then of
        the lowest index.

    Source:
        Roller et al., arXiv:2106.04426, section 3.
    """
    expert_V = [0] * len(frequencies)
    heap = [(0.0, 0, e) for e in range(num_experts)]
    for token in sorted(range(len(frequencies)), key=lambda v: -frequencies[v]):
        load, tokens, e = heap[0]
        expert_V[token] = e
        heapq.heapreplace(heap, (load + frequencies[token], tokens + 1, e))
    return expert_V


def _random(vocabulary: int, num_experts: int, hashes: int, seed: int) -> list[list[int]]:
    """Hash h draws from group h, experts h E / H and following."""
    part, generator = num_experts // hashes, torch.Generator().manual_seed(seed)
    # on the CPU whatever the default device is, so that a seed gives one table
    drawn_VH = torch.randint(part, (vocabulary, hashes), generator=generator, device="cpu")
    experts_VH: list[list[int]] = (drawn_VH + torch.arange(hashes, device="cpu") * part).tolist()
    return experts_VH


def _checked(frequencies: Sequence[float], vocabulary: int) -> Sequence[float]:
    if len(frequencies) != vocabulary or not all(0 <= f < float("inf") for f in frequencies):
        raise OptionError(
            f"frequencies must be {vocabulary} finite numbers of at least 0, got {len(frequencies)}, "
            f"the least {min(frequencies, default=None)}"
        )
    return frequencies
