"""Steering: a trained model with other decisions, inside of a ``with``; nothing of the model is changed."""

from mixtura.steering.steer import steer

__all__ = ["steer"]
