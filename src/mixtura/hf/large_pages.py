"""Weights in large pages: a processor looks up the place of 2 MB at once instead of 4 KB, and reads memory faster.

Linux can gather what lies in small pages behind a program's back: addresses and values stay as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

_PAGE = 2 << 20  # bytes
_PIECE = 16 * _PAGE  # of a call; others who ask for memory wait for it
_REST = 3  # times as long as a piece took
_MADV_COLLAPSE = 25  # Linux 6.1 and later


class LargePages:
    """Gathers the memory of tensors on a thread of its own, about ten seconds for each gigabyte.

    It works a quarter of the time, so that what is computed meanwhile is hardly slower; two seconds if one waits.
    What lies in a file that is mapped into memory, and what does not fill a large page, stays where it is.

    Args:
        tensors: on the CPU. They are not kept alive.

    Attributes:
        size: bytes of all tensors.
        gathered: bytes that lie in large pages by now.
        refusal: why nothing could be gathered, or "".
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        whole = {tensor.data_ptr(): tensor for tensor in tensors}.values()
        self.size = sum(tensor.nbytes for tensor in whole)
        self.gathered, self.refusal = 0, ""
        parts = [_Part.of(tensor) for tensor in whole if tensor.nbytes >= _PAGE]
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._gather, args=(parts,), daemon=True)
        self._thread.start()

    def wait(self) -> LargePages:
        """Until all is gathered that can be, which goes faster then."""
        self._hurry.set()
        self._thread.join()
        return self

    def told(self) -> dict[str, Any]:
        """``gathered``, ``size`` and ``refusal``."""
        return {"gathered": self.gathered, "size": self.size, "refusal": self.refusal}

    def _gather(self, parts: list[_Part]) -> None:
        if not sys.platform.startswith("linux"):
            self.refusal = "large pages are asked for on Linux alone"
            return
        errors = set()
        for part in parts:
            for start, length in _pieces(part):
                begin = time.perf_counter()
                error = _collapse(start, length)
                self._hurry.wait(_REST * (time.perf_counter() - begin))
                if error:
                    errors.add(os.strerror(error))
                else:
                    self.gathered += length
        if errors and not self.gathered:
            self.refusal = f"the system gathered nothing: {', '.join(sorted(errors))} (Linux 6.1 and later can)"


class _Part(NamedTuple):
    """Where a tensor lies: a weak reference to the tensor itself would forbid to exchange it, as Module.to may do."""

    storage: StorageWeakRef
    offset: int
    size: int  # both in bytes

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Part:
        offset = tensor.storage_offset() * tensor.element_size()
        return cls(StorageWeakRef(tensor.untyped_storage()), offset, tensor.nbytes)


def _pieces(part: _Part) -> Iterator[tuple[int, int]]:
    """Address and bytes of whole pages of a tensor, whose storage lives until the next piece is asked for."""
    done = 0
    while (storage := torch.UntypedStorage._new_with_weak_ptr(part.storage.cdata)) is not None:
        place = storage.data_ptr() + part.offset
        end = storage.data_ptr() + min(part.offset + part.size, storage.nbytes())
        begin, end = -(-place // _PAGE) * _PAGE, end // _PAGE * _PAGE
        if begin + done >= end:
            return
        length = min(_PIECE, end - begin - done)
        yield begin + done, length
        done += length


def _collapse(start: int, length: int) -> int:
    """The number of the error, or 0."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return ctypes.get_errno() if madvise(start, length, _MADV_COLLAPSE) else 0
