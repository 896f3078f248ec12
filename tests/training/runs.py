"""Small runs that the tests of training share. As a program: train into a folder, and die on the way.

python runs.py OUT at-step 5             SIGKILL at the end of step 5
python runs.py OUT in-weights 4          SIGKILL when the weights of the checkpoint of step 4 are half written
python runs.py OUT in-optimizer 4        SIGKILL when its optimizer is half written
python runs.py OUT before-mark 4         SIGKILL when all is written but the mark
python runs.py OUT interrupt 5           Ctrl-C at the end of step 5
"""

import os
import signal
import sys
from pathlib import Path

import torch

from mixtura.data import Corpus
from mixtura.hf import convert
from mixtura.hf.callbacks import CompleteMark
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from mixtura.training.recipe import Recipe
from mixtura.training.train import train
from pico import pico
from training.byte_tokenizer import VOCABULARY_SIZE, byte_tokenizer


def recipe(**fields):
    """Eight steps of two micro-batches with balance terms; ``train`` fields as keywords."""
    plain = {"steps": 8, "batch_size": 2, "gradient_accumulation": 2, "learning_rate": 1e-2, "save_every": 2}
    values = {
        "model": "pico",
        "data": {"domains": {"words": 2, "digits": 1}, "sequence_length": 16},
        "train": {**plain, **fields},
        "balance": {"load-balancing": 0.01, "router-z-loss": 0.001},
        "seed": 3,
    }
    return Recipe.from_dict(values)


def model(family="gpt2"):
    """Two mixtures in three layers; GPT-2 has dropout, so random states matter."""
    made = pico(family, vocab_size=VOCABULARY_SIZE)
    gated = family == "llama"
    layers = {i: Mixture(TopKRouter(32, 4), Experts(4, 32, 16, gated=gated, bias=not gated)) for i in (1, 2)}
    return convert(made, layers)


def corpus():
    """Two domains of a few sentences, written so that there is something to learn."""
    words = [f"the other thing is there, and the weather is rather fine {i}; " * 6 for i in range(8)]
    digits = [" ".join(str(i * j) for j in range(60)) for i in range(1, 9)]
    return Corpus(train={"words": words, "digits": digits}, held_out={})


def run(out, how=None, model_=None, **options):
    """Train a fresh model."""
    start = model() if model_ is None else model_
    return train(
        how or recipe(), out, model=start, tokenizer=byte_tokenizer(), corpus=corpus(), progress=False, **options
    )


def _die():
    os.kill(os.getpid(), signal.SIGKILL)


def _die_in_the_middle_of(module, name, file_name, step):
    """Make a saving function write half of one file and die."""
    save = getattr(module, name)

    def half(value, path, **options):
        save(value, path, **options)
        if Path(path).name == file_name and Path(path).parent.name == f"checkpoint-{step}":
            os.truncate(path, os.path.getsize(path) // 2)
            _die()

    setattr(module, name, half)


def _act_at(step, event, action):
    """Do something in a callback of the trainer."""
    original = getattr(CompleteMark, event, None)

    def act(self, args, state, control, **kwargs):
        if state.global_step == step:
            action()
        return original(self, args, state, control, **kwargs) if original else None

    setattr(CompleteMark, event, act)


def main(out, where, step):
    import safetensors.torch

    if where == "at-step":
        _act_at(step, "on_step_begin", lambda: _die())
    elif where == "before-mark":
        _act_at(step, "on_save", lambda: _die())
    elif where == "interrupt":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        _act_at(step, "on_step_begin", lambda: os.kill(os.getpid(), signal.SIGINT))
    elif where == "in-weights":
        _die_in_the_middle_of(safetensors.torch, "save_file", "model.safetensors", step)
    else:
        _die_in_the_middle_of(torch, "save", "optimizer.pt", step)
    run(Path(out))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
