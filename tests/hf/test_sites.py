"""Feed-forward layers are found by structure, read as weights that compute the same, and refused when they do more."""

import pytest
import torch
from torch import nn

from mixtura.core import NotExpressibleError
from mixtura.hf import feed_forward_sites
from mixtura.hf.sites import decoder_layers
from pico import DENSE, SPARSE, pico


@pytest.mark.parametrize("base", DENSE)
def test_weights_compute_what_the_layer_computes(base):
    model = pico(base)
    sites = feed_forward_sites(model)
    assert [site.layer for site in sites] == [0, 1, 2]
    x = torch.randn(2, 5, 32)
    for site in sites:
        weights = site.read()
        if site.inline:
            layer = decoder_layers(model)[site.layer]
            expected = layer.fc2(layer.activation_fn(layer.fc1(x)))
        else:
            expected = site.module(x)
        torch.testing.assert_close(weights(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("base", SPARSE)
def test_a_native_mixture_is_seen_and_not_read(base):
    site = feed_forward_sites(pico(base))[1]
    assert site.kind == "mixture"
    with pytest.raises(NotExpressibleError, match="layer 1 is a mixture already"):
        site.read()


def test_a_layer_that_scales_its_output_is_refused():
    model = pico("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(NotExpressibleError, match=r"layer 1: mlp \(LlamaMLP\) does not compute"):
        feed_forward_sites(model)[1].read()


def test_an_unknown_activation_is_refused():
    model = pico("llama")
    model.model.layers[0].mlp.act_fn = nn.Softplus()
    with pytest.raises(NotExpressibleError, match="activation Softplus"):
        feed_forward_sites(model)[0].read()


def test_a_model_without_known_structure_is_refused_by_name():
    model = pico("llama")
    model.model.layers[2].mlp = nn.Linear(32, 32)
    with pytest.raises(NotExpressibleError, match=r"LlamaForCausalLM: no feed-forward .* layer 2, which has self_attn"):
        feed_forward_sites(model)


def test_dropout_of_the_feed_forward_is_kept():
    from mixtura.nn import Experts, Mixture
    from mixtura.nn.routers.topk_softmax import TopKRouter

    model = pico("gpt2", resid_pdrop=0.5)
    site = feed_forward_sites(model)[0]
    dropout = site.module.dropout
    site.put(Mixture(TopKRouter(32, 4), Experts(4, 32, 16)))
    assert model.transformer.h[0].mlp.dropout is dropout
