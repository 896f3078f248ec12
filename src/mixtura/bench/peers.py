"""Peers: other programs, each in a virtual environment of its own, behind a worker that speaks lines of JSON.

Nothing of a peer is imported here. A folder holds an environment for each, named as the peer: ``FOLDER/zentorch/bin/
python``. ``benchmarks/peers/README.md`` in the repository tells how they are made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mixtura.core.errors import MixturaError, OptionError, unknown_name

PEERS = ("zentorch", "vllm", "onnxruntime", "llama", "pomegranate")
ENVIRONMENT = "MIXTURA_PEERS"
_WORKERS = Path(__file__).with_name("workers")


class PeerError(MixturaError, RuntimeError):
    """A worker failed, with its last line."""


def found_peers(folder: Path | None, names: Sequence[str] | None = None) -> dict[str, Path]:
    """Interpreters by name of the peer.

    Args:
        folder: with an environment for each; None for ``$MIXTURA_PEERS``, and nobody if that is not set either.
        names: which; None for all that are there.

    Raises:
        UnknownNameError: if a name is not one of ``PEERS``.
        OptionError: if the folder, or an environment in it that was asked for, is not there.
    """
    if folder is None and os.environ.get(ENVIRONMENT):
        folder = Path(os.environ[ENVIRONMENT])
    if folder is not None and not folder.is_dir():
        raise OptionError(f"the folder of peers {str(folder)!r} does not exist")
    for name in names or ():
        if name not in PEERS:
            raise unknown_name("peer", name, PEERS)
    there = {}
    for name in PEERS if names is None else names:
        python = None if folder is None else folder / name / "bin" / "python"
        if python is not None and python.exists():
            there[name] = python
        elif names is not None:
            where = f"no folder was given (--peers-folder or ${ENVIRONMENT})" if python is None else f"no {python}"
            raise OptionError(f"peer {name!r} is not set up: {where}")
    return there


class Worker:
    """A running worker.

    Args:
        python: interpreter of the peer's environment.
        script: of ``workers``, without its ending.
        threads: of its computations.
        errors: file that takes what it says on standard error.
    """

    def __init__(self, python: Path, script: str, threads: int, errors: IO[bytes]) -> None:
        self._errors = errors
        self._process = subprocess.Popen(
            [str(python), str(_WORKERS / f"{script}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self.pid = self._process.pid

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer.

        Raises:
            PeerError: if it failed or ended.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": what, **arguments}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PeerError(f"the worker ended: {self._last_line()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def close(self, patience: float = 5.0) -> None:
        """End it; by force if it has not ended after so many seconds."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_line(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "without a word")


@contextlib.contextmanager
def worker(python: Path, script: str, threads: int) -> Iterator[Worker]:
    """A worker that is ended with the block."""
    with tempfile.TemporaryFile() as errors:
        made = Worker(python, script, threads, errors)
        try:
            yield made
        finally:
            made.close()


@dataclasses.dataclass
class There:
    """A contestant in a worker.

    Attributes:
        who: its name, as the worker knows it.
        worker: where it runs.
    """

    who: str
    worker: Worker

    def run(self, times: int, clock: str = "wall") -> list[float]:
        """Seconds of each of so many runs."""
        return [float(second) for second in self.worker.ask("run", who=self.who, times=times, clock=clock)["seconds"]]
