"""Quantized linear layers in every family: what codes stand for is computed, also where code reads weights itself."""

import copy
import sys
import types

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, T5Config, T5ForConditionalGeneration

from mixtura.hf import quantize_model
from mixtura.hf.read_weights import is_read
from mixtura.nn.quantized_linear import CodesError, QuantizedLinear
from pico import DENSE, pico, tokens
from pico_native import FAMILIES, OUTSIDE, native

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32, "state_size": 8, "tie_word_embeddings": False}
SELECTING = {"index_topk": 4}  # of 40 positions


def t5():
    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "tie_word_embeddings": False}
    return T5ForConditionalGeneration(T5Config(vocab_size=64, decoder_start_token_id=0, **sizes))


MODELS = {
    **{name: lambda name=name: pico(name) for name in DENSE if name != "gpt2"},  # it has no Linear
    **{name: lambda name=name: native(name, **SELECTING) for name in {**FAMILIES, **OUTSIDE}},
    "mamba": lambda: AutoModelForCausalLM.from_config(MambaConfig(**SMALL)),
    "mamba2": lambda: AutoModelForCausalLM.from_config(Mamba2Config(**SMALL, num_heads=8, head_dim=8, n_groups=1)),
    "t5": t5,
}
LEFT = {  # layers whose weight the family's code reads, but for routers
    **{name: {"weights_proj"} for name in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa")},
    "hy_v4": {"lm_head", "weights_proj"},
    "jamba": {"dt_proj"},
    "mamba": {"lm_head", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"lm_head", "out_proj"},
    "t5": {"lm_head", "wo"},  # the head is tied
}


def made(name):
    torch.manual_seed(0)
    return quantize_model(MODELS[name]().eval(), bits=8, linears=True, activation_bits=16)


@torch.no_grad()
def logits(model):
    ids = tokens(2, 40)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, use_cache=False, **more).logits


@pytest.mark.parametrize("name", MODELS)
def test_codes_compute_what_they_stand_for(name):
    model = made(name)
    plain = copy.deepcopy(model).dequantize()
    expected, seen = logits(plain), logits(model)
    assert seen.dtype == expected.dtype
    assert (seen - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("name", LEFT)
def test_layers_whose_weight_is_read_are_left(name, tmp_path):
    model = made(name)
    parts = [(n.rpartition(".")[2], module) for n, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert {n for n, module in parts if type(module) is nn.Linear} - {"gate", "router"} == LEFT[name]
    assert any(isinstance(module, QuantizedLinear) for _, module in parts)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_a_tied_head_whose_weight_is_read_is_left_even_if_a_head_is_asked_for():
    model = AutoModelForCausalLM.from_config(MambaConfig(**{**SMALL, "tie_word_embeddings": True})).eval()
    quantize_model(model, bits=8, linears=True, head=True)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert type(model.lm_head) is nn.Linear


READERS = """
import torch
from torch import nn
from torch.nn import init

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("own", "inherited", "deep", "local", "drawn", "by_name", "set", "called", "initialized", "other"):
            setattr(self, name, nn.Linear(2, 2))
        self.listed, self.walked = nn.ModuleList([nn.Linear(2, 2)]), nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        init.zeros_(self.initialized.weight)

    def forward(self, x):
        self.set.weight = nn.Parameter(x)
        layer = self.local
        x = x @ layer.weight @ self.listed[0].weight
        for one in (self.drawn, getattr(self, "by_name")):
            x = x @ one.weight
        return self.called(x).to(self.own.weight.dtype) + sum(part.weight.sum() for part in self.walked)

class Base(nn.Module):
    def forward(self, x):
        return x @ self.inherited.weight

class Other(nn.Module):
    def forward(self, x):
        return x @ self.other.weight

class Both(Block, Base):
    pass

def outside(model):
    return model.block.deep.weight

def _init_weights(module):
    init.zeros_(module.called.weight)
"""


def test_readers_are_found_in_the_source(tmp_path, monkeypatch):
    (tmp_path / "modeling_readers.py").write_text(READERS)
    monkeypatch.syspath_prepend(tmp_path)
    module = __import__("modeling_readers")
    monkeypatch.setitem(sys.modules, "modeling_readers", module)
    linears = [name for name, part in module.Both().named_modules() if isinstance(part, nn.Linear)]
    read = {name for name in linears if is_read(module.Both(), name)}
    assert read == {"own", "inherited", "deep", "local", "drawn", "by_name", "listed.0", "walked.0"}
    assert not is_read(module.Block(), "inherited")


def test_without_a_source_nothing_is_known_to_be_read():
    made = types.new_class("Made", (nn.Module,), exec_body=lambda body: body.update(__module__="nowhere"))()
    made.proj = nn.Linear(2, 2)
    assert not is_read(made, "proj")


def test_adapters_are_trained_on_codes_and_not_merged_into_them():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(made("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    model(tokens(), labels=tokens()).loss.backward()
    assert model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight.grad.any()
    with pytest.raises(CodesError, match="codes in place of its weight"):
        model.merge_adapter()
