"""``accelerate``: experts on the library's kernels, a cache that grows in place, and decode steps run as a plan.

A decode step, one token a sequence, goes past the modules if a ``DecodePlan`` can be recorded from them and was
measured to compute what they do. Whatever the plan does not know, and more tokens than one, goes through the modules.
Where linear layers and attention have few tokens there, as the head after a prompt, the library computes them one by
one (``FewTokens``). Training goes through the modules as ever. ``acceleration`` counts how often, and why.

B rows (sequences), L positions in the cache, V vocabulary.
"""

from __future__ import annotations

import collections
import functools
import inspect
import threading
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn.modules import module as torch_modules
from transformers import DynamicCache

from mixtura.core.errors import MixturaWarning, NotExpressibleError, OptionError
from mixtura.hf.decode_plan import DecodePlan
from mixtura.hf.forward import is_listened_to
from mixtura.hf.growing_cache import Growing, grow
from mixtura.hf.large_pages import LargePages
from mixtura.hf.quantizer import quantize_model
from mixtura.hf.unchanged import Unchanged
from mixtura.nn.backends.native.experts import is_transformed, is_watched
from mixtura.nn.backends.native.few_tokens import FewTokens
from mixtura.nn.backends.native.library import library, why_no_library
from mixtura.nn.backends.native.tape import MAX_ROWS

_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # of logits, relative to their size
_KNOWN = {
    "input_ids",
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "logits_to_keep",
    "return_dict",
}
_MORE_OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
_PROBED = 8  # tokens
_FAR = 8192  # positions before the last of them, unless the model ends earlier: what changes with the length shows


def accelerate(model: Any, *, bits: int | None = None, **options: Any) -> Any:
    """Make generation fast on the CPU, in place; without ``bits`` what is computed stays the same up to rounding.

    Nothing is packed: weights can be saved, trained, merged and changed as before. Linux gathers them into large pages
    meanwhile, see ``LargePages``. Called again it looks at the model anew. ``undo`` takes it back, but for bits that
    were taken away.

    Args:
        model: causal language model of transformers or of the family, dense or with mixtures, on the CPU in float32 or
            bfloat16. One with adapters of peft is accelerated inside.
        bits: 8 or 4 to quantize experts and linear layers first, but for routers and a head that is tied to the
            embeddings; None leaves them as they are. A model that was loaded quantized stays so.
        **options: of ``MixturaQuantizationConfig``.

    Returns:
        The model itself.

    Warns:
        MixturaWarning: if decode steps cannot be run as a plan, with the reason; experts, linear layers and attention
            are computed by the library all the same.

    Raises:
        NotExpressibleError: if the library was not built, the model is not on the CPU, or it is quantized already and
            ``bits`` are given.
        OptionError: for an option that is not accepted; the model is as it was.

    Example:
        >>> mixtura.accelerate(model).generate(**batch)
    """
    if library() is None:
        raise NotExpressibleError(f"{why_no_library()}: install a C++ compiler, then mixtura again")
    devices = sorted({parameter.device.type for parameter in model.parameters()})
    if devices != ["cpu"]:
        raise NotExpressibleError(f"accelerate is for models on the CPU, got one on {', '.join(devices)}")
    if options and bits is None:
        raise OptionError(f"{', '.join(sorted(options))} need bits, 8 or 4")
    inner = _inner(model)
    if bits is not None:
        quantize_model(inner, **{"linears": True, **options, "bits": bits})
    if hasattr(inner, "set_experts_implementation"):
        inner.set_experts_implementation("mixtura")
    inner._mixtura_decoding = decoding = _Decoding()
    if not isinstance(inner, _Accelerated):
        inner.__class__ = _accelerated(type(inner))
    if reason := decoding.prove(inner):
        warnings.warn(f"decode steps go through the modules: {reason}", MixturaWarning, stacklevel=2)
    decoding.pages = LargePages([*inner.parameters(), *inner.buffers()])
    return model


def undo(model: Any) -> Any:
    """Take ``accelerate`` back; experts stay on the library."""
    inner = _inner(model)
    if isinstance(inner, _Accelerated):
        inner.__class__ = type(inner).__mro__[2]
        del inner._mixtura_decoding
    return model


def acceleration(model: Any, *, wait: bool = False) -> dict[str, Any]:
    """What became of decode steps since ``accelerate``.

    Args:
        model: as ``accelerate`` left it.
        wait: until the weights lie in large pages, about two seconds for each gigabyte; for who measures.

    Returns:
        ``planned``: steps that ran as a plan; ``refusal``: why none can, or ""; ``through_modules``: the other steps by
        the reason why they did not; ``operations``: linear layers and attentions, of few tokens each, that the library
        computed for the modules; ``large_pages``: bytes of weights that lie in such by now, of how many, and why none
        could be had, or ""; empty for a copy of a model.

    Raises:
        OptionError: if the model was not accelerated.
    """
    inner = _inner(model)
    if not isinstance(inner, _Accelerated):
        raise OptionError(f"{type(model).__name__} was not accelerated")
    decoding, pages = inner._mixtura_decoding, inner._mixtura_decoding.pages
    if pages and wait:
        pages.wait()
    return {
        "planned": decoding.planned,
        "refusal": decoding.refusal,
        "through_modules": dict(decoding.through_modules),
        "operations": decoding.operations,
        "large_pages": pages.told() if pages else {},
    }


def _inner(model: Any) -> Any:
    """The model in a wrapper of peft, which calls that one and not itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class _Accelerated:
    """Marks a class that ``_accelerated`` made; the one after it is the model's own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (type(self).__mro__[2],), self.__dict__


def _revive(cls: type) -> Any:
    """An accelerated model of a class, without anything in it, for pickle and copies."""
    made = _accelerated(cls)
    return made.__new__(made)


@functools.cache
def _accelerated(cls: type) -> type:
    names = list(inspect.signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]

    @functools.wraps(cls.forward)  # type: ignore[attr-defined]
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return self._mixtura_decoding.forward(self, functools.partial(cls.forward, self), given)  # type: ignore[attr-defined]

    return type(cls.__name__, (_Accelerated, cls), {"forward": forward, "__module__": cls.__module__})


class _Decoding:
    """Plans of one model, and what was done with them."""

    def __init__(self, refusal: str = "", output: type = dict) -> None:
        self.refusal, self._output = refusal, output
        self.planned = self.operations = 0
        self.through_modules: collections.Counter[str] = collections.Counter()
        self.pages: LargePages | None = None
        self._plan: DecodePlan | None = None
        self._unchanged: Unchanged | None = None
        self._lock = threading.Lock()  # a plan has the memory of one step

    def __deepcopy__(self, memo: Any) -> _Decoding:
        return _Decoding(self.refusal, self._output)  # a plan reads the weights of its own model

    def __reduce__(self) -> Any:
        return _Decoding, (self.refusal, self._output)

    def forward(self, model: Any, modules: Any, given: dict[str, Any]) -> Any:
        """A forward call of the model with these arguments, as a plan or through the modules."""
        if torch.is_grad_enabled() or model.training or is_watched() or is_transformed():
            return modules(**given)
        given = self._with_growing_cache(model, given)
        tokens = given.get("input_ids")
        if tokens is None or given.get("past_key_values") is None or tokens.shape[1:] != (1,):
            return self._by_operation(modules, given)
        step = self.refusal or self._guarded_step(model, given)
        if isinstance(step, str):
            self.through_modules[step] += 1
            return self._by_operation(modules, given)
        self.planned += 1
        return self._output(logits=step[:, None], past_key_values=given["past_key_values"])

    def _by_operation(self, modules: Any, given: dict[str, Any]) -> Any:
        with FewTokens() as few:
            out = modules(**given)
        self.operations += few.count
        return out

    @torch.no_grad()
    def prove(self, model: Any) -> str:
        """Why no plan computes what the modules do; "" if one does."""
        if "forward" in vars(model):
            self.refusal = "its forward was exchanged, as torch.compile(model.forward) does; accelerate it before"
            return self.refusal
        training = [module for module in model.modules() if module.training]
        model.eval()
        try:
            with torch.autocast("cpu", enabled=False):
                self.refusal = self._compare(model)
        except (NotExpressibleError, OptionError) as error:
            self.refusal = str(error)
        finally:
            for module in training:
                module.training = True
            self._plan = None  # it knows more positions than are needed
        return self.refusal

    def _compare(self, model: Any) -> str:
        self._record(model, 1, 1)
        modules = functools.partial(type(model).__mro__[2].forward, model)
        vocabulary = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(0, vocabulary, (1, _PROBED), generator=torch.Generator().manual_seed(0))
        caches = [DynamicCache(config=model.config) for _ in range(2)]
        if not all(grow(cache) for cache in caches):
            return "its cache has layers of another kind (states)"
        for cache in caches:
            modules(input_ids=ids[:, :-2], past_key_values=cache)
        far = min(getattr(model.config, "max_position_embeddings", None) or _FAR, _FAR) - 1
        for t, place in ((-2, _PROBED - 2), (-1, far)):
            given = {"input_ids": ids[:, t : t + 1 or None], "position_ids": torch.tensor([[place]]), "use_cache": True}
            self._output = type(expected := modules(**given, past_key_values=caches[0]))
            seen = self._step(model, {**given, "past_key_values": caches[1]})
            if isinstance(seen, str):
                return seen
            off = (seen.float() - expected.logits[:, 0].float()).norm() / expected.logits.float().norm()
            if not off <= _TOLERANCE[seen.dtype]:
                return f"a plan recorded from its modules computes something else: logits are off by {float(off):.1%}"
        return ""

    def _with_growing_cache(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        cache = given.get("past_key_values")
        use = given.get("use_cache")
        if cache is None and not self.refusal and (model.config.use_cache if use is None else use):
            cache = DynamicCache(config=model.config)
        if isinstance(cache, DynamicCache) and not getattr(cache, "offloading", False):
            grow(cache)
        return given if cache is None else {**given, "past_key_values": cache}

    def _guarded_step(self, model: Any, given: Mapping[str, Any]) -> torch.Tensor | str:
        with self._lock:
            try:
                return self._step(model, given)
            except NotExpressibleError as error:
                return str(error)

    def _step(self, model: Any, given: Mapping[str, Any]) -> torch.Tensor | str:
        """Logits (B, V) of a decode step, or why the plan cannot take it."""
        cache, tokens = given["past_key_values"], given["input_ids"]
        (B, _), past = tokens.shape, cache.get_seq_length()
        if reason := self._why_not(model, given, B, past):
            return reason
        starts_B = _starts(given.get("attention_mask"), B, past + 1)
        if starts_B is None:
            return "the attention mask is not that of padding on the left"
        place = given.get("position_ids")
        positions_B = torch.full((B,), past) if place is None else place[:, 0].expand(B)
        if self._plan is None or self._plan.rows != B or not self._plan.reaches(positions_B):
            self._record(model, B, int(positions_B.max()) + 1)
        plan: DecodePlan = self._plan  # type: ignore[assignment]
        ids_B = tokens[:, 0]
        return plan.refusal(ids_B, positions_B, cache.layers) or plan.step(ids_B, positions_B, starts_B, cache.layers)

    def _why_not(self, model: Any, given: Mapping[str, Any], B: int, past: int) -> str:
        asked = [
            name for name, value in given.items() if name not in _KNOWN and value is not None and value is not False
        ]
        asked += [name for name in _MORE_OUTPUTS if getattr(model.config, name, False)]
        if asked:
            return f"{', '.join(asked)} is asked for"
        if torch.is_autocast_enabled("cpu"):
            return "autocast is on"
        place = given.get("position_ids")
        if place is not None and (place.ndim != 2 or place.shape[1] != 1):
            return f"positions of shape {tuple(place.shape)} are given for one token a sequence"
        if given.get("return_dict") is False or given.get("use_cache") is False:
            return "the output or the cache is not the usual one"
        layers = given["past_key_values"].layers
        if not layers or not all(isinstance(layer, Growing) for layer in layers):
            return "the cache is not one that grows in place"
        if B > MAX_ROWS:
            return f"more than {MAX_ROWS} sequences"
        if is_listened_to(model) or torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks:
            return "capture, replay, steering or a hook listens"
        return "" if self._unchanged is None else self._unchanged.difference()

    def _record(self, model: Any, rows: int, length: int) -> None:
        with torch.inference_mode(False), torch.no_grad():  # tensors of that mode could not be written to outside of it
            self._plan = DecodePlan(model, rows, 2 * length)
        self._unchanged = self._unchanged or Unchanged(model)


def _starts(mask: Any, B: int, L: int) -> torch.Tensor | None:
    """First position of each row that is no padding; None if the mask says anything else."""
    if mask is None:
        return torch.zeros(B, dtype=torch.int64)
    if not isinstance(mask, torch.Tensor) or mask.shape != (B, L):
        return None
    real_BL = mask.bool()
    starts_B = L - real_BL.sum(1)
    if not starts_B.any():
        return starts_B
    return starts_B if bool((real_BL.int().argmax(1) == starts_B).all()) and bool(real_BL[:, -1].all()) else None
