"""Every benchmark on tiny shapes, from its name to its rows; nothing is said of how fast anything is."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mixtura.bench import limits as limits_module
from mixtura.bench import peers as peers_module
from mixtura.bench.contest import cosines
from mixtura.bench.decode import Steps, decode
from mixtura.bench.first_token import peak_gigabytes
from mixtura.bench.gguf_file import write_gguf
from mixtura.bench.layer import few_bits_experts, layer, plain_codes, random_experts
from mixtura.bench.limits import Read, limits
from mixtura.bench.measuring import Watch
from mixtura.bench.memory import FirstToken, memory
from mixtura.bench.models import UPCYCLED, active_parameters, make_model, step_bytes, twin
from mixtura.bench.prefill import prefill
from mixtura.bench.train import TWIN, train
from mixtura.core.errors import MixturaWarning, NotExpressibleError
from mixtura.hf.accelerate import acceleration

DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
SHAPES = {"moe": ("Qwen3Moe", DENSE | EXPERTS), "dense": ("Llama", DENSE)}
PYTHON = Path(sys.executable)
LAYER_WORKER = """
import sys
sys.path.insert(0, {workers!r})
import numpy as np
import torch
from layer_arrays import tensor
from loop import serve

class Layer:
    def load(self, folder, threads, bits):
        self.folder, self.first, self.down = folder, tensor(folder, "first"), tensor(folder, "down")
        return {{"versions": {{"zentorch": "made up"}}}}

    def case(self, name):
        hidden, indices, logits = (tensor(self.folder, f"{{name}}-{{p}}") for p in ("hidden", "indices", "logits"))
        weights = logits.gather(1, indices).softmax(-1)  # as an operator does that selects by itself
        def out(factor):
            made = torch.zeros(hidden.shape)
            for t, row in enumerate(indices.tolist()):
                for slot, e in enumerate(row):
                    gate, up = (self.first[e] @ hidden[t]).chunk(2)
                    made[t] += factor * weights[t, slot] * (self.down[e] @ (torch.nn.functional.silu(gate) * up))
            return made
        self.calls = {{"right": lambda: out(1), "wrong": lambda: out(1.5)}}
        return {{"who": list(self.calls)}}

    def output(self, who, path):
        np.save(path, self.calls[who]().numpy())

serve(Layer())
"""


@pytest.fixture
def watch():
    return Watch(used=lambda own: (0.0, 0.0), sleep=lambda seconds: None)


def everything(name):
    return True


def test_layers(watch, tmp_path, monkeypatch):
    workers = str(Path(peers_module.__file__).with_name("workers"))
    (tmp_path / "zentorch_layer.py").write_text(LAYER_WORKER.format(workers=workers))
    monkeypatch.setattr(peers_module, "_WORKERS", tmp_path)
    versions, options = {}, {"shapes": {"tiny": (32, 32, 4, 2)}, "tokens": (1, 5), "read_bytes": 4096}
    peers = {"zentorch": PYTHON, "vllm": PYTHON}
    cases = list(layer(watch, peers, versions, wanted=everything, rounds=1, **options))
    types = ("fp32", "bf16", "int8", "int4")
    assert [case.name for case in cases] == [f"tiny/{name}/T{T}" for name in types for T in (1, 5)]
    assert versions == {"zentorch": "made up"}
    stock = [f"transformers {name}" for name in ("eager", "grouped_mm", "batched_mm")]
    for case in cases:
        few = "int" in case.name
        assert list(case.outcome.timings) == [
            "mixtura",
            *(["mixtura, tokens of 8 bits"] if "int8" in case.name else []),
            *(["transformers grouped_mm, bf16"] if few else stock),
            "right",
            "gemm",
            "read",
        ]
        assert set(case.left_out) == {"vllm", "wrong"}  # whose worker is not there, and whose output is off
        assert case.left_out["wrong"] == "its output is off by 0.5"
        assert set(case.limits) == {"gemm", "read"}
        assert case.errors["mixtura"] < (0.2 if "int4" in case.name else 0.02)
        assert {row["who"] for row in case.rows()} == set(case.outcome.timings) - {"gemm", "read"}
        assert case.beside == (("transformers grouped_mm, bf16",) if few else ())
        assert all(row["of_limit"] > 0 for row in case.rows())


def test_only_wanted_cases_are_made(watch):
    one = list(layer(watch, {}, {}, wanted=lambda name: name == "t/bf16/T1", rounds=1, shapes={"t": (16, 16, 2, 1)}))
    assert [case.name for case in one] == ["t/bf16/T1"]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_codes_for_peers_stand_for_the_same_weights(bits, name):
    few = few_bits_experts(random_experts((64, 32, 2, 1), torch.bfloat16), bits)
    codes_ENK, scales_ENG = plain_codes(few, name)
    seen = (codes_ENK.float() - 2 ** (bits - 1)) * scales_ENG.repeat_interleave(32, 2)
    assert codes_ENK.dtype == torch.uint8
    assert int(codes_ENK.max()) < 2**bits
    assert all(torch.equal(seen[e], few.weight(name, e)) for e in range(2))


def test_experts_are_the_same_each_time():
    first, second = (random_experts((16, 8, 2, 1), torch.bfloat16) for _ in range(2))
    assert torch.equal(first.down_proj, second.down_proj)
    assert first.gate_up_proj.float().std() == pytest.approx(0.02, rel=0.1)


def test_decode_steps(watch):
    cases = (("moe", 16, 5, 1), ("moe", 16, 5, 3), ("dense", 16, 20, 1))
    done = list(decode(watch, {}, {}, wanted=everything, rounds=1, cases=cases, shapes=SHAPES, read_bytes=4096))
    assert [case.name for case in done] == ["moe/bf16/L5/B1", "moe/bf16/L5/B3", "dense/bf16/L20/B1"]
    for case in done:
        assert list(case.outcome.timings) == ["transformers", "mixtura", "read"]
        assert case.errors["mixtura"] < 0.05
        assert case.unit == "tok/s"
        assert case.outcome.failed == {}
    assert [case.amount for case in done] == [1, 3, 1]


def test_decode_steps_with_few_bits(watch):
    cases = (("moe", 8, 5, 2), ("dense", 4, 5, 1))
    done = list(decode(watch, {}, {}, wanted=everything, rounds=1, cases=cases, shapes=SHAPES, read_bytes=4096))
    assert [case.name for case in done] == ["moe/int8/L5/B2", "dense/int4/L5/B1"]
    for case, least in zip(done, (0.999, 0.97), strict=True):
        assert list(case.outcome.timings) == ["transformers, bf16", "mixtura", "read"]
        assert least < case.cosines["mixtura"] < 1
        rows = {row["who"]: row for row in case.rows()}
        assert rows["mixtura"]["cosine"] == round(case.cosines["mixtura"], 6)
        assert rows["mixtura"]["vs_best_peer"] is None


def test_cosines():
    outputs = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[2.0, 2.0]]), "c": torch.tensor([[0.0, 1.0]])}
    assert cosines(outputs, "a") == pytest.approx({"a": 1.0, "b": 0.5**0.5, "c": 0.0})


def test_decode_steps_are_those_of_the_plan_and_leave_the_cache():
    import mixtura

    model = mixtura.accelerate(make_model("moe", SHAPES))
    prompts_BL, following_NB = torch.randint(0, 64, (2, 6)), torch.randint(0, 64, (3, 2))
    steps = Steps("mixtura", model, prompts_BL, following_NB)
    expected = model(torch.cat([prompts_BL, following_NB[:1].T], 1)).logits[:, -1].float()
    for _ in range(2):
        assert torch.allclose(steps.logits(), expected, atol=0.05)
        assert len(steps.run(4)) == 4
    assert acceleration(model)["planned"] == 2 * 5


def test_prompts(watch):
    done = list(prefill(watch, {}, {}, wanted=everything, rounds=1, cases=(("moe", 9),), shapes=SHAPES))
    (case,) = done
    assert case.name == "moe/bf16/L9"
    assert list(case.outcome.timings) == ["transformers", "mixtura", "gemm"]
    assert case.errors["mixtura"] < 0.05
    assert case.amount == 9


def test_training(watch):
    shape = {**DENSE, "tie_word_embeddings": True}
    shape.pop("intermediate_size")
    done = list(train(watch, wanted=everything, rounds=1, shape=shape, experts=EXPERTS, batch=(2, 5)))
    assert [case.name for case in done] == ["small/fp32", "small/bf16", "small/bf16-weights"]
    for case in done:
        assert list(case.outcome.timings) == ["mixtura", "transformers eager", "transformers grouped_mm", TWIN, "gemm"]
        assert case.errors["mixtura"] < 0.01
        ratios = {row["who"]: row["vs_best_peer"] for row in case.rows()}
        assert max(ratios["transformers eager"], ratios["transformers grouped_mm"]) == 1.0


def test_memory_and_the_first_token(watch, monkeypatch):
    told = iter([{"seconds": n, "gigabytes": 2.0 * n} for n in range(1, 99)])
    monkeypatch.setattr(FirstToken, "_once", lambda one, clock: next(told))
    options = {"cases": (("moe", 6),), "shapes": SHAPES}
    done = list(memory(watch, wanted=lambda name: name == "moe/L6", rounds=1, **options))
    assert [(case.name, case.unit) for case in done] == [("moe/L6/first token", "s"), ("moe/L6/peak", "GB")]
    who = ["mixtura", "mixtura, 8 bits", "mixtura, 4 bits", "transformers grouped_mm", "transformers eager"]
    assert all(list(case.outcome.timings) == who for case in done)
    assert [row["value"] for row in done[0].rows()] == [6, 7, 8, 9, 10]  # the second run of each
    assert [row["value"] for row in done[1].rows()] == [7, 9, 11, 13, 15]  # the median of both, twice as many


def test_a_run_is_a_process(tmp_path):
    make_model("moe", {"moe": ("Qwen3Moe", DENSE | EXPERTS | {"vocab_size": 128})}).save_pretrained(tmp_path)
    one = FirstToken("mixtura", tmp_path, "mixtura", 3)
    (seconds,) = one.run(1)
    assert 0 < seconds < 60
    assert 0.05 < one.gigabytes[0] < 4
    one._command = [sys.executable, "-c", "raise MemoryError('no more')"]
    with pytest.raises(RuntimeError, match=r"^MemoryError: no more$"):
        one.run(1)


def test_the_peak_is_of_this_process():
    before = peak_gigabytes()
    kept = np.ones(int(before * 1e9 / 8) + 25_000_000)  # more than there ever was, and 200 MB
    assert peak_gigabytes() > kept.nbytes / 1e9 > before


def test_limits(watch, monkeypatch):
    monkeypatch.setattr(limits_module, "_PRODUCTS", [(3, 4, 5)])
    monkeypatch.setattr(limits_module, "_VECTOR", (6, 7))
    monkeypatch.setattr(limits_module, "Read", lambda who: Read(who, 1 << 16))
    done = {case.name: case for case in limits(watch, wanted=everything, rounds=1)}
    assert list(done) == ["gemm/fp32/3x4x5", "gemv/fp32", "gemm/bf16/3x4x5", "gemv/bf16", "read"]
    assert done["gemm/fp32/3x4x5"].amount == 2 * 3 * 4 * 5 / 1e9
    assert done["gemv/bf16"].amount == 6 * 7 * 2 / 1e9
    assert all(case.rows()[0]["value"] > 0 for case in done.values())


def test_reading_counts_all_bytes_by_the_clock_of_the_library(monkeypatch):
    monkeypatch.setattr("mixtura.bench.limits.read_bandwidth", lambda tensor: tensor.nbytes * 4.0)
    assert Read("read", 1 << 12).run(3) == [0.25] * 3


def test_a_model_that_is_not_in_the_cache_is_left_out(watch, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    with pytest.warns(MixturaWarning, match="without smollm2-upcycled: smollm2-135m is not in the cache"):
        done = list(decode(watch, {}, {}, wanted=everything, rounds=1, cases=((UPCYCLED, 16, 5, 1),), read_bytes=4096))
    assert done == []


def test_a_twin_has_the_same_parameters_and_its_own_settings():
    model = make_model("moe", SHAPES)
    other = twin(model)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    other.set_experts_implementation("eager")
    assert model.config._experts_implementation != "eager"


def test_what_a_step_reads():
    model, (D, F, V) = make_model("moe", SHAPES), (32, 32, 64)
    attention = 2 * D * 64 + 2 * D * 32 + 2 * 16
    layer_weights = attention + 2 * D + 4 * D + 2 * 3 * D * F
    active = 2 * layer_weights + D + V * D
    assert active_parameters(model) == active
    cached = 2 * 2 * 16 * 2 * 7
    assert step_bytes(model, 1, 7) == 2 * (active + cached)
    all_experts = 2 * 2 * 3 * D * F
    assert step_bytes(model, 50, 0) == pytest.approx(2 * (active + all_experts))
    assert step_bytes(model, 1, 7, 4) == pytest.approx(active * 4.5 / 8 + 2 * cached)
    touched = step_bytes(model, 2, 0) / 2 - active  # 4 (1 - 1/4) - 2 = 1 expert more
    assert touched == pytest.approx(2 * 3 * D * F)


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_gguf_holds_the_weights(name, tmp_path):
    import gguf

    model = make_model(name, SHAPES)
    write_gguf(model, tmp_path / "m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensors = {one.name: one for one in reader.tensors}
    stored = sum(math.prod(one.shape.tolist()) for one in reader.tensors)
    assert stored == sum(parameter.numel() for parameter in model.parameters())
    down = tensors["output.weight"].data.view(np.uint16)
    assert np.array_equal(down, model.lm_head.weight.view(torch.uint16).numpy())
    query = model.model.layers[1].self_attn.q_proj.weight
    found = torch.from_numpy(tensors["blk.1.attn_q.weight"].data.view(np.uint16).copy()).view(torch.bfloat16)
    rows = torch.arange(64).view(4, 2, 8).transpose(1, 2).flatten() if name == "dense" else torch.arange(64)
    assert torch.equal(found, query[rows])


def test_gguf_refuses_other_families(tmp_path):
    model = make_model("other", {"other": ("Qwen3", DENSE)})
    with pytest.raises(NotExpressibleError, match="family 'qwen3' is not written"):
        write_gguf(model, tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_broken_worker_of_a_language_model_is_left_out(watch):
    options = {"cases": (("moe", 16, 4, 1),), "shapes": SHAPES, "read_bytes": 4096}
    (case,) = decode(watch, {"llama": PYTHON}, {}, wanted=everything, rounds=1, **options)
    assert "llama_cpp" in case.left_out["llama.cpp"]
    assert set(case.errors) == {"transformers", "mixtura"}
