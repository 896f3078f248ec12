"""Experts of few bits: the modules, and the library against the formula on what their codes mean.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import copy
import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn import Experts
from mixtura.nn.backends import naive_backend
from mixtura.nn.backends.native import instructions, use_instructions
from mixtura.nn.backends.native.quantized import QuantizedStruct, quantized_native_backend, why_not_quantized
from mixtura.nn.experts.feed_forward import view_expert
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.experts.quantized import (
    QuantizedExperts,
    dequantize_experts,
    dequantizing_backend,
    quantize_experts,
)

ISAS = instructions()[1]
LAYOUTS = [
    {"gated": gated, "bias": bias, "transposed": transposed, "interleaved": interleaved}
    for gated in (True, False)
    for bias in (True, False)
    for transposed in (True, False)
    for interleaved in (True, False)
    if gated or not interleaved
]
EXACT = 2e-5  # tokens of 16 bits
ROUGH = 1e-2  # tokens of 8 bits, or in bfloat16


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    use_instructions(ISAS[0])


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def experts(E, D, F, how=None, dtype=torch.float32, **options):
    made = Experts(E, D, F, **options).requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=i) * 0.3)
    made = made.to(dtype)
    if how is not None:
        quantize_experts(made, how)
    return made


def call(T, K, E, D, dtype=torch.float32, seed=0):
    """Tokens, indices of which some are empty, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype)
    indices_TK = torch.randint(0, E + 1, (T, K), generator=generator)
    return hidden_TD, indices_TK, torch.rand(T, K, generator=generator)


def expected(module, hidden_TD, indices_TK, weights_TK):
    """The formula in float64 on the weights that the codes stand for."""
    return naive_backend(wide(module), hidden_TD.double(), indices_TK, weights_TK.double())


def wide(module):
    module = copy.deepcopy(module)
    dequantize_experts(module, torch.float64)
    return module.double().requires_grad_(False)


def reach(module, hidden_TD, indices_TK, weights_TK):
    """The largest output if all summands had one sign: what errors are a share of, also where summands cancel."""
    module = wide(module)
    for parameter in module.parameters():
        parameter.abs_()
    shape, axis = ((2, -1), -2) if module.is_concatenated else ((-1, 2), -1)
    module._apply_gate, module.act_fn = lambda x: x.unflatten(-1, shape).prod(axis), lambda x: x
    return naive_backend(module, hidden_TD.double().abs(), indices_TK, weights_TK.double()).amax().clamp(min=1e-3)


def check(module, arguments, tolerance, backend=quantized_native_backend):
    out_TD, wanted_TD = backend(module, *arguments), expected(module, *arguments)
    assert out_TD.shape == wanted_TD.shape
    assert out_TD.dtype == arguments[0].dtype
    if len(out_TD):
        assert ((out_TD.double() - wanted_TD).abs() <= tolerance * reach(module, *arguments)).all()


HOWS = st.builds(
    Quantization,
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64, 128]),
    zero_point=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    activation_bits=st.sampled_from([8, 16]),
)


@st.composite
def shapes(draw):
    return [draw(st.integers(low, high)) for low, high in ((0, 23), (1, 4), (1, 6), (1, 150), (1, 150))]


# Modules


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: "-".join(k for k, v in options.items() if v) or "plain")
def test_weights_come_back_in_their_own_layout(layout):
    plain, quantized = experts(3, 40, 24, **layout), experts(3, 40, 24, Quantization(8), **layout)
    assert isinstance(quantized, QuantizedExperts)
    assert isinstance(quantized, Experts)
    dequantize_experts(quantized, torch.float32)
    assert type(quantized) is Experts
    assert quantized.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(quantized.state_dict()[name], tensor, rtol=0, atol=0 if "bias" in name else 0.01)


@pytest.mark.parametrize(("bits", "size", "zero_point"), [(8, 32, False), (4, 32, False), (4, 128, True)])
def test_memory_is_what_the_bits_say(bits, size, zero_point):
    weights = 3 * 64 * 256 * 2
    module = experts(2, 64, 256, Quantization(bits, size, zero_point))
    bits_a_group = 16 + (8 if zero_point else 0)
    per_weight = {64: bits + bits_a_group / min(size, 64), 256: bits + bits_a_group / size}
    wanted = weights * (2 / 3 * per_weight[64] + 1 / 3 * per_weight[256]) / 8
    assert sum(p.nbytes for p in module.parameters()) == wanted


def test_scales_keep_their_type_and_biases_do_not():
    module = experts(2, 40, 24, Quantization(4, scale_dtype="float32", zero_point=True), bias=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = module.bfloat16().state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor.bfloat16() if name.endswith("bias") else tensor)
        assert after[name].dtype == (torch.bfloat16 if name.endswith("bias") else tensor.dtype)
    moved = module.to("meta")
    assert {t.device.type for t in moved.state_dict().values()} == {"meta"}
    assert moved.down_proj_scale.dtype == torch.float32


def test_the_form_on_the_meta_device_is_that_of_the_values():
    for how in (Quantization(8, 64), Quantization(4, 128, True, "float32")):
        real = experts(2, 40, 24, how, bias=True, transposed=True)
        with torch.device("meta"):
            meta = Experts(2, 40, 24, bias=True, transposed=True)
        quantize_experts(meta, how)
        assert {n: (t.shape, t.dtype) for n, t in meta.state_dict().items()} == {
            n: (t.shape, t.dtype) for n, t in real.state_dict().items()
        }


def test_what_is_quantized_is_neither_quantized_again_nor_viewed_as_weights():
    module = experts(2, 40, 24, Quantization())
    with pytest.raises(NotExpressibleError, match="experts are quantized already"):
        quantize_experts(module, Quantization())
    with pytest.raises(NotExpressibleError, match="experts are quantized"):
        view_expert(module, 0)


# The library against the formula


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: "-".join(k for k, v in options.items() if v) or "plain")
@settings(max_examples=10, deadline=None)
@given(shape=shapes(), how=HOWS, half=st.booleans())
def test_every_layout_shape_and_form(isa, layout, shape, how, half):
    (T, K, E, D, F), dtype = shape, torch.bfloat16 if half else torch.float32
    use_instructions(isa)
    module = experts(E, D, F, how, dtype, **layout)
    check(module, call(T, K, E, D, dtype), ROUGH if half or how.levels == 127 else EXACT)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_height_of_a_tile(isa, bits, activation_bits):
    use_instructions(isa)
    for zero_point in (False, True):
        module = experts(1, 96, 96, Quantization(bits, 64, zero_point, activation_bits=activation_bits))
        for T in (1, 2, 3, 4, 5, 6, 7, 8, 9, 40):
            hidden_TD, _, weights_TK = call(T, 1, 1, 96, seed=T)
            arguments = (hidden_TD, torch.zeros(T, 1, dtype=torch.int64), weights_TK)
            check(module, arguments, ROUGH if activation_bits == 8 else EXACT)


def rounded(x_TK, levels=127):
    """Tokens in blocks of 32 as the library rounds them."""
    blocks = torch.nn.functional.pad(x_TK.float(), (0, -x_TK.shape[1] % 32)).view(len(x_TK), -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (levels / largest)).round() * (largest / levels)).view(len(x_TK), -1)[:, : x_TK.shape[1]]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_of_8_bits_are_rounded_in_blocks_of_32_and_nothing_else_is_lost(isa, bits):
    use_instructions(isa)
    module = experts(1, 80, 72, Quantization(bits, activation_bits=8), gated=False, activation="linear")
    hidden_TD = drawn(9, 80)
    inner_TF = rounded(hidden_TD) @ module.weight("up_proj", 0).T
    wanted_TD = rounded(inner_TF) @ module.weight("down_proj", 0).T
    found_TD = quantized_native_backend(module, hidden_TD, torch.zeros(9, 1, dtype=torch.int64), torch.ones(9, 1))
    apart = (found_TD - wanted_TD).abs() / wanted_TD.abs().max()
    assert apart.median() < 1e-5
    assert apart.max() < 5e-3  # a unit that lies between two levels


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_comes_out_the_same_whatever_is_beside_it(isa, activation_bits, bits):
    """To the bit: alone as in generation, among others as in a prompt, on one thread or two."""
    use_instructions(isa)
    module = experts(4, 96, 80, Quantization(bits, activation_bits=activation_bits))
    hidden_TD, indices_TK, weights_TK = call(43, 2, 4, 96)
    together_TD = quantized_native_backend(module, hidden_TD, indices_TK, weights_TK)
    for t in range(43):
        alone = quantized_native_backend(module, hidden_TD[t : t + 1], indices_TK[t : t + 1], weights_TK[t : t + 1])
        assert torch.equal(alone[0], together_TD[t])
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(quantized_native_backend(module, hidden_TD, indices_TK, weights_TK), together_TD)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_all_instruction_sets_give_the_same_but_for_fused_roundings(activation_bits, bits):
    module = experts(4, 96, 80, Quantization(bits, activation_bits=activation_bits), activation="relu")
    arguments = call(17, 2, 4, 96)
    found = []
    for isa in ISAS:
        use_instructions(isa)
        found.append(quantized_native_backend(module, *arguments))
    for other in found[1:]:
        apart = (other - found[0]).abs() / found[0].abs().max()
        assert apart.median() < 1e-6
        assert apart.max() < (5e-3 if activation_bits == 8 else 5e-5)


def test_sixteen_bits_of_tokens_are_closer_than_eight_and_the_default_says_which():
    errors = {}
    for bits, activation_bits in itertools.product((8, 4), (8, 16)):
        module = experts(2, 128, 128, Quantization(bits, activation_bits=activation_bits))
        arguments = call(32, 2, 2, 128)
        wanted_TD = expected(module, *arguments)
        errors[bits, activation_bits] = float((quantized_native_backend(module, *arguments) - wanted_TD).norm())
    assert errors[8, 16] < 0.02 * errors[8, 8]
    assert (Quantization(8).levels, Quantization(4).levels) == (32767, 127)


def test_empty_slots_and_padding_are_never_read():
    module = experts(3, 40, 24, Quantization())
    hidden_TD, _, weights_TK = call(4, 2, 3, 40)
    hidden_TD[1] = torch.nan
    weights_TK[1] = torch.nan
    indices_TK = torch.tensor([[0, 2], [3, 9], [1, 3], [3, 3]])
    for backend in (quantized_native_backend, dequantizing_backend):
        out_TD = backend(module, hidden_TD, indices_TK, weights_TK)
        assert out_TD.isfinite().all()
        assert not out_TD[[1, 3]].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_what_is_not_finite_makes_its_own_token_nan(isa, activation_bits):
    use_instructions(isa)
    module = experts(2, 70, 40, Quantization(activation_bits=activation_bits))
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (3, 69):
            hidden_TD, indices_TK, weights_TK = call(3, 1, 1, 70)
            hidden_TD[1, place] = value
            out_TD = quantized_native_backend(module, hidden_TD, indices_TK * 0, weights_TK)
            assert out_TD[1].isnan().all()
            assert out_TD[[0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e30])
def test_tokens_of_any_size(size):
    module = experts(1, 64, 32, Quantization(), gated=False, activation="linear")
    hidden_TD, _, weights_TK = call(3, 1, 1, 64)
    out_TD = quantized_native_backend(module, hidden_TD * size, torch.zeros(3, 1, dtype=torch.int64), weights_TK)
    wanted_TD = expected(module, hidden_TD, torch.zeros(3, 1, dtype=torch.int64), weights_TK) * size
    torch.testing.assert_close(out_TD.double(), wanted_TD, rtol=1e-3, atol=max(1e-3 * size, 1e-29))


def gpt_oss():
    from transformers import AutoModelForCausalLM, GptOssConfig

    sizes = {"hidden_size": 64, "intermediate_size": 40, "num_local_experts": 4, "vocab_size": 64, "head_dim": 8}
    config = GptOssConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)
    module = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts.requires_grad_(False)
    for i, parameter in enumerate(module.parameters()):
        parameter.copy_(drawn(*parameter.shape, seed=i))
    return module


@pytest.mark.parametrize("isa", ISAS)
def test_the_clamped_gate_of_gpt_oss(isa):
    use_instructions(isa)
    for bits in (8, 4):
        module, arguments = gpt_oss(), call(9, 2, 4, 64)
        quantize_experts(module, Quantization(bits, activation_bits=16))
        assert why_not_quantized(module, arguments[0], arguments[2]) == ""
        check(module, arguments, EXACT)
        assert torch.equal(module(*arguments), quantized_native_backend(module, *arguments))


def test_tokens_and_weights_may_be_views_and_the_weights_a_memory_map(tmp_path):
    module = experts(3, 40, 24, Quantization(4, zero_point=True))
    hidden_TD, indices_TK, weights_TK = call(6, 2, 3, 40)
    wanted = quantized_native_backend(module, hidden_TD, indices_TK, weights_TK)
    for name, tensor in module.named_parameters():
        path = tmp_path / name
        path.write_bytes(tensor.numpy().tobytes())
        tensor.data = torch.from_file(str(path), size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    strided = torch.stack([hidden_TD, hidden_TD], 1)[:, 0]
    assert torch.equal(quantized_native_backend(module, strided, indices_TK.int(), weights_TK.double()), wanted)


# What the library leaves to torch


REFUSED = {
    "without autocast": lambda m, h: (m, h.double()),
    "weights must be contiguous": lambda m, h: (_strided(m), h),
    "of the experts' width": lambda m, h: (m, h[:, :-1]),
    "it runs on the CPU": lambda m, h: (m, h.to("meta")),
    "no gradients of quantized experts": lambda m, h: (m, h.requires_grad_()),
}


def _strided(module):
    module.down_proj.data = torch.cat([module.down_proj, module.down_proj], 2)[..., ::2]
    return module


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(reason):
    hidden_TD, indices_TK, weights_TK = call(3, 2, 3, 40)
    module, hidden_TD = REFUSED[reason](experts(3, 40, 24, Quantization()), hidden_TD)
    with pytest.raises(NotExpressibleError, match=reason):
        quantized_native_backend(module, hidden_TD, indices_TK, weights_TK)


def test_wrong_arguments_are_refused():
    hidden_TD, indices_TK, weights_TK = call(3, 2, 3, 40)
    module = experts(3, 40, 24, Quantization())
    with pytest.raises(ShapeError, match="indices_TK must be at least 0, got -1"):
        quantized_native_backend(module, hidden_TD, indices_TK * 0 - 1, weights_TK)
    with pytest.raises(ShapeError, match=r"must be \(T, D\), \(T, K\), \(T, K\)"):
        quantized_native_backend(module, hidden_TD, indices_TK[:2], weights_TK)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float16, {}),
        (torch.float32, {"activation": "tanh"}),
        (torch.bfloat16, {"bias": True}),
    ],
    ids=str,
)
def test_torch_computes_what_the_library_does_not(dtype, options):
    module = experts(3, 40, 24, Quantization(4), **options).to(dtype)
    arguments = call(7, 2, 3, 40, dtype)
    check(module, arguments, 3e-2 if dtype.itemsize == 2 else 1e-5, type(module).forward)


def test_gradients_of_tokens_weights_of_slots_and_biases():
    """Codes have none: adapters and routers are trained beside them."""
    module = experts(3, 40, 24, Quantization(4), bias=True)
    plain = copy.deepcopy(module)
    dequantize_experts(plain, torch.float32)
    hidden_TD, indices_TK, weights_TK = call(7, 2, 3, 40)
    found = []
    for of, compute in ((module, module), (plain, lambda *a: naive_backend(plain, *a))):
        biases = [p.requires_grad_() for n, p in of.named_parameters() if n.endswith("bias")]
        leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), *biases]
        out_TD = compute(leaves[0], indices_TK, leaves[1])
        found.append((out_TD, *torch.autograd.grad(out_TD.square().sum(), leaves)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_struct_is_as_long_as_in_c():
    assert ctypes.sizeof(QuantizedStruct) == 88 + 2 * 3 * 8 + 4 * 4
