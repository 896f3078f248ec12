"""Timing in turns, with clocks and loads that are made up."""

import fcntl
import os
import subprocess
import sys
import time

import pytest

from mixtura.bench.measuring import QUIET, Here, Outcome, Timing, Watch, interleave, used_seconds
from mixtura.core.errors import MixturaError


class World:
    """A clock that moves when somebody works or sleeps, and a load of others by time."""

    def __init__(self, foreign=lambda now: 0.0):
        self.now, self.own, self.others, self.foreign = 0.0, 0.0, 0.0, foreign
        self.log = []

    def pass_time(self, seconds, mine=0.0):
        steps = max(1, round(seconds / 0.01))
        for _ in range(steps):
            self.others += self.foreign(self.now) * seconds / steps
            self.now += seconds / steps
        self.own += mine * seconds

    def watch(self, **options):
        return Watch(
            used=lambda own: (self.own + self.others, self.own),
            clock=lambda: self.now,
            sleep=lambda seconds: self.pass_time(seconds),
            **options,
        )


class Fake:
    """A contestant whose runs take given seconds, one after the other, then the last one for ever."""

    def __init__(self, who, world, *seconds):
        self.who, self.world, self.seconds = who, world, list(seconds)

    def run(self, times, clock="wall"):
        taken = []
        for _ in range(times):
            taken.append(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
            self.world.pass_time(taken[-1], mine=2.0)
            self.world.log.append(self.who)
        return taken


def test_the_result_is_the_median_over_rounds():
    world = World()
    outcome = interleave([Fake("a", world, 9, 1, 2, 3, 4, 100, 6, 7)], world.watch(), rounds=7)
    assert outcome.timings["a"] == Timing(4, pytest.approx(4 / 4), 7)  # the first run is to get warm
    assert outcome.quiet
    assert outcome.foreign == pytest.approx(0)


def test_contestants_take_turns():
    world = World()
    interleave([Fake("a", world, 1), Fake("b", world, 1)], world.watch(), rounds=3)
    assert "".join(world.log) == "ab" + "ab" * 3


def test_short_runs_come_in_bursts_and_the_first_of_each_does_not_count():
    world = World()
    slow_at_first = Fake("a", world, *[0.01] * 4, *[0.1, *[0.01] * 6] * 3)
    outcome = interleave([slow_at_first], world.watch(), rounds=3, burst=0.06)
    assert len(world.log) == 4 + 3 * 7
    assert outcome.timings["a"] == Timing(pytest.approx(0.01), 0, 3)


def test_a_single_run_of_a_burst_is_warm_too():
    world = World()
    outcome = interleave([Fake("a", world, *[0.01] * 4, *[0.1, 0.01] * 3)], world.watch(), rounds=3, burst=0.01)
    assert outcome.timings["a"] == Timing(pytest.approx(0.01), 0, 3)


def test_rounds_that_others_disturb_do_not_count():
    world = World(foreign=lambda now: 1.0 if 3 < now < 6 else 0.0)
    outcome = interleave([Fake("a", world, 1)], world.watch(patience=0), rounds=4)
    assert outcome.timings["a"].rounds == 4
    assert outcome.quiet
    assert world.log.count("a") > 5


def test_a_machine_that_is_never_quiet_is_said_not_to_be():
    world = World(foreign=lambda now: 0.5)
    outcome = interleave([Fake("a", world, 1)], world.watch(patience=0), rounds=3)
    assert outcome.timings["a"].rounds == 6
    assert outcome.foreign == pytest.approx(0.5)
    assert outcome.quiet is False


def test_waits_until_others_are_done():
    world = World(foreign=lambda now: 1.0 if now < 20 else 0.0)
    watch = world.watch(patience=60)
    watch.round()
    assert 20 <= world.now < 21
    world = World(foreign=lambda now: 1.0)
    world.watch(patience=5).round()
    assert 5 <= world.now < 6


def test_own_load_is_not_foreign():
    world = World(foreign=lambda now: 0.25)
    foreign = world.watch(patience=0).round()
    world.pass_time(10, mine=2.0)
    assert foreign() == pytest.approx(0.25)


def test_where_load_cannot_be_known_nothing_is_claimed():
    outcome = interleave([Here("a", lambda: None)], Watch(used=lambda own: None, sleep=lambda s: None), rounds=2)
    assert outcome.foreign is None
    assert outcome.quiet is None


def test_who_fails_is_told_and_the_others_are_timed():
    world = World()

    class Breaks(Fake):
        def run(self, times, clock="wall"):
            if len(world.log) > 4:
                raise ValueError("no\nmore")
            return super().run(times, clock)

    outcome = interleave([Breaks("b", world, 1), Fake("a", world, 1)], world.watch(), rounds=3)
    assert outcome.failed == {"b": "ValueError: no more"}
    assert list(outcome.timings) == ["a"]


def test_iqr_is_relative():
    assert Timing.of([2.0, 2.0, 2.0]) == Timing(2.0, 0.0, 3)
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0]).iqr == pytest.approx(2 / 3)
    assert Timing.of([5.0]) == Timing(5.0, 0.0, 1)


def test_quiet_is_a_matter_of_cores():
    assert Outcome({}, {}, QUIET / 2).quiet
    assert not Outcome({}, {}, QUIET * 2).quiet


def test_processor_time_of_this_process_grows_with_work():
    before = used_seconds({os.getpid()})
    while used_seconds({os.getpid()})[1] - before[1] < 0.3:
        sum(range(100_000))
    after = used_seconds({os.getpid()})
    assert after[0] - before[0] > 0.1  # ticks of the whole machine come late
    assert used_seconds({2**30})[1] == 0  # there is no such process


def test_sleep_takes_no_time_of_the_processor():
    sleeps = Here("sleeps", lambda: time.sleep(0.05))
    (wall,), (processor,) = sleeps.run(1), sleeps.run(1, "processor")
    assert wall >= 0.05
    assert processor < 0.04


def test_by_the_processor_nothing_is_waited_for_and_no_round_is_repeated():
    world, clocks = World(lambda now: 1.0), []

    class Asked(Fake):
        def run(self, times, clock="wall"):
            clocks.append(clock)
            return super().run(times)

    outcome = interleave([Asked("a", world, 1)], world.watch(timer="processor", patience=1000.0), rounds=3)
    assert outcome.timings["a"].rounds == 3
    assert set(clocks) == {"processor"}
    assert world.now < 20
    assert not outcome.quiet


def test_processes_that_were_started_and_have_ended_count_as_own():
    before = used_seconds({os.getpid()})
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    after = used_seconds({os.getpid()})
    assert after[1] - before[1] >= 0.05


def free(path):
    """Whether somebody else could take the lock, shared and alone."""
    with open(path) as file:
        found = []
        for kind in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                found.append(True)
            except BlockingIOError:
                found.append(False)
        return found


def test_the_lock_is_shared_while_preparing_and_held_alone_while_timing(tmp_path):
    path, world, seen = tmp_path / "lock", World(), []

    class Looks(Fake):
        def run(self, times, clock="wall"):
            seen.append(free(path))
            return super().run(times, clock)

    with world.watch(lock=path) as watch:
        assert free(path) == [True, False]
        interleave([Looks("a", world, 1)], watch, rounds=2)
        assert free(path) == [False, False]
        watch.release()
        assert free(path) == [True, False]
    assert free(path) == [True, True]
    assert seen == [[True, False], [False, False], [False, False]]


def test_others_get_the_lock_after_a_minute(tmp_path):
    path, world, taken = tmp_path / "lock", World(), []
    with world.watch(lock=path) as watch:
        watch.sleep = lambda seconds: (taken.append(world.now), world.pass_time(seconds)) if all(free(path)) else None
        interleave([Fake("a", world, 25)], watch, rounds=6)
    assert [round(now) for now in taken] == [25, 100]  # before the first round, and when three have taken a minute


def test_the_lock_is_given_back_when_a_round_breaks(tmp_path):
    world = World()

    class Interrupted(Fake):
        def run(self, times, clock="wall"):
            if world.log:
                raise KeyboardInterrupt
            return super().run(times, clock)

    with world.watch(lock=tmp_path / "lock") as watch:
        with pytest.raises(KeyboardInterrupt):
            interleave([Interrupted("a", world, 1)], watch)
        assert free(tmp_path / "lock") == [True, False]


def test_a_system_without_locks_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("mixtura.bench.measuring.fcntl", None)
    with pytest.raises(MixturaError, match="a lock needs a system with flock"):
        Watch(lock=tmp_path / "lock")
