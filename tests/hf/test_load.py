import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import mixtura.hf.load
from mixtura.core.errors import FetchError, FileFormatError, MixturaWarning, UnknownNameError
from mixtura.hf.load import load_model
from pico import pico, tokens


def tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


@pytest.fixture
def folder(tmp_path):
    """A model with its tokenizer, saved."""
    pico("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    """Rewrite the tensors of a folder."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def one_line(caught):
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_gives_its_model_and_tokenizer(folder):
    model, words = load_model(folder)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, pico("llama")(tokens()).logits)
    assert not model.training
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert words.encode("w7") == [7]


def test_the_path_may_be_text_and_the_dtype_another(folder):
    model, _ = load_model(str(folder), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_folder_without_a_tokenizer_gives_none(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert load_model(folder)[1] is None


def test_a_known_name_is_fetched_and_read_from_its_gguf(monkeypatch, tmp_path):
    (tmp_path / "inside").mkdir()
    file = tmp_path / "inside" / "model.gguf"
    file.touch()
    seen = []
    monkeypatch.setattr(mixtura.hf.load, "fetch", lambda name: seen.append(name) or tmp_path)
    monkeypatch.setattr(sys.modules["mixtura.hf.gguf"], "load_gguf", lambda path, *, dtype: (str(path), dtype))
    assert load_model("smollm2-135m", dtype=torch.float64) == (str(file), torch.float64)
    assert seen == ["smollm2-135m"]
    assert load_model(file) == (str(file), torch.float32)


@pytest.mark.parametrize("config", [None, "", "{", "[]", "{}", '{"architectures": []}'])
def test_a_folder_that_is_no_model_is_named(folder, config):
    path = folder / "config.json"
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(FileFormatError, match="is no model: it has no readable config") as caught:
        load_model(folder)
    assert str(folder) in one_line(caught)


def test_an_unknown_model_type_is_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_family"}))
    with pytest.raises(FileFormatError, match="no_such_family") as caught:
        load_model(folder)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_weights_are_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError) as caught:
        load_model(folder)
    assert str(folder) in one_line(caught)


def test_weights_that_are_not_there_are_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileFormatError, match="cannot be loaded") as caught:
        load_model(folder)
    assert str(folder) in one_line(caught)


def test_a_pickle_is_not_read(folder):
    (folder / "model.safetensors").unlink()
    torch.save(pico("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(FileFormatError, match="cannot be loaded"):
        load_model(folder)


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(FileFormatError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    change(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(FileFormatError, match=r"other shapes: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)


def test_a_tensor_without_a_place_is_warned_of(folder):
    change(folder, lambda weights: weights.update({"model.extra": torch.zeros(2)}))
    with pytest.warns(MixturaWarning, match=r"does not use: model\.extra"):
        load_model(folder)


def test_a_damaged_tokenizer_is_named(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(FileFormatError, match="tokenizer") as caught:
        load_model(folder)
    assert str(folder) in one_line(caught)


@pytest.mark.parametrize("name", ["smollm-135m", "smollm2"])
def test_an_unknown_name_offers_the_nearest(name):
    with pytest.raises(UnknownNameError, match=f"unknown model '{name}'; did you mean 'smollm2-135m'"):
        load_model(name)


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "a/b/c"])
def test_a_name_like_no_other_lists_the_known(name):
    with pytest.raises(UnknownNameError, match="known: smollm2-135m"):
        load_model(name)


def test_an_id_of_the_hub_without_a_network_is_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FetchError, match="model 'nobody/nothing': cannot be loaded") as caught:
        load_model("nobody/nothing")
    one_line(caught)


def test_code_from_a_folder_is_not_run(folder):
    ran = folder.parent / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    with pytest.raises(FileFormatError) as caught:
        load_model(folder)
    one_line(caught)
    assert not ran.exists()


def test_a_model_of_ours_is_loaded(tmp_path):
    from mixtura.hf import mixtures
    from mixtura.surgery.upcycle import upcycle

    model = upcycle(pico("llama"), layers=[1]).model.eval()
    model.save_pretrained(tmp_path / "moe")

    loaded, _ = load_model(tmp_path / "moe")
    assert list(mixtures(loaded)) == ["1"]
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
