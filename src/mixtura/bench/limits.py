"""The limits of the machine: products of matrices, and how fast memory can be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from mixtura.bench.measuring import Here, Watch, interleave
from mixtura.bench.report import Case
from mixtura.nn.backends.native.library import library
from mixtura.nn.backends.native.tape import read_bandwidth

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
READ_BYTES = 1 << 29  # many times the caches of any processor
_PRODUCTS = [(4096, 4096, 4096), (1024, 2048, 2048), (512, 4096, 2048), (64, 2048, 2048), (16, 2048, 2048)]
_VECTOR = (65536, 2048)


class Product:
    """A product of matrices whose size reaches what torch reaches, as a limit for others.

    Args:
        dtype: of the matrices.
        sizes: rows, columns, and the sum between them.
    """

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, int, int] = (1024, 2048, 2048)) -> None:
        M, N, K = sizes
        self.operations = 2 * M * N * K
        self._factors = (torch.ones(M, K).to(dtype), torch.ones(N, K).to(dtype))

    def __call__(self) -> object:
        """Multiply."""
        return F.linear(*self._factors)


class Read:
    """Reads memory by all threads, as a contestant; where the wall counts, its seconds are by the library's own clock.

    Args:
        who: its name.
        size: bytes.
    """

    def __init__(self, who: str = "read", size: int = READ_BYTES) -> None:
        self.who = who
        self._memory = torch.ones(size // 4)
        self.bytes = self._memory.nbytes

    def run(self, times: int, clock: str = "wall") -> list[float]:
        """Seconds of each of so many passes."""
        if library() is None:
            return Here(self.who, self._memory.sum).run(times, clock)
        if clock != "wall":
            return Here(self.who, lambda: read_bandwidth(self._memory)).run(times, clock)
        return [self.bytes / read_bandwidth(self._memory) for _ in range(times)]


def limits(watch: Watch, *, wanted: Callable[[str], bool], rounds: int) -> Iterator[Case]:
    """Time products, products with one vector, and reading.

    Args:
        watch: over the machine.
        wanted: whether a case of that name is.
        rounds: as in ``interleave``.
    """
    for dtype_name, dtype in DTYPES.items():
        for sizes in _PRODUCTS:
            name = f"gemm/{dtype_name}/{'x'.join(map(str, sizes))}"
            if wanted(name):
                product = Product(dtype, sizes)
                yield _one(name, "torch", product, product.operations / 1e9, "GF/s", watch, rounds)
        name = f"gemv/{dtype_name}"
        if wanted(name):
            N, K = _VECTOR
            vector, matrix = torch.ones(1, K, dtype=dtype), torch.ones(N, K, dtype=dtype)
            call = lambda v=vector, m=matrix: F.linear(v, m)
            yield _one(name, "torch", call, matrix.nbytes / 1e9, "GB/s", watch, rounds)
    if wanted("read"):
        read = Read("mixtura" if library() is not None else "torch")
        outcome = interleave([read], watch, rounds=rounds)
        yield Case("read", outcome, "GB/s", read.bytes / 1e9)


def _one(name: str, who: str, call: Any, amount: float, unit: str, watch: Watch, rounds: int) -> Case:
    return Case(name, interleave([Here(who, call)], watch, rounds=rounds), unit, amount, beside=(who,))
