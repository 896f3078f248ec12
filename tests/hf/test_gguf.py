"""A pico Llama, written as llama.cpp would, is read as it was; transformers' own reader is the second opinion."""

import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from mixtura.core.errors import FileFormatError, MixturaError, NotExpressibleError
from mixtura.hf.gguf import load_gguf
from pico import pico

HEADS, KV_HEADS = 4, 2
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ċ", "ĠĠ"), ("t", "h"), ("Ġ", "th"), ("e", "r"), ("Ġ", "a")]
TOKENS = ["<|end|>", "<|start|>", "<own>", *BYTES, *("".join(pair) for pair in MERGES)]
TYPES = [3, 3, 4] + [1] * (len(TOKENS) - 3)
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
FIELDS = {
    "llama.block_count": 2,
    "llama.context_length": 128,
    "llama.embedding_length": 32,
    "llama.feed_forward_length": 64,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KV_HEADS,
    "llama.attention.layer_norm_rms_epsilon": 1e-4,
    "llama.rope.freq_base": 5_000.0,
    "llama.rope.dimension_count": 8,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": TYPES,
    "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}",
}


def llama(*, tied=True):
    return pico(
        "llama",
        vocab_size=len(TOKENS),
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        rms_norm_eps=float(np.float32(1e-4)),
        rope_parameters={"rope_type": "default", "rope_theta": 5_000.0},
        tie_word_embeddings=tied,
    )


def tensors(model):
    """Name and array of each weight as llama.cpp stores it: rows that rotate together are neighbors."""
    found = {}
    for key, weight in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = weight.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in key:
                half = len(array) // heads // 2
                rows = [
                    head * 2 * half + pair + side * half
                    for head in range(heads)
                    for pair in range(half)
                    for side in (0, 1)
                ]
                array = array[rows]
        for ours, theirs in NAMES.items():
            key = key.replace(ours, theirs)
        found[key] = array
    return found


def write(path, arrays, *, architecture="llama", quantized=None, packed=None, **changes):
    """A GGUF file; a field that is changed to None is left out; ``packed`` are quantized arrays, with their types."""
    writer = GGUFWriter(path, architecture)
    kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    for key, value in {**FIELDS, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        if value is not None:
            kinds.get(type(value), writer.add_array)(key, value)
    packed = packed or {}
    for name, array in arrays.items():
        if name in packed:
            writer.add_tensor(name, packed[name][0], raw_dtype=packed[name][1])
        elif quantized is not None and array.ndim == 2:
            writer.add_tensor(name, quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "pico.gguf", tensors(llama()))


def theirs(path):
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(gguf_file=path.name, dequantize=True),
    )


def ids_2L():
    return torch.randint(0, len(TOKENS), (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_logits_are_those_that_were_written(tmp_path, tied):
    model = llama(tied=tied)
    found, _ = load_gguf(write(tmp_path / "m.gguf", tensors(model)))
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    assert all(torch.equal(weight, wanted[key]) for key, weight in found.state_dict().items())
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
    assert torch.equal(found(ids_2L()).logits, model(ids_2L()).logits)
    assert not found.training
    assert all(weight.requires_grad for weight in found.parameters())


def test_the_order_of_rows_matters(tmp_path):
    model = llama()
    weights = {**tensors(model), "blk.0.attn_q.weight": model.model.layers[0].self_attn.q_proj.weight.detach().numpy()}
    found, _ = load_gguf(write(tmp_path / "m.gguf", weights))
    assert not torch.allclose(found(ids_2L()).logits, model(ids_2L()).logits, atol=1e-4)


def test_a_quantized_tensor_among_others(tmp_path):
    model, kind = llama(), GGMLQuantizationType.Q8_0
    weights = tensors(model)
    packed = quantize(weights["blk.1.ffn_up.weight"], kind)
    found, _ = load_gguf(write(tmp_path / "m.gguf", weights, packed={"blk.1.ffn_up.weight": (packed, kind)}))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.copy_(torch.from_numpy(dequantize(packed, kind)))
    assert torch.equal(found(ids_2L()).logits, model(ids_2L()).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_0", "Q5_1", "F16"])
def test_quantized_weights_equal_transformers(tmp_path, kind):
    path = write(tmp_path / "m.gguf", tensors(llama()), quantized=GGMLQuantizationType[kind])
    found, wanted = load_gguf(path)[0], theirs(path)
    assert found.state_dict().keys() == wanted.state_dict().keys()
    assert all(torch.equal(weight, found.state_dict()[key]) for key, weight in wanted.state_dict().items())
    assert torch.equal(found(ids_2L()).logits, wanted(ids_2L()).logits)


def test_the_configuration_equals_transformers(file):
    found, wanted = load_gguf(file)[0].config.to_dict(), theirs(file).config.to_dict()
    nameless = {"_name_or_path", "_model_name_or_path", "unk_token_id"}
    assert {key: found[key] for key in found.keys() - nameless} == {key: wanted[key] for key in found.keys() - nameless}
    assert found["rope_parameters"]["rope_theta"] == 5_000.0
    assert (found["head_dim"], found["max_position_embeddings"]) == (8, 128)


def test_weights_in_another_dtype(file):
    model = load_gguf(file, dtype=torch.bfloat16)[0]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_is_read_generates_trains_and_is_saved(file, tmp_path):
    model, tokenizer = load_gguf(file)
    new = model.generate(ids_2L()[:1], max_new_tokens=3, do_sample=False)
    assert new.shape[1] <= 12
    model(ids_2L(), labels=ids_2L()).loss.backward()
    assert all(weight.grad.abs().sum() > 0 for weight in model.parameters())
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(again(ids_2L()).logits, model(ids_2L()).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "m")(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]


TEXT = "other  things:\n\n    a  12 and the 3rd, é\t<own> <|start|>x<|end|>"


def pair_of_tokenizers(path):
    """Ours, and transformers' with the rule for digits, which it does not read."""
    wanted = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    rules = [pre_tokenizers.Digits(individual_digits=True), wanted.backend_tokenizer.pre_tokenizer]
    wanted.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rules)
    return load_gguf(path)[1], wanted


def test_tokens_equal_transformers_with_the_rule_for_digits(file):
    found, wanted = pair_of_tokenizers(file)
    pieces = st.sampled_from(["  ", " ", "\n", "\t", "1", "23", "the", " other", "é", "日", "<|end|>", "²", "'s", "!"])

    @given(st.one_of(st.text(), st.lists(pieces).map("".join)))
    @settings(deadline=None)
    def check(text):
        ids = found(text)["input_ids"]
        assert ids == wanted(text)["input_ids"]
        assert found.decode(ids) == text

    check()
    assert found.all_special_tokens == wanted.all_special_tokens
    assert found.chat_template == wanted.chat_template
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 0, 0)


def test_digits_are_cut_as_the_file_says(tmp_path):
    arrays = tensors(llama())
    cut = load_gguf(write(tmp_path / "a.gguf", arrays))[1]
    whole = load_gguf(write(tmp_path / "b.gguf", arrays, tokenizer__ggml__pre="gpt-2"))[1]
    assert cut.tokenize("x  1") == ["x", "ĠĠ", "1"]
    assert whole.tokenize("x  1") == ["x", "Ġ", "Ġ", "1"]


def test_the_files_own_tokens_are_found_in_text(file):
    tokenizer = load_gguf(file)[1]
    assert tokenizer.tokenize("a<own>b<|end|>") == ["a", "<own>", "b", "<|end|>"]
    assert tokenizer.decode(tokenizer("a<own>b<|end|>")["input_ids"], skip_special_tokens=True) == "a<own>b"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<|start|>hi<|end|>"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"architecture": "qwen2"}, "general.architecture 'qwen2'; read is 'llama'"),
        ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.model 'llama'; read is 'gpt2'"),
        ({"tokenizer__ggml__pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe'; read is 'smollm', 'gpt-2'"),
        ({"tokenizer__ggml__add_bos_token": True}, "tokenizer.ggml.add_bos_token True; read is None, False"),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn'; read is None, 'none'"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, changes, reason):
    path = write(tmp_path / "m.gguf", tensors(llama()), **changes)
    with pytest.raises(NotExpressibleError, match=reason):
        load_gguf(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q", "other"])
def test_a_tensor_that_no_llama_has_is_refused(tmp_path, name):
    path = write(tmp_path / "m.gguf", {**tensors(llama()), name: np.ones(4, np.float32)})
    with pytest.raises(NotExpressibleError, match=f"tensor '{name}' is none of a Llama's"):
        load_gguf(path)


@pytest.mark.parametrize(
    "field", [key for key in FIELDS if "block_count" in key or "head_count" in key or "tokens" in key]
)
def test_a_missing_field_is_named(tmp_path, field):
    path = write(tmp_path / "m.gguf", tensors(llama()), **{field.replace(".", "__"): None})
    with pytest.raises(FileFormatError, match=f"the GGUF file has no field '{field}'"):
        load_gguf(path)


@pytest.mark.parametrize("name", ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight"])
def test_a_missing_tensor_is_named(tmp_path, name):
    arrays = tensors(llama())
    del arrays[name]
    path = write(tmp_path / "m.gguf", arrays)
    with pytest.raises(FileFormatError, match=r"do not make a Llama: .*(embed_tokens|model\.norm|up_proj)"):
        load_gguf(path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    arrays = tensors(llama())
    arrays["blk.0.ffn_up.weight"] = arrays["blk.0.ffn_up.weight"][:-1]
    with pytest.raises(FileFormatError, match=r"do not make a Llama: .*layers\.0\.mlp\.up_proj"):
        load_gguf(write(tmp_path / "m.gguf", arrays))


def test_every_truncation_is_noticed(file, tmp_path):
    whole = file.read_bytes()
    end = GGUFReader(file).tensors[-1]
    last = end.data_offset + end.n_bytes  # what follows is padding
    cuts = {0, 1, 3, 4, 8, 20, 23, 24, last - 1, *range(25, last, 2999)}
    path = tmp_path / "cut.gguf"
    for cut in sorted(cuts):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileFormatError, match=r"cut\.gguf' is no whole GGUF file"):
            load_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + b"0" * 100, b"GGUF" + b"\xff" * 400])
def test_what_is_no_gguf_is_named(tmp_path, content):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"m\.gguf' is no whole GGUF file"):
        load_gguf(tmp_path / "m.gguf")


def test_no_file_is_named(tmp_path):
    with pytest.raises(FileFormatError, match=r"gone\.gguf' is no whole GGUF file"):
        load_gguf(tmp_path / "gone.gguf")


def test_damage_to_the_header_is_an_error_of_ours_or_harmless(file, tmp_path):
    whole = file.read_bytes()
    header = GGUFReader(file).data_offset
    path = tmp_path / "damaged.gguf"
    for at in range(0, header, 61):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            load_gguf(path)
        except MixturaError as error:
            assert "\n" not in str(error), error  # noqa: PT017


def test_without_the_package_the_error_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MixturaError, match=r'pip install "mixtura\[gguf\]"'):
        load_gguf(file)
