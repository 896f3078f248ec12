"""Errors of density that the core has no name for."""

from __future__ import annotations

from mixtura.core.errors import MixturaError


class SingularComponentError(MixturaError, ValueError):
    """A component has collapsed: its covariance is not positive definite, so its density has no value."""
