"""Where a decoder's feed-forward layers are, what they hold, how one is exchanged: by structure, not by class.

D width, F width of the feed-forward, T tokens. A layer is accepted when its parts have known names and a run on random
tokens gives what its weights say: one argument in, one tensor out, nothing added. Everything else is refused by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import NotExpressibleError
from mixtura.nn.dense import FeedForwardWeights
from mixtura.nn.experts.activations import ACTIVATIONS
from mixtura.nn.mixture import Mixture

# (gate, up, down); a fused projection holds the gate in its first half
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")
_PLAIN = (("fc1", "fc2"), ("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"))
_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
_DROPOUT_NAMES = ("dropout",)


class Holder(nn.Module):
    """Stands in the place of a feed-forward and gives the mixture's tensors a name of their own, ``<place>.mixture``.

    Args:
        mixture: the layer.
        dropout: of the feed-forward that stood here, kept.
    """

    def __init__(self, mixture: Mixture, dropout: nn.Module | None = None) -> None:
        super().__init__()
        self.mixture = mixture
        self.dropout = dropout

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The mixture, then the dropout that the feed-forward had."""
        out = self.mixture(hidden)
        return out if self.dropout is None else self.dropout(out)  # type: ignore[no-any-return]


@dataclasses.dataclass(frozen=True)
class Site:
    """The feed-forward of one decoder layer.

    Attributes:
        layer: number of the decoder layer.
        dim: D.
        parent: module that holds it.
        name: attribute of the parent; for an inline one (OPT) the first projection.
        kind: "gated", "fused", "plain" or "mixture" (a native or own mixture stands there).
        parts: names of the projections.
        inline: whether the projections lie in the decoder layer itself.
    """

    layer: int
    dim: int
    parent: nn.Module
    name: str
    kind: str
    parts: tuple[str, ...] = ()
    inline: bool = False

    @property
    def module(self) -> nn.Module:
        """What stands there now; of an inline one, the decoder layer."""
        return self.parent if self.inline else getattr(self.parent, self.name)

    def read(self) -> FeedForwardWeights:
        """The dense weights, without copying.

        Raises:
            NotExpressibleError: if there is a mixture already, or the layer computes something else than its
                weights say.
        """
        if self.kind == "mixture":
            raise NotExpressibleError(f"layer {self.layer} is a mixture already ({type(self.module).__name__})")
        weights = self._weights()
        if not self.inline:
            _check(self, weights)
        return weights

    def _weights(self) -> FeedForwardWeights:
        projections = [_linear(getattr(self.module, part)) for part in self.parts]
        activation = _activation_name(self)
        if self.kind == "plain":
            (up, up_bias), (down, down_bias) = projections
            return FeedForwardWeights(None, up, down, None, up_bias, down_bias, activation)
        if self.kind == "gated":
            (gate, gate_bias), (up, up_bias), (down, down_bias) = projections
            return FeedForwardWeights(gate, up, down, gate_bias, up_bias, down_bias, activation)
        (both, both_bias), (down, down_bias) = projections
        gate, up = both.chunk(2)
        gate_bias, up_bias = (None, None) if both_bias is None else both_bias.chunk(2)
        return FeedForwardWeights(gate, up, down, gate_bias, up_bias, down_bias, activation)

    def check_replaceable(self) -> None:
        """Raise ``NotExpressibleError`` unless hidden states are all that goes in and comes out."""
        if not self.inline:
            _run(self)

    def put(self, mixture: Mixture) -> None:
        """Put a mixture there; what stood there is let go."""
        mixture.layer = str(self.layer)
        if not self.inline:
            dropout = next((getattr(self.module, n) for n in _DROPOUT_NAMES if hasattr(self.module, n)), None)
            setattr(self.parent, self.name, Holder(mixture, dropout if isinstance(dropout, nn.Module) else None))
            return
        setattr(self.parent, self.parts[0], Holder(mixture))
        setattr(self.parent, _activation_attribute(self.parent), nn.Identity())
        setattr(self.parent, self.parts[1], nn.Identity())


def decoder(model: nn.Module) -> nn.Module:
    """The module that owns the decoder layers and gets a model's inputs, without a head; also under PEFT.

    Raises:
        NotExpressibleError: if no list of modules has as many entries as the configuration has layers.
    """
    wanted = _layers_wanted(model)
    for module in model.modules():
        if any(isinstance(child, nn.ModuleList) and len(child) == wanted for child in module.children()):
            return module
    raise NotExpressibleError(f"{type(model).__name__}: no list of {wanted} decoder layers was found")


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers; raises as ``decoder`` does."""
    wanted = _layers_wanted(model)
    return next(c for c in decoder(model).children() if isinstance(c, nn.ModuleList) and len(c) == wanted)


def is_of_transformers(model: nn.Module) -> bool:
    """Whether it has a configuration of transformers; also under DistributedDataParallel."""
    return hasattr(_unwrapped(model), "config")


def _unwrapped(model: nn.Module) -> nn.Module:
    while not hasattr(model, "config") and hasattr(model, "module"):  # DistributedDataParallel hides it
        model = model.module  # type: ignore[assignment]
    return model


def _layers_wanted(model: nn.Module) -> int:
    return int(_unwrapped(model).config.get_text_config().num_hidden_layers)  # type: ignore[union-attr, operator]


def feed_forward_sites(model: nn.Module) -> list[Site]:
    """The feed-forward of every decoder layer, in their order.

    Raises:
        NotExpressibleError: if a layer has none of a known structure, or several.
    """
    return [_site(model, i, layer) for i, layer in enumerate(decoder_layers(model))]


def _site(model: nn.Module, number: int, layer: nn.Module) -> Site:
    found = list(_candidates(number, int(model.config.hidden_size), layer))  # type: ignore[union-attr, arg-type]
    if len(found) == 1:
        return found[0]
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    what = "no feed-forward" if not found else "several feed-forwards"
    raise NotExpressibleError(
        f"{type(model).__name__}: {what} of a known structure in decoder layer {number}, which has {children}"
    )


def _candidates(number: int, dim: int, layer: nn.Module) -> Iterator[Site]:
    for name, child in layer.named_children():
        kind, parts = _structure(child)
        if kind is not None:
            yield Site(number, dim, layer, name, kind, parts)
    for parts in _PLAIN:
        if all(isinstance(getattr(layer, part, None), nn.Linear) for part in parts):
            yield Site(number, dim, layer, parts[0], "plain", parts, inline=True)


def _structure(module: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    """Kind and projections of a module that may be a feed-forward."""
    if isinstance(module, Holder) or hasattr(module, "experts"):
        return "mixture", ()
    for kind, parts in (("gated", _GATED), ("fused", _FUSED), *(("plain", plain) for plain in _PLAIN)):
        if all(hasattr(module, part) for part in parts):
            return kind, parts
    return None, ()


def _linear(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight as (out, in), and bias; transformers' Conv1D (GPT-2) stores (in, out)."""
    weight: Any = module.weight.T if type(module).__name__ == "Conv1D" else module.weight  # type: ignore[operator]
    return weight.detach(), None if module.bias is None else module.bias.detach()  # type: ignore[operator, return-value]


def _activation_attribute(module: nn.Module) -> str:
    for name in _ACTIVATION_NAMES:
        if hasattr(module, name):
            return name
    raise NotExpressibleError(
        f"{type(module).__name__} has no activation under the names {', '.join(_ACTIVATION_NAMES)}"
    )


def _activation_name(site: Site) -> str:
    """Name of the activation, found by comparing values."""
    function = getattr(site.module, _activation_attribute(site.module))
    x = torch.linspace(-6, 6, 97)
    with torch.no_grad():
        y = function(x.clone())
        for exact in (torch.equal, torch.allclose):
            for name, ours in ACTIVATIONS.items():
                if exact(ours(x), y):
                    return name
    raise NotExpressibleError(f"layer {site.layer}: activation {type(function).__name__} is not one of ours")


@torch.no_grad()
def _run(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, and what the module makes of them.

    Raises:
        NotExpressibleError: if it takes more than hidden states, or does not give hidden states back.
    """
    module = site.module
    like = next(module.parameters())
    tokens = torch.randn(1, 5, site.dim, generator=torch.Generator().manual_seed(0)).to(like)
    training = module.training
    module.eval()
    try:
        out = module(tokens)
    except (TypeError, AttributeError) as error:  # an argument is missing, or None where a tensor is needed
        raise NotExpressibleError(f"{_describe(site)} cannot be called with hidden states alone: {error}") from error
    finally:
        module.train(training)
    if not isinstance(out, torch.Tensor) or out.shape != tokens.shape:
        raise NotExpressibleError(f"{_describe(site)} does not return hidden states but {type(out).__name__}")
    return tokens, out


def _check(site: Site, weights: FeedForwardWeights) -> None:
    """Run the layer on random tokens and compare with its weights."""
    tokens, out = _run(site)
    if not torch.allclose(out, weights(tokens), rtol=1e-2, atol=1e-4):
        raise NotExpressibleError(f"{_describe(site)} does not compute down(act(up)) of its own weights")


def _describe(site: Site) -> str:
    return f"layer {site.layer}: {site.name} ({type(site.module).__name__})"
