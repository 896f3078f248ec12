"""Experts: forms of f_k, stacked with E first, and groups of unlike forms side by side."""
