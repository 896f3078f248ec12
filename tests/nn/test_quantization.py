"""Weights of few bits: how good the codes are, and how they lie. N rows of K weights."""

import itertools

import pytest
import torch

from mixtura.core.errors import OptionError
from mixtura.nn.experts.quantization import Quantization, dequantize, quantize


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def relative_error(weight_NK, how):
    (found_NK,) = dequantize(quantize(weight_NK, how), (len(weight_NK),), weight_NK.shape[1], how)
    return float((found_NK - weight_NK).norm() / weight_NK.norm())


def test_four_bits_are_better_than_the_rule_of_q4_0_at_equal_bits():
    """Q4_0 gives the value that is farthest from 0 the lowest code; a scale in float16 for 32 weights, as here."""
    weight_NK = drawn(64, 256)
    groups = weight_NK.view(64, -1, 32)
    scale = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)) / -8
    plain = ((groups / scale).round().clamp(-8, 7) * scale.half().float()).view_as(weight_NK)
    of_plain = float((plain - weight_NK).norm() / weight_NK.norm())
    assert relative_error(weight_NK, Quantization(4)) < 0.95 * of_plain
    assert relative_error(weight_NK, Quantization(4, zero_point=True)) < 0.92 * of_plain
    lopsided = weight_NK.abs()
    assert relative_error(lopsided, Quantization(4, zero_point=True)) < 0.6 * relative_error(lopsided, Quantization(4))


@pytest.mark.parametrize("zero_point", [False, True])
def test_more_bits_and_smaller_groups_are_better(zero_point):
    weight_NK = drawn(32, 256)
    errors = [
        relative_error(weight_NK, Quantization(bits, size, zero_point)) for bits in (8, 4) for size in (32, 64, 128)
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.006
    assert errors[3] < 0.085


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("zero", [None, 3])
def test_weights_that_codes_can_hold_are_held_exactly(bits, zero):
    how = Quantization(bits, 64, zero is not None)
    codes_NK = torch.randint(0, 2**bits, (19, 100), generator=torch.Generator().manual_seed(0))
    codes_NK[:, ::32], codes_NK[:, 1::32] = 0, 2**bits - 1  # all of the range in every group
    weight_NK = 0.125 * (codes_NK - (2 ** (bits - 1) if zero is None else zero)).float()
    (found_NK,) = dequantize(quantize(weight_NK, how), (19,), 100, how)
    assert torch.equal(found_NK, weight_NK)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_lie_where_the_interface_says(bits):
    how, N, K = Quantization(bits, 32, zero_point=True), 19, 70
    weight_NK = drawn(N, K)
    made = quantize(weight_NK, how)
    codes, scales, zeros = made
    assert codes.shape == (2, 96 * 16 * bits // 8)
    assert scales.shape == zeros.shape == (2, 3, 16)
    (found_NK,) = dequantize(made, (N,), K, how)
    for n, k in itertools.product(range(N), range(K)):
        panel, row, block, i = codes[n // 16], n % 16, k // 32, k % 32
        if bits == 8:
            code = panel[block * 512 + i // 4 * 64 + row * 4 + i % 4]
        else:
            code = panel[block * 256 + i // 8 * 64 + row * 4 + i % 4] >> (4 if i % 8 >= 4 else 0) & 15
        scale, zero = scales[n // 16, block, row].float(), zeros[n // 16, block, row].float()
        assert found_NK[n, k] == scale * (code.float() - zero)


def test_a_group_of_zeros_or_of_one_value_stays_what_it_is():
    weight_NK = torch.zeros(3, 64)
    weight_NK[1], weight_NK[2, 40] = 0.5, -7.0
    for bits, zero_point in itertools.product((8, 4), (False, True)):
        how = Quantization(bits, zero_point=zero_point)
        (found_NK,) = dequantize(quantize(weight_NK, how), (3,), 64, how)
        torch.testing.assert_close(found_NK, weight_NK, rtol=1e-3, atol=0)


WRONG = {
    "bits": (5, "8, 4"),
    "group_size": (48, "32, 64, 128"),
    "zero_point": ("yes", "False, True"),
    "scale_dtype": ("bfloat16", "'float16', 'float32'"),
    "activation_bits": (4, "None, 8, 16"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused(name):
    value, accepted = WRONG[name]
    with pytest.raises(OptionError, match=f"{name} must be one of {accepted}, got {value!r}"):
        Quantization(**{name: value})


def test_true_is_no_number_of_bits_and_one_is_no_truth():
    for options in ({"bits": True}, {"zero_point": 1}, {"group_size": 32.0}):
        with pytest.raises(OptionError, match="must be one of"):
            Quantization(**options)


def test_weights_that_cannot_be_quantized_are_refused():
    weight_NK = drawn(4, 32)
    for value in (torch.nan, torch.inf):
        weight_NK[2, 3] = value
        with pytest.raises(OptionError, match="weights must be finite"):
            quantize(weight_NK, Quantization())
    weight_NK[2, 3] = 1e8
    with pytest.raises(OptionError, match="weights up to 1e\\+08 need scale_dtype='float32', got 'float16'"):
        quantize(weight_NK, Quantization())
    quantize(weight_NK, Quantization(scale_dtype="float32"))
