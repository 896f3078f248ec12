"""The library as operators of torch: checked by torch itself, compiled, exported; and what they keep away from it.

T tokens, D width, E experts, K slots a token, F expert width.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mixtura.core.errors import NotExpressibleError, ShapeError
from mixtura.nn import Experts, Mixture
from mixtura.nn.backends import automatic_backend, naive_backend, sorted_backend
from mixtura.nn.backends.native import native_backend, why_not
from mixtura.nn.backends.native.ops import OPERATOR, OPERATOR_BACKWARD
from mixtura.nn.routers.topk_softmax import TopKRouter

SILU, CLAMPED = 1, 7


def tensors(T=5, K=2, E=3, D=8, F=6, dtype=torch.float32, bias=True, transposed=False):
    """Of a call of gated experts, some slots empty."""
    generator = torch.Generator().manual_seed(T)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    first, down = (E, D, 2 * F) if transposed else (E, 2 * F, D), (E, F, D) if transposed else (E, D, F)
    slots = torch.randint(0, E + 1, (T, K), generator=generator), torch.rand(T, K, generator=generator)
    biases = (random(E, 2 * F), random(E, D)) if bias else (None, None)
    return [random(T, D), *slots, random(*first), random(*down), *biases]


CALLS = [
    (tensors(), (SILU, True, False, False, 0.0, 0.0)),
    (tensors(T=0), (SILU, True, False, True, 0.0, 0.0)),
    (tensors(dtype=torch.bfloat16, bias=False), (SILU, True, False, False, 0.0, 0.0)),
    (tensors(transposed=True), (CLAMPED, True, True, True, 1.702, 7.0)),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("inputs", "form"), CALLS)
@pytest.mark.parametrize("keep", [True, False])
def test_torch_finds_nothing_wrong_with_the_operator(inputs, form, keep):
    """Schema, what it changes or aliases (nothing), shapes that it promises, gradients as a compiler sees them."""
    arguments = [t.requires_grad_(keep and t.is_floating_point()) if t is not None else None for t in _copies(inputs)]
    checked = torch.library.opcheck(OPERATOR, (*arguments, *form, keep))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("inputs", "form"), CALLS)
@pytest.mark.parametrize("wanted", [[True] * 5, [False, True, False, False, False]])
def test_torch_finds_nothing_wrong_with_its_gradient(inputs, form, wanted):
    out_TD, kept_SC = OPERATOR(*inputs, *form, True)
    checked = torch.library.opcheck(OPERATOR_BACKWARD, (torch.ones_like(out_TD), kept_SC, *inputs, *form, wanted))
    assert set(checked.values()) == {"SUCCESS"}


def _copies(inputs):
    return [None if t is None else t.clone() for t in inputs]


class Layer(nn.Module):
    """A mixture without state."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4), Experts(4, 16, 24)

    def forward(self, hidden_TD):
        weights_TK, indices_TK = self.gate(hidden_TD).softmax(-1).topk(2)
        return hidden_TD + self.experts(hidden_TD, indices_TK, weights_TK)


def layers():
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer())


def operators(graph):
    return [node.target for node in graph.nodes if node.target in (OPERATOR, OPERATOR_BACKWARD)]


def test_a_compiled_model_has_one_operator_a_layer_forward_and_one_backward():
    """In one graph without a break, for any number of tokens, with equal results."""
    graphs = []

    def keep(module, _inputs):
        graphs.append(module.graph)
        return make_boxed_func(module)

    model = layers()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True, dynamic=True)
    for T in (7, 4):
        hidden_TD = torch.randn(T, 16)
        expected_TD, out_TD = model(hidden_TD), compiled(hidden_TD)
        assert torch.equal(out_TD, expected_TD)
        wanted, found = (torch.autograd.grad(y.square().sum(), model.parameters()) for y in (expected_TD, out_TD))
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert [operators(graph) for graph in graphs] == [[OPERATOR] * 2, [OPERATOR_BACKWARD] * 2]


def test_compiled_under_autocast():
    model, hidden_TD = layers().requires_grad_(False), torch.randn(5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(hidden_TD), model(hidden_TD), rtol=1e-2, atol=1e-2)  # by torch


def test_weights_that_autocast_casts_for_a_few_tokens_are_left_to_torch():
    experts, (hidden_TD, indices_TK, weights_TK) = Experts(3, 8, 6).requires_grad_(False), tensors()[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_TD, native_TD, sorted_TD = (
            backend(experts, hidden_TD, indices_TK, weights_TK)
            for backend in (automatic_backend, native_backend, sorted_backend)
        )
    assert torch.equal(out_TD, sorted_TD)
    assert out_TD.dtype == native_TD.dtype == torch.float32
    torch.testing.assert_close(native_TD, sorted_TD, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_has_one_operator_a_layer(strict):
    """Functional, so that decompositions leave it in peace; for any number of tokens, none too."""
    model, tokens = layers(), torch.export.Dim("tokens", min=1)
    program = torch.export.export(model, (torch.randn(7, 16),), dynamic_shapes=({0: tokens},), strict=strict)
    for graph in (program.graph, program.run_decompositions().graph):
        assert operators(graph) == [OPERATOR] * 2
    for T in (0, 1, 7, 20):
        hidden_TD = torch.randn(T, 16)
        assert torch.equal(program.module()(hidden_TD), model(hidden_TD))


def test_an_exported_mixture_is_saved_and_loaded(tmp_path):
    mixture = Mixture(TopKRouter(16, 4), Experts(4, 16, 24))
    program = torch.export.export(mixture, (torch.randn(7, 16),), strict=False)
    torch.export.save(program, tmp_path / "layer.pt2")
    loaded, hidden_TD = torch.export.load(tmp_path / "layer.pt2").module(), torch.randn(7, 16)
    assert operators(program.graph) == [OPERATOR]
    assert torch.equal(loaded(hidden_TD), mixture(hidden_TD))


def test_modes_of_torch_see_the_operator():
    """Those that count what is computed, or compute shapes alone."""
    experts, (hidden_TD, indices_TK, weights_TK) = Experts(3, 8, 6), tensors()[:3]
    with FlopCounterMode(display=False) as counted:
        native_backend(experts, hidden_TD, indices_TK, weights_TK).sum().backward()
    assert counted.get_total_flops() == 3 * 2 * indices_TK.numel() * 3 * 8 * 6
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_TD = native_backend(experts, mode.from_tensor(hidden_TD), indices_TK, weights_TK)
    assert fake_TD.shape == hidden_TD.shape


def test_transforms_of_functions_are_left_to_torch():
    experts, (hidden_TD, indices_TK, weights_TK) = Experts(3, 8, 6), tensors()[:3]

    def loss(backend):
        return lambda hidden_TD: backend(experts, hidden_TD, indices_TK, weights_TK).square().sum()

    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))[1]):
        found, wanted = (transform(loss(backend))(hidden_TD) for backend in (automatic_backend, sorted_backend))
        assert torch.equal(found, wanted)
        with pytest.raises(NotExpressibleError, match=r"no transforms of torch.func and no derivatives forward"):
            transform(loss(native_backend))(hidden_TD)


def test_second_gradients_are_refused_and_not_left_out():
    experts, (hidden_TD, indices_TK, weights_TK) = Experts(3, 8, 6), tensors()[:3]
    for compiled in (False, True):
        leaf_TD = hidden_TD.clone().requires_grad_()
        if compiled:
            out_TD, _ = OPERATOR(leaf_TD, indices_TK, weights_TK, *tensors()[3:], *CALLS[0][1], True)
            (gradient_TD,) = torch.autograd.grad(out_TD.square().sum(), leaf_TD, create_graph=True)
            with pytest.raises(NotExpressibleError, match="have no second gradients"):
                gradient_TD.sum().backward()
        else:
            out_TD = native_backend(experts, leaf_TD, indices_TK, weights_TK)
            with pytest.raises(NotExpressibleError, match="choose the experts implementation 'mixtura_sorted'"):
                torch.autograd.grad(out_TD.sum(), leaf_TD, create_graph=True)


def test_the_operator_checks_indices():
    arguments = tensors()
    out_TD, kept_SC = OPERATOR(*arguments, *CALLS[0][1], True)
    arguments[1][2, 1] = -3
    with pytest.raises(ShapeError, match="indices_TK must be at least 0, got -3"):
        OPERATOR(*arguments, *CALLS[0][1], False)
    with pytest.raises(ShapeError, match="indices_TK must be at least 0, got -3"):
        OPERATOR_BACKWARD(out_TD, kept_SC, *arguments, *CALLS[0][1], [True] * 5)


class Clipped(nn.Module):
    """SiLU near zero."""

    def forward(self, x):
        return nn.functional.silu(x).clamp(max=10)


class Learned(nn.Module):
    """SiLU for now."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.slope * x)


@pytest.mark.parametrize("activation", [Clipped(), Learned()])
def test_an_activation_that_only_looks_like_one_of_its_own(activation):
    for experts in (Experts(2, 8, 6), Experts(2, 8, 6, gated=False)):
        experts.act_fn = activation
        assert why_not(experts, torch.randn(3, 8)) == "the activation is not one of its own"


def test_an_activation_that_is_exchanged_counts_at_once():
    experts, (hidden_TD, indices_TK, weights_TK) = Experts(3, 8, 6), tensors()[:3]
    for activation in (nn.functional.relu, nn.functional.gelu):
        experts.act_fn = activation
        out_TD = native_backend(experts, hidden_TD, indices_TK, weights_TK)
        torch.testing.assert_close(out_TD, naive_backend(experts, hidden_TD, indices_TK, weights_TK))
