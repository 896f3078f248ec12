"""Traces with known content."""

import numpy as np

from mixtura.traces.trace import COLUMNS, Trace


def made(
    experts_TK, *, E, domain_T=None, token_T=None, weights_TK=None, valid_T=None, layers=("0",), domains=("a", "b")
):
    """A trace whose every layer has the same decisions."""
    experts_TK = np.asarray(experts_TK)
    T, K = experts_TK.shape
    weights_TK = np.where(experts_TK < E, 1 / K, 0) if weights_TK is None else np.asarray(weights_TK)
    by_token = {
        "position": np.arange(T),
        "token": np.arange(T) if token_T is None else np.asarray(token_T),
        "valid": np.ones(T, bool) if valid_T is None else np.asarray(valid_T),
        "domain": np.zeros(T, int) if domain_T is None else np.asarray(domain_T),
    }
    columns = {name: np.zeros(len(layers) * T * K, dtype) for name, dtype in COLUMNS.items()}
    columns |= {name: np.tile(np.repeat(c, K), len(layers)).astype(COLUMNS[name]) for name, c in by_token.items()}
    columns["layer"] = np.repeat(np.arange(len(layers)), T * K).astype(np.int16)
    columns["slot"] = np.tile(np.arange(K), T * len(layers)).astype(np.int16)
    columns["expert"] = np.tile(experts_TK.reshape(-1), len(layers)).astype(np.int32)
    columns["weight"] = np.tile(weights_TK.reshape(-1), len(layers)).astype(np.float32)
    meta = {"layers": list(layers), "experts": [E] * len(layers), "domains": list(domains), "model": "made"}
    meta["parents"] = {}
    return Trace(**columns, meta=meta)


def random(T=200, E=5, K=2, seed=0, layers=("3", "7"), domains=("a", "b", "c"), length=None):
    """Random decisions with empty slots, padding, domains and tokens; in sequences of ``length``, or one."""
    generator = np.random.default_rng(seed)
    experts = np.argsort(generator.random((T, E + 1)), 1)[:, :K]
    weights = np.where(experts < E, generator.random((T, K)), 0)
    trace = made(
        experts,
        E=E,
        weights_TK=weights,
        domain_T=generator.integers(-1, len(domains), T),
        token_T=generator.integers(-1, 9, T),
        valid_T=generator.random(T) < 0.8,
        layers=layers,
        domains=domains,
    )
    if length is not None:
        trace.sequence, trace.position = trace.position // length, trace.position % length
    return trace
