"""Linear layers and attention of few tokens in the library, beside torch's own."""

import pytest
import torch
from torch.nn import functional as F

from mixtura.nn.backends.native.few_tokens import FewTokens, attend, linear_of_few

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def near(seen, expected):
    return (seen.float() - expected.float()).norm() <= TOLERANCE[expected.dtype] * expected.float().norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "N"), [((1, 1, 64), 48), ((3, 1, 33), 130), ((8, 70), 1), ((5,), 7), ((2, 3, 96), 129)]
)
@torch.no_grad()
def test_linear_layers(dtype, shape, N):
    x, weight, bias = random(*shape, dtype=dtype), random(N, shape[-1], dtype=dtype, seed=1), random(N, dtype=dtype)
    for arguments in ((x, weight), (x, weight, bias)):
        seen, expected = linear_of_few(*arguments), F.linear(*arguments)
        assert seen.shape == expected.shape
        assert seen.dtype == dtype
        assert near(seen, expected)


@torch.no_grad()
def test_linear_layers_of_others_are_left_to_torch():
    x, weight = random(2, 16), random(4, 16)
    others = [
        (random(9, 16), weight),
        (x.bfloat16(), weight),
        (x, weight, random(4).bfloat16()),
        (x, random(16, 4).T),
        (random(16, 2).T, weight),
        (random(0, 16), weight),
        (x, random(16)),
        (x.to("meta"), weight.to("meta")),
        (x, random(4, 15)),
    ]
    assert [linear_of_few(*arguments) for arguments in others] == [None] * len(others)
    with torch.autocast("cpu"):
        assert linear_of_few(x, weight) is None
    with torch.enable_grad():
        assert linear_of_few(x, weight) is None


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("B", "H", "V", "L", "P"), [(1, 4, 4, 9, 16), (3, 6, 2, 300, 32), (2, 8, 1, 2100, 64)])
@torch.no_grad()
def test_attention(dtype, B, H, V, L, P):
    query = random(B, 1, H, P, dtype=dtype).transpose(1, 2)
    room = [random(B, V, L + 5, P, dtype=dtype, seed=seed) for seed in (1, 2)]
    before = [tensor.clone() for tensor in room]
    key, value = (tensor[:, :, 2 : L + 2] for tensor in room)
    starts_B = torch.arange(B) * (L // 4)
    mask = (torch.arange(L) >= starts_B[:, None])[:, None, None]
    for given, firsts in ((None, torch.zeros(B, dtype=torch.int64)), (mask, starts_B)):
        expected = F.scaled_dot_product_attention(query, key, value, given, scale=0.3, enable_gqa=True)
        assert near(attend(query, key, value, firsts, 0.3), expected)
        with FewTokens() as few:
            seen = F.scaled_dot_product_attention(query, key, value, given, scale=0.3, enable_gqa=True)
        assert torch.equal(seen, attend(query, key, value, firsts, 0.3))
        assert few.count == 1
    assert all(map(torch.equal, room, before))


@torch.no_grad()
def test_heads_that_share_keys_may_stand_among_the_queries():
    query, key, value = random(2, 3, 4, 32), random(2, 3, 50, 32, seed=1), random(2, 3, 50, 32, seed=2)
    mask = torch.arange(50) >= torch.tensor([0, 7])[:, None, None, None]
    with FewTokens() as few:
        seen = F.scaled_dot_product_attention(query, key, value, mask)
    assert few.count == 1
    assert near(seen, F.scaled_dot_product_attention(query, key, value, mask))


@torch.no_grad()
def test_attention_of_others_is_left_to_torch():
    query, key = random(1, 4, 1, 16), random(1, 2, 9, 16)
    holes = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    holes[..., 4] = False
    others = [
        (random(1, 4, 65, 16), key, {}),
        (random(1, 4, 2, 16), key, {"attn_mask": holes.expand(1, 1, 2, 9)}),
        (random(1, 4, 1, 8), random(1, 2, 9, 8), {}),
        (query, key.transpose(2, 3).contiguous().transpose(2, 3), {}),
        (query, key, {"attn_mask": holes}),
        (query, key, {"attn_mask": torch.zeros(1, 1, 1, 9)}),
        (query, key, {"is_causal": True}),
    ]
    for query, key, options in others:
        with FewTokens() as few:
            seen = F.scaled_dot_product_attention(query, key, key, enable_gqa=True, **options)
        assert few.count == 0
        assert torch.equal(seen, F.scaled_dot_product_attention(query, key, key, enable_gqa=True, **options))


@torch.no_grad()
def test_bits_do_not_depend_on_rows_or_threads():
    x, weight, threads = random(5, 200), random(300, 200), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = linear_of_few(x, weight)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat([linear_of_few(row[None], weight) for row in x]), together)


@torch.no_grad()
def test_what_torch_broadcasts_is_left_to_torch():
    x, weight, bias = torch.randn(2, 32), torch.randn(48, 32), torch.randn(1)
    query, shared = torch.randn(2, 4, 1, 16), torch.randn(1, 4, 9, 16)
    with FewTokens() as mode:
        linear, attended = F.linear(x, weight, bias), F.scaled_dot_product_attention(query, shared, shared)
    assert mode.count == 0
    assert torch.equal(linear, F.linear(x, weight, bias))
    assert torch.equal(attended, F.scaled_dot_product_attention(query, shared, shared))
    with FewTokens(), pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(query, shared[..., :8], shared[..., :8])
