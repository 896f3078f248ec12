"""R-UP-S: SmolLM2-135M-Instruct, whose last two feed-forward layers are trained on, dense or as mixtures.

What enters these layers is computed once, since all below is frozen. 60 steps of 4 x 128 tokens from four domains; 48
held-out blocks. The softmax runs over the tokens that occur in these blocks, so levels are lower than those of the
whole vocabulary; differences between arms are what counts.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from mixtura.core.files import cache_folder, write_file
from mixtura.data import Corpus, MixedBlocks
from mixtura.evidence.rigs.language_training import schedule
from mixtura.evidence.rigs.text import DOMAINS
from mixtura.hf import record
from mixtura.hf.balance import Balancer
from mixtura.hf.load import load_model
from mixtura.hf.sites import decoder, decoder_layers
from mixtura.surgery.upcycle import upcycle

MODEL, LAYERS, LENGTH, BATCH, STEPS, HELD_OUT = "smollm2-135m", 2, 128, 4, 60, 48
FIGURE = "nats a token, SmolLM2"


class Blocks(NamedTuple):
    """Text as the last layers see it.

    Attributes:
        hidden_BQD: what enters them, float16.
        tokens_BQ: ids, into the vocabulary of ``known_V``.
        known_V: ids of the model's own vocabulary that occur.
    """

    hidden_BQD: torch.Tensor
    tokens_BQ: torch.Tensor
    known_V: torch.Tensor


@functools.cache
def blocks() -> Blocks:
    """Training blocks, then held-out ones; computed once and kept in the cache folder.

    Raises:
        FetchError: if the model or a domain cannot be had.
    """
    from safetensors.torch import load_file, save_file

    place = cache_folder() / "evidence" / f"upcycled-{STEPS * BATCH}-{HELD_OUT}.safetensors"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with write_file(place) as partial:
            save_file(_computed()._asdict(), partial)
    return Blocks(**load_file(place))


@torch.no_grad()
def _computed() -> Blocks:
    model, tokenizer = load_model(MODEL)
    tokens_BQ = _tokens(tokenizer)
    known_V, compact = torch.unique(tokens_BQ, return_inverse=True)
    caught: list[torch.Tensor] = []
    first = decoder_layers(model)[-LAYERS]
    handle = first.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0].half()))
    for part in torch.split(tokens_BQ, 8):
        decoder(model)(input_ids=part, use_cache=False)
    handle.remove()
    return Blocks(torch.cat(caught), compact, known_V)


def _tokens(tokenizer: Any) -> torch.Tensor:
    corpus = Corpus.load(DOMAINS, on_missing="raise")
    parts = []
    for side, total in ((corpus.train, STEPS * BATCH), (corpus.held_out, HELD_OUT)):
        drawn = MixedBlocks(
            side,
            dict.fromkeys(DOMAINS, 1.0),
            total=total,
            length=LENGTH,
            tokenize=lambda text: tokenizer(text, add_special_tokens=False)["input_ids"],
        )
        parts += [torch.as_tensor(drawn[n]["input_ids"]) for n in range(len(drawn))]
    return torch.stack(parts)


@functools.cache
def _tail() -> Any:
    """A model of the last two layers, whose head knows the tokens that occur."""
    model, _ = load_model(MODEL)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.tie_word_embeddings = LAYERS, False
    tail = type(model)(config)
    whole, layers = decoder_layers(model), decoder_layers(tail)
    for number in range(LAYERS):
        layers[number].load_state_dict(whole[number - LAYERS].state_dict())
    tail.model.norm.load_state_dict(model.model.norm.state_dict())
    rows = blocks().known_V
    tail.lm_head = nn.Linear(config.hidden_size, len(rows), bias=False)
    tail.lm_head.weight.data.copy_(model.lm_head.weight.data[rows])
    return tail.requires_grad_(False)


def train(
    *,
    seed: int,
    lr: float,
    steps: int = STEPS,
    options: Mapping[str, Any] | None = None,
    balance: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Loss on held-out blocks after training the feed-forward layers; runs of one seed see the blocks in one order.

    Args:
        seed: of the order and the surgery.
        lr: highest rate.
        steps: of 4 blocks.
        options: of ``sparse-upcycling``; None stays dense.
        balance: terms, see ``Balancer``.
    """
    torch.manual_seed(seed)
    model: Any = copy.deepcopy(_tail())
    if options is not None:
        small = torch.arange(64).view(1, 64)
        model = upcycle(model, layers="all", tokens_BQ=small, seed=seed, **options).model
    for layer in decoder_layers(model):
        layer.mlp.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    balancer, order = Balancer(model.train(), balance or {}), torch.randperm(STEPS * BATCH)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule(step, steps)
        rows = order[step * BATCH : (step + 1) * BATCH]
        balancer.begin_step(BATCH * LENGTH)
        with record(model) as states:
            loss = _loss(model, rows)
        torch.autograd.backward(loss + balancer.loss(states)[0])
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balancer.end_step()
    return {FIGURE: held_out(model), "total parameters": sum(p.numel() for p in trained)}


def _loss(model: Any, rows: torch.Tensor) -> torch.Tensor:
    hidden_BQD, tokens_BQ, _ = blocks()
    logits_BQV = model(inputs_embeds=hidden_BQD[rows].float(), use_cache=False).logits
    return F.cross_entropy(logits_BQV[:, :-1].flatten(0, 1), tokens_BQ[rows][:, 1:].flatten())


@torch.no_grad()
def held_out(model: Any) -> float:
    """Mean loss over the held-out blocks."""
    model.eval()
    rows = torch.arange(STEPS * BATCH, STEPS * BATCH + HELD_OUT)
    return sum(float(_loss(model, part)) * len(part) for part in torch.split(rows, 8)) / HELD_OUT
