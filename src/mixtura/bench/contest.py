"""Who takes part with a language model: the model itself, ours beside it, and workers that read it from files."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixtura.bench.gguf_file import write_gguf
from mixtura.bench.measuring import Watch
from mixtura.bench.peers import PeerError, There, Worker, worker
from mixtura.core.errors import MixturaWarning, NotExpressibleError


class Contest:
    """A model and the workers that have it too.

    Args:
        model: as transformers runs it.
        stack: ends the workers and removes their files.
        watch: is told whose load is not foreign.

    Attributes:
        left_out: who cannot take part, and why.
    """

    def __init__(self, model: Any, stack: contextlib.ExitStack, watch: Watch) -> None:
        self.model, self._stack, self._watch = model, stack, watch
        self.left_out: dict[str, str] = {}
        self._workers: dict[str, Worker] = {}

    def accelerated(self, model: Any, **options: Any) -> Any:
        """The model as ``accelerate`` leaves it; None if it cannot, and what it warns of is told."""
        from mixtura.hf.accelerate import accelerate, acceleration

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", MixturaWarning)
            try:
                made = accelerate(model, **options)
                acceleration(made, wait=True)
            except NotExpressibleError as error:
                self.left_out["mixtura"] = str(error)
                return None
        for one in said:
            if issubclass(one.category, MixturaWarning):
                self.left_out["mixtura's plan"] = str(one.message)
        return made

    def invite_llama(self, peers: Mapping[str, Path], versions: dict[str, str], bits: int = 16) -> None:
        """Write the model for llama.cpp, and have it quantized there (8 or 4 bits: Q8_0, Q4_0) and read."""
        if "llama" not in peers:
            return
        path = Path(self._stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
        try:
            write_gguf(self.model, path)
        except NotExpressibleError as error:
            self.left_out["llama.cpp"] = str(error)
            return
        self._invite("llama.cpp", peers["llama"], "llama_model", path, versions, bits=bits)

    def invite_sgl(self, peers: Mapping[str, Path], versions: dict[str, str]) -> None:
        """Save the model for transformers in vLLM's environment, whose experts take their place there."""
        if "vllm" not in peers:
            return
        if not getattr(self.model.config, "num_experts", None):
            self.left_out["transformers + sgl"] = "there are no experts in the model"
            return
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self.model.save_pretrained(folder)
        self._invite("transformers + sgl", peers["vllm"], "vllm_model", folder, versions)

    def there(
        self, what: str, outputs: dict[str, torch.Tensor], left_out: dict[str, str], **tokens: torch.Tensor
    ) -> list[There]:
        """Workers that are ready for a case; their logits are added to the outputs."""
        contestants = []
        with tempfile.TemporaryDirectory() as folder:
            for name, one in self._workers.items():
                path = Path(folder) / "logits.npy"
                try:
                    one.ask(what, **{key: ids.tolist() for key, ids in tokens.items()})
                    one.ask("output", who=name, path=str(path))
                except PeerError as error:
                    left_out[name] = str(error)
                    continue
                outputs[name] = torch.from_numpy(np.load(path)).float()
                contestants.append(There(name, one))
        return contestants

    def _invite(
        self, name: str, python: Path, script: str, path: Path, versions: dict[str, str], **options: Any
    ) -> None:
        threads = torch.get_num_threads()
        one = self._stack.enter_context(worker(python, script, threads))
        try:
            versions |= one.ask("load", path=str(path), threads=threads, **options)["versions"]
        except PeerError as error:
            self.left_out[name] = str(error)
            one.close()
            return
        self._workers[name] = one
        self._watch.own.add(one.pid)


def relative_errors(outputs: Mapping[str, torch.Tensor], reference: str) -> dict[str, float]:
    """Distance of each from the reference, relative to its size."""
    expected = outputs[reference]
    return {who: float((out - expected).norm() / expected.norm()) for who, out in outputs.items()}


def cosines(outputs: Mapping[str, torch.Tensor], reference: str) -> dict[str, float]:
    """Of the angle between each and the reference, all rows as one vector."""
    expected = outputs[reference].flatten()
    return {who: float(torch.cosine_similarity(out.flatten(), expected, 0)) for who, out in outputs.items()}
