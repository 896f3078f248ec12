"""Commands from a model to a model: ``upcycle``, ``install``, ``quantize``, ``export``; and ``generate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from mixtura.cli.options import Json, Model, key_values, method_option, show

Out = Annotated[Path, typer.Argument(help="New or empty folder.")]


def upcycle(
    model: Model,
    out: Out,
    method: Annotated[
        str, typer.Option(help="Key of the method; see mixtura methods --role surgery.")
    ] = "sparse-upcycling",
    layers: Annotated[
        str, typer.Option(help='"all", "last:6", "first:2", "every:2", "24-29", or numbers.')
    ] = "every:2",
    option: Annotated[list[str], method_option("NAME=VALUE for the method, may be repeated.")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Turn dense feed-forward layers into mixtures, with a receipt of what changed.

    Example: mixtura upcycle smollm2-135m out --layers last:6 --option copies=4 --option shards=2
    """
    from mixtura.core.errors import unknown_name
    from mixtura.core.files import check_new_folder
    from mixtura.hf.load import load_model
    from mixtura.hf.save import save_model
    from mixtura.surgery.upcycle import default_options, find_surgery
    from mixtura.surgery.upcycle import upcycle as run

    options, known = key_values(option), default_options(find_surgery(method))
    for name in options:
        if name not in known:
            raise unknown_name(f"option of {method}", name, known)
    check_new_folder(out)

    dense, tokenizer = load_model(model)
    made, receipt = run(dense, method, layers=layers, **options)
    chosen = [word for pair in option for word in ("--option", pair)]
    command = shlex.join(["mixtura", "upcycle", model, out.name, "--method", method, "--layers", layers, *chosen])
    save_model(made, out, tokenizer=tokenizer, parents=(model,), receipts={"upcycle": receipt}, command=command)
    parameters, active = receipt["parameters"], receipt["active_parameters"]
    lines = (
        f"{out}: layers {receipt['layers']}, largest difference of a logit {receipt['max_logit_difference']:.1e}\n"
        f"parameters {parameters['before']:,} -> {parameters['after']:,}, "
        f"active a token {active['before']:,} -> {active['after']:,}"
    )
    show(receipt, as_json=as_json, lines=lines)


def install(
    model: Model,
    out: Out,
    router: Annotated[str, typer.Option(help="Key of the method; see mixtura methods --role router.")],
    layers: Annotated[
        str, typer.Option(help='"all" that have native mixtures, "last:6", "first:2", "every:2", "24-29", or numbers.')
    ] = "all",
    start: Annotated[
        str, typer.Option(help='"native": rows and selection of the router that is there; or "random".')
    ] = "native",
    allow: Annotated[list[str], typer.Option(help="Key of a method that may read later tokens.")] = [],  # noqa: B006
    option: Annotated[list[str], method_option("NAME=VALUE for the method, may be repeated.")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Let a router of ours decide in the native mixtures of a model, with a receipt of what changed.

    Example: mixtura install OLMoE out --router aux-loss-free-bias --layers last:6 --option rate=0.001
    """
    from mixtura.core.files import check_new_folder
    from mixtura.hf.install import find_router
    from mixtura.hf.install import install as run
    from mixtura.hf.load import load_model
    from mixtura.hf.save import save_model

    options = key_values(option)
    find_router(router).check(options)
    check_new_folder(out)

    native, tokenizer = load_model(model)
    made, receipt = run(native, router, layers=layers, start=start, allow=allow, **options)
    chosen = "".join([f" --allow {key}" for key in allow] + [f" --option {pair}" for pair in option])
    command = f"mixtura install {model} {out.name} --router {router} --layers {layers} --start {start}{chosen}"
    save_model(made, out, tokenizer=tokenizer, parents=(model,), receipts={"install": receipt}, command=command)
    difference, parameters = receipt["max_logit_difference"], receipt["parameters"]
    lines = (
        f"{out}: {router} in layers {', '.join(receipt['layers'])}, largest difference of a logit {difference:.1e}\n"
        f"parameters {parameters['before']:,} -> {parameters['after']:,}"
    )
    show(receipt, as_json=as_json, lines=lines)


def quantize(
    model: Model,
    out: Out,
    bits: Annotated[int, typer.Option(help="8 or 4.")] = 8,
    option: Annotated[
        list[str],
        method_option(
            "NAME=VALUE: group_size, zero_point, scale_dtype, activation_bits, linears; head=true gives a head "
            "that is tied to the embeddings a quantized matrix of its own, too."
        ),
    ] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Take bits away from experts and linear layers, with a receipt of what changed.

    What is written loads by transformers after import mixtura.hf, and is fast on a CPU.

    Example: mixtura quantize runs/demo/mixture out --bits 4 --option group_size=64
    """
    from mixtura.core.files import check_new_folder
    from mixtura.hf.load import load_model
    from mixtura.hf.quantizer import MixturaQuantizationConfig
    from mixtura.hf.save import save_model
    from mixtura.surgery.quantize import quantize as run

    options = key_values(option)
    MixturaQuantizationConfig(**{"linears": True, **options, "bits": bits})
    check_new_folder(out)
    loaded, tokenizer = load_model(model)
    made, receipt = run(loaded, bits=bits, **options)
    chosen = "".join(f" --option {pair}" for pair in option)
    command = f"mixtura quantize {model} {out.name} --bits {bits}{chosen}"
    save_model(made, out, tokenizer=tokenizer, parents=(model,), receipts={"quantize": receipt}, command=command)
    before, after = (receipt["bytes"][name] / 1e6 for name in ("before", "after"))
    difference = receipt["max_logit_difference"]
    lines = f"{out}: {before:.1f} -> {after:.1f} MB, largest difference of a logit {difference:.1e}"
    show(receipt, as_json=as_json, lines=lines)


def export(
    model: Model,
    out: Annotated[Path | None, typer.Argument(help="New or empty folder; none with --check.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say which stock families can hold the model.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model of mixtura as a stock family, for programs that have never heard of mixtura.

    Example: mixtura export runs/demo/mixture out
    """
    from mixtura.core.errors import OptionError
    from mixtura.core.files import check_new_folder

    if out is None and not check:
        raise OptionError("export needs a folder to write to, or --check")
    if out is not None:
        check_new_folder(out)
    from mixtura.hf.export import check_export
    from mixtura.hf.export import export as run
    from mixtura.hf.load import load_model

    loaded, tokenizer = load_model(model)
    if check or out is None:
        lacks = check_export(loaded)
        lines = "\n".join(f"{family:10} {reason or 'can hold it'}" for family, reason in lacks.items())
        show({"lacks": lacks}, as_json=as_json, lines=lines)
        return
    receipt = run(loaded, out, tokenizer=tokenizer)
    difference = receipt["max_logit_difference"]
    show(receipt, as_json=as_json, lines=f"{out}: {receipt['family']}, largest difference of a logit {difference:.1e}")


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens, at most.")] = 60,
) -> None:
    """Let a model go on from a prompt, greedily.

    Example: mixtura generate runs/demo/mixture --prompt "Shall I compare thee"
    """
    from mixtura.hf.generate import generate_text
    from mixtura.hf.load import load_model

    loaded, tokenizer = load_model(model)
    typer.echo(prompt + generate_text(loaded, tokenizer, prompt, max_new_tokens=tokens))


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file."""
    for command in (upcycle, install, quantize, export, generate):
        app.command()(command)
