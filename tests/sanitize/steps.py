"""Random steps of tapes, each operation compared with its formula in float64, and steps of whole models by a plan.

An operation is a generator: it records itself on the tape, then draws what it reads, and after the run compares; so on
for each step. Each reads tensors of its own, so that no error hides in those of others.

B rows (sequences), D width, E experts, K slots a token, F width of a feed-forward, N outputs, L positions, H heads of
queries, V heads of keys, P width of a head, R angles of a rotation.
"""

import math

import torch
from calls import (
    DTYPES,
    ROUNDING,
    agree,
    bound_of_quantized,
    few_bits,
    form_of,
    formula,
    largest_of_block,
    largest_units,
    quantized_experts,
    units,
    width,
)

from mixtura.core import SelectionSpec, select
from mixtura.nn.backends.native import few_tokens
from mixtura.nn.backends.native.activation import PLAIN
from mixtura.nn.backends.native.ops import Form, struct
from mixtura.nn.backends.native.tape import Linear, Norm, Tape, few_bits_product
from mixtura.nn.quantized_linear import quantize_linear

WIDEST = 200  # of a product, so that many calls are made
VOCABULARY = 40
DECLARED = few_tokens._library
CHUNK = 1024  # positions that a thread attends to at once


class ExactTape(Tape):
    """Its workspaces have room for this many positions and no byte more."""

    length = 1

    def _finish(self, threads, length):
        super()._finish(threads, self.length)

    def _room(self, size):
        self._workspace.append(torch.empty(size, dtype=torch.uint8))
        assert self._workspace[-1].data_ptr() % 64 == 0
        return self._workspace[-1].data_ptr()


class ExactLibrary:
    """Attention beside a tape gets no room to move its workspace to the beginning of a line: it begins there."""

    def __getattr__(self, name):
        return getattr(DECLARED(), name)

    def mixtura_attend_workspace(self, *arguments):
        return DECLARED().mixtura_attend_workspace(*arguments) - 64


def some_width(rng):
    """Of a product."""
    return min(width(rng), rng.randint(WIDEST // 2, WIDEST))


def norm_of(rng, dtype, D):
    """A norm or none, and a function from x to its value and to how large the terms of that are."""
    kind = rng.choice((None, "rms", "layer"))
    if kind is None:
        return None, lambda x: (x.double(), x.double().abs())
    of = rng.choice((dtype, torch.float32))
    weight, bias = (torch.randn(D).to(of) if rng.random() < 0.7 else None for _ in range(2))
    norm = Norm(kind, weight, bias, 1e-5, float(rng.choice((0, 1))) if kind == "rms" else 0.0)

    def normalized(x):
        x = x.double()
        mean = x.mean(-1, keepdim=True) * (kind == "layer")
        factor = 1 / ((x - mean).square().mean(-1, keepdim=True) + norm.eps).sqrt()
        factor = factor * (1 if weight is None else weight.double() + norm.offset)
        shift = 0 if bias is None else bias.double()
        return (x - mean) * factor + shift, (x.abs() + mean.abs()) * factor.abs() + abs(shift)

    return norm, normalized


class Matrix:
    """A product of the tape, its formula and how exact it is."""

    def __init__(self, rng, dtype, N, D):
        self.rounding, self.spread, bias = ROUNDING[dtype], lambda x: x, rng.random() < 0.5
        if rng.random() < 0.4:
            self._of_few_bits(rng, dtype, N, D, bias)
            return
        of = rng.choice((dtype, dtype, torch.float32))
        self.weight_ND = torch.randn(N, D).to(of)
        self.bias_N = torch.randn(N).to(of) if bias else None
        self.linear = Linear(self.weight_ND, self.bias_N)

    def _of_few_bits(self, rng, dtype, N, D, bias):
        begin, behind, how = 16 * rng.choice((0, 0, 1, 3)), rng.choice((0, 0, 1, 20)), few_bits(rng)
        whole = torch.nn.Linear(D, begin + N + behind, bias=bias, dtype=dtype)
        quantize_linear(whole, how)
        self.linear = whole.few_bits().rows(begin, begin + N) if begin + behind else whole.few_bits()
        self.weight_ND, self.bias_N = whole.dequantized()[begin : begin + N], self.linear.bias_N
        self.rounding, self.spread = self.rounding + 2 / how.levels, largest_of_block

    def __call__(self, h_BD, size_BD):
        """The product, and how large its terms are."""
        weight_ND, bias_N = self.weight_ND.double(), 0 if self.bias_N is None else self.bias_N.double()
        return h_BD @ weight_ND.T + bias_N, self.spread(size_BD) @ weight_ND.abs().T + abs(bias_N)


def entry(rng, tape, D):
    """What a product reads: x in float32 with a norm, in the tape's type without; and its value and size."""
    norm, normalized = norm_of(rng, tape.dtype, D)
    x_BD = torch.empty(tape.rows, D, dtype=tape.dtype if norm is None else torch.float32)
    return x_BD, norm, lambda: tuple(t.to(tape.dtype).double() for t in normalized(x_BD))


def embed(rng, tape):
    table_VD, scale = torch.randn(VOCABULARY, some_width(rng)).to(tape.dtype), rng.choice((1.0, 0.7))
    x_BD = tape.embed(table_VD, scale)
    while True:
        yield
        wanted_BD = table_VD.double()[tape.ids_B] * scale
        agree("embed", x_BD, wanted_BD, wanted_BD.abs(), 1e-6)
        yield


def norm(rng, tape):
    D = some_width(rng)
    norm, normalized = norm_of(rng, tape.dtype, D)
    x_BD = torch.empty(tape.rows, D)
    h_BD = tape.norm(x_BD, norm)
    while True:
        x_BD.normal_()
        yield
        agree("norm", h_BD, *normalized(x_BD), ROUNDING[tape.dtype])
        yield


def fold(rng, tape):
    D, factor = some_width(rng), rng.choice((1.0, -0.3))
    norm, normalized = norm_of(rng, tape.dtype, D)
    sum_BD, x_BD = tape.sum(D), torch.empty(tape.rows, D)
    tape.fold(sum_BD, norm, x_BD, factor)
    while True:
        (value_BD, size_BD), before_BD = normalized(sum_BD.normal_()), x_BD.normal_().double()
        yield
        agree("fold", x_BD, before_BD + factor * value_BD, before_BD.abs() + size_BD, 2e-5)
        assert not sum_BD.any(), "a sum that was folded is not zeros"
        yield


def linears(rng, tape):
    D = some_width(rng)
    x_BD, norm, of_x = entry(rng, tape, D)
    matrices = [Matrix(rng, tape.dtype, some_width(rng), D) for _ in range(rng.randint(1, 4))]
    outs = tape.linears(x_BD, norm, [matrix.linear for matrix in matrices])
    while True:
        x_BD.normal_()
        yield
        for matrix, out_BN in zip(matrices, outs, strict=True):
            agree("linears", out_BN, *matrix(*of_x()), matrix.rounding)
        yield


def linear_add(rng, tape):
    D, N = some_width(rng), some_width(rng)
    y_BD, x_BN = torch.empty(tape.rows, D, dtype=tape.dtype), torch.empty(tape.rows, N)
    matrix = Matrix(rng, tape.dtype, N, D)
    tape.linear_add(y_BD, matrix.linear, x_BN)
    while True:
        y_BD.normal_(), (before_BN := x_BN.normal_().double())
        yield
        value_BN, size_BN = matrix(y_BD.double(), y_BD.double().abs())
        agree("linear_add", x_BN, before_BN + value_BN, before_BN.abs() + size_BN, matrix.rounding)
        yield


def feed_forward(rng, tape):
    D, F, N = some_width(rng), some_width(rng), some_width(rng)
    h_BD, norm, of_h = entry(rng, tape, D)
    x_BN, by_row_B1 = torch.empty(tape.rows, N), torch.empty(tape.rows, 1) if rng.random() < 0.3 else None
    gate, up, down = (Matrix(rng, tape.dtype, *shape) for shape in ((F, D), (F, D), (N, F)))
    gate, number = gate if rng.random() < 0.7 else None, rng.randrange(len(PLAIN))
    linears = (None if gate is None else gate.linear, up.linear, down.linear)
    tape.feed_forward(h_BD, norm, linears, number, x_BN, by_row_B1)
    form = Form(number, gate is not None, False, False, 0.0, 0.0)
    while True:
        h_BD.normal_(), (before_BN := x_BN.normal_().double())
        share_B1 = 1 if by_row_B1 is None else by_row_B1.normal_().double().sigmoid()
        yield
        parts = [matrix(*of_h()) for matrix in (gate, up) if matrix is not None]
        inner_BF, size_BF = (torch.cat(both, -1) for both in zip(*parts, strict=True))
        value_BN, size_BN = down(units(inner_BF, form), largest_units(size_BF, form))
        bound_BN = before_BN.abs() + share_B1 * size_BN
        rounding = sum(m.rounding for m in (gate, up, down) if m is not None)
        agree("feed_forward", x_BN, before_BN + share_B1 * value_BN, bound_BN, rounding)
        yield


def spec_of(rng, E):
    """A selection that the operation knows."""
    order = rng.choice(("score-topk", "topk-score"))
    spec = SelectionSpec(
        k=rng.randint(1, E),
        score=rng.choice(("softmax", "sigmoid")),
        order=order,
        renormalize=rng.choice((None, 1)),
        scale=rng.choice((1.0, 2.5)),
    )
    return spec, torch.randn(E) if order == "score-topk" and rng.random() < 0.3 else None


def mixture(rng, tape):
    E, D, F, form = rng.randint(1, 9), some_width(rng), some_width(rng), form_of(rng)
    spec, bias_E = spec_of(rng, E)
    h_BD, logits_BE = torch.empty(tape.rows, D, dtype=tape.dtype), torch.empty(tape.rows, E)
    x_BD, quantized = torch.empty(tape.rows, D), rng.random() < 0.5
    if quantized:
        keep, described, tensors = quantized_experts(rng, E, D, F, form, tape.dtype)
        rounding, bound = ROUNDING[tape.dtype] + 2 / keep.quantization.levels, bound_of_quantized
    else:
        keep = stacked(rng, E, D, F, form, tape.dtype)
        described, tensors = struct(*keep[:2], keep[2:], form), [None if t is None else t.double() for t in keep]
        rounding, bound = ROUNDING[tape.dtype], bound_of_stacked
    tape.mixture(h_BD, logits_BE, spec, bias_E, described, x_BD)
    while True:
        h_BD.normal_(), (before_BD := x_BD.normal_().double())
        logits_BE.copy_(torch.randn(tape.rows, E) if rng.random() < 0.5 else torch.randint(-1, 2, (tape.rows, E)))
        yield
        routing = select(logits_BE, spec, bias_E)
        call = (form, h_BD.double(), routing.indices_TK, routing.weights_TK.double(), *tensors)
        bound_BD = before_BD.abs() + bound(*call)
        agree("mixture", x_BD, before_BD + formula(units, *call), bound_BD, rounding)
        yield


def stacked(rng, E, D, F, form, dtype):
    """Weights of experts."""
    C, biased = 2 * F if form.gated else F, rng.random() < 0.5
    shapes = [(E, D, C), (E, F, D)] if form.transposed else [(E, C, D), (E, D, F)]
    shapes += [(E, C), (E, D)] if biased else []
    made = [(0.3 * torch.randn(shape)).to(dtype) for shape in shapes]
    return made + [None] * (4 - len(made))


def bound_of_stacked(form, hidden_BD, indices_BK, *tensors):
    """How large terms can be."""
    return formula(largest_units, form, hidden_BD.abs(), indices_BK, *(None if t is None else t.abs() for t in tensors))


class Attention:
    """An attention of the tape, the cache that it is given, and what all of that should hold."""

    def __init__(self, rng, tape):
        self.rng, self.tape, self.B = rng, tape, tape.rows
        self.V, self.P = rng.randint(1, 3), 16 * rng.choice((1, 1, 2, 3, 5))
        self.H, self.R = self.V * rng.randint(1, 6), rng.choice((0, 1, 3, 8, rng.randint(1, self.P // 2)))
        self.whole, self.neighbors = rng.random() < 0.3, rng.random() < 0.3
        self.window, self.softcap = rng.choice((0, 1, 2, 5, 40, 1500)), rng.choice((0.0, 0.0, 2.0))
        self.scale = rng.choice((self.P**-0.5, 0.1))
        self.query, self.key, self.value = (torch.empty(self.B, n * self.P) for n in (self.H, self.V, self.V))
        wide = [n * self.P if self.whole else self.P for n in (self.H, self.V)]
        self.norms = [norm_of(rng, tape.dtype, n) for n in wide]
        self.sinks_H = torch.randn(self.H).to(tape.dtype) if rng.random() < 0.3 else None
        self.angles = torch.randn(tape.places, self.R) if self.R else None
        self.pasts = [torch.empty(self.B, self.V, 0, self.P, dtype=tape.dtype)] * 2
        self.caches, self.skipped, self.number = [], 0, len(tape._attentions)
        angles = (self.angles.cos(), self.angles.sin()) if self.R else None
        self.out = tape.attention(
            *(self.query, self.key, self.value),
            width=self.P,
            angles=angles,
            scale=self.scale,
            norms=(self.norms[0][0], self.norms[1][0]),
            whole=self.whole,
            window=self.window,
            softcap=self.softcap,
            sinks_H=self.sinks_H,
            neighbors=self.neighbors,
        )

    def steps(self):
        """As an operation."""
        while True:
            self._draw(self.tape.length)
            yield
            self._compare(self.tape.length)
            yield

    def _draw(self, L):
        past = L - 1 - self.pasts[0].shape[2]
        if past < 0:
            self.pasts = [t[:, :, : L - 1] for t in self.pasts]  # another sequence, as long as this one was
        elif past:
            new = [torch.randn(self.B, self.V, past, self.P).to(self.tape.dtype) for _ in range(2)]
            self.pasts = [torch.cat(pair, 2) for pair in zip(self.pasts, new, strict=True)]
        for tensor in (self.query, self.key, self.value):
            tensor.normal_()
        if past or not self.caches or L - self.skipped > self.caches[0].shape[2]:
            self._hold(L)

    def _hold(self, L):
        """In blocks that begin where the window can see, and have no room but for this step or for a few more."""
        first = max(0, L - self.window) if self.window else 0
        self.skipped, more = self.rng.choice((0, first, self.rng.randint(0, first))), self.rng.choice((0, 1, 7))
        padded = torch.arange(L - 1)[None] < self.tape.starts_B[:, None]
        self.caches = []
        for past in self.pasts:
            cache = past.new_full((self.B, self.V, L - self.skipped + more, self.P), math.nan)
            seen = past.masked_fill(padded[:, None, :, None], math.nan)[:, :, self.skipped :]
            cache[:, :, : seen.shape[2]] = seen
            self.caches.append(cache)
        self.tape.cache(self.number, *self.caches, self.skipped)

    def _prepared(self, x, heads, which):
        """(B, heads, P), normalized and rotated."""
        normalized = self.norms[which][1]
        shape = (self.B, heads, self.P)
        x = normalized(x)[0].view(shape) if self.whole else normalized(x.view(shape))[0]
        if self.R:
            angles = self.angles.double()[self.tape.positions_B][:, None]
            x = rotated(x, angles.cos(), angles.sin(), self.neighbors)
        return x.to(self.tape.dtype)

    def _compare(self, L):
        new = (self._prepared(self.key, self.V, 1), self.value.view(self.B, self.V, self.P).to(self.tape.dtype))
        for name, cache, one in zip(("keys", "values"), self.caches, new, strict=True):
            agree(name, cache[:, :, L - 1 - self.skipped], one.double(), one.double().abs() + 1, ROUNDING[one.dtype])
        now = [cache[:, :, L - 1 - self.skipped, None] for cache in self.caches]
        self.pasts = [torch.cat(pair, 2) for pair in zip(self.pasts, now, strict=True)]
        query = self._prepared(self.query, self.H, 0).double()[:, :, None]
        starts_B = self.tape.starts_B.clamp(min=L - self.window if self.window else 0)
        how = {"scale": self.scale, "softcap": self.softcap, "sinks_H": self.sinks_H}
        out, bound = attended(query, *(t.double() for t in self.pasts), starts_B, **how)
        agree("attention", self.out, out.flatten(1), bound.flatten(1), 3 * ROUNDING[self.tape.dtype])


def rotated(x, cosine, sine, neighbors):
    """Units against those R further on, or against their neighbors; those behind 2 R stay."""
    R = cosine.shape[-1]
    some = x[..., : 2 * R]
    a, b = (some[..., ::2], some[..., 1::2]) if neighbors else some.chunk(2, -1)
    turned = (a * cosine - b * sine, b * cosine + a * sine)
    joined = torch.stack(turned, -1).flatten(-2) if neighbors else torch.cat(turned, -1)
    return torch.cat([joined, x[..., 2 * R :]], -1)


def attended(query, keys, values, starts_B, scale, softcap=0.0, sinks_H=None):
    """Attention (B, H, Q, P) to positions from the start on, and the largest value that each unit can be."""
    H, (B, V, L, _) = query.shape[1], keys.shape
    unseen = (torch.arange(L)[None] < starts_B[:, None])[:, None, None]
    keys, values = (t.repeat_interleave(H // V, 1) for t in (keys, values))
    scores = query @ keys.mT * scale
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(unseen, -math.inf)
    if sinks_H is not None:
        scores = torch.cat([scores, sinks_H.double().view(1, H, 1, 1).expand(B, H, query.shape[2], 1)], -1)
    weights = scores.softmax(-1)[..., :L]
    largest = values.abs().masked_fill(unseen.mT, 0).amax(2, keepdim=True)
    return weights @ values, largest.expand_as(query)


OPERATIONS = (embed, norm, fold, linears, linear_add, feed_forward, mixture, lambda *a: Attention(*a).steps())


def tape_call(rng):
    """A few operations in any order, a few steps; now and then another, shorter sequence."""
    B = rng.choice((rng.randint(1, 4), rng.randint(1, 9), rng.choice((16, 17, 33, 64))))
    tape = (ExactTape if rng.random() < 0.8 else Tape)(rng.choice(DTYPES), B)
    L = rng.choice((1, 2, rng.randint(1, 20), rng.randint(250, 260), rng.choice((1, 2)) * CHUNK - rng.randint(0, 4)))
    L = L if B < 10 else min(L, 20)
    tape.places = L + 12
    tape.starts_B.copy_(torch.randint(0, L, (B,)) if rng.random() < 0.5 else torch.zeros(B))
    operations = [kind(rng, tape) for kind in rng.choices(OPERATIONS, k=rng.randint(1, 5))]
    for _ in range(rng.randint(1, 6)):
        tape.length = L
        tape.ids_B.random_(0, VOCABULARY), tape.positions_B.random_(0, tape.places)
        for operation in operations:
            next(operation)  # draws
        tape.run(L)
        for operation in operations:
            next(operation)  # compares
        L = L + 1 if rng.random() < 0.9 else max(int(tape.starts_B.max()) + 1, L - rng.randint(0, 5))
        if rng.random() < 0.2:
            torch.set_num_threads(rng.randint(1, 4))


def few_tokens_call(rng):
    """Linear layers and attention beside a tape."""
    dtype, few_tokens._library = rng.choice(DTYPES), ExactLibrary
    (attend_call if rng.random() < 0.4 else product_call)(rng, dtype)


def product_call(rng, dtype):
    """Of a few rows, of few bits also of more than a tape has."""
    N, D, rows = some_width(rng), some_width(rng), rng.choice((rng.randint(1, 8), rng.randint(0, 140)))
    matrix, x_BD = Matrix(rng, dtype, N, D), torch.randn(rows, D).to(dtype)
    if isinstance(matrix.linear, Linear):
        matrix.weight_ND = matrix.weight_ND.to(dtype)
        matrix.bias_N = None if matrix.bias_N is None else matrix.bias_N.to(dtype)
        out_BN = few_tokens.linear_of_few(x_BD[:8], matrix.weight_ND, matrix.bias_N)
        assert (out_BN is None) == (rows == 0), "not computed"
    else:
        out_BN = few_bits_product(matrix.linear, x_BD)
    if out_BN is not None:
        x_BD = x_BD[: len(out_BN)].double()
        agree("product", out_BN, *matrix(x_BD, x_BD.abs()), matrix.rounding)


def attend_call(rng, dtype):
    """Over a cache that has room or has not."""
    B, V, Q, P = rng.randint(1, 8), rng.randint(1, 3), rng.choice((1, 2, 5, 64)), 16 * rng.choice((1, 2, 3, 5))
    H, L = V * rng.randint(1, 5), rng.choice((rng.randint(1, 20), rng.randint(250, 260), CHUNK + rng.randint(-2, 2)))
    L = L if B * H * Q < 100 else min(L, 20)
    query, starts_B = torch.randn(B, H, Q, P).to(dtype), torch.randint(0, L, (B,))
    caches = torch.full((2, B, V, L + rng.choice((0, 1, 7)), P), math.nan, dtype=dtype).unbind()
    keys, values = (cache[:, :, :L] for cache in caches)
    for held in (keys, values):
        held.copy_(torch.randn(held.shape))
    out = few_tokens.attend(query, keys, values, starts_B, None)
    assert out is not None, "not computed"
    agree(
        "attend", out, *attended(*(t.double() for t in (query, keys, values)), starts_B, P**-0.5), 3 * ROUNDING[dtype]
    )


def model_call(rng):
    """Steps of a small model by its plan, longer than what its caches have room for at first."""
    from hf.decoders import FAMILIES, MODELS, WIDE, WINDOWED, decoded, gpt_oss, left
    from mixtura.hf.accelerate import accelerate, acceleration
    from pico import pico, tokens

    families = {name: lambda n=name, o=options: pico(n, **{**WIDE, **o}) for name, options in FAMILIES.items()}
    model = rng.choice([*MODELS.values(), *WINDOWED.values(), *families.values(), gpt_oss])()
    rows, length, bits = rng.randint(1, 5), rng.choice((4, 20, 70)), rng.choice((None, None, 8, 4))
    ids, mask = tokens(rows, length, rng.randint(0, 99)), left(rows, length, rng.randint(0, 2))
    wanted = decoded(model, ids, mask)
    found = decoded(accelerate(model, bits=bits), ids, mask)
    assert acceleration(model)["planned"] == length - 2, acceleration(model)
    assert found.isfinite().all(), "logits are not finite"
    if bits is None:
        agree("logits", found, wanted.double(), wanted.abs().max().double(), 1e-3)


KINDS = {"tape": tape_call, "few tokens": few_tokens_call, "model": model_call}
