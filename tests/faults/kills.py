"""Kills processes at random moments of training and saving, and looks whether anything was lost.

    python tests/faults/kills.py --kills 200 --seed 0

One process imports everything and forks the ones that are killed. Of three kills two hit a run of ``train``, always by
SIGKILL, which is started again until it is done; one hits a process that writes a model, an export, a trace and a
report over and over to the same places, by SIGKILL, SIGTERM or SIGINT. Half of the moments are uniform in time, half
are aimed at a phase drawn first, so that short phases are hit too. After every kill:

    train   the folder is absent or, byte for byte, what an uninterrupted run leaves; no complete checkpoint is gone
    save    everything is, byte for byte, the old or the new one, and was there at every moment
    both    files of others are untouched; the next write leaves nothing of the dead process

and a run that is done has the logged losses and the weights of an uninterrupted one, bit for bit.
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

import mixtura.hf.save
import mixtura.training.setup
import mixtura.training.train
from mixtura.core.files import PARTIAL, write_file
from mixtura.hf.callbacks import CompleteMark, newest_checkpoint
from mixtura.hf.export import export
from mixtura.traces.report import write_report
from mixtura.traces.trace import COLUMNS, Trace
from training import runs

FOREIGN = ("notes.txt", ".partial-mine/a", "out.checkpoints/notes.txt", f"{PARTIAL}mine.txt", "out.txt")


INTERRUPTED = 130


class Lost(Exception):
    """Something is not as it should be after a kill."""


@dataclasses.dataclass
class Child:
    """A forked process that says which phase it is in.

    Attributes:
        pid: of the process.
        pipe: end of the pipe that it writes its phases to.
        marks: (seconds since the fork, phase) so far.
        ended: exit status, None while it runs; negative for a signal.
    """

    pid: int
    pipe: int
    started: float
    marks: list = dataclasses.field(default_factory=list)
    ended: int | None = None
    rest: bytes = b""

    @classmethod
    def of(cls, work, folder):
        """Fork; ``work(folder, say)`` runs in the child."""
        read, write = os.pipe()
        sys.stderr.flush()
        sys.stdout.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # until the child can catch it
        started = time.monotonic()
        pid = os.fork()
        if not pid:
            _be_the_child(work, folder, write)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.close(write)
        return cls(pid, read, started)

    def listen(self, seconds):
        """Read what was said, and wait for something at most that long."""
        if select.select([self.pipe], [], [], seconds)[0]:
            said = self.rest + os.read(self.pipe, 65536)
            *lines, self.rest = said.split(b"\n")
            self.marks += [
                (float(t) - self.started, phase.decode()) for t, _, phase in (x.partition(b" ") for x in lines)
            ]
            if not said:
                self.reap()

    def kill(self, how=signal.SIGKILL):
        """Kill, and read the last words."""
        os.kill(self.pid, how)
        while self.ended is None:
            self.listen(1)

    def reap(self):
        """Collect the exit status."""
        self.ended = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.pipe)

    @property
    def phase(self):
        """The last one that it was in."""
        return next((phase for _, phase in reversed(self.marks) if " " not in phase), "start")


def _be_the_child(work, folder, pipe):
    code = 1
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        work(folder, lambda phase: os.write(pipe, f"{time.monotonic()} {phase}\n".encode()))
        code = 0
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def train_child(folder, say):
    """One run of ``train``; the rows that were logged go to a file beside the folder."""

    class Saying(CompleteMark):
        def on_step_begin(self, *args, **kwargs):
            say("step")

        def on_step_end(self, args, state, control, **kwargs):
            if control.should_save:
                say("checkpoint")

        def on_save(self, args, state, control, **kwargs):
            say("mark")
            super().on_save(args, state, control, **kwargs)
            say(f"complete {state.global_step}")

        def on_train_end(self, args, state, control, **kwargs):
            rows = [row for row in state.log_history if "loss" in row]
            rows_of(folder).write_text(json.dumps(rows))
            say("between")

    mixtura.training.setup.CompleteMark = Saying
    _say_before(mixtura.hf.save, "save_model", "save", say)
    _say_before(mixtura.training.train, "_clear", "clear", say)
    runs.run(folder / "out")


def _say_before(module, name, phase, say):
    function = getattr(module, name)

    def saying(*args, **kwargs):
        say(phase)
        return function(*args, **kwargs)

    setattr(module, name, saying)


def save_child(folder, say, times=4):
    """Write one of two models, traces and reports after the other."""
    for i in range(times):
        say("save model")
        mixtura.hf.save.save_model(SAVED[i % 2][0], folder / "out", overwrite=True)
        say("save export")
        export(SAVED[i % 2][0], folder / "export", overwrite=True)
        say("save trace")
        SAVED[i % 2][1].save(folder / "trace.safetensors")
        say("save report")
        write_report(folder / "report.html", notes=f"number {i % 2}")


def rows_of(folder):
    """Where a run's logged rows are noted."""
    return folder.with_suffix(".json")


def digest(path):
    """Names and contents of a folder, contents of a file or trace, as one sum; None if it is not there."""
    if not path.exists():
        return None
    if path.suffix == ".safetensors":  # the order of its metadata is another in every process
        return hashlib.sha256(b"".join(column.tobytes() for column in Trace.load(path).columns.values())).hexdigest()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    total = hashlib.sha256()
    for file in files:
        total.update(str(file.relative_to(path)).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def new_folder(place):
    """A folder with files of others, named as if to be taken for ours."""
    folder = Path(tempfile.mkdtemp(dir=place))
    for name in FOREIGN:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    return folder


def check_foreign(folder):
    """Raise unless the files of others are as they were."""
    for name in FOREIGN:
        if not (folder / name).is_file() or (folder / name).read_text() != name:
            raise Lost(f"{name} of somebody else was touched")


def check_left_over(folder, allowed):
    """Raise unless the next write leaves nothing of a dead process."""
    with write_file(folder / "next") as partial:
        partial.write_text("")
    names = {path.name for path in folder.iterdir()}
    extra = names - {name.partition("/")[0] for name in FOREIGN} - {"next", *allowed}
    if extra:
        raise Lost(f"{sorted(extra)} were left over")


class Training:
    """Kills runs of ``train``."""

    signals = (signal.SIGKILL,)

    def __init__(self, place):
        self.place, self.work = place, train_child
        self.runs = 0
        self.folder = new_folder(place)
        self.phases = uninterrupted(self)
        self.out, self.rows = digest(self.folder / "out"), json.loads(rows_of(self.folder).read_text())
        self.names = sorted(path.name for path in (self.folder / "out").iterdir())
        self.renew()

    def renew(self):
        """Begin a new run."""
        shutil.rmtree(self.folder)
        self.folder, self.complete = new_folder(self.place), 0

    def look(self, child):
        """While it runs: the folder is absent or whole."""
        with contextlib.suppress(FileNotFoundError):
            if sorted(os.listdir(self.folder / "out")) != self.names:
                raise Lost("out was there and not whole")

    def check(self, child):
        """After a kill, or when a run has ended by itself."""
        check_foreign(self.folder)
        done = digest(self.folder / "out")
        if done is None:
            self.check_checkpoints(child)
            return
        if done != self.out:
            raise Lost("out is not what an uninterrupted run leaves")
        if json.loads(rows_of(self.folder).read_text()) != self.rows:
            raise Lost("other losses were logged than in an uninterrupted run")
        if child.ended == 0 and {path.name for path in (self.folder / "out.checkpoints").iterdir()} != {"notes.txt"}:
            raise Lost("checkpoints of a finished run were left over")
        check_left_over(self.folder, {"out"})
        self.runs += 1
        self.renew()

    def check_checkpoints(self, child):
        """The newest complete checkpoint is no older than the last that was told complete."""
        told = [int(phase.split()[1]) for _, phase in child.marks if phase.startswith("complete ")]
        self.complete = max([self.complete, *told])
        found = newest_checkpoint(self.folder / "out.checkpoints")
        step = 0 if found is None else int(found.name.removeprefix("checkpoint-"))
        if step < self.complete:
            raise Lost(f"checkpoint {self.complete} was complete and is gone, the newest is {step}")
        self.complete = step


class Saving:
    """Kills processes that write over and over."""

    written = ("out", "export", "trace.safetensors", "report.html")
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)

    def __init__(self, place):
        self.work = lambda folder, say: save_child(folder, lambda phase: say(phase.replace(" ", "-")))
        self.runs = 0
        self.known = {name: set() for name in self.written}
        self.folder = new_folder(place)
        for times in (1, 2):
            join(Child.of(lambda folder, say, times=times: save_child(folder, say, times), self.folder))
            for name, sums in self.known.items():
                sums.add(digest(self.folder / name))
        self.phases = uninterrupted(self)

    def look(self, child):
        """While it runs: everything is always there."""
        for name in self.written:
            if not (self.folder / name).exists():
                raise Lost(f"{name} was away for a moment")

    def check(self, child):
        """After a kill, or when it has ended by itself."""
        check_foreign(self.folder)
        for name, sums in self.known.items():
            if digest(self.folder / name) not in sums:
                raise Lost(f"{name} is neither the old nor the new one")
        check_left_over(self.folder, self.written)
        self.runs += child.ended == 0


def uninterrupted(scenario):
    """Run to the end; the duration of the phases, by name, and of the whole."""
    child = Child.of(scenario.work, scenario.folder)
    join(child)
    marks = [(t, phase) for t, phase in child.marks if " " not in phase]
    marks = [(0.0, "start"), *marks, (time.monotonic() - child.started, "end")]
    longest = collections.defaultdict(float)
    for (t, phase), (following, _) in itertools.pairwise(marks):
        longest[phase] = max(longest[phase], following - t)
    return dict(longest), marks[-1][0]


def join(child):
    """Wait for a child that must end well."""
    while child.ended is None:
        child.listen(1)
    if child.ended:
        raise Lost(f"a process that nobody killed ended with {child.ended}")


def drawn(scenario, rng):
    """A moment: after this phase has begun, so many seconds."""
    phases, whole = scenario.phases
    if rng.random() < 0.5:
        return "start", rng.uniform(0, whole)
    phase = rng.choice(sorted(phases))
    return phase, rng.uniform(0, phases[phase])


def attempt(scenario, rng):
    """Run one process and kill it; the phase in which it died, or None if it was done before."""
    (phase, delay), how = drawn(scenario, rng), rng.choice(scenario.signals)
    child, at = Child.of(scenario.work, scenario.folder), None
    try:
        while child.ended is None:
            scenario.look(child)
            if at is None:
                begun = 0.0 if phase == "start" else next((t for t, p in child.marks if p == phase), None)
                at = None if begun is None else child.started + begun + delay
            left = float("inf") if at is None else at - time.monotonic()
            if left <= 0:
                child.kill(how)
            else:
                child.listen(min(left, 0.002))
    finally:
        if child.ended is None:
            child.kill()
    if child.ended not in (0, INTERRUPTED, *(-number for number in scenario.signals)):
        raise Lost(f"a process that went on after a kill ended with {child.ended}")
    scenario.check(child)
    return child.phase if child.ended else None


def kill_often(kills, seed, place):
    """Kill that many processes.

    Returns:
        "kills", how many there were "by_phase", and the "runs" of train that were done in the end.

    Raises:
        Lost: as soon as something is.
    """
    rng = random.Random(seed)
    training, saving = Training(place), Saving(place)
    found = collections.Counter()
    while found.total() < kills:
        phase = attempt(saving if found.total() % 3 == 2 else training, rng)
        if phase is not None:
            found[phase] += 1
    last = Child.of(training.work, training.folder)
    join(last)
    training.check(last)
    return {"kills": found.total(), "by_phase": dict(sorted(found.items())), "runs": training.runs}


def trace(seed):
    """Some rows of a trace."""
    rows = {name: np.full(50, seed, dtype) for name, dtype in COLUMNS.items()}
    rows |= {name: np.zeros(50, COLUMNS[name]) for name in ("layer", "domain")}
    return Trace(**rows, meta={"layers": ["0"], "experts": [4], "domains": ["a"], "model": ""})


def saved():
    """Two models with traces, for the processes that write over and over."""
    models = [runs.model("llama"), runs.model("llama")]
    torch.nn.init.ones_(models[1].lm_head.weight)
    return [(model, trace(i)) for i, model in enumerate(models)]


def main():
    """Kill and report."""
    parser = argparse.ArgumentParser(description="Kill runs at random moments and look whether anything was lost.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        result = kill_often(options.kills, options.seed, Path(place))
    print(json.dumps({**result, "lost": 0, "seconds": round(time.monotonic() - started)}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    SAVED = saved()
    main()
