"""Small methods built from their signatures: the sizes that every signature names alike are filled in."""

import copy

import torch

from mixtura.core import registry

SIZES = {"dim": 8, "num_experts": 6, "width": 4, "k": 2}


def build(row, **options):
    """The method with the sizes it asks for, and the same random weights in every call."""
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name in row.options}
    made = row(**{**sizes, **options})
    if isinstance(made, torch.nn.Module):
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def rows(role):
    """Every registered method of a role, as parameters of a test."""
    return registry.methods(role)


def key(row):
    """Name of a test's parameter."""
    return row.key


def tokens(generator, T=12):
    """Hidden states (T, D)."""
    return torch.randn(T, SIZES["dim"], generator=generator)


def permuted(router, order_E):
    """The router whose expert e is the expert order_E[e] of the given one: every tensor with one axis of length E."""
    E = router.num_experts
    other = copy.deepcopy(router)
    for tensor in (*other.parameters(), *other.buffers()):
        axes = [axis for axis, size in enumerate(tensor.shape) if size == E]
        if axes:
            tensor.data = tensor.data.index_select(axes[0], order_E)
    return other
