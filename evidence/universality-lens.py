"""The regret of a Bayes mixture is ruled by the weight of models near the truth, not by how many models there are.

The paper proves bounds and runs nothing. The first part measures them: classes of 1000 and 10000 random decision
trees, of which one model, or 1 %, are near-copies of the truth; 200 outcomes. At equal weight the larger class should
cost as much as the smaller one; 100 times the weight should save ln 100 = 4.6 nats. The baseline follows the likeliest
model. The second part is the paper's way to practice: stochastic gradient Langevin dynamics draws networks from their
posterior, whose average predicts. Digits, a fifth of the labels replaced at random, in training and in test alike;
every arm takes as many steps and is tuned over the same grid. A control averages the iterates of plain SGD.
"""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

from mixtura.density import BayesMixture, regret_bound
from mixtura.evidence import Lab, Verdict, evidence

DEPTH, COLUMNS, OUTCOMES = 3, 8, 200


def random_trees(rng, M):
    """Trees that ask the same question on a level: columns and thresholds (M, depth), chances of leaves (M, leaves)."""
    leaves = rng.choice([0.1, 0.3, 0.7, 0.9], (M, 2**DEPTH))
    return rng.integers(0, COLUMNS, (M, DEPTH)), rng.uniform(-0.5, 0.5, (M, DEPTH)), leaves


def chances(trees, x_ND):
    """Chance of outcome 1, (N, M)."""
    columns, thresholds, leaves = trees
    bits = x_ND[:, columns] > thresholds
    leaf_NM = bits @ 2 ** np.arange(DEPTH)
    return leaves[np.arange(len(leaves)), leaf_NM]


def a_class_near_the_truth(rng, truth, M, near):
    """Random trees, ``near`` of which are the truth with leaves moved a little."""
    trees = random_trees(rng, M)
    for mine, true in zip(trees, truth, strict=True):
        mine[:near] = true
    trees[2][:near] = trees[2][:near] + rng.uniform(-0.01, 0.01, (near, 2**DEPTH))
    return trees


def divergences(chance_NM, true_N):
    """Mean Kullback-Leibler divergence from the truth over inputs, (M,)."""
    ones = true_N[:, None] * np.log(true_N[:, None] / chance_NM)
    zeros = (1 - true_N[:, None]) * np.log((1 - true_N[:, None]) / (1 - chance_NM))
    return (ones + zeros).mean(0).clip(0)


def learn_trees(seed: int, M: int, near: int) -> dict[str, float]:
    """Regret in nats of the mixture and of the likeliest model, and the bounds."""
    rng = np.random.default_rng(seed)
    truth = random_trees(rng, 1)
    trees = a_class_near_the_truth(rng, truth, M, near)
    x_ND = rng.uniform(-1, 1, (OUTCOMES, COLUMNS))
    true_N, chance_NM = chances(truth, x_ND)[:, 0], chances(trees, x_ND)
    y_N = rng.uniform(size=OUTCOMES) < true_N
    log_NM = np.log(np.where(y_N[:, None], chance_NM, 1 - chance_NM))
    loss_of_truth = -np.log(np.where(y_N, true_N, 1 - true_N)).sum()
    mixture = BayesMixture(M)
    mixture.update(log_NM)
    before_NM = np.cumsum(log_NM, axis=0) - log_NM
    likeliest_N = before_NM.argmax(1)
    many_ND = rng.uniform(-1, 1, (500, COLUMNS))
    bound = regret_bound(divergences(chances(trees, many_ND), chances(truth, many_ND)[:, 0]), OUTCOMES)
    return {
        "regret": mixture.log_loss_ - loss_of_truth,
        "regret of the likeliest": -log_NM[np.arange(OUTCOMES), likeliest_N].sum() - loss_of_truth,
        "bound": bound.bound,
        "sharper bound": bound.sharper,
        "log of the class": float(np.log(M)),
    }


def digits(seed):
    """Digits with a fifth of the labels replaced, 900 rows to learn from and 897 held out."""
    X, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(X))
    X, y = X[order] / 16, y[order]
    y = np.where(rng.uniform(size=len(y)) < 0.2, rng.integers(0, 10, len(y)), y)
    X, y = torch.tensor(X, dtype=torch.float32), torch.tensor(y)
    return X[:900], y[:900], X[900:], y[900:]


def learn_digits(seed: int, noise: bool, average: bool, rate: float, precision: float, steps: int) -> dict[str, float]:
    """Log loss on rows held out, of the last network or of the mean over the second half of the steps."""
    X, y, X_test, y_test = digits(seed)
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    weights, kept = list(net.parameters()), []
    size = 2 * rate / len(X)  # of a step of the dynamics, whose potential is the sum over rows
    for step in range(steps):
        some = torch.randint(0, len(X), (100,))
        loss = torch.nn.functional.cross_entropy(net(X[some]), y[some])
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= rate * (gradient + precision / len(X) * weight)
                if noise:
                    weight += size**0.5 * torch.randn_like(weight)
            if step == steps - 1 or (average and step >= steps // 2 and step % (steps // 100) == 0):
                kept.append(net(X_test).softmax(-1))
    p = torch.stack(kept if average else kept[-1:]).mean(0)
    loss = torch.nn.functional.nll_loss(p.clamp_min(1e-30).log(), y_test)
    return {"log loss": loss.item(), "accuracy": (p.argmax(-1) == y_test).double().mean().item()}


@evidence(
    "universality-lens",
    claim="Regret is governed by the cumulative weight of models near the truth, not by the size of the class; an "
    "average of Langevin samples predicts at least as well as one network trained by SGD",
    source="arXiv:2506.07661",
    figure="regret, nats, and log loss, nats, lower is better",
    setting="classes of 1000 and 10000 random trees with 1 or 1 % near-copies of the truth, 200 outcomes; digits with "
    "a fifth of the labels replaced, 900 rows, a network of one hidden layer of 64",
    seeds=10,
)
def run(lab: Lab) -> Verdict:
    few, many = lab.pick(1_000, smoke=100), lab.pick(10_000, smoke=1_000)
    lab.arm("large class, 1 %", learn_trees, M=many, near=many // 100)
    lab.arm("large class, one model", learn_trees, M=many, near=1)
    lab.arm("small class, 1 %", learn_trees, M=few, near=few // 100)
    saved = lab.difference("regret", "large class, one model", "large class, 1 %")
    size = lab.difference("regret", "large class, 1 %", "small class, 1 %")
    grid = {"rate": [0.03, 0.1, 0.3], "precision": [0.3, 3.0, 30.0]}
    steps = lab.pick(6_000, smoke=200)
    arms = {"SGD": (False, False), "SGLD, mean": (True, True), "SGD, mean of iterates": (False, True)}
    for name, (noise, average) in arms.items():
        lab.tuned_arm(name, learn_digits, grid=grid, figure="log loss", noise=noise, average=average, steps=steps)
    gap = lab.difference("log loss", "SGLD, mean", "SGD")
    control = lab.difference("log loss", "SGLD, mean", "SGD, mean of iterates")
    expected = np.log(many / (many // 100))
    weight_counts = abs(saved.mean - expected) <= 0.2 * expected and size.high < 0.2 * expected
    verdict = "holds" if weight_counts and gap.high <= 0 else "partly" if weight_counts or gap.high <= 0 else None
    return Verdict(
        verdict or "does not hold here",
        f"100 times the weight near the truth saves {saved} nats (ln 100 = {expected:.2f}), a class 10 times as large "
        f"at equal weight costs {size} more; the mean of Langevin samples has {gap} nats against SGD, and {control} "
        "against the mean of SGD's iterates",
    )
