"""``Balancer``: balance losses and balancing routers over whole optimizer steps, for any training loop.

    loss of a step = sum over terms  coefficient * sum over layers  sum over calls  n / N * term(routing of that call)

n are the routed tokens of a call, padding not counted, N those of the whole step: of all micro-batches and all
processes. A term that is a mean over tokens then comes out the same however the step is split, and load balancing does
where its load f is known before the step (``previous-step-load``).

E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mixtura.core import registry
from mixtura.core.errors import (
    MixturaError,
    MixturaWarning,
    NotExpressibleError,
    OptionError,
    UnknownNameError,
    unknown_name,
)
from mixtura.core.routing import Routing, counts
from mixtura.core.selection import SelectionSpec
from mixtura.hf.families import selection_spec
from mixtura.hf.modeling import routers
from mixtura.hf.native import native_mixtures
from mixtura.nn.balance.statistic import sum_over_processes
from mixtura.nn.state import RouterState

Terms = Mapping[str, float | Mapping[str, Any]]
DEFAULT_STATISTIC = "previous-step-load"


class Balancer:
    """Balance terms of a model, counted and scaled over optimizer steps.

    Args:
        model: with mixtures of ours or native ones; its routers' ``end_step`` is called after every step.
        terms: coefficient by key of a balance method, or a mapping of ``coefficient`` and the method's options.
        statistic: key of what f a load-balancing term sees; see ``mixtura methods --role statistic``.

    Raises:
        UnknownNameError: with the nearest key, if a term is no balance method, or the statistic is none.
        OptionError: if a term has no coefficient, or options that its method has not.

    Example:
        >>> balancer = Balancer(model, {"load-balancing": 0.01})
        >>> balancer.begin_step(tokens=attention_mask.sum())
        >>> with record(model) as states:
        ...     logits = model(input_ids, attention_mask=attention_mask).logits
        >>> loss = cross_entropy(logits) + balancer.loss(states)[0]
        >>> loss.backward(); optimizer.step(); balancer.end_step()
    """

    def __init__(self, model: nn.Module, terms: Terms, statistic: str = DEFAULT_STATISTIC) -> None:
        self.model = model
        self.terms = parse_terms(terms)
        self.statistic = _of_role("statistic", statistic).build()
        self.counts: dict[str, torch.Tensor] = {}
        self.expected: int | None = None
        self.total: torch.Tensor | None = None
        self.routed: dict[str, int] = {}
        self._warned = False

    def begin_step(self, tokens: torch.Tensor | int) -> None:
        """An optimizer step begins; on every process.

        Args:
            tokens: real tokens of all micro-batches of the step, of this process.
        """
        tokens = torch.as_tensor(tokens)
        self.expected = int(tokens)
        self.total = sum_over_processes(tokens.to(_device(self.model)))
        self.counts, self.routed = {}, {}

    def loss(self, states: Sequence[RouterState]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Share of a micro-batch in the balance loss of the step.

        Args:
            states: of its forward calls, as ``mixtura.hf.record`` gives them; calls without gradient are passed over.

        Returns:
            The loss, a scalar with gradient to the routers, and its terms by key, detached: mean over the layers,
            without coefficient.

        Raises:
            OptionError: if there are terms, but no mixture was run, or a native router gives no logits; or if no step
                has begun.
        """
        if self.total is None:
            raise OptionError("begin_step must be called before loss: the number of tokens of the step scales it")
        decided = [(s, r.layer, r.routing) for s in states if s.differentiable for r in s.tape.records]
        self._check(decided)
        total = torch.zeros((), device=self.total.device)
        parts = {key: torch.zeros((), device=self.total.device) for key in self.terms}
        layers = max(len({layer for _, layer, _ in decided}), 1)
        for state, layer, routing in decided:
            n, load_E = self._count(layer, routing, state.mask_T)
            share = n / self.total.clamp(min=1)
            for key, (coefficient, options) in self.terms.items():
                takes = {"load_E": load_E} if "load_E" in registry.get(key).options else {}
                value = registry.get(key).build(routing, mask_T=state.mask_T, **takes, **options) * share
                total = total + coefficient * value.to(total.device)
                parts[key] += value.detach().to(total.device) / layers
        return total, parts

    def _count(self, layer: str, routing: Routing, mask_T: torch.Tensor | None) -> tuple[int, torch.Tensor]:
        """Real tokens of a call, and the load that its loss sees."""
        n = len(routing.indices_TK) if mask_T is None else int(mask_T.sum())
        counts_E = counts(routing, mask_T)
        self.routed[layer] = self.routed.get(layer, 0) + n
        self.counts[layer] = self.counts[layer] + counts_E if layer in self.counts else counts_E
        return n, self.statistic.observe(layer, counts_E)

    def _check(self, decided: Sequence[tuple[RouterState, str, Routing]]) -> None:
        if not self.terms:
            return
        if not decided:
            raise OptionError(f"balance terms {sorted(self.terms)} need a routing with gradient, but none was made")
        blind = sorted({layer for _, layer, r in decided if _has_no_logits(r)})
        if blind:
            raise OptionError(f"balance needs logits, but the routers of layers {', '.join(blind)} give none")
        if not self._warned:
            self._warned = True
            self._warn_of_routers_without_gradient(decided)

    def _warn_of_routers_without_gradient(self, decided: Sequence[tuple[RouterState, str, Routing]]) -> None:
        modules = routers(self.model) | {layer: m.router for layer, m in native_mixtures(self.model).items()}
        frozen = {layer for layer, m in modules.items() if m and not any(p.requires_grad for p in m.parameters())}
        without = sorted({layer for _, layer, r in decided if layer in frozen or not r.logits_TE.requires_grad})
        if without:
            warnings.warn(
                f"balance terms {sorted(self.terms)} have no gradient path to the routers of layers "
                f"{', '.join(without)}: they are frozen, or their logits have no graph",
                MixturaWarning,
                stacklevel=4,
            )

    def check_tokens(self) -> None:
        """Before the optimizer's step: every token that was announced has been routed, and no other.

        Raises:
            MixturaError: if not, since the loss was then scaled by a wrong number.
        """
        wrong = {layer: n for layer, n in self.routed.items() if n != self.expected}
        if wrong and self.terms:
            layer, n = next(iter(wrong.items()))
            raise MixturaError(
                f"the step was announced with {self.expected} tokens, but layer {layer} routed {n}: give begin_step "
                "the tokens that the model sees (a trainer: override routed_tokens)"
            )

    def end_step(self) -> None:
        """After the optimizer's step: tell routers and statistic what the whole step has counted; on every process."""
        totals = {layer: sum_over_processes(counts_E) for layer, counts_E in sorted(self.counts.items())}
        self.statistic.end_step(totals)
        for layer, router in routers(self.model).items():
            if layer in totals:
                router.end_step(totals[layer])
        self.total = self.expected = None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; plain JSON."""
        return {"statistic": self.statistic.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""
        self.statistic.load_state_dict(state["statistic"])


def _has_no_logits(routing: Routing) -> bool:
    """Whether a native router gave none, so that NaN without a graph stand in their place."""
    logits_TE = routing.logits_TE
    return not logits_TE.requires_grad and len(logits_TE) > 0 and bool(logits_TE[0].isnan().all())


def constant_routers(model: nn.Module) -> list[str]:
    """Layers whose router is trained, but weighs its one expert constantly: the model's loss has no gradient for it."""
    specs = {layer: (router, getattr(router, "spec", None)) for layer, router in routers(model).items()}
    specs |= {layer: (native.router, _native_spec(model)) for layer, native in native_mixtures(model).items()}
    return [
        layer
        for layer, (router, spec) in specs.items()
        if spec and spec.weighs_constantly and router and any(p.requires_grad for p in router.parameters())
    ]


def _native_spec(model: Any) -> SelectionSpec | None:
    try:
        return selection_spec(model.config)
    except (NotExpressibleError, UnknownNameError):
        return None


def parse_terms(terms: Terms) -> dict[str, tuple[float, dict[str, Any]]]:
    """Coefficient and options by key.

    Raises:
        UnknownNameError: with the nearest key, if a term is no balance method.
        OptionError: if a term has no coefficient, or options that its method has not.
    """
    parsed = {}
    for key, value in terms.items():
        method = _of_role("balance", key)
        options = dict(value) if isinstance(value, Mapping) else {"coefficient": value}
        coefficient = options.pop("coefficient", None)
        if isinstance(coefficient, bool) or not isinstance(coefficient, int | float):
            raise OptionError(f"balance term {key!r} needs a number, or a mapping with 'coefficient', got {value!r}")
        method.check(options)
        parsed[key] = (float(coefficient), options)
    return parsed


def _of_role(role: str, key: str) -> registry.Method:
    known = {row.key: row for row in registry.methods(role)}
    if key not in known:
        raise unknown_name(f"method of role {role}", key, known)
    return known[key]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
