"""The own family over every base that is tried: attach, run, save, load, refuse."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from mixtura.core import FileFormatError, MixturaError, NotExpressibleError, OptionError, UnknownNameError
from mixtura.hf import convert, mixtures, record
from mixtura.nn import ExpertGroup, Experts, Mixture
from mixtura.nn.experts.forms import ConstantExperts, CopyExperts, ZeroExperts
from mixtura.nn.mixture import FeedForward
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import DENSE, SPARSE, pico, tokens

D = 32


def gated(experts=4, k=2):
    return Mixture(TopKRouter(D, experts, k), Experts(experts, D, 16), FeedForward(D, 8))


def mixed():
    forms = [
        Experts(3, D, 16, gated=False, bias=True, activation="gelu"),
        ZeroExperts(1, D),
        CopyExperts(1, D),
        ConstantExperts(1, D),
        Experts(2, D, 8),
    ]
    return Mixture(TopKRouter(D, 8, 3), ExpertGroup(forms))


def mixture_model(base="llama", **options):
    return convert(pico(base, **options), {0: gated(), 2: mixed()})


def logits(model, x, **options):
    with torch.no_grad():
        return model(x, **options).logits


@pytest.mark.parametrize("base", [*DENSE, *SPARSE])
def test_saved_and_loaded_bit_equal(base, tmp_path):
    model, x = mixture_model(base), tokens()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.model_type == "mixtura"
    assert torch.equal(logits(loaded, x), logits(model, x))


@pytest.mark.parametrize("base", [*DENSE, *SPARSE])
def test_one_state_a_forward_with_padding_kept_out(base):
    model, x = mixture_model(base), tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    with record(model) as states:
        model(x, attention_mask=mask)
        model(x)
    layers = ["0", "1", "2"] if base in SPARSE else ["0", "2"]  # native mixtures decide through the state too
    assert [[record.layer for record in state.tape.records] for state in states] == [layers, layers]
    first = states[0].tape.records[0]
    empty_T = (first.routing.indices_TK == 4).all(1)
    assert torch.equal(empty_T, mask.reshape(-1) == 0)
    assert not (states[1].tape.records[0].routing.indices_TK == 4).any()


def test_every_expert_has_tensors_of_its_own_on_disk(tmp_path):
    mixture_model().save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    place = "model.layers.0.mlp.mixture.experts"
    assert {f"{place}.{e}.{part}.weight" for e in range(4) for part in ("gate_proj", "up_proj", "down_proj")} <= names
    assert "model.layers.2.mlp.mixture.experts.forms.0.2.fc1.bias" in names
    assert not [name for name in names if "gate_up_proj" in name]


def test_other_weights_are_shared_not_copied():
    dense = pico("llama")
    embedding = dense.get_input_embeddings().weight
    model = convert(dense, {1: gated()})
    assert model.get_input_embeddings().weight is embedding
    assert list(mixtures(model)) == ["1"]


def test_converting_again_keeps_the_mixtures():
    model = convert(pico("llama"), {0: gated()})
    kept = mixtures(model)["0"]
    again = convert(model, {2: gated(5)})
    assert mixtures(again)["0"] is kept
    assert sorted(again.config.mixtura["layers"]) == ["0", "2"]
    with record(again) as states:
        again(tokens())
    assert len(states) == 1


def test_generation_equals_a_full_forward():
    model, x = mixture_model(), tokens()
    made = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=5, do_sample=False)
    for step in range(5):
        full = logits(model, made[:, : 9 + step])
        assert torch.equal(full[:, -1].argmax(-1), made[:, 9 + step])


@pytest.mark.parametrize("cache", [None, "static"])
def test_left_padding_in_generation_is_not_routed(cache):
    model, x = mixture_model(), tokens()
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    with record(model) as states:
        model.generate(x, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation=cache)
    prefill = states[0].tape.records[0].routing.indices_TK
    assert torch.equal((prefill == 4).all(1), mask.reshape(-1) == 0)
    for state in states[1:]:
        assert (state.tape.records[0].routing.indices_TK < 4).all()


def test_checkpointing_gives_the_same_gradients_and_one_record_a_layer():
    x = tokens()
    gradients = []
    for checkpointed in (False, True):
        model = mixture_model().train()
        if checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        with record(model) as states:
            one, two = model(x, labels=x, use_cache=False), model(x.flip(0), labels=x, use_cache=False)
        (one.loss + 2 * two.loss).backward()
        assert [len(state.tape.records) for state in states] == [2, 2]
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_reentrant_checkpointing_is_refused():
    model = mixture_model().train()
    with pytest.raises(OptionError, match="use_reentrant must be False"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})


def test_deepcopy_is_independent():
    model, x = mixture_model(), tokens()
    twin = copy.deepcopy(model)
    twin.set_experts_implementation("eager")
    assert model.config._experts_implementation == "mixtura"
    assert torch.allclose(logits(twin, x), logits(model, x), atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "mixtura_naive"])
def test_null_and_empty_slots_train_equal_on_every_backend(backend, tmp_path):
    """Saved and reloaded without arguments, with memory poisoned first."""
    mixture_model().save_pretrained(tmp_path)
    x = tokens()
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    gradients = []
    for name in (None, backend):
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        if name:
            model.set_experts_implementation(name)
        poison = [torch.full((1 << 16,), float("nan")) for _ in range(8)]
        del poison
        model(x, attention_mask=mask, labels=x.masked_fill(mask == 0, -100)).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-4, atol=1e-6, msg=key)


def test_unknown_backend_names_the_nearest(tmp_path):
    mixture_model().save_pretrained(tmp_path)
    with pytest.raises(MixturaError, match="did you mean 'mixtura'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="mixtur")


@pytest.mark.parametrize(
    "lost", ["mixture.router.gate.weight", "mixture.experts.2.", "layers.0.mlp.mixture.experts", "mixture.shared"]
)
def test_a_missing_tensor_is_an_error_that_names_it(lost, tmp_path):
    convert(pico("llama"), {0: gated()}).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if lost not in name}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises((FileFormatError, RuntimeError), match="mixture"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mixtura": {"version": 99, "layers": {}}}, FileFormatError, "upgrade mixtura"),
        ({"base_model_type": "lama"}, UnknownNameError, "did you mean"),
        ({"mixtura": None}, FileFormatError, "mixtura.layers"),
        ({"base_model_type": "vit"}, NotExpressibleError, "no causal language model"),
    ],
)
def test_a_wrong_configuration_is_refused(change, error, message, tmp_path):
    convert(pico("llama"), {0: gated()}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_layers_and_other_forms_are_refused():
    with pytest.raises(OptionError, match=r"layers must lie in 0 \.\. 2, got 7"):
        convert(pico("llama"), {7: gated()})
    twisted = Mixture(TopKRouter(D, 4), Experts(4, D, 16, interleaved=True))
    with pytest.raises(NotExpressibleError, match="interleaved"):
        convert(pico("llama"), {0: twisted})


@pytest.mark.parametrize(("base", "reason"), [("bloom", "residual"), ("gpt_oss", "tuple")])
def test_feed_forwards_with_another_signature_are_refused_by_name(base, reason):
    options = {"n_layer": 3, "n_head": 4} if base == "bloom" else {"head_dim": 8, "num_local_experts": 4}
    with pytest.raises(NotExpressibleError, match=reason):
        convert(pico(base, **options), {0: gated()})


def test_a_base_model_without_head_loads(tmp_path):
    model, x = mixture_model(), tokens()
    model.save_pretrained(tmp_path)
    headless = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(headless(x).last_hidden_state, model.model(x).last_hidden_state)


def test_loads_in_a_new_process(tmp_path):
    model, x = mixture_model(), tokens()
    model.save_pretrained(tmp_path)
    torch.save(logits(model, x), tmp_path / "expected.pt")
    code = (
        "import sys, torch, mixtura.hf\n"
        "from transformers import AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "x = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "print(torch.equal(model(x).logits, torch.load(folder + '/expected.pt', weights_only=True)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_bfloat16_loads_and_runs(tmp_path):
    mixture_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert mixtures(model)["0"].experts.gate_up_proj.dtype == torch.bfloat16
    assert logits(model, tokens()).isfinite().all()


def test_peft_trains_saves_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    mixture_model().save_pretrained(tmp_path / "base")
    x = tokens()
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj"])
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    with record(adapted) as states:
        expected = logits(adapted, x)
    assert len(states) == 1
    assert list(mixtures(adapted)) == ["0", "2"]
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(again, x), expected)
    torch.testing.assert_close(logits(again.merge_and_unload(), x), expected, atol=1e-5, rtol=1e-5)
