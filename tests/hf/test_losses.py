"""The loss of a causal language model, against its formula and under accumulation."""

import torch
from torch.nn import functional as F

from mixtura.hf.losses import IGNORED, next_token_loss


def test_next_token_loss_is_the_mean_over_the_predicted_tokens():
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, 3:] = IGNORED
    expected = [
        -logits[b, q].log_softmax(-1)[labels[b, q + 1]] for b in range(2) for q in range(4) if labels[b, q + 1] >= 0
    ]
    torch.testing.assert_close(next_token_loss(logits, labels), torch.stack(expected).mean())


def test_next_token_loss_of_micro_batches_is_that_of_the_batch():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, 2:] = IGNORED
    count = labels[:, 1:].ne(IGNORED).sum()
    parts = [next_token_loss(logits[i : i + 1], labels[i : i + 1], count) for i in range(3)]
    torch.testing.assert_close(sum(parts), next_token_loss(logits, labels))


def test_next_token_loss_of_nothing_is_zero():
    assert next_token_loss(torch.randn(1, 4, 7), torch.full((1, 4), IGNORED)) == 0


def test_next_token_loss_is_computed_in_float32():
    logits, labels = torch.randn(2, 5, 7).bfloat16(), torch.randint(0, 7, (2, 5))
    expected = F.cross_entropy(logits.float()[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    assert torch.equal(next_token_loss(logits, labels), expected)
