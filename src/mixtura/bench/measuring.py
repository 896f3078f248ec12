"""Contestants timed in turns on a machine that is theirs alone, or is said not to be.

A round gives each contestant a burst of runs; what counts of it is the median. A result is the median over rounds, so
that what drifts (clock, memory, other guests of the machine) hits everybody. A round in which other processes used the
processor does not count, unless there are too few without.

On a machine that is never quiet, the clock "processor" counts the seconds in which one thread was computing: others
still share caches and memory with it, but the time that they compute is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from mixtura.core.errors import OptionError

try:
    import fcntl
except ImportError:  # Windows: there is neither a lock nor a /proc/stat
    fcntl = None  # type: ignore[assignment]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ROUNDS = 7
QUIET = 0.15  # cores that others may use
BURST = 0.06
_MOST = 200  # runs of a burst
_SLOW = 0.2  # seconds of a run above which caches and threads need no run to get warm
_SETTLE = 0.02  # threads of the contestant before spin for some milliseconds
_TURN = 60.0  # seconds for which a lock is held, if a round is shorter
_WAKE = 0.2  # seconds
_TICKS = 100  # a second, of /proc


class Contestant(Protocol):
    """Something that can be run again and again.

    Attributes:
        who: its name.
    """

    who: str

    def run(self, times: int, clock: str = "wall") -> Sequence[float]:
        """Seconds of each of so many runs, by one of ``CLOCKS``."""
        ...


@dataclasses.dataclass
class Here:
    """A contestant in this process.

    Attributes:
        who: its name.
        call: what one run does.
    """

    who: str
    call: Callable[[], object]

    def run(self, times: int, clock: str = "wall") -> list[float]:
        """Seconds of each of so many runs, by one of ``CLOCKS``."""
        now, seconds = CLOCKS[clock], []
        for _ in range(times):
            start = now()
            self.call()
            seconds.append(now() - start)
        return seconds


@dataclasses.dataclass(frozen=True)
class Timing:
    """What came out for a contestant.

    Attributes:
        seconds: of a run, median over rounds.
        iqr: distance of the quartiles over rounds, relative to the median.
        rounds: how many counted.
    """

    seconds: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        """From the seconds of the rounds."""
        middle = statistics.median(seconds)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else (0, 0, 0)
        return cls(middle, (high - low) / middle, len(seconds))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A case, timed.

    Attributes:
        timings: by contestant.
        failed: who raised something, and what.
        foreign: cores that others used, the most in a round that counted; None where that cannot be known.
    """

    timings: Mapping[str, Timing]
    failed: Mapping[str, str]
    foreign: float | None

    @property
    def quiet(self) -> bool | None:
        """Whether others left the machine alone; None where that cannot be known."""
        return None if self.foreign is None else self.foreign < QUIET


class Watch:
    """Waits for quiet, and says how much others disturbed.

    Args:
        patience: seconds to wait before a round.
        lock: file that benchmarks of this machine lock in turns, for a minute or one round at a time; None for none.
        timer: one of ``CLOCKS``, for the runs. By "processor" nothing is waited for and no round is repeated.
        used: seconds of processor time that everybody, and that these processes have used so far; None if unknown.
        clock: seconds.
        sleep: waits so many seconds.

    Attributes:
        own: ids of the processes whose load is not foreign.
    """

    def __init__(
        self,
        *,
        patience: float = 60.0,
        lock: Path | None = None,
        timer: str = "wall",
        used: Callable[[set[int]], tuple[float, float] | None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if lock is not None and fcntl is None:
            raise OptionError("a lock needs a system with flock")
        self.patience, self.lock, self.timer = patience if timer == "wall" else 0.0, lock, timer
        self.used, self.clock, self.sleep = used or used_seconds, clock, sleep
        self.own = {os.getpid()}
        self._file: IO[str] | None = None
        self._alone_since: float | None = None

    def __enter__(self) -> Watch:
        """Share the lock: who prepares must not disturb those who time."""
        if self.lock is not None:
            self._file = open(self.lock, "a")
            fcntl.flock(self._file, fcntl.LOCK_SH)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def round(self) -> Callable[[], float | None]:
        """Take the lock alone and wait for quiet; what is returned says how many cores others used since."""
        if self._file is not None and (self._alone_since is None or self.clock() - self._alone_since > _TURN):
            self._yield()
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._alone_since = self.clock()
        end = self.clock() + self.patience
        while (foreign := self._foreign()) is not None:
            self.sleep(0.3)
            if foreign() < QUIET or self.clock() > end:
                break
        return self._foreign() or (lambda: None)

    def release(self) -> None:
        """Share the lock again; to be called before what takes long and is not timed."""
        if self._file is not None and self._alone_since is not None:
            self._yield()
            fcntl.flock(self._file, fcntl.LOCK_SH)
        self._alone_since = None

    def _yield(self) -> None:
        """Unlock, and give those who wait the time to wake up: who locks again at once overtakes them."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
        self.sleep(_WAKE)

    def _foreign(self) -> Callable[[], float] | None:
        before, start = self.used(self.own), self.clock()
        if before is None:
            return None

        def cores() -> float:
            after = self.used(self.own)
            assert after is not None
            everybody, own = (a - b for a, b in zip(after, before, strict=True))
            return max(everybody - own, 0.0) / max(self.clock() - start, 1e-3)

        return cores


def used_seconds(own: set[int]) -> tuple[float, float] | None:
    """Processor time that everybody has used, and that these processes and their children that ended have.

    None where /proc is not Linux's.
    """
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = ticks
    mine = 0
    for pid in own:
        with contextlib.suppress(OSError):  # it has ended
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            mine += sum(map(int, fields[11:15]))
    return (user + nice + system + irq + softirq + steal) / _TICKS, mine / _TICKS


def interleave(
    contestants: Sequence[Contestant], watch: Watch, *, rounds: int = ROUNDS, burst: float = BURST
) -> Outcome:
    """Time contestants in turns.

    Args:
        contestants: with names of their own.
        watch: over the machine.
        rounds: that are to count; as many again are tried while others disturb. The watch keeps its lock after them.
        burst: seconds of a contestant in a round, if one run is shorter.
    """
    failed: dict[str, str] = {}
    runs = {one.who: _number_of_runs(one, burst, watch, failed) for one in contestants}
    most = 2 * rounds if watch.timer == "wall" else rounds
    taken: list[tuple[float | None, dict[str, float]]] = []
    try:
        while sum(_undisturbed(foreign) for foreign, _ in taken) < rounds and len(taken) < most:
            foreign = watch.round()
            running = [one for one in contestants if one.who not in failed]
            seconds = {one.who: _burst(one, *runs[one.who], watch, failed) for one in running}
            taken.append((foreign(), seconds))
    except BaseException:
        watch.release()
        raise
    good = [(foreign, seconds) for foreign, seconds in taken if _undisturbed(foreign)]
    counted = good if len(good) >= rounds else taken
    known = [foreign for foreign, _ in counted if foreign is not None]
    return Outcome(
        {
            one.who: Timing.of([seconds[one.who] for _, seconds in counted])
            for one in contestants
            if one.who not in failed
        },
        failed,
        max(known) if known else None,
    )


def _undisturbed(foreign: float | None) -> bool:
    return foreign is None or foreign < QUIET


def _number_of_runs(one: Contestant, burst: float, watch: Watch, failed: dict[str, str]) -> tuple[int, bool]:
    """How many runs are a burst, and whether one before them is needed to get warm."""
    try:
        seconds = one.run(1, watch.timer)[0]
        if seconds < _SLOW:
            seconds = min(one.run(3, watch.timer))
    except Exception as error:
        failed[one.who] = _words(error)
        return 1, False
    return max(1, min(_MOST, round(burst / max(seconds, 1e-9)))), seconds < _SLOW


def _burst(one: Contestant, times: int, warm: bool, watch: Watch, failed: dict[str, str]) -> float:
    watch.sleep(_SETTLE)
    try:
        return statistics.median(one.run(times + warm, watch.timer)[warm:])
    except Exception as error:
        failed[one.who] = _words(error)
        return float("nan")


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
