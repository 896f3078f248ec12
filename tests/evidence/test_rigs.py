"""Rigs: the text they read, what they count, and parts of a batch that are balanced as calls of their own."""

import pytest
import torch

from mixtura.evidence.rigs import upcycled
from mixtura.evidence.rigs.language import DIM, LENGTH, LanguageModel, decided
from mixtura.evidence.rigs.language_arms import mixture
from mixtura.evidence.rigs.language_training import figures, fit, hold_out, split
from mixtura.evidence.rigs.text import LOCAL, draw, held_out_sequences, read
from mixtura.hf.balance import Balancer
from pico import pico

TOP2 = mixture("topk-softmax", k=2)


def tiny(**options):
    return fit(seed=0, lr=1e-3, steps=2, domains=LOCAL, **options)


def test_held_out_text_is_the_same_for_all_and_not_learned_from():
    text = read(LOCAL)
    rows = held_out_sequences(text, 16, LENGTH)
    assert torch.equal(rows, held_out_sequences(text, 16, LENGTH))
    assert rows.shape == (16, LENGTH + 1)
    assert len({bytes(row.tolist()) for row in rows}) == 16
    learned, held = ([bytes(part.tolist()) for part in side] for side in text)
    sequences = [bytes(row.tolist()) for row in rows]
    assert all(sequence in held[row % 2] for row, sequence in enumerate(sequences))
    known = sum(sequence in learned[row % 2] for row, sequence in enumerate(sequences))
    assert known <= 2  # heads of files that are alike


def test_runs_of_one_seed_see_the_same_sequences():
    one, other = (draw(read(LOCAL).train, 4, 8, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.equal(torch.tensor(tiny(layer=TOP2).losses), torch.tensor(tiny(layer=TOP2).losses))


def test_training_goes_on_with_the_data_that_come_next():
    whole = tiny(layer={"dense": 8})
    first = fit(seed=0, lr=1e-3, steps=1, total=2, domains=LOCAL, layer={"dense": 8})
    later = fit(seed=0, lr=0.0, steps=1, domains=LOCAL, layer={"dense": 8}, model=first.model, before=1)
    generator = torch.Generator().manual_seed(1000)
    draw(read(LOCAL).train, 16, LENGTH, generator)
    second_BQ = draw(read(LOCAL).train, 16, LENGTH, generator)
    logits_BQV = first.model(second_BQ[:, :-1])[0]
    loss = torch.nn.functional.cross_entropy(logits_BQV.flatten(0, 1), second_BQ[:, 1:].flatten())
    assert later.losses[0] == pytest.approx(loss.item(), abs=1e-6)
    assert whole.losses[0] == first.losses[0]


def test_active_parameters_are_those_of_the_dense_layer_and_the_router():
    mixed, dense = tiny(layer=TOP2), tiny(layer={"dense": 128})
    told, plain = figures(mixed, hold_out(mixed, 8)), figures(dense, hold_out(dense, 8))
    routers = 2 * 8 * DIM
    assert told["active parameters"] == plain["active parameters"] + routers
    assert told["total parameters"] == plain["total parameters"] + routers + 2 * 6 * 64 * DIM * 3
    assert told["flops"] == plain["flops"] + 2 * routers
    assert told["slots a token"] == 2
    assert (plain["MaxVio"], plain["slots a token"]) == (0, 0)


def test_parts_of_a_batch_are_balanced_as_calls_of_their_own():
    model = LanguageModel(TOP2)
    bytes_BQ = torch.randint(256, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    together = split(model(bytes_BQ)[1], 4)
    apart = [model(part)[1] for part in bytes_BQ.chunk(4)]
    assert balance(model, together) == pytest.approx(balance(model, apart), rel=1e-5)
    assert balance(model, together) != pytest.approx(balance(model, [model(bytes_BQ)[1]]), rel=1e-3)


def balance(model, states):
    balancer = Balancer(model, {"load-balancing": 1.0}, "micro-batch-load")
    balancer.begin_step(4 * LENGTH)
    return balancer.loss(states)[0].item()


def test_a_model_that_is_not_of_transformers_can_be_balanced():
    model = LanguageModel(mixture("aux-loss-free-bias", k=2))
    balancer = Balancer(model, {"router-z-loss": 1e-3})
    balancer.begin_step(2 * LENGTH)
    state = model(torch.zeros(2, LENGTH, dtype=torch.long))[1]
    assert len(decided(state)) == 2
    balancer.loss([state])[0].backward()
    balancer.end_step()
    assert model.blocks[0].feed_forward.router.selection_bias.any()


def test_the_last_layers_of_a_model_are_trained_on_what_enters_them(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    monkeypatch.setattr(upcycled, "DOMAINS", LOCAL)
    monkeypatch.setattr(upcycled, "load_model", lambda name: (pico("llama", vocab_size=256), bytes_of))
    for cached in (upcycled.blocks, upcycled._tail):
        cached.cache_clear()
    whole, rows = pico("llama", vocab_size=256), torch.arange(2)
    known_V, tokens_BQ = upcycled.blocks().known_V, upcycled.blocks().tokens_BQ[rows]
    logits_BQV = whole(known_V[tokens_BQ]).logits[..., known_V]
    wanted = torch.nn.functional.cross_entropy(logits_BQV[:, :-1].flatten(0, 1), tokens_BQ[:, 1:].flatten())
    assert upcycled._loss(upcycled._tail(), rows).item() == pytest.approx(wanted.item(), abs=1e-3)
    before = upcycled.held_out(upcycled._tail())
    dense = upcycled.train(seed=0, lr=1e-2, steps=2)[upcycled.FIGURE]
    mixed = upcycled.train(seed=0, lr=0.0, steps=1, options={"copies": 2, "shards": 2, "k": 2})[upcycled.FIGURE]
    assert mixed == pytest.approx(before, abs=1e-5)
    assert dense < before - 1e-3
    for cached in (upcycled.blocks, upcycled._tail):
        cached.cache_clear()


def bytes_of(text, add_special_tokens):
    return {"input_ids": list(text.encode())}
