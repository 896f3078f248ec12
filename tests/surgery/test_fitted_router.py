"""Fitted rows equal a ridge regression done at once, and tell kinds of text apart."""

import pytest
import torch

from mixtura.core import OptionError
from mixtura.surgery.fitted_router import fit_router_rows
from pico import pico, tokens


def naive(model, blocks, layer, ridge, sharpness):
    states = []
    site = model.model.layers[layer].mlp
    handle = site.register_forward_pre_hook(lambda module, args: states.append(args[0].detach().flatten(0, 1)))
    for ids in blocks.values():
        model(ids)
    handle.remove()
    X = torch.cat(states)
    Y = torch.cat([torch.full((len(s),), c) for c, s in enumerate(states)])
    Y = torch.nn.functional.one_hot(Y, len(blocks)).float()
    A = X.T @ X / len(X)
    A = A + ridge * A.diagonal().mean() * torch.eye(len(A))
    rows = torch.linalg.solve(A, X.T @ (Y - Y.mean(0)) / len(X)).T
    return rows * sharpness / (X @ rows.T).std(correction=0), X, Y


def kinds():
    """Two kinds of text with tokens of their own."""
    return {"low": tokens(5, 9, seed=1).clamp(max=20), "high": tokens(7, 9, seed=2).clamp(min=40)}


def test_rows_are_the_ridge_regression_and_tell_the_kinds_apart():
    model, blocks = pico("llama"), kinds()
    rows = fit_router_rows(model, blocks, [0, 2], ridge=0.1, sharpness=4.0, batch_size=2)
    for layer in (0, 2):
        expected, X, Y = naive(model, blocks, layer, 0.1, 4.0)
        torch.testing.assert_close(rows[layer], expected, rtol=1e-3, atol=1e-4)
        found = (X @ rows[layer].T).argmax(1)
        assert (found == Y.argmax(1)).float().mean() > 0.9


def test_works_where_projections_lie_in_the_layer_itself():
    rows = fit_router_rows(pico("opt"), kinds(), [1])
    assert rows[1].shape == (2, 32)


@pytest.mark.parametrize("options", [{"ridge": 0.0}, {"sharpness": -1.0}])
def test_wrong_numbers_are_refused(options):
    with pytest.raises(OptionError, match="above 0"):
        fit_router_rows(pico("llama"), kinds(), [0], **options)
    with pytest.raises(OptionError, match="two or more kinds"):
        fit_router_rows(pico("llama"), {"one": tokens()}, [0])


def test_clusters_part_the_states_and_are_told_apart():
    model, blocks = pico("llama"), kinds()
    rows = fit_router_rows(model, blocks, [1], clusters=3, ridge=1e-3)[1]
    assert rows.shape == (3, 32)
    _, X, _ = naive(model, blocks, 1, 0.1, 1.0)
    used = torch.bincount((X @ rows.T).argmax(1), minlength=3)
    assert (used > 0).all()
    again = fit_router_rows(model, blocks, [1], clusters=3, ridge=1e-3)[1]
    assert torch.equal(rows, again)
