"""One layer of SwiGLU experts, forward, against everybody who computes such layers on a CPU.

With 8 and 4 bits, ours and onnxruntime have the same codes (groups of 32 inputs), zentorch one scale for each row of
its own choice; errors are those of all bits in bfloat16, which transformers computes beside.

T tokens, D width, E experts, K slots a token, F expert width.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mixtura.bench.limits import DTYPES, READ_BYTES, Product, Read
from mixtura.bench.measuring import Contestant, Here, Watch, interleave
from mixtura.bench.peers import PeerError, There, Worker, worker
from mixtura.bench.report import Case
from mixtura.hf.large_pages import LargePages
from mixtura.nn.backends import automatic_backend
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import QuantizedExperts, quantize_experts

SHAPES = {"A": (512, 1024, 8, 2), "B": (1024, 512, 64, 8), "C": (2048, 1024, 64, 8)}  # D, F, E, K
TOKENS = (1, 8, 64, 512, 4096)
_COPIES = 3e8  # bytes of weights that "batched_mm" may copy for a case
_FEW_BITS = {"int8": 8, "int4": 4}
_MOST = {"int8": 64, "int4": 64}  # tokens
_LARGEST_ERROR = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.05, "int4": 0.2}
STOCK = "transformers grouped_mm, bf16"  # beside few bits
ROUNDED = "mixtura, tokens of 8 bits"  # as the peers compute; ours keeps 16 by itself


def layer(
    watch: Watch,
    peers: Mapping[str, Path],
    versions: dict[str, str],
    *,
    wanted: Callable[[str], bool],
    rounds: int,
    shapes: Mapping[str, tuple[int, int, int, int]] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    read_bytes: int = READ_BYTES,
) -> Iterator[Case]:
    """Time layers.

    Args:
        watch: over the machine.
        peers: interpreters by name.
        versions: those of the peers are added.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
        shapes: D, F, E, K by name.
        tokens: numbers of them.
        read_bytes: size of the memory that is read for the limit.
    """
    for shape_name, shape in shapes.items():
        for type_name in (*DTYPES, *_FEW_BITS):
            names = {f"{shape_name}/{type_name}/T{T}": T for T in tokens if _MOST.get(type_name, T) >= T}
            names = {name: T for name, T in names.items() if wanted(name)}
            if names:
                watch.release()
                with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
                    arena = _Arena(Path(folder), shape, type_name, read_bytes)
                    arena.invite(peers, watch, stack)
                    versions |= arena.versions
                    for name, T in names.items():
                        yield arena.case(name, T, watch, rounds)


class _Arena:
    """The experts of one layer, in this process and in the workers."""

    def __init__(self, folder: Path, shape: tuple[int, int, int, int], type_name: str, read_bytes: int) -> None:
        self.folder, self.shape, self.type_name = folder, shape, type_name
        self.bits = _FEW_BITS.get(type_name)
        self.dtype = dtype = DTYPES.get(type_name, torch.bfloat16)
        self.experts = random_experts(shape, dtype)
        self.few = few_bits_experts(self.experts, self.bits) if self.bits else None
        self.rounded = few_bits_experts(self.experts, 8, activation_bits=8) if self.bits == 8 else None
        for module in filter(None, (self.experts, self.few, self.rounded)):
            LargePages([*module.parameters(), *module.buffers()]).wait()  # as accelerate does
        self.workers: dict[str, Worker] = {}
        self.left_out: dict[str, str] = {}
        self.versions: dict[str, str] = {}
        self.limits = (Product(dtype), Read("read", read_bytes))

    def invite(self, peers: Mapping[str, Path], watch: Watch, stack: contextlib.ExitStack) -> None:
        """Start the workers of those who compute layers."""
        peers = {name: python for name, python in peers.items() if name in ("zentorch", "vllm", "onnxruntime")}
        if not peers:
            return
        for name, short in (("gate_up_proj", "first"), ("down_proj", "down")):
            _write(self.folder / f"{short}.npy", getattr(self.experts, name))
            if self.few is not None:
                for part, tensor in zip(("codes", "scales"), plain_codes(self.few, name), strict=True):
                    _write(self.folder / f"{short}-{part}.npy", tensor)
        for name, python in peers.items():
            more = {"bits": self.bits} | ({"slots": self.shape[3]} if name == "onnxruntime" else {})
            one = stack.enter_context(worker(python, f"{name}_layer", torch.get_num_threads()))
            try:
                answer = one.ask("load", folder=str(self.folder), **more, threads=torch.get_num_threads())
            except PeerError as error:
                self.left_out[name] = str(error)
                one.close()
                continue
            self.versions |= answer["versions"]
            self.workers[name] = one
            watch.own.add(one.pid)

    def case(self, name: str, T: int, watch: Watch, rounds: int) -> Case:
        """Check that everybody computes the same, then time it."""
        D, F, E, K = self.shape
        generator = torch.Generator().manual_seed(T)
        hidden_TD = torch.randn(T, D, generator=generator).to(self.dtype)
        logits_TE = torch.randn(T, E, generator=generator)
        weights_TK, indices_TK = logits_TE.softmax(-1).topk(K)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        tensors = {"hidden": hidden_TD, "indices": indices_TK, "weights": weights_TK, "logits": logits_TE}
        left_out = dict(self.left_out)
        contestants = self._here(left_out, hidden_TD, indices_TK, weights_TK)
        reference = self.experts_forward("eager", hidden_TD, indices_TK, weights_TK)
        outputs = {one.who: one.call().float() for one in contestants}  # type: ignore[attr-defined]
        there = self._there(tensors, left_out, outputs)
        errors = {who: float((out - reference).norm() / reference.norm()) for who, out in outputs.items()}
        for who, error in errors.items():
            if not error <= _LARGEST_ERROR[self.type_name]:
                left_out[who] = f"its output is off by {error:.2g}"
        product, read = self.limits
        everybody: list[Contestant] = [*contestants, *there, Here("gemm", product), read]
        outcome = interleave([one for one in everybody if one.who not in left_out], watch, rounds=rounds)
        gemm, bandwidth = (product.operations / 1e9, "gemm"), (read.bytes / 1e9, "read")
        told = {who: amount / outcome.timings[who].seconds for amount, who in (gemm, bandwidth)}
        bytes_each = self.bits / 8 + 2 / 32 if self.bits else self.dtype.itemsize
        touched = len(indices_TK.unique()) * 3 * D * F * bytes_each
        least = max(6 * T * K * D * F / 1e9 / told["gemm"], touched / 1e9 / told["read"])
        beside = (STOCK,) if self.bits else ()
        return Case(name, outcome, limits=told, least=least, errors=errors, left_out=left_out, beside=beside)

    def experts_forward(self, name: str, *inputs: torch.Tensor) -> Any:
        """By an implementation of transformers."""
        self.experts.config._experts_implementation = name
        return self.experts(*inputs)

    def _here(self, left_out: dict[str, str], *inputs: torch.Tensor) -> list[Here]:
        if self.few is not None:
            few, rounded, stock = self.few, self.rounded, functools.partial(self.experts_forward, "grouped_mm")
            ours = [Here("mixtura", lambda: few(*inputs))]
            if rounded is not None:
                ours.append(Here(ROUNDED, lambda: rounded(*inputs)))
            return [*ours, Here(STOCK, lambda: stock(*inputs))]
        D, F, _, K = self.shape
        copied = len(inputs[0]) * K * 3 * D * F * self.dtype.itemsize
        stock = ["eager", "grouped_mm"]
        if copied < _COPIES:
            stock.append("batched_mm")
        else:
            left_out["transformers batched_mm"] = f"it would copy {copied / 1e9:.1f} GB of weights"
        forward = self.experts_forward
        return [
            Here("mixtura", lambda: automatic_backend(self.experts, *inputs)),
            *(Here(f"transformers {n}", lambda n=n: forward(n, *inputs)) for n in stock),
        ]

    def _there(
        self, tensors: Mapping[str, torch.Tensor], left_out: dict[str, str], outputs: dict[str, torch.Tensor]
    ) -> list[There]:
        contestants = []
        if self.workers:
            for part, tensor in tensors.items():
                _write(self.folder / f"case-{part}.npy", tensor)
        for name, one in self.workers.items():
            try:
                for who in one.ask("case", name="case")["who"]:
                    path = self.folder / "out.npy"
                    one.ask("output", who=who, path=str(path))
                    outputs[who] = torch.from_numpy(np.load(path)).float()
                    contestants.append(There(who, one))
            except PeerError as error:
                left_out[name] = str(error)
        return contestants


def random_experts(shape: tuple[int, int, int, int], dtype: torch.dtype) -> nn.Module:
    """Stacked SwiGLU experts as OLMoE has them, with weights of deviation 0.02."""
    from transformers import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

    D, F, E, K = shape
    config = OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K)
    made = OlmoeExperts(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            for part in parameter:  # an expert at a time: no copy of all in float32
                part.copy_(torch.randn(part.shape, generator=generator).mul_(0.02))
    return made.requires_grad_(False)


def few_bits_experts(experts: nn.Module, bits: int, **options: Any) -> QuantizedExperts:
    """A quantized copy; options of ``Quantization``."""
    made: Any = copy.deepcopy(experts)
    quantize_experts(made, Quantization(bits=bits, **options))
    return made  # type: ignore[no-any-return]


def plain_codes(experts: QuantizedExperts, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (E, N, K), a byte for each weight, and scales (E, N, K / group), as they are before they are packed."""
    how = experts.quantization
    scales_EPGR = experts.codes(name).scales.float()
    scales_ENG = scales_EPGR.transpose(2, 3).flatten(1, 2)
    weights_ENK = torch.stack([experts.weight(name, e) for e in range(len(scales_ENG))])
    steps_ENK = weights_ENK / scales_ENG.repeat_interleave(how.group_size, 2)
    return steps_ENK.nan_to_num(0.0).round().add(how.middle).to(torch.uint8), scales_ENG


def _write(path: Path, tensor: torch.Tensor) -> None:
    plain = tensor.detach().view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor.detach()
    np.save(path, plain.numpy())
