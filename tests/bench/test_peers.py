"""Workers: found, asked, broken, ended. The peer is this interpreter, with workers that are written here."""

import os
import sys
from pathlib import Path

import pytest

from mixtura.bench import peers
from mixtura.bench.peers import PeerError, There, found_peers, worker
from mixtura.core.errors import OptionError, UnknownNameError

PYTHON = Path(sys.executable)
WORKER = """
import sys, os
sys.path.insert(0, {loop!r})
from loop import serve

class Contest:
    def load(self, **given):
        print("libraries print what they like")
        self.calls, self.count = {{"counts": self.one, "breaks": lambda: 1 / 0}}, 0
        return {{"given": given, "threads": os.environ["OMP_NUM_THREADS"]}}

    def one(self):
        self.count += 1

    def before(self, who):
        self.started = self.count

    def counted(self):
        return {{"count": self.count, "started": self.started}}

    def end(self):
        print("Traceback", file=sys.stderr)
        print("MemoryError: no more", file=sys.stderr, flush=True)
        os._exit(3)

serve(Contest())
"""


@pytest.fixture
def one(tmp_path, monkeypatch):
    loop = str(Path(peers.__file__).with_name("workers"))
    (tmp_path / "made.py").write_text(WORKER.format(loop=loop))
    monkeypatch.setattr(peers, "_WORKERS", tmp_path)
    with worker(PYTHON, "made", 3) as made:
        yield made


def test_a_worker_answers_and_prints_beside(one):
    assert one.ask("load", folder="x", slots=2) == {"given": {"folder": "x", "slots": 2}, "threads": "3"}


def test_a_contestant_runs_there(one):
    one.ask("load")
    seconds = There("counts", one).run(4)
    assert len(seconds) == 4
    assert all(second >= 0 for second in seconds)
    There("counts", one).run(1)
    assert one.ask("counted") == {"count": 5, "started": 4}


def test_an_error_there_is_one_here_and_the_worker_goes_on(one):
    one.ask("load")
    with pytest.raises(PeerError, match=r"^ZeroDivisionError: division by zero$"):
        There("breaks", one).run(1)
    with pytest.raises(PeerError, match="AttributeError"):
        one.ask("nothing")
    assert len(There("counts", one).run(2)) == 2


def test_a_worker_that_ends_is_told_with_its_last_line(one):
    one.ask("load")
    for _ in range(2):
        with pytest.raises(PeerError, match=r"^the worker ended: MemoryError: no more$"):
            one.ask("end")


def test_a_worker_is_gone_after_the_block(tmp_path, one):
    one.close()
    with pytest.raises(ProcessLookupError):
        os.kill(one.pid, 0)


def test_a_worker_that_hangs_is_ended_too(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text("import time; time.sleep(100)")
    monkeypatch.setattr(peers, "_WORKERS", tmp_path)
    with worker(PYTHON, "hangs", 1) as made:
        made.close(patience=0.01)
    with pytest.raises(ProcessLookupError):
        os.kill(made.pid, 0)


def environment(folder, name):
    (folder / name / "bin").mkdir(parents=True)
    (folder / name / "bin" / "python").touch()


def test_peers_are_found_in_a_folder_or_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("MIXTURA_PEERS", raising=False)
    environment(tmp_path, "zentorch")
    assert found_peers(None) == {}
    assert found_peers(tmp_path) == {"zentorch": tmp_path / "zentorch" / "bin" / "python"}
    assert found_peers(tmp_path, []) == {}
    monkeypatch.setenv("MIXTURA_PEERS", str(tmp_path))
    assert set(found_peers(None)) == {"zentorch"}


def test_peers_that_are_not_there_are_named(tmp_path, monkeypatch):
    monkeypatch.delenv("MIXTURA_PEERS", raising=False)
    with pytest.raises(UnknownNameError, match=r"unknown peer 'zentorh'; did you mean 'zentorch'"):
        found_peers(tmp_path, ["zentorh"])
    with pytest.raises(OptionError, match=r"peer 'vllm' is not set up: no .*vllm/bin/python"):
        found_peers(tmp_path, ["vllm"])
    with pytest.raises(OptionError, match="no folder was given"):
        found_peers(None, ["vllm"])
    with pytest.raises(OptionError, match=r"the folder of peers .* does not exist"):
        found_peers(tmp_path / "nowhere")
