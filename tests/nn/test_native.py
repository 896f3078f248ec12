"""The library against the formula: every layout, activation, instruction set, odd shape; what it refuses; its bits.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from mixtura.core.errors import NotExpressibleError, ShapeError, UnknownNameError
from mixtura.nn import Experts
from mixtura.nn.backends import naive_backend, sorted_backend
from mixtura.nn.backends.automatic import automatic_backend
from mixtura.nn.backends.native import instructions, native_backend, use_instructions, why_not
from mixtura.nn.backends.native.library import PATH

ISAS = instructions()[1]
LAYOUTS = [
    {"gated": gated, "bias": bias, "transposed": transposed, "interleaved": interleaved}
    for gated in (True, False)
    for bias in (True, False)
    for transposed in (True, False)
    for interleaved in (True, False)
    if gated or not interleaved
]

ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "linear")


@pytest.fixture(autouse=True)
def best_instructions():
    yield
    use_instructions(ISAS[0])


def experts(E, D, F, dtype=torch.float32, **options):
    made = Experts(E, D, F, **options).requires_grad_(False)
    for i, parameter in enumerate(made.parameters()):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.3)
    return made.to(dtype)


def call(T, K, E, D, dtype=torch.float32, seed=0):
    """Tokens, indices of which some are empty, weights."""
    generator = torch.Generator().manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=generator).to(dtype)
    indices_TK = torch.randint(0, E + 1, (T, K), generator=generator)
    return hidden_TD, indices_TK, torch.rand(T, K, generator=generator)


def expected(module, hidden_TD, indices_TK, weights_TK):
    """The formula in float64 on the same weights."""
    wide = Experts(module.num_experts, module.dim, module.width, **OPTIONS[module]).double().requires_grad_(False)
    wide.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    wide.act_fn = module.act_fn
    return naive_backend(wide, hidden_TD.double(), indices_TK, weights_TK.double())


OPTIONS = {}


def check(module, arguments, tolerance):
    out_TD, wanted_TD = native_backend(module, *arguments).double(), expected(module, *arguments)
    scale = wanted_TD.abs().max().clamp(min=1e-3) if wanted_TD.numel() else 1
    assert out_TD.shape == wanted_TD.shape
    assert ((out_TD - wanted_TD).abs() <= tolerance * scale).all()


@st.composite
def shapes(draw):
    return [draw(st.integers(low, high)) for low, high in ((0, 23), (1, 4), (1, 6), (1, 75), (1, 75))]


def test_the_library_was_built_here():
    """All others of this file say nothing without it."""
    assert PATH.exists()
    assert ISAS[-1] == "portable"
    assert instructions()[0] == ISAS[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: "-".join(k for k, v in options.items() if v) or "plain")
@settings(max_examples=8, deadline=None)
@given(shape=shapes(), half=st.booleans())
def test_every_layout_and_shape(isa, layout, shape, half):
    (T, K, E, D, F), dtype = shape, torch.bfloat16 if half else torch.float32
    use_instructions(isa)
    module = experts(E, D, F, dtype, **layout)
    OPTIONS[module] = layout
    check(module, call(T, K, E, D, dtype), 2e-2 if half else 2e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 13, 16, 40])
def test_every_height_of_a_tile(isa, tokens):
    use_instructions(isa)
    for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        module = experts(1, 64, 64, dtype)
        OPTIONS[module] = {}
        hidden_TD, _, weights_TK = call(tokens, 1, 1, 64, dtype)
        check(module, (hidden_TD, torch.zeros(tokens, 1, dtype=torch.int64), weights_TK), tolerance)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "name", ["silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "linear"]
)
def test_every_activation_over_its_range(isa, gated, name):
    use_instructions(isa)
    module = experts(2, 16, 40, gated=gated, activation=name)
    OPTIONS[module] = {"gated": gated, "activation": name}
    hidden_TD, indices_TK, weights_TK = call(9, 2, 2, 16)
    check(module, (hidden_TD * 20, indices_TK, weights_TK), 2e-5)


def test_an_activation_that_it_does_not_know_is_left_to_torch():
    module = experts(2, 8, 8, activation="tanh")
    arguments = call(5, 2, 2, 8)
    assert why_not(module, arguments[0]) == "the activation is not one of its own"
    assert torch.equal(automatic_backend(module, *arguments), sorted_backend(module, *arguments))


def gpt_oss():
    from transformers import AutoModelForCausalLM, GptOssConfig

    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_local_experts": 4, "vocab_size": 64, "head_dim": 8}
    config = GptOssConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)
    module = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts.requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=2.0)
    return module


def test_the_clamped_gate_of_gpt_oss():
    module, arguments = gpt_oss(), call(9, 2, 4, 32)
    assert why_not(module, arguments[0]) == ""
    wanted_TD = naive_backend(module, *arguments)
    torch.testing.assert_close(native_backend(module, *arguments), wanted_TD, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_token_comes_out_the_same_beside_a_few_others(isa, dtype):
    """To the bit, while no expert has 96 slots: alone as in generation, or among others."""
    use_instructions(isa)
    module = experts(8, 96, 80, dtype)
    hidden_TD, indices_TK, weights_TK = call(200, 2, 8, 96, dtype)
    assert 40 < indices_TK.flatten().bincount()[:8].max() < 96
    together_TD = native_backend(module, hidden_TD, indices_TK, weights_TK)
    for t in range(0, 200, 7):
        alone = native_backend(module, hidden_TD[t : t + 1], indices_TK[t : t + 1], weights_TK[t : t + 1])
        assert torch.equal(alone[0], together_TD[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("tokens", [31, 500])
def test_the_same_bits_on_any_number_of_threads(isa, dtype, tokens):
    """With few tokens an expert and with many, or both in one call."""
    use_instructions(isa)
    module, threads = experts(6, 96, 300, dtype), torch.get_num_threads()
    arguments = call(tokens, 2, 6, 96, dtype)
    arguments[1][arguments[1] == 5] = 6
    arguments[1][0] = 5  # an expert with one token beside those with many
    outputs = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            outputs.append(native_backend(module, *arguments))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: "-".join(k for k, v in options.items() if v) or "plain")
@pytest.mark.parametrize("half", [False, True])
def test_many_tokens(isa, layout, half):
    """Several tasks and tiles of every layout, and an expert with few tokens beside."""
    use_instructions(isa)
    dtype = torch.bfloat16 if half else torch.float32
    module = experts(3, 83, 277, dtype, **layout)
    OPTIONS[module] = layout
    hidden_TD, indices_TK, weights_TK = call(240, 2, 3, 83, dtype)
    indices_TK[indices_TK == 2] = 3
    indices_TK[5] = 2
    check(module, (hidden_TD, indices_TK, weights_TK), 2e-2 if half else 2e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_more_tokens_than_are_packed_at_once(isa):
    use_instructions(isa)
    module = experts(1, 1 << 13, 3)
    OPTIONS[module] = {}
    hidden_TD, _, weights_TK = call(130, 1, 1, 1 << 13)
    check(module, (hidden_TD, torch.zeros(130, 1, dtype=torch.int64), weights_TK), 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_expert_with_more_slots_than_there_are_tokens(dtype):
    module = experts(3, 40, 24, dtype)
    OPTIONS[module] = {}
    hidden_TD, _, weights_TK = call(12, 16, 3, 40, dtype)
    check(
        module,
        (hidden_TD, torch.ones(12, 16, dtype=torch.int64), weights_TK),
        3e-2 if dtype == torch.bfloat16 else 2e-5,
    )


def test_empty_slots_and_padding_are_never_read():
    module = experts(3, 16, 8)
    hidden_TD, _, weights_TK = call(4, 2, 3, 16)
    hidden_TD[1] = torch.nan
    weights_TK[1] = torch.nan
    indices_TK = torch.tensor([[0, 2], [3, 9], [1, 3], [3, 3]])
    out_TD = native_backend(module, hidden_TD, indices_TK, weights_TK)
    assert out_TD.isfinite().all()
    assert not out_TD[[1, 3]].any()


def test_nan_and_infinity_go_through():
    module = experts(2, 16, 8)
    hidden_TD, indices_TK, weights_TK = call(3, 1, 1, 16)
    indices_TK.zero_()
    hidden_TD[1, 3] = torch.nan
    out_TD = native_backend(module, hidden_TD, indices_TK, weights_TK)
    assert out_TD[1].isnan().all()
    assert out_TD[[0, 2]].isfinite().all()


def test_tokens_and_weights_may_be_views_and_the_weights_a_memory_map(tmp_path):
    module = experts(3, 16, 8)
    hidden_TD, indices_TK, weights_TK = call(6, 2, 3, 16)
    wanted = native_backend(module, hidden_TD, indices_TK, weights_TK)
    for name, tensor in module.named_parameters():
        path = tmp_path / name
        path.write_bytes(tensor.numpy().tobytes())
        tensor.data = torch.from_file(str(path), shared=False, size=tensor.numel()).view(tensor.shape)
    strided = torch.stack([hidden_TD, hidden_TD], 1)[:, 0]
    assert torch.equal(native_backend(module, strided, indices_TK.int(), weights_TK.double()), wanted)


REFUSED = {
    "must be float32 or bfloat16": lambda m, h: (m.double(), h.double()),
    "weights must be contiguous": lambda m, h: (_strided(m), h),
    "of the experts' width": lambda m, h: (m, h[:, :-1]),
    "it runs on the CPU": lambda m, h: (m, h.to("meta")),
}


def _strided(module):
    module.down_proj = nn.Parameter(module.down_proj.transpose(1, 2).contiguous().transpose(1, 2), requires_grad=False)
    return module


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_cannot_do_is_refused_with_the_reason(reason):
    hidden_TD, indices_TK, weights_TK = call(3, 2, 3, 16)
    module, hidden_TD = REFUSED[reason](experts(3, 16, 8), hidden_TD)
    with pytest.raises(NotExpressibleError, match=reason):
        native_backend(module, hidden_TD, indices_TK, weights_TK)


def test_wrong_arguments_are_refused():
    hidden_TD, indices_TK, weights_TK = call(3, 2, 3, 16)
    module = experts(3, 16, 8)
    with pytest.raises(ShapeError, match="indices_TK must be at least 0, got -1"):
        native_backend(module, hidden_TD, indices_TK - 4 * (indices_TK == 3) - (indices_TK == 0).long(), weights_TK)
    with pytest.raises(ShapeError, match=r"must be \(T, D\), \(T, K\), \(T, K\)"):
        native_backend(module, hidden_TD, indices_TK[:2], weights_TK)
    with pytest.raises(ShapeError, match=r"must be \(T, D\), \(T, K\), \(T, K\)"):
        native_backend(module, hidden_TD, indices_TK, weights_TK[:, :1])
    with pytest.raises(UnknownNameError, match="did you mean 'portable'"):
        use_instructions("potable")


def test_the_struct_is_as_long_as_in_c():
    from mixtura.nn.backends.native.library import ExpertsStruct

    assert ctypes.sizeof(ExpertsStruct) == 3 * 8 + 4 * 8 + 5 * 4 + 2 * 4 + 4  # padded to eight bytes


def gradients(backend, module, hidden_TD, indices_TK, weights_TK):
    """Of a fixed function of the output: of tokens, weights of slots, and every parameter."""
    leaves = [hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_(), *module.parameters()]
    out_TD = backend(module, leaves[0], indices_TK, leaves[1])
    probe_TD = torch.linspace(-1, 2, out_TD.numel()).view_as(out_TD)
    found = torch.autograd.grad((out_TD * probe_TD).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]


def check_gradients(module, arguments, tolerance):
    found = gradients(native_backend, module, *arguments)
    wide = Experts(module.num_experts, module.dim, module.width, **OPTIONS[module]).double()
    wide.load_state_dict({name: p.double() for name, p in module.state_dict().items()})
    hidden_TD, indices_TK, weights_TK = arguments
    wanted = gradients(naive_backend, wide, hidden_TD.double(), indices_TK, weights_TK.double())
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        scale = other.abs().max().clamp(min=1e-3) if other.numel() else 1
        assert ((one.double() - other).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda options: "-".join(k for k, v in options.items() if v) or "plain")
@settings(max_examples=6, deadline=None)
@given(shape=shapes(), half=st.booleans())
def test_gradients_of_every_layout_and_shape(isa, layout, shape, half):
    (T, K, E, D, F), dtype = shape, torch.bfloat16 if half else torch.float32
    use_instructions(isa)
    module = experts(E, D, F, dtype, **layout).requires_grad_(True)
    OPTIONS[module] = layout
    check_gradients(module, call(T, K, E, D, dtype), 3e-2 if half else 5e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gradients_of_every_activation(isa, gated, name):
    use_instructions(isa)
    module = experts(2, 16, 40, gated=gated, activation=name).requires_grad_(True)
    OPTIONS[module] = {"gated": gated, "activation": name}
    hidden_TD, indices_TK, weights_TK = call(9, 2, 2, 16)
    check_gradients(module, (hidden_TD * 5, indices_TK, weights_TK), 5e-5)


def test_gradients_of_the_clamped_gate_of_gpt_oss():
    module = gpt_oss().requires_grad_(True)
    arguments = call(9, 2, 4, 32)
    found, wanted = (gradients(backend, module, *arguments) for backend in (native_backend, naive_backend))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_only_what_is_wanted_gets_a_gradient_and_idle_experts_get_zeros():
    module = experts(3, 16, 8)
    module.down_proj.requires_grad_(True)
    hidden_TD, indices_TK, weights_TK = call(6, 1, 1, 16)
    native_backend(module, hidden_TD, indices_TK * 0 + 1, weights_TK).sum().backward()
    assert module.gate_up_proj.grad is None
    assert module.down_proj.grad[1].any()
    assert not module.down_proj.grad[[0, 2]].any()


def test_gradients_are_the_same_for_any_number_of_threads():
    module = experts(4, 96, 80).requires_grad_(True)
    arguments, threads = call(31, 2, 4, 96), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(gradients(native_backend, module, *arguments))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
