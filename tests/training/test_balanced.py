"""Balance is exact however a step is split: into micro-batches, over processes, by other trainers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mixtura.core.errors import FileFormatError, MixturaError, MixturaWarning
from mixtura.training.balanced import STATE
from pico import pico
from training.runs import recipe, run
from training.splits import ACCUMULATIONS, gradients, own

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def one_call():
    return gradients(1)


def assert_same(found, expected):
    kept, row = found
    assert kept.keys() == expected[0].keys()
    for name, gradient in expected[0].items():
        torch.testing.assert_close(kept[name], gradient, rtol=0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")
    for name in ("loss", "cross_entropy", "load-balancing", "router-z-loss"):
        assert row[name] == pytest.approx(expected[1][name], abs=1e-5), name


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_changes_nothing(accumulation, one_call):
    assert_same(gradients(accumulation), one_call)


def test_the_terms_are_a_good_part_of_the_gradient(one_call):
    """So that the equalities above say something of them."""
    without, _ = gradients(1, terms={})
    for name, gradient in one_call[0].items():
        if ".router." in name:
            assert (gradient - without[name]).norm() > 0.1 * gradient.norm(), name


def test_processes_change_nothing(tmp_path, one_call):
    """Two processes, and two processes with two micro-batches each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        env |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
        }
        command = [sys.executable, str(HERE / "splits.py"), str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    errors = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    for accumulation in ACCUMULATIONS:
        found = load_file(tmp_path / f"{accumulation}.safetensors")
        row = {name.removeprefix("log."): value.item() for name, value in found.items() if name.startswith("log.")}
        kept = {name: value for name, value in found.items() if not name.startswith("log.")}
        assert_same((kept, row), one_call)


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_native_families_are_exact_too(family):
    make = lambda: pico(family)
    assert_same(gradients(4, make), gradients(1, make))


def test_the_buffer_deviates_and_the_micro_batch_deviates_more(one_call):
    """Distance of the routers' gradients of a split step from those of the whole one, relative."""
    distance = {}
    for statistic in ("previous-step-load", "global-batch-lbl", "micro-batch-load"):
        split, whole = gradients(4, statistic=statistic)[0], gradients(1, statistic=statistic)[0]
        names = [name for name in whole if ".router." in name]
        distance[statistic] = sum((split[n] - whole[n]).norm() for n in names) / sum(whole[n].norm() for n in names)
    assert distance["previous-step-load"] < 1e-5
    assert 1e-3 < distance["global-batch-lbl"] < distance["micro-batch-load"]


def test_checkpointed_activations_change_nothing(one_call):
    def make():
        model = own()
        model.gradient_checkpointing_enable()
        return model

    assert_same(gradients(4, make), one_call)


def test_tokens_that_a_batch_does_not_show_are_refused(monkeypatch):
    monkeypatch.setattr("mixtura.training.balanced.Balanced.routed_tokens", lambda self, batch: 3)
    with pytest.raises(MixturaError, match="announced with 3 tokens"):
        gradients(1)


def test_a_top_1_router_that_nothing_trains_is_warned_of():
    def make():
        from mixtura.hf import convert
        from mixtura.nn import Experts, Mixture
        from mixtura.nn.routers.topk_softmax import TopKRouter

        with pytest.warns(MixturaWarning, match="top-1 gate"):
            router = TopKRouter(32, 4, k=1)
        return convert(pico("llama"), {1: Mixture(router, Experts(4, 32, 16))})

    with pytest.warns(MixturaWarning, match="the routers of layers 1 choose one expert and renormalize"):
        gradients(1, make, terms={})


def test_a_resumed_run_needs_the_load_of_its_last_step(tmp_path, monkeypatch):
    """It is in the checkpoint; without it the run is refused, not continued from a uniform load."""
    from mixtura.hf.callbacks import CompleteMark
    from mixtura.training.trainer import MixtureTrainer

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(CompleteMark, "on_step_begin", stop, raising=False)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", recipe())
    monkeypatch.undo()
    monkeypatch.setattr(MixtureTrainer, "_load_rng_state", lambda self, checkpoint: None)
    checkpoint = tmp_path / "out.checkpoints" / "checkpoint-4"
    assert set(checkpoint.iterdir()) >= {checkpoint / STATE}
    monkeypatch.setattr("mixtura.hf.callbacks.is_complete", lambda path: True)
    (checkpoint / STATE).unlink()
    with pytest.raises(FileFormatError, match=f"has no readable {STATE}"):
        run(tmp_path / "out", recipe())
