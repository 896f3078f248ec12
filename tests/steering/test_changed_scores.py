"""``select`` with changed scores: the same for numpy and torch, empty slots where nobody is left, finite gradients.

T tokens, E experts.
"""

import numpy as np
import pytest
import torch

from mixtura.core import routing as r
from mixtura.core.selection import SelectionSpec, select

T, E = 30, 6
SPECS = [
    SelectionSpec(k=3),
    SelectionSpec(k=3, renormalize=1),
    SelectionSpec(k=3, order="topk-score"),
    SelectionSpec(k=3, score="sigmoid", renormalize=2, scale=2.5),
    SelectionSpec(k=3, score="sigmoid", order="topk-score"),
    SelectionSpec(k=3, score="relu", order="topk-score"),
    SelectionSpec(k=4, score="none"),
    SelectionSpec(k=3, renormalize=1, p=0.5),
    SelectionSpec(k=3, renormalize=1, null_experts=1),
    SelectionSpec(k=2, score="sigmoid", groups=3, groups_kept=1, group_score="top2-sum"),
    SelectionSpec(k=3, groups=3, groups_kept=1, group_fill=0.0),
]
every_spec = pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))


def some(generator):
    """Logits, and which experts are taken away from each token; from the last token all of them."""
    away_TE = torch.rand(T, E, generator=generator) < 0.5
    away_TE[-1] = True
    return torch.randn(T, E, generator=generator), away_TE


@every_spec
def test_nothing_changed_is_nothing_changed(spec, generator):
    logits_TE, _ = some(generator)
    if spec.group_fill == 0.0:
        spec = SelectionSpec(k=2, groups=3, groups_kept=1, group_fill=0.0)
    for one, other in zip(select(logits_TE, spec), select(logits_TE, spec, change=lambda c: c), strict=True):
        assert torch.equal(one, other)


@every_spec
def test_who_is_taken_away_is_not_chosen(spec, generator):
    logits_TE, away_TE = some(generator)
    changed = r.check(select(logits_TE, spec, change=lambda c: c.masked_fill(away_TE, float("-inf"))))
    chosen_TE = r.scatter_count(changed)[:, :E].bool()
    assert not (chosen_TE & away_TE).any()
    assert (changed.indices_TK[-1] == E).all()
    assert torch.isfinite(changed.weights_TK).all()
    if spec.groups == 1 and spec.p is None:
        assert chosen_TE.sum(-1).tolist() == (~away_TE).sum(-1).clamp(max=spec.k).tolist()


@every_spec
def test_numpy_gives_what_torch_gives(spec, generator):
    logits_TE, away_TE = some(generator)
    expected = select(logits_TE, spec, change=lambda c: c.masked_fill(away_TE, float("-inf")))
    hidden = np.where(away_TE.numpy(), -np.inf, 0).astype("float32")
    found = select(logits_TE.numpy(), spec, change=lambda c: c + hidden)
    assert np.array_equal(found.indices_TK, expected.indices_TK)
    np.testing.assert_allclose(found.weights_TK, expected.weights_TK, rtol=1e-5, atol=1e-6)


@every_spec
def test_gradients_are_finite_where_slots_are_empty(spec, generator):
    logits_TE, away_TE = some(generator)
    logits_TE.requires_grad_()
    changed = select(logits_TE, spec, change=lambda c: c.masked_fill(away_TE, float("-inf")))
    (changed.weights_TK * torch.arange(1, spec.k + 1)).sum().backward()
    assert torch.isfinite(logits_TE.grad).all()
    assert logits_TE.grad.any()
    assert not logits_TE.grad[-1].any()


def test_the_rest_is_weighed_as_if_the_others_were_not_there(generator):
    logits_TE, _ = some(generator)
    for spec in (SelectionSpec(k=2, renormalize=1), SelectionSpec(k=2, order="topk-score")):
        changed = select(logits_TE, spec, change=lambda c: torch.cat([c[:, :4], torch.full((T, 2), -torch.inf)], 1))
        fewer = select(logits_TE[:, :4], spec)
        assert torch.equal(changed.indices_TK, fewer.indices_TK)
        torch.testing.assert_close(changed.weights_TK, fewer.weights_TK)
