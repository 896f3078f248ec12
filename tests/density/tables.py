"""Tables that several tests of density use."""

import numpy as np


def rows(n=200, d=3, k=3, seed=0, offset=0.0):
    """Rows of k clusters that overlap a little, and the cluster of each."""
    generator = np.random.default_rng(seed)
    which = generator.integers(0, k, n)
    return generator.normal(size=(n, d)) * (1 + which[:, None]) + 4 * which[:, None] + offset, which


def responsibilities(n=200, k=3, seed=1):
    """Random responsibilities to start from."""
    return np.random.default_rng(seed).dirichlet(np.ones(k), n)


def with_holes(X, share=0.25, seed=2):
    """The table with some values missing."""
    return np.where(np.random.default_rng(seed).uniform(size=X.shape) < share, np.nan, X)


def same(one, two, rtol=1e-12):
    """Two fitted mixtures have the same parameters."""
    np.testing.assert_allclose(one.weights_, two.weights_, rtol=rtol)
    np.testing.assert_allclose(one.means_, two.means_, rtol=rtol, atol=rtol)
    np.testing.assert_allclose(one.covariances_, two.covariances_, rtol=rtol, atol=rtol)
