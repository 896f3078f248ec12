"""Routers: a gate makes logits, a spec makes a routing of them. One method a file."""
