"""Random calls of experts, and of experts with weights of few bits, each compared with its formula in float64.

Every tensor is a block of its own on the heap that ends where it ends, so that AddressSanitizer sees a read or write
beside it; what is not written yet is NaN. NaN are also the weights of experts without a token and those of empty slots:
nobody may use them.

T tokens, D width, E experts, K slots a token, S slots of one expert, F expert width, C = 2F gated or F plain.
"""

import ctypes
import math

import torch

from mixtura.core.errors import ShapeError
from mixtura.nn import Experts
from mixtura.nn.backends.native.activation import CLAMPED, PLAIN
from mixtura.nn.backends.native.library import library
from mixtura.nn.backends.native.ops import Form, backward, forward
from mixtura.nn.backends.native.quantized import quantized_struct
from mixtura.nn.experts.activations import ACTIVATIONS
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import quantize_experts

DTYPES = (torch.float32, torch.bfloat16)
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of sums over terms that are as large as they can be
ODD = (1, 2, 3, 15, 17, 31, 33, 63, 65)
WORK = (2_000_000, 2_000_000, 2_000_000, 20_000_000)  # of which a call makes at most so many products
NOWHERE = (0, 1, 1 << 40)  # beyond E, empty slots


def width(rng):
    """Mostly small and odd, sometimes whole vectors, now and then wider than what is computed at once."""
    kind = rng.choice(("odd", "odd", "small", "small", "lines", "wide"))
    if kind == "wide":
        return rng.choice((rng.randint(250, 330), rng.randint(510, 520), rng.randint(1020, 1040)))
    return {"odd": rng.choice(ODD), "small": rng.randint(1, 70), "lines": 16 * rng.randint(1, 9)}[kind]


def sizes(rng):
    """T, K, E, D, F."""
    T = rng.choice((rng.randint(0, 3), rng.randint(4, 40), rng.randint(40, 72), rng.choice((100, 191, 193, 300))))
    K, E, D, F = rng.choice((rng.randint(1, 4), rng.randint(1, 12))), rng.randint(1, 9), width(rng), width(rng)
    work = rng.choice(WORK)
    return min(T, work // (K * D * F)), K, max(1, min(E, work // 2 // (D * F))), D, F


def chosen(rng, T, K, E):
    """Experts of the slots (T, K): any, one again and again, none, different ones, few at all, or so many of each."""
    kind = rng.choice(("any", "any", "one", "none", "different", "few", "so many"))
    indices_TK = torch.randint(0, E + rng.choice((0, 1, 3)), (T, K))
    if kind == "one":
        indices_TK.fill_(rng.randrange(E))
    elif kind == "none":
        indices_TK.fill_(E)
    elif kind == "different":
        order_TX = torch.rand(T, max(K, E)).argsort(-1)
        indices_TK = order_TX[:, :K].clamp(max=E)
    elif kind == "few":
        indices_TK.masked_fill_(torch.rand(T, K) < 0.9, E)
    elif kind == "so many":
        counts = [rng.choice((*ODD, 16, 32, 64, 96, 97, 192)) for _ in range(E)]
        slots = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)] + [torch.full((T * K,), E)])
        indices_TK = slots[: T * K][torch.randperm(T * K)].view(T, K)
    empty_TK = indices_TK >= E
    return torch.where(empty_TK, E + rng.choice(NOWHERE), indices_TK).contiguous(), empty_TK


def form_of(rng):
    """An activation in a layout. The bound of a clamp lies between what sums can be: so no rounding passes it."""
    gated = rng.random() < 0.7
    number = rng.randrange(len(PLAIN) + gated)
    return Form(number, gated, rng.random() < 0.5, gated and rng.random() < 0.5, 1.702, 1.7)


def grid(*shape, dtype=torch.float32, step=0.125):
    """Multiples of a power of 2, so few that sums of their products are exact in any order."""
    return (torch.randint(-8, 9, shape) * step).to(dtype)


def split(pre_SC, form):
    """Gate and up projection of gated experts."""
    return (pre_SC[..., ::2], pre_SC[..., 1::2]) if form.interleaved else pre_SC.chunk(2, -1)


def units(pre_SC, form):
    """Hidden units."""
    gate, up = split(pre_SC, form) if form.gated else (pre_SC, 1)
    if form.activation == CLAMPED:
        gate, up = gate.clamp(max=form.limit), up.clamp(-form.limit, form.limit)
        return (up + 1) * gate * torch.sigmoid(form.alpha * gate)
    return ACTIVATIONS[PLAIN[form.activation]](gate) * up


def largest_units(pre_SC, form):
    """How large hidden units and their derivatives can be, of sums that are as large as they can be."""
    gate, up = split(pre_SC, form) if form.gated else (pre_SC, 1)
    if form.activation == CLAMPED:
        return (up + 1) * gate
    return (gate * gate if PLAIN[form.activation] == "relu2" else gate) * up


def formula(of_units, form, hidden_TD, indices_TK, weights_TK, first, down, first_bias, down_bias):
    """sum_k w_tk f_{i_tk}(x_t), one expert after the other."""
    first, down = (first, down) if form.transposed else (first.mT, down.mT)
    biases = [[0] * len(first) if bias is None else bias.unbind() for bias in (first_bias, down_bias)]
    out_TD = torch.zeros_like(hidden_TD)
    for e, (first_DC, down_FD, first_C, down_D) in enumerate(zip(first.unbind(), down.unbind(), *biases, strict=True)):
        token_S, slot_S = (indices_TK == e).nonzero(as_tuple=True)
        pre_SC = hidden_TD[token_S] @ first_DC + first_C
        out_SD = of_units(pre_SC, form) @ down_FD + down_D
        out_TD = out_TD.index_add(0, token_S, out_SD * weights_TK[token_S, slot_S, None])
    return out_TD


@torch.enable_grad()
def differentiated(of_units, form, tensors, indices_TK, d_out_TD):
    """The formula, and gradients of all tensors that there are."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    out_TD = formula(of_units, form, leaves[0], indices_TK, *leaves[1:])
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(out_TD, there, d_out_TD, allow_unused=True))
    gradients = [None if t is None else next(found) for t in leaves]
    return out_TD.detach(), [t if g is None else g for t, g in zip(leaves, gradients, strict=True)]


def experts_call(rng):
    """Forward with and without what backward needs, in one and in several threads, and backward."""
    dtype, form, (T, K, E, D, F) = rng.choice(DTYPES), form_of(rng), sizes(rng)
    indices_TK, empty_TK = chosen(rng, T, K, E)
    C = 2 * F if form.gated else F
    shapes = [(E, D, C), (E, F, D)] if form.transposed else [(E, C, D), (E, D, F)]
    biases = [(E, C), (E, D)] if rng.random() < 0.5 else []
    experts = [grid(*shape, dtype=dtype, step=0.0625) for shape in shapes + biases]
    for e in set(range(E)) - set(indices_TK.flatten().tolist()):
        for tensor in experts:
            tensor[e] = math.nan
    experts += [None] * (4 - len(experts))
    weights_TK = (2 * torch.rand(T, K) - 1).masked_fill(empty_TK, math.nan)
    hidden_TD, d_out_TD = grid(T, D, dtype=dtype), grid(T, D, dtype=dtype)
    check_negative(rng, (hidden_TD, indices_TK, weights_TK, *experts, *form))
    out_TD, kept_SC = forward(hidden_TD, indices_TK, weights_TK, *experts, *form, True)
    wanted = [rng.random() < 0.8 for _ in range(5)]
    found = backward(d_out_TD, kept_SC, hidden_TD, indices_TK, weights_TK, *experts, *form, wanted)
    torch.set_num_threads(rng.randint(1, 4))
    again_TD, _ = forward(hidden_TD, indices_TK, weights_TK, *experts, *form, False)
    assert torch.equal(out_TD, again_TD), "forward has other bits without what backward needs, or by other threads"
    wide = [None if t is None else t.double() for t in (hidden_TD, weights_TK, *experts)]
    out, gradients = differentiated(units, form, wide, indices_TK, d_out_TD.double())
    largest = [None if t is None else t.abs() for t in wide]
    out_bound, bounds = differentiated(largest_units, form, largest, indices_TK, d_out_TD.double().abs())
    agree("out", out_TD, out, out_bound, ROUNDING[dtype])
    wanted.insert(1, True)
    names = ("hidden", "weights", "first", "down", "first bias", "down bias")
    for name, want, got, gradient, bound in zip(names, wanted, found, gradients, bounds, strict=True):
        if want and gradient is not None:
            agree(f"gradient of {name}", got, gradient, bound, ROUNDING[dtype])


def check_negative(rng, arguments):
    """A negative index is an error."""
    hidden_TD, indices_TK, *others = arguments
    if indices_TK.numel() and rng.random() < 0.05:
        wrong_TK = indices_TK.clone()
        wrong_TK.view(-1)[rng.randrange(wrong_TK.numel())] = -rng.choice(NOWHERE[1:])
        try:
            forward(hidden_TD, wrong_TK, *others, False)
        except ShapeError:
            return
        raise AssertionError("a negative index is no error")


def few_bits(rng):
    """How weights may be quantized."""
    return Quantization(
        bits=rng.choice((8, 4)),
        group_size=rng.choice((32, 64, 128)),
        zero_point=rng.random() < 0.5,
        scale_dtype=rng.choice(("float16", "float32")),
        activation_bits=rng.choice((8, 16)),
    )


def rounding(dtype, how):
    """Of tokens to levels, twice, and of the type."""
    return ROUNDING[dtype] + 2 / how.levels


def largest_of_block(x):
    """In place of each absolute value the largest one of its 32, by which it is rounded."""
    n = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -n % 32)).unflatten(-1, (-1, 32))
    return blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., :n]


def quantized_experts(rng, E, D, F, form, dtype):
    """A module, its struct, and the tensors of the formula."""
    layout = {"gated": form.gated, "transposed": form.transposed, "interleaved": form.interleaved}
    experts = Experts(E, D, F, bias=rng.random() < 0.5, **layout).requires_grad_(False).to(dtype)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.3)
    quantize_experts(experts, few_bits(rng))
    struct = quantized_struct(experts, dtype)
    struct.experts.activation, struct.experts.alpha, struct.experts.limit = form.activation, form.alpha, form.limit
    tensors = [torch.stack([experts.weight(name, e) for e in range(E)]).double() for name in experts.rows]
    biases = [getattr(experts, f"{name}_bias").double() if experts.has_bias else None for name in experts.rows]
    return experts, struct, tensors + biases


def bound_of_quantized(form, hidden_TD, indices_TK, weights_TK, *tensors):
    """How large terms can be that are rounded in blocks."""
    sizes = [None if t is None else t.abs() for t in (weights_TK, *tensors)]

    def of_units(pre_SC, form):
        return largest_of_block(largest_units(pre_SC, form))

    return formula(of_units, form, largest_of_block(hidden_TD.abs()), indices_TK, *sizes)


def quantized_call(rng):
    """Forward of weights of few bits."""
    dtype, form, (T, K, E, D, F) = rng.choice(DTYPES), form_of(rng), sizes(rng)
    indices_TK, empty_TK = chosen(rng, T, K, E)
    experts, struct, tensors = quantized_experts(rng, E, D, F, form, dtype)
    weights_TK = (2 * torch.rand(T, K) - 1).masked_fill(empty_TK, math.nan)
    hidden_TD = torch.randn(T, D).to(dtype)
    outs = []
    for threads in (torch.get_num_threads(), rng.randint(1, 4)):
        out_TD, call = torch.empty_like(hidden_TD), ctypes.byref(struct)
        size = library().mixtura_quantized_workspace(call, T, K, threads)
        blocks = (hidden_TD, indices_TK, weights_TK, out_TD, torch.empty(size, dtype=torch.uint8))
        code = library().mixtura_quantized_forward(call, *(t.data_ptr() for t in blocks), T, K, threads)
        assert code == 0, f"code {code}"
        outs.append(out_TD)
    assert torch.equal(*outs), "other threads, other bits"
    arguments = (form, hidden_TD.double(), indices_TK, weights_TK.double(), *tensors)
    bound_TD = bound_of_quantized(*arguments)
    agree("out", outs[0], formula(units, *arguments), bound_TD, rounding(dtype, experts.quantization))


def agree(name, found, wanted, bound, tolerance):
    """What differs from the formula by more than a part of how large it could be is an error."""
    assert found.shape == wanted.shape, f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}"
    off = ~((found.double() - wanted).abs() <= tolerance * bound + 1e-30)
    if off.any():
        at = tuple(off.nonzero()[0].tolist())
        seen = f"{float(found[at])}, not {float(wanted[at])}; terms may be {float(bound.expand_as(off)[at]):.3g}"
        raise AssertionError(f"{name} is off at {int(off.sum())} of {off.numel()} places, the first one {at}: {seen}")
