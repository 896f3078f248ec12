"""Our backends in native families: the logits and gradients of their own eager loop; theirs on our experts."""

import pytest
import torch
from transformers.integrations.moe import ExpertsInterface

from mixtura.core.errors import UnknownNameError
from mixtura.hf.backends import experts_backend
from mixtura.nn import Experts
from pico_native import FAMILIES, native


def run(model, backend, ids, probe):
    """Logits, and gradients by parameter."""
    model.set_experts_implementation(backend)
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    (logits * probe).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_native_families(model_type, generator, monkeypatch):
    calls = []
    ours = experts_backend("mixtura")
    monkeypatch.setitem(ExpertsInterface._global_mapping, "counted", lambda *a: calls.append(1) or ours(*a))
    model = native(model_type)
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    probe = torch.randn(2, 7, 64, generator=generator)
    logits, gradients = run(model, "eager", ids, probe)
    our_logits, our_gradients = run(model, "counted", ids, probe)
    assert len(calls) == (1 if model_type == "nemotron_h" else 2)
    torch.testing.assert_close(our_logits, logits, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == our_gradients.keys()
    for name, gradient in gradients.items():
        rounding = 1e-5 * max(1.0, float(gradient.abs().max()))  # entries are sums of terms as large as the largest
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=rounding, msg=name)


@pytest.mark.parametrize("backend", ["mixtura", "mixtura_naive"])
def test_registered_by_name(backend, generator):
    model = native("olmoe")
    ids = torch.randint(3, 64, (2, 7), generator=generator)
    with torch.no_grad():
        model.set_experts_implementation("eager")
        expected = model(ids).logits
        model.set_experts_implementation(backend)
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm", "batched_mm", "mixtura", "mixtura_naive"])
@pytest.mark.parametrize(
    "layout", [{}, {"bias": True}, {"gated": False}, {"transposed": True}, {"interleaved": True}], ids=str
)
def test_every_backend_on_our_experts_with_empty_slots(backend, layout, generator):
    torch.manual_seed(0)
    experts = Experts(4, 16, 8, **layout)
    hidden_TD = torch.randn(9, 16, generator=generator)
    indices_TK = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(9)])
    indices_TK[3] = 4
    weights_TK = torch.rand(9, 2, generator=generator).masked_fill(indices_TK == 4, 0).requires_grad_()
    expected = experts_backend("mixtura_naive")(experts, hidden_TD, indices_TK, weights_TK)
    out_TD = experts_backend(backend)(experts, hidden_TD, indices_TK, weights_TK)
    torch.testing.assert_close(out_TD, expected, rtol=1e-5, atol=1e-7)
    assert not out_TD[3].any()
    (gradient_TK,) = torch.autograd.grad(out_TD.sum(), weights_TK)
    assert not gradient_TK[indices_TK == 4].any()


def test_unknown_name_names_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'grouped_mm'"):
        experts_backend("groupd_mm")


def test_a_backend_that_is_registered_later_is_found(monkeypatch, generator):
    monkeypatch.setitem(ExpertsInterface._global_mapping, "late", lambda experts, hidden_TD, *_: hidden_TD)
    experts = Experts(2, 4, 4)
    hidden_TD = torch.randn(3, 4, generator=generator)
    indices_TK = torch.zeros(3, 1, dtype=torch.int64)
    assert torch.equal(experts_backend("late")(experts, hidden_TD, indices_TK, torch.ones(3, 1)), hidden_TD)
