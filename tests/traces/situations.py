"""What people do with a model: each situation runs a model and gives numbers that any other decision would change."""

import contextlib
import copy
import functools
import os
import tempfile

import torch

from mixtura.hf import convert
from mixtura.nn import Experts, Mixture
from mixtura.nn.routers.topk_softmax import TopKRouter
from pico import pico, tokens
from pico_native import native


def ours(base="llama", layers=(0, 2), k=2, **options):
    """A model of the family mixtura, over a dense or a sparse base."""
    mixtures = {i: Mixture(TopKRouter(32, 4, k), Experts(4, 32, 16)) for i in layers}
    return spread(convert(pico(base, **options), mixtures))


def spread(model):
    """The model with weights so large that other decisions give other tokens."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.2)
    return model


def break_gates(model):
    """Other gates, so that the model by itself decides otherwise."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gate.weight", ".router.weight")):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))


MODELS = {
    "ours": ours,
    "mixed": lambda: ours("olmoe", layers=(1,)),
    "mixtral": lambda: spread(native("mixtral")),
    "olmoe": lambda: spread(native("olmoe")),
    "deepseek_v3": lambda: spread(native("deepseek_v3")),
    "gpt_oss": lambda: spread(native("gpt_oss")),
    "qwen2_moe": lambda: spread(native("qwen2_moe")),
}


def left_padded(rows=2, length=7, padded=3):
    """Tokens and mask; the first row begins with padding."""
    x, mask = tokens(rows, length), torch.ones(rows, length, dtype=torch.long)
    mask[0, :padded] = 0
    return x.masked_fill(mask == 0, 0), mask


def generated(model, rows=2, **options):
    """Scores of all steps of a generation of 5 tokens."""
    x, mask = left_padded(rows) if rows > 1 else (tokens(1, 7), torch.ones(1, 7, dtype=torch.long))
    made = model.generate(
        x,
        attention_mask=mask,
        max_new_tokens=5,
        min_new_tokens=5,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    return torch.cat([made.sequences.flatten().float(), *(step.flatten() for step in made.logits)])


def forward(model):
    """Logits of left-padded text."""
    x, mask = left_padded()
    with torch.no_grad():
        return model(x, attention_mask=mask).logits


@functools.cache
def assistant_of(model):
    """A model that often, but not always, says what the model says when first asked for."""
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in assistant.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            parameter.add_(0.03 * noise)
    return assistant


def assisted(model):
    """Drafts of another model, some of which are rejected."""
    return generated(model, rows=1, assistant_model=assistant_of(model))


@contextlib.contextmanager
def one_process():
    """A process group of one, over a file."""
    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(os.path.join(folder, "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def distributed(model):
    """Under DistributedDataParallel."""
    with one_process(), torch.no_grad():
        return torch.nn.parallel.DistributedDataParallel(model)(tokens()).logits


SITUATIONS = {
    "forward": forward,
    "dynamic cache": generated,
    "static cache": lambda model: generated(model, cache_implementation="static"),
    "no cache": lambda model: generated(model, use_cache=False),
    "beams": lambda model: generated(model, num_beams=3, num_return_sequences=2),
    "chunked prompt": lambda model: generated(model, prefill_chunk_size=3),
    "assisted": assisted,
    "prompt lookup": lambda model: generated(model, rows=1, prompt_lookup_num_tokens=3),
    "distributed": distributed,
}
