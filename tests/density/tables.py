"""Tables that several tests of density use."""

import numpy as np
from hypothesis import strategies as st


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


@st.composite
def degenerate_tables(draw):
    """Few rows, repeated, constant, far from the origin, tiny or huge, some with missing values."""
    n, d, distinct = draw(st.integers(1, 12)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    seed, scale = draw(st.integers(0, 10**6)), draw(st.sampled_from([1e-200, 1e-12, 1.0, 1e12, 1e100]))
    offset, constant = draw(st.sampled_from([0.0, 1.0, -1e8, 1e15])), draw(st.booleans())
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(distinct, d))[generator.integers(0, distinct, n)] * scale + offset
    X[:, 0] = offset if constant else X[:, 0]
    missing = generator.uniform(size=X.shape) < draw(st.sampled_from([0.0, 0.0, 0.3]))
    return np.where(missing, np.nan, X)
