"""The padding mask in every form in which a decoder gets it."""

import pytest
import torch

from mixtura.hf.forward import padding_mask

TOKENS = torch.ones(2, 3, dtype=torch.long)
REAL = torch.tensor([[0, 1, 1], [1, 1, 1]])


class Cache:
    def __init__(self, length):
        self.length = length

    def get_seq_length(self):
        return self.length


def static(past, keys, as_bool):
    """What transformers makes of REAL for a static cache: causal, padding hidden, (B, 1, Q, keys)."""
    seen = torch.zeros(2, 1, 3, keys, dtype=torch.bool)
    for b in range(2):
        for q in range(3):
            for key in range(past + q + 1):
                seen[b, 0, q, key] = bool(REAL[b, key - past]) if key >= past else True
    return seen if as_bool else torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))


@pytest.mark.parametrize(
    ("mask", "past"),
    [
        (REAL, 0),
        (torch.cat([torch.ones(2, 4, dtype=torch.long), REAL], 1), 4),
        (static(0, 8, True), 0),
        (static(4, 8, True), 4),
        (static(4, 8, False), 4),
        ({"full_attention": static(4, 8, True), "sliding_attention": static(4, 8, True)}, 4),
    ],
)
def test_every_form_says_the_same(mask, past):
    found = padding_mask((), {"input_ids": TOKENS, "attention_mask": mask, "past_key_values": Cache(past)})
    assert torch.equal(found, REAL.reshape(-1).bool())


def test_positional_arguments_count():
    assert torch.equal(padding_mask((TOKENS, REAL), {}), REAL.reshape(-1).bool())


def test_embeddings_instead_of_tokens():
    found = padding_mask((), {"inputs_embeds": torch.zeros(2, 3, 8), "attention_mask": REAL})
    assert torch.equal(found, REAL.reshape(-1).bool())


def test_no_mask_is_none():
    assert padding_mask((TOKENS,), {}) is None
