"""Seeing: who decided what. Capture routings of a model, keep them in a file, measure them, show them in a report.

Everything but ``capture`` works on a ``Trace`` alone and needs no torch.
"""

from mixtura.traces.trace import Trace

__all__ = ["Trace"]
