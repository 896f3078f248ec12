"""Linear layers of 8 and 4 bits: the library against torch on the same codes, and codes against the weight."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from mixtura.core.errors import NotExpressibleError
from mixtura.nn.backends.native.library import instructions, use_instructions
from mixtura.nn.experts.quantization import Quantization
from mixtura.nn.quantized_linear import CodesError, QuantizedLinear, dequantize_linear, quantize_linear

HOW = st.builds(
    Quantization,
    bits=st.sampled_from([8, 4]),
    group_size=st.sampled_from([32, 64, 128]),
    zero_point=st.booleans(),
    scale_dtype=st.sampled_from(["float16", "float32"]),
    activation_bits=st.just(16),
)


def linear(inputs=100, outputs=70, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs, bias=bias)


def quantized(how, **sizes):
    made = linear(**sizes)
    quantize_linear(made, how)
    return made


@settings(deadline=None, max_examples=60)
@given(how=HOW, inputs=st.integers(1, 200), outputs=st.integers(1, 150), rows=st.integers(0, 70), bias=st.booleans())
def test_the_library_computes_what_the_codes_say(how, inputs, outputs, rows, bias):
    made = quantized(how, inputs=inputs, outputs=outputs, bias=bias)
    x = torch.randn(rows, inputs)
    with torch.no_grad():
        seen, expected = made(x), F.linear(x, made.dequantized(), made.bias)
    assert seen.shape == expected.shape
    assert (seen - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize(("bits", "off"), [(8, 0.01), (4, 0.12)])
def test_codes_are_near_the_weight(bits, off):
    plain, made = linear(), quantized(Quantization(bits=bits))
    assert isinstance(made, QuantizedLinear)
    error = (made.dequantized() - plain.weight).norm() / plain.weight.norm()
    assert 0 < error < off
    stored = sum(parameter.nbytes for name, parameter in made.named_parameters() if name != "bias")
    assert stored <= 80 * 128 * (bits + 0.5) / 8  # filled up to 16 rows and 32 inputs, with a scale of 2 bytes for 32


@pytest.mark.parametrize("isa", instructions()[1])
@pytest.mark.parametrize("levels", [8, 16])
@pytest.mark.parametrize("bits", [8, 4])
def test_every_instruction_set(isa, levels, bits):
    made, x = quantized(Quantization(bits=bits, activation_bits=levels)), torch.randn(9, 100)
    before = instructions()[0]
    try:
        use_instructions(isa)
        with torch.no_grad():
            seen = made(x)
    finally:
        use_instructions(before)
    expected = F.linear(x, made.dequantized(), made.bias)
    assert (seen - expected).norm() < (1e-2 if levels == 8 else 1e-4) * expected.norm()


def test_bits_do_not_depend_on_other_rows():
    made, x = quantized(Quantization()), torch.randn(67, 100)
    with torch.no_grad():
        whole = made(x)
        assert all(torch.equal(made(x[i : i + 1])[0], whole[i]) for i in (0, 5, 63, 66))


def test_gradients_reach_the_input_and_the_bias():
    made, x = quantized(Quantization()), torch.randn(3, 4, 100, requires_grad=True)
    made(x).square().sum().backward()
    plain = linear()
    plain.weight = nn.Parameter(made.dequantized())
    again = x.detach().clone().requires_grad_()
    plain(again).square().sum().backward()
    assert torch.allclose(x.grad, again.grad, atol=1e-5)
    assert torch.allclose(made.bias.grad, plain.bias.grad, atol=1e-4)
    assert dict(made.named_parameters())["weight"].grad is None


def test_types_copies_and_the_way_back():
    made, x = quantized(Quantization()), torch.randn(2, 100)
    half = copy.deepcopy(made).bfloat16()
    assert half.weight_scale.dtype == torch.float16
    with torch.no_grad():
        assert (half(x.bfloat16()).float() - made(x)).norm() < 0.01 * made(x).norm()
    weight = made.dequantized()
    dequantize_linear(made, torch.float32)
    assert type(made) is nn.Linear
    assert torch.equal(made.weight, weight)
    assert {name for name, _ in made.named_parameters()} == {"weight", "bias"}


def test_what_is_no_plain_linear_is_refused():
    made = quantized(Quantization())
    with pytest.raises(NotExpressibleError, match="a plain Linear can be quantized, got QuantizedLinear"):
        quantize_linear(made, Quantization())


READINGS = {
    "cannot use": (lambda w, x: F.linear(x, w), lambda w, x: w @ x.T, lambda w, x: x @ w, lambda w, x: torch.sum(w)),
    "has no": (lambda w, x: w.data, lambda w, x: w.numpy(), lambda w, x: w.to(x.dtype), lambda w, x: w.sum()),
}


@pytest.mark.parametrize(("message", "read"), [(m, read) for m, reads in READINGS.items() for read in reads])
def test_codes_are_not_taken_for_weights(message, read):
    made, plain = quantized(Quantization()), linear()
    weight = made.weight
    assert (weight.dtype, weight.device, weight.shape) == (plain.weight.dtype, plain.weight.device, plain.weight.shape)
    assert made.bfloat16().weight.dtype == torch.bfloat16
    with pytest.raises(CodesError, match=f"codes in place of its weight.*{message}"):
        read(weight, torch.randn(3, 100))


def test_weights_come_back_in_the_type_that_the_layer_has_by_then():
    for convert, dtype in ((nn.Module.float, torch.float32), (nn.Module.bfloat16, torch.bfloat16)):
        before, after = convert(linear()), convert(quantized(Quantization()))
        quantize_linear(before, Quantization())
        for made in (before, after):
            dequantize_linear(made)
            assert made.weight.dtype == made.bias.dtype == dtype
