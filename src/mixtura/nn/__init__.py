"""Layers: routers, experts, the mixture of both, what balances them, and the backends that compute them. Torch only."""

from mixtura.nn.experts.feed_forward import Experts
from mixtura.nn.experts.group import ExpertGroup
from mixtura.nn.mixture import FeedForward, Mixture
from mixtura.nn.routers.base import BaseRouter, LinearGate, Router
from mixtura.nn.state import RouterState, Tape, current_state

__all__ = [
    "BaseRouter",
    "ExpertGroup",
    "Experts",
    "FeedForward",
    "LinearGate",
    "Mixture",
    "Router",
    "RouterState",
    "Tape",
    "current_state",
]
