"""Random calls of the native library, to be run on one that was built with sanitizers: ``make sanitize``.

Every tensor is a block of its own on the heap, so that AddressSanitizer sees a read or write beside it. Results are
compared with the formula in float64, those of decode steps by ``accelerate`` with the modules.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import collections
import copy
import itertools
import random
import sys
import time
from pathlib import Path

import torch

from mixtura.nn import Experts
from mixtura.nn.backends import naive_backend
from mixtura.nn.backends.native import instructions, library, native_backend, use_instructions
from mixtura.nn.backends.native.quantized import quantized_native_backend
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import dequantize_experts, quantize_experts
from pico import pico, tokens

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "linear")
DTYPES = (torch.float32, torch.bfloat16)
FAMILIES = ("llama", "qwen2", "qwen3", "olmoe", "mixtral")


def layouts():
    """Every combination that there is."""
    for gated, bias, transposed, interleaved in itertools.product((True, False), repeat=4):
        if gated or not interleaved:
            yield {"gated": gated, "bias": bias, "transposed": transposed, "interleaved": interleaved}


def sizes(rng):
    """T, K, E, D, F: mostly odd and small; now and then many tokens of one expert, or rows of many lines."""
    T, K, E = rng.choice((0, 1, 2, 3, rng.randint(4, 40), rng.randint(190, 420))), rng.randint(1, 4), rng.randint(1, 9)
    D, F = (rng.choice((rng.randint(1, 70), rng.randint(1, 9) * 16, rng.randint(257, 300))) for _ in range(2))
    return T, K, E, D, F


def drawn(rng, layout, dtype):
    """Experts, and tokens, indices of which some are empty, and weights for them."""
    T, K, E, D, F = sizes(rng)
    experts = Experts(E, D, F, activation=rng.choice(ACTIVATIONS), **layout)
    experts.reset_parameters(0.3)
    indices_TK = torch.randint(0, E + rng.choice((1, 3)), (T, K))
    if rng.random() < 0.2:
        indices_TK.clamp_(max=0)
    return experts.to(dtype), torch.randn(T, D).to(dtype), indices_TK, torch.rand(T, K)


def gradients(backend, experts, hidden_TD, indices_TK, weights_TK):
    """Output, and gradients of everything."""
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), *experts.parameters()]
    out_TD = backend(experts, leaves[0], indices_TK, leaves[1])
    found = torch.autograd.grad(out_TD.sum() * 0.5, leaves, allow_unused=True)
    return [out_TD.detach()] + [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]


def experts_call(rng, layout):
    """Forward and backward."""
    dtype = rng.choice(DTYPES)
    experts, hidden_TD, indices_TK, weights_TK = drawn(rng, layout, dtype)
    with torch.no_grad():
        native_backend(experts, hidden_TD, indices_TK, weights_TK)
    found = gradients(native_backend, experts, hidden_TD, indices_TK, weights_TK)
    wide = copy.deepcopy(experts).double()
    wanted = gradients(naive_backend, wide, hidden_TD.double(), indices_TK, weights_TK.double())
    agree(found, wanted, 1e-4 if dtype == torch.float32 else 4e-2)


def quantized_call(rng, layout):
    """Forward, with 16 bits a token: the rounding of 8 is no error of ours."""
    dtype = rng.choice(DTYPES)
    experts, hidden_TD, indices_TK, weights_TK = drawn(rng, layout, dtype)
    bits, group, zero, scales = rng.choice((8, 4)), rng.choice((32, 64, 128)), rng.random() < 0.5, rng.random() < 0.5
    how = Quantization(bits=bits, group_size=group, zero_point=zero, scale_dtype="float16" if scales else "float32")
    quantize_experts(experts.requires_grad_(False), how)
    with torch.no_grad():
        found = quantized_native_backend(experts, hidden_TD, indices_TK, weights_TK)
        wide = copy.deepcopy(experts)
        dequantize_experts(wide, torch.float64)
        wanted = naive_backend(wide.double(), hidden_TD.double(), indices_TK, weights_TK.double())
    agree([found], [wanted], 4e-2)


def steps_call(rng, _layout):
    """Generation of a small model by a plan."""
    from mixtura.hf.accelerate import accelerate, acceleration

    head, key_value_heads, dtype = (
        rng.choice((16, 32)),
        rng.choice((1, 2, 4)),
        rng.choice(DTYPES),
    )
    options = {"hidden_size": 4 * head, "head_dim": head, "num_key_value_heads": key_value_heads}
    family, rows = rng.choice(FAMILIES), rng.randint(1, 5)
    options |= {"intermediate_size": rng.randint(9, 90), "vocab_size": rng.randint(64, 90), "sliding_window": None}
    model = pico(family, **options).to(dtype)
    ids = tokens(rows, rng.randint(1, 12))
    mask = torch.ones_like(ids)
    mask[0, : rng.randrange(ids.shape[1])] = 0
    accelerate(model, bits=rng.choice((None, None, 8, 4)))
    model.generate(ids, attention_mask=mask, max_new_tokens=rng.randint(2, 70), do_sample=False, eos_token_id=None)
    assert acceleration(model)["planned"], acceleration(model)


CALLS = {"experts": experts_call, "quantized": quantized_call, "steps": steps_call}
IN_TURN = ["steps"] + ["experts"] * 10 + ["quantized"] * 10


def agree(found, wanted, tolerance):
    """What differs from the formula is an error."""
    for one, other in zip(found, wanted, strict=True):
        if other.numel():
            worst, scale = float((one.double() - other).abs().max()), max(1e-3, float(other.abs().max()))
            assert worst <= tolerance * scale, f"off by {worst / scale}"


def main():
    """Usage: fuzz.py LIBRARY SECONDS [SEED]."""
    path, seconds, seed = Path(sys.argv[1]).resolve(), float(sys.argv[2]), int((sys.argv[3:] or [0])[0])
    library.PATH = path
    end, done = time.monotonic() + seconds, collections.Counter()
    if library.why_no_library():
        sys.exit(library.why_no_library())
    names = instructions()[1]
    plans = itertools.cycle(itertools.product(layouts(), names, IN_TURN))
    for number in itertools.count():
        if time.monotonic() > end:
            break
        layout, name, kind = next(plans)
        rng = random.Random(f"{seed} {number}")
        torch.manual_seed(rng.randint(0, 1 << 30))
        torch.set_num_threads(rng.randint(1, 3))
        use_instructions(name)
        try:
            CALLS[kind](rng, layout)
        except Exception as error:
            raise SystemExit(f"call {number} of seed {seed}, {kind} on {name}, {layout}: {error!r}") from error
        done[kind] += 1
    print(f"{dict(done)} calls on {', '.join(names)}: nothing found")


if __name__ == "__main__":
    main()
