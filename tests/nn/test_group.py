"""Unlike forms side by side.

T tokens, D width, E experts, K slots a token.
"""

import pytest
import torch

from mixtura.core.errors import OptionError
from mixtura.nn import ExpertGroup, Experts
from mixtura.nn.experts.forms import ConstantExperts, CopyExperts, ZeroExperts

T, D = 9, 8


def group():
    """Indices 0..2 feed-forward, 3..4 zero, 5 copy, 6..7 constant; 8 is the empty slot."""
    torch.manual_seed(0)
    made = ExpertGroup([Experts(3, D, 4), ZeroExperts(2, D), CopyExperts(1, D), ConstantExperts(2, D)])
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def one(made, e, x_D):
    """f_e(x) as its docstring says it."""
    network, _, _, constant = made.forms
    if e < 3:
        return network(x_D[None], torch.tensor([[e]]), torch.ones(1, 1))[0]
    if e < 5:
        return torch.zeros(D)
    if e == 5:
        return x_D
    a_2 = (constant.mixer[e - 6] @ x_D).softmax(0)
    return a_2[0] * x_D + a_2[1] * constant.vector[e - 6]


def test_each_form_has_its_range_of_indices(generator):
    made, hidden_TD = group(), torch.randn(T, D, generator=generator)
    assert made.num_experts == 8
    indices_TK = torch.stack([torch.randperm(9, generator=generator)[:4] for _ in range(T)])
    weights_TK = torch.rand(T, 4, generator=generator)
    expected_TD = torch.zeros(T, D)
    for t in range(T):
        for e, w in zip(indices_TK[t].tolist(), weights_TK[t], strict=True):
            if e < 8:
                expected_TD[t] += w * one(made, e, hidden_TD[t])
    torch.testing.assert_close(made(hidden_TD, indices_TK, weights_TK), expected_TD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("e", range(8))
def test_every_index_alone(e, generator):
    made, hidden_TD = group(), torch.randn(T, D, generator=generator)
    out_TD = made(hidden_TD, torch.full((T, 1), e), torch.full((T, 1), 0.5))
    expected_TD = torch.stack([0.5 * one(made, e, x_D) for x_D in hidden_TD])
    torch.testing.assert_close(out_TD, expected_TD, rtol=1e-5, atol=1e-6)


def test_only_empty_slots_answer_0(generator):
    out_TD = group()(torch.randn(T, D, generator=generator), torch.full((T, 2), 8), torch.ones(T, 2))
    assert not out_TD.any()


@pytest.mark.parametrize(
    ("forms", "dims"),
    [([], r"\[\]"), ([ZeroExperts(1, 4)], r"\[4\]"), ([ZeroExperts(1, 4), CopyExperts(1, 5)], r"\[4, 5\]")],
    ids=["none", "one", "unlike"],
)
def test_a_group_has_two_or_more_forms_of_one_width(forms, dims):
    with pytest.raises(OptionError, match=f"forms must be two or more of the same dim, got dims {dims}"):
        ExpertGroup(forms)
