"""Answers lines of JSON, one for each that is asked. Runs in the environment of a peer: only the standard library."""

import json
import os
import sys
import time


def serve(contest):
    """Answer until standard input ends.

    ``{"do": "load", ...}`` calls ``contest.load(...)``, likewise every other method; ``{"do": "run", "who", "times",
    "clock"}`` times ``contest.calls[who]``, after ``contest.before(who)`` if there is one. What the peer prints goes to
    standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        what = asked.pop("do")
        try:
            answer = timed(contest, **asked) if what == "run" else getattr(contest, what)(**asked)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        answers.write(json.dumps(answer or {}) + "\n")
        answers.flush()


def timed(contest, who, times, clock):
    """Seconds of each of so many runs."""
    now = {"wall": time.perf_counter, "processor": time.process_time}[clock]
    if hasattr(contest, "before"):
        contest.before(who)
    call, seconds = contest.calls[who], []
    for _ in range(times):
        start = now()
        call()
        seconds.append(now() - start)
    return {"seconds": seconds}
