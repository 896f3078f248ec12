"""The steps of the tour that compute: two arms, what the mixture does, and that it can be read elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mixtura.core.errors import MixturaError, MixturaWarning, NotExpressibleError
from mixtura.core.files import write_file
from mixtura.core.layers import chosen_layers
from mixtura.data import Corpus
from mixtura.hf.count import count_parameters
from mixtura.hf.export import export
from mixtura.hf.generate import generate_text
from mixtura.hf.load import load_model
from mixtura.surgery.fitted_router import fit_router_rows
from mixtura.surgery.upcycle import upcycle
from mixtura.tour import DATA, LAYERS, PROMPTS, TRAIN, UPCYCLE, Tour
from mixtura.traces.inspect import capture_documents
from mixtura.training.evaluate import bits_per_byte
from mixtura.training.recipe import Recipe
from mixtura.training.sequences import Sequences
from mixtura.training.train import train

_RELOAD = """
import sys
if sys.argv[3] == "without":
    sys.modules["mixtura"] = None  # importing it raises
else:
    import mixtura.hf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging
logging.disable_progress_bar()
expected = load_file(sys.argv[2])
logits = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()(expected["tokens"], use_cache=False).logits
print(float((logits - expected["logits"]).abs().max()))
"""


@dataclasses.dataclass
class Arms:
    """The dense baseline and the mixture, trained and measured.

    Attributes:
        mixture: the trained mixture; of the dense baseline only numbers are kept.
        tokenizer: of both.
        held_out: documents by domain.
        bits_per_byte: by arm ("base", "dense", "mixture") and domain.
        active: parameters of a token by arm.
        total: parameters by arm.
        curves: (step, cross-entropy) by arm.
        receipt: of the upcycling.
        recipe: of the mixture.
        tokens_trained: by either arm.
        skipped: domains that could not be had, and why.
    """

    mixture: Any
    tokenizer: Any
    held_out: dict[str, list[str]]
    bits_per_byte: dict[str, dict[str, float]]
    active: dict[str, int]
    total: dict[str, int]
    curves: dict[str, list[tuple[int, float]]]
    receipt: dict[str, Any]
    recipe: dict[str, Any]
    tokens_trained: int
    skipped: dict[str, str]


def compare_arms(tour: Tour) -> Arms:
    """Fetch, measure the base, train and measure both arms."""
    with tour.step("fetch"):
        corpus = Corpus.load()
        base, tokenizer = load_model(tour.model)
    for name, reason in corpus.skipped.items():
        print(f"without {name}: {reason}", file=sys.stderr)
    number = base.config.num_hidden_layers
    layers = chosen_layers(f"last:{min(LAYERS, number)}", number)
    bits = {"base": _evaluate(tour, base, tokenizer, corpus)}
    counts = {"base": count_parameters(base)}
    curves = {}

    recipe = _recipe(tour, corpus, f"feed-forward:{layers[0]}-{layers[-1]}")
    dense, curves["dense"] = _train(tour, "dense", recipe, copy.deepcopy(base), tokenizer, corpus, {})
    bits["dense"], counts["dense"] = _evaluate(tour, dense, tokenizer, corpus), count_parameters(dense)
    del dense

    recipe = _recipe(tour, corpus, "mixtures")
    with tour.step("upcycle"):
        blocks = _blocks_by_domain(recipe, tokenizer, corpus)
        rows = fit_router_rows(base, blocks, layers, clusters=int(UPCYCLE["copies"]))
        tokens_BQ = torch.cat([ids_NL[:1, :128] for ids_NL in blocks.values()])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MixturaWarning)  # that a top-1 gate gets no gradient: it is frozen here
            mixture, receipt = upcycle(base, layers=layers, tokens_BQ=tokens_BQ, router_rows=rows, **UPCYCLE)
    del base
    receipts = {"upcycle": receipt}
    mixture, curves["mixture"] = _train(tour, "mixture", recipe, mixture, tokenizer, corpus, receipts)
    bits["mixture"], counts["mixture"] = _evaluate(tour, mixture, tokenizer, corpus), count_parameters(mixture)
    return Arms(
        mixture,
        tokenizer,
        corpus.held_out,
        bits,
        {name: count.active for name, count in counts.items()},
        {name: count.total for name, count in counts.items()},
        curves,
        receipt,
        recipe.to_dict() | {"upcycle": {"layers": layers, **UPCYCLE, "router": "fitted to clusters"}},
        recipe.training_tokens,
        corpus.skipped,
    )


def _recipe(tour: Tour, corpus: Corpus, parameters: str) -> Recipe:
    warmup = min(int(TRAIN["warmup"]), tour.steps - 1)
    train_options = {**TRAIN, "steps": tour.steps, "warmup": warmup, "parameters": parameters}
    if parameters == "mixtures":
        train_options["router_learning_rate"] = 0.0
    return Recipe.from_dict(
        {"model": tour.model, "data": {"domains": list(corpus.train), **DATA}, "train": train_options}
    )


def _evaluate(tour: Tour, model: Any, tokenizer: Any, corpus: Corpus) -> dict[str, float]:
    with tour.step("evaluate"):
        tokens = int(DATA["held_out_tokens"])
        return bits_per_byte(model, tokenizer, corpus.held_out, max_tokens=tokens, progress=tour.progress)


def _train(
    tour: Tour, name: str, recipe: Recipe, model: Any, tokenizer: Any, corpus: Corpus, receipts: dict[str, Any]
) -> tuple[Any, list[tuple[int, float]]]:
    """Train an arm, or load it where a former, killed tour has finished it."""
    folder, history = tour.out / name, tour.out / f"{name}.history.json"
    with tour.step(f"train {name}"):
        if history.is_file():
            return load_model(folder)[0], [tuple(row) for row in json.loads(history.read_text())]
        if folder.is_dir():  # killed between the model and its history
            shutil.rmtree(folder)
        done = train(
            recipe,
            folder,
            model=model,
            tokenizer=tokenizer,
            corpus=corpus,
            receipts=receipts,
            progress=tour.progress,
        )
        with write_file(history) as partial:
            partial.write_text(json.dumps(done.history), encoding="utf-8")
    return done.model, done.history


def _blocks_by_domain(recipe: Recipe, tokenizer: Any, corpus: Corpus, number: int = 4) -> dict[str, torch.Tensor]:
    """The first blocks (N, L) of each domain that the recipe reads: fitting the routers reads nothing more."""
    blocks = Sequences.of(recipe, tokenizer, corpus).blocks
    found: dict[str, list[torch.Tensor]] = {name: [] for name in corpus.train}
    for block in blocks:
        if len(found[block["domain"]]) < number:
            found[block["domain"]].append(torch.as_tensor(block["input_ids"]))
    return {name: torch.stack(ids) for name, ids in found.items() if ids}


def show_routing(tour: Tour, arms: Arms) -> dict[str, Any]:
    """Capture decisions on held-out text and keep the trace."""
    with tour.step("see"):
        trace = capture_documents(arms.mixture, arms.tokenizer, arms.held_out, max_tokens=1024)
        trace.save(tour.out / "trace.safetensors")
    return {"trace": trace}


def export_and_reload(tour: Tour, arms: Arms) -> dict[str, Any]:
    """Read the saved mixture in a new process, export it, read that without mixtura, and let it speak."""
    with tour.step("reload"):
        expected = _expected(arms, tour.out / "logits.safetensors")
        difference = _reload(tour.out / "mixture", expected, "with")
        if difference != 0:
            raise MixturaError(f"the reloaded mixture's logits differ by {difference:.2e}; saving is broken")
    with tour.step("export"):
        receipt = _export(arms, tour.out / "export", expected)
    with tour.step("generate"):
        samples = {prompt: generate_text(arms.mixture, arms.tokenizer, prompt, max_new_tokens=30) for prompt in PROMPTS}
    expected.unlink()
    return {"receipts": {"reload": {"max_logit_difference": difference}, "export": receipt}, "samples": samples}


def _export(arms: Arms, out: Path, expected: Path) -> dict[str, Any]:
    """Receipt of the export, or why no stock family can hold the mixture."""
    if out.exists():
        shutil.rmtree(out)
    try:
        receipt = export(arms.mixture, out, tokenizer=arms.tokenizer)
    except NotExpressibleError as error:
        return {"family": None, "reason": str(error)}
    return {**receipt, "max_logit_difference_without_mixtura": _reload(out, expected, "without")}


@torch.no_grad()
def _expected(arms: Arms, path: Path) -> Path:
    text = next(iter(arms.held_out.values()))[0]
    tokens = arms.tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
    logits = arms.mixture.eval()(tokens, use_cache=False).logits
    save_file({"tokens": tokens, "logits": logits.contiguous()}, path)
    return path


def _reload(folder: Path, expected: Path, with_mixtura: str) -> float:
    """Largest difference of a logit in a new process."""
    command = [sys.executable, "-c", _RELOAD, str(folder), str(expected), with_mixtura]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MixturaError(
            f"{str(folder)!r} could not be read in a new process: {done.stderr.strip().splitlines()[-1]}"
        )
    return float(done.stdout.strip().splitlines()[-1])
