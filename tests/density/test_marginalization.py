"""Marginalization models: with the tables of a joint all identities hold exactly; training finds such a joint."""

import itertools

import pytest
import torch
from scipy import stats
from torch import nn

from mixtura.core.errors import OptionError, ShapeError
from mixtura.density.marginalization import (
    UNKNOWN,
    MarginalizationModel,
    ValueNet,
    fit_conditionals,
    fit_energy,
    fit_marginals,
)

L, K = 4, 3


class Table(nn.Module):
    """What a function of the joint says of every row of values, known or not, looked up."""

    def __init__(self, log_joint, say):
        super().__init__()
        self.L, self.K = log_joint.ndim, log_joint.shape[0]
        self.said = torch.stack([say(log_joint, row) for row in all_rows(self.L, self.K, low=UNKNOWN).tolist()])

    def forward(self, x_NL):
        powers = (self.K + 1) ** torch.arange(self.L - 1, -1, -1)
        return self.said[(x_NL + 1) @ powers]


def log_marginal(log_joint, row):
    known = tuple(slice(None) if value == UNKNOWN else value for value in row)
    return log_joint[known].reshape(-1).logsumexp(0)[None]


def logits(log_joint, row):
    """Of every unknown variable given the known ones; of a known variable, nothing that matters."""
    out = torch.full((len(row), log_joint.shape[0]), 7.0)
    for i in (i for i, value in enumerate(row) if value == UNKNOWN):
        given = [log_marginal(log_joint, [*row[:i], value, *row[i + 1 :]]) for value in range(log_joint.shape[0])]
        out[i] = torch.cat(given)
    return out.flatten()


def all_rows(L, K, low=0):
    return torch.tensor(list(itertools.product(range(low, K), repeat=L)))


@pytest.fixture(scope="module")
def log_joint():
    generator = torch.Generator().manual_seed(0)
    return torch.randn((K,) * L, generator=generator).mul(1.5).flatten().log_softmax(0).view((K,) * L)


@pytest.fixture(scope="module")
def exact(log_joint):
    return MarginalizationModel(L, K, marginal=Table(log_joint, log_marginal), conditional=Table(log_joint, logits))


def small(L, K, seed=0):
    torch.manual_seed(seed)
    parts = {"marginal": ValueNet(L, K, 1, width=32, depth=2), "conditional": ValueNet(L, K, L * K, width=32, depth=2)}
    return MarginalizationModel(L, K, random_state=seed, **parts)


def test_the_tables_agree_with_themselves_in_every_order(exact):
    rows = all_rows(L, K)
    for _ in range(3):
        torch.testing.assert_close(exact.consistency_gap(rows), torch.zeros(len(rows)), atol=1e-5, rtol=0)
    assert exact.consistency_loss(rows) < 1e-9


def test_marginals_add_up_and_conditionals_are_normalized(exact):
    partial = all_rows(L, K, low=UNKNOWN)
    for i in range(L):
        rows = partial[partial[:, i] == UNKNOWN]
        filled = [exact.log_marginal(rows.index_fill(1, torch.tensor([i]), value)) for value in range(K)]
        torch.testing.assert_close(torch.stack(filled).logsumexp(0), exact.log_marginal(rows))
    torch.testing.assert_close(exact.log_conditionals(partial).logsumexp(-1), torch.zeros(len(partial), L))
    assert exact.log_marginal(torch.full((1, L), UNKNOWN)).abs() < 1e-6


def test_the_chain_of_conditionals_is_the_marginal_in_every_order(exact):
    partial = all_rows(L, K, low=UNKNOWN)
    marginals = exact.log_marginal(partial)
    for order in itertools.permutations(range(L)):
        chain = exact.log_likelihood(partial, torch.tensor(order).expand(len(partial), L))
        torch.testing.assert_close(chain, marginals, atol=1e-5, rtol=0)
    torch.testing.assert_close(exact.log_likelihood(partial), marginals, atol=1e-5, rtol=0)


def test_an_order_is_what_is_asked_for():
    model = small(3, 2)  # untrained: orders disagree
    x = torch.tensor([[1, 0, 1]])
    by_hand = torch.zeros(())
    for i, before in ((2, [-1, -1, -1]), (0, [-1, -1, 1]), (1, [1, -1, 1])):
        by_hand = by_hand + model.log_conditionals(torch.tensor([before]))[0, i, x[0, i]]
    torch.testing.assert_close(model.log_likelihood(x, torch.tensor([[1, 2, 0]]))[0], by_hand)
    assert (model.log_likelihood(x, torch.tensor([[0, 1, 2]]))[0] - by_hand).abs() > 1e-4


def test_samples_follow_the_joint(exact, log_joint):
    counts = torch.bincount(exact.sample(4000) @ torch.tensor([K**3, K**2, K, 1]), minlength=K**L)
    expected = log_joint.exp().flatten().double() * 4000
    large = expected > 5
    observed = [*counts[large].tolist(), int(counts[~large].sum())]
    theory = torch.cat([expected[large], expected[~large].sum()[None]])
    assert stats.chisquare(observed, theory / theory.sum() * sum(observed)).pvalue > 1e-3


def test_completions_keep_what_is_known_and_follow_the_conditional(exact, log_joint):
    rows = torch.tensor([[2, UNKNOWN, UNKNOWN, 0]]).expand(3000, L)
    done = exact.complete(rows)
    assert (done[:, [0, 3]] == torch.tensor([2, 0])).all()
    expected = log_joint[2, :, :, 0].flatten().softmax(0).double() * 3000
    counts = torch.bincount(done[:, 1] * K + done[:, 2], minlength=K * K)
    assert stats.chisquare(counts, expected / expected.sum() * 3000).pvalue > 1e-3


def test_redrawing_changes_few_variables_and_keeps_the_distribution(exact):
    rows = exact.sample(500)
    again = exact.redraw(rows, 1)
    assert (again != rows).sum(1).max() == 1
    assert (exact.redraw(rows, 0) == rows).all()


def test_the_loss_of_conditionals_is_the_entropy_under_the_truth(exact, log_joint):
    entropy = -(log_joint.exp() * log_joint).sum()
    losses = torch.stack([exact.any_order_loss(exact.sample(1500)) for _ in range(4)])
    assert losses.mean() == pytest.approx(entropy.item(), abs=0.15)


def test_training_from_data_finds_the_joint():
    joint = torch.distributions.Categorical(torch.tensor([[0.4, 0.1], [0.05, 0.45]]).flatten())
    torch.manual_seed(0)
    pairs = joint.sample((3000,))
    x = torch.stack([pairs // 2, pairs % 2, torch.randint(2, (3000,)), pairs // 2 ^ (torch.rand(3000) < 0.2)], 1)
    model = small(4, 2)
    fit_conditionals(model, x, steps=150, lr=1e-2)
    kept = {name: value.clone() for name, value in model.conditional.state_dict().items()}
    gaps = fit_marginals(model, x, steps=250, lr=1e-2)
    assert all((value == kept[name]).all() for name, value in model.conditional.state_dict().items())
    assert sum(gaps[-20:]) < 0.05 * sum(gaps[:20])
    asked = torch.tensor([[1, -1, -1, -1], [-1, 0, -1, -1], [0, 1, -1, -1], [-1, -1, 1, -1], [1, 1, 0, 1]])
    found = model.log_marginal(asked).exp()
    truth = ((x[None] == asked[:, None]) | (asked[:, None] == UNKNOWN)).all(-1).float().mean(1)
    torch.testing.assert_close(found.detach(), truth, atol=0.04, rtol=0)


def test_training_from_an_energy_finds_its_marginals_and_its_normalizer():
    rows = all_rows(4, 2)

    def log_density(x):
        spins = 2.0 * x - 1
        return 0.5 * (spins[:, 1:] * spins[:, :-1]).sum(1) + 0.3 * spins[:, 0] + 2

    truth = log_density(rows)
    log_z = truth.logsumexp(0)
    model = small(4, 2)
    gaps = fit_energy(model, log_density, steps=300, lr=1e-2, batch_size=128)
    assert gaps[-1] < 0.1
    samples = model.sample(2000)
    bound = (log_density(samples) - model.log_marginal(samples)).mean()
    assert bound.item() == pytest.approx(log_z.item(), abs=0.1)
    for known in ([0], [2, 3], [0, 1, 3]):
        asked = torch.full_like(rows, UNKNOWN)
        asked[:, known] = rows[:, known]
        same = (rows[:, None, known] == rows[None, :, known]).all(-1)
        exact = torch.where(same, truth[None], -torch.inf).logsumexp(1) - log_z
        assert (model.log_marginal(asked).exp() - exact.exp()).abs().max() < 0.06


def test_seeds_repeat():
    def run():
        model = small(3, 2, seed=4)
        x = model.sample(50)
        return x, fit_conditionals(model, x, steps=3), fit_marginals(model, x, steps=3)

    one, two = run(), run()
    assert (one[0] == two[0]).all()
    assert one[1:] == two[1:]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: m.log_marginal(torch.zeros(2, 4, dtype=int)), ShapeError, r"x must be \(N, 3\)"),
        (lambda m: m.log_marginal(torch.full((1, 3), 2)), OptionError, "from -1 to 1"),
        (lambda m: m.log_marginal(torch.zeros(1, 3)), OptionError, "whole numbers"),
        (lambda m: m.consistency_gap(torch.full((1, 3), UNKNOWN)), OptionError, "from 0 to 1"),
        (lambda m: fit_conditionals(m, torch.full((1, 3), UNKNOWN)), OptionError, "from 0 to 1"),
        (lambda m: m.sample(0), OptionError, "n must be"),
        (lambda m: fit_energy(m, lambda x: x.sum(1), consistency=-1), OptionError, "consistency"),
        (lambda m: fit_energy(m, lambda x: x.sum(1), steps=0), OptionError, "steps"),
        (lambda m: MarginalizationModel(0, 2), OptionError, "n_variables"),
        (lambda m: MarginalizationModel(3, 1), OptionError, "n_values"),
    ],
)
def test_wrong_calls_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(small(3, 2))
