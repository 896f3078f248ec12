"""Bits per byte: against a naive loop, a uniform model, and the text's own bytes."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixtura.core.errors import OptionError
from mixtura.training.evaluate import bits_per_byte, windows
from pico import pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer

TEXTS = {
    "english": ["the other thing is there, and the weather is rather fine", "th", "x" * 40],
    "german": ["über den Brücken grünt es für die Mühlen, süß und kühn ☃", "", "a"],
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    return pico("llama", vocab_size=VOCABULARY_SIZE)


def naive(model, tokenizer, texts, length):
    """Documents, windows and tokens one by one; no padding, no batches."""
    nats, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        pieces = [ids[i : i + length] for i in range(0, len(ids), length)]
        for i, piece in enumerate(pieces):
            if len(piece) == length or (i == 0 and len(piece) > 1):
                logits = model(torch.tensor([piece])).logits[0].double().log_softmax(-1)
                for position, token in enumerate(piece[1:]):
                    nats -= logits[position, token].item()
                    size += len(tokenizer.convert_ids_to_tokens(token))  # a byte-level token has a character a byte
    return nats / math.log(2) / size


@pytest.mark.parametrize("length", [2, 7, 256])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_equals_the_naive_loop(model, tokenizer, length, batch_size):
    got = bits_per_byte(model, tokenizer, TEXTS, length=length, batch_size=batch_size, progress=False)
    with torch.no_grad():
        expected = {name: naive(model, tokenizer, texts, length) for name, texts in TEXTS.items()}
    assert got == pytest.approx({**expected, "mean": sum(expected.values()) / 2}, rel=1e-5)
    assert got == bits_per_byte(model, tokenizer, TEXTS, length=length, batch_size=batch_size, progress=False)


def test_a_uniform_model_needs_log2_of_the_vocabulary_a_token(tokenizer):
    model = pico("llama", vocab_size=VOCABULARY_SIZE)
    torch.nn.init.zeros_(model.lm_head.weight)
    got = bits_per_byte(model, tokenizer, TEXTS, length=16, progress=False)
    for name, texts in TEXTS.items():
        found = windows(tokenizer, texts, 16, 10**6)
        tokens, size = sum(len(w.ids) - 1 for w in found), sum(sum(w.bytes[1:]) for w in found)
        assert got[name] == pytest.approx(math.log2(VOCABULARY_SIZE) * tokens / size, rel=1e-6)


def test_the_mode_of_the_model_is_left_alone(model, tokenizer):
    model.train()
    bits_per_byte(model, tokenizer, TEXTS, progress=False)
    assert model.training
    model.eval()


def test_bytes_of_tokens_sum_to_those_of_the_text(tokenizer):
    text = TEXTS["german"][0]
    (window,) = windows(tokenizer, [text], 10**6, 10**6)
    assert len(window.ids) < len(text.encode())  # some are merged
    assert sum(window.bytes) == len(text.encode())


def test_bytes_of_a_vocabulary_of_words():
    words = Tokenizer(models.WordLevel({"?": 0, "süß": 1, "und": 2, "kühn": 3}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    (window,) = windows(PreTrainedTokenizerFast(tokenizer_object=words), ["süß und kühn"], 9, 9)
    assert window.bytes == [5, 4, 6]  # each with the blank before it


def test_at_most_max_tokens_from_all_documents_in_turn(tokenizer):
    texts = ["a" * 10, "b" * 25, "c" * 7]
    found = windows(tokenizer, texts, 5, 11)
    assert [tokenizer.decode(w.ids) for w in found] == ["aaaaa", "bbbbb", "cccc"]
    assert sum(len(w.ids) - 1 for w in found) == 11
    everything = [tokenizer.decode(w.ids) for w in windows(tokenizer, texts, 5, 10**6)]
    assert everything == ["aaaaa", "bbbbb", "ccccc", "aaaaa", "bbbbb", "bbbbb", "bbbbb", "bbbbb"]


def test_domains_without_text_are_named(model, tokenizer):
    for texts in ([], [""], ["a"]):
        with pytest.raises(OptionError, match="domain 'empty' has no held-out text"):
            bits_per_byte(model, tokenizer, {**TEXTS, "empty": texts}, progress=False)
    with pytest.raises(OptionError, match="held_out must name at least one domain"):
        bits_per_byte(model, tokenizer, {}, progress=False)
    with pytest.raises(OptionError, match="length must be at least 2"):
        bits_per_byte(model, tokenizer, TEXTS, length=1, progress=False)
