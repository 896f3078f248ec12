"""Small methods built from their signatures: the sizes that every signature names alike are filled in."""

import copy
import functools

import torch

from mixtura.core import registry
from mixtura.core.selection import SelectionSpec, select
from mixtura.nn.state import RouterState, use_state

SIZES = {"dim": 8, "num_experts": 6, "width": 4, "k": 2, "vocabulary": 40, "null_experts": 3, "zero_computation": 3}


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


def ids(T):
    """Token ids (T,), all different."""
    return torch.arange(T) * 3 % SIZES["vocabulary"]


def state_of(token_T, num_experts, mask_T=None, order_E=slice(None)):
    """A call of one sequence; a mixture of as many experts has decided before, by the ids of the tokens.

    Its expert e is the expert order_E[e] of another call.
    """
    state = RouterState(mask_T=mask_T, token_T=token_T, rows=1)
    table_VE = torch.randn(SIZES["vocabulary"], num_experts, generator=torch.Generator().manual_seed(2))
    state.tape.write("before", select(table_VE[token_T][:, order_E], SelectionSpec(k=1)))
    return state


def route(router, hidden_TD, mask_T=None, token_T=None, order_E=slice(None)):
    """What a router decides in such a call."""
    token_T = ids(len(hidden_TD)) if token_T is None else token_T
    with use_state(state_of(token_T, router.num_experts, mask_T, order_E)):
        return router(hidden_TD)


def bound(row):
    """A balance loss with the sizes that it asks for; a function of a routing and a mask."""
    return functools.partial(row, **{name: size for name, size in SIZES.items() if name in row.options})


def kinds(num_experts, last):
    """A random order of experts in which the last ones, which are of another kind, stay the last ones."""
    generator = torch.Generator().manual_seed(3)
    first = num_experts - last
    return torch.cat([torch.randperm(first, generator=generator), torch.randperm(last, generator=generator) + first])


def permuted(router, order_E):
    """The router whose expert e is the expert order_E[e] of the given one.

    Every axis of length E is an axis of experts, and whole numbers are the names of experts.
    """
    other = copy.deepcopy(router)
    for tensor in (*other.parameters(), *other.buffers()):
        for axis, size in enumerate(tensor.shape):
            if size == router.num_experts:
                tensor.data = tensor.data.index_select(axis, order_E)
        if not tensor.is_floating_point():
            tensor.data = order_E.argsort()[tensor.data]
    return other
