"""``doctor``: what a model's tensors are and do, and what is wrong with them, each with its name and a way out.

Nothing is believed that can be tried: which tensors get a gradient is seen in a backward call, which experts are chosen
in the same forward call, what was loaded by comparing files with the model.

E experts, k chosen a token.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mixtura.core.errors import FileFormatError, MixturaError, MixturaWarning, NotExpressibleError, UnknownNameError
from mixtura.core.selection import SelectionSpec
from mixtura.hf.doctor_experts import Computing, computing
from mixtura.hf.doctor_findings import Finding, findings, ranges
from mixtura.hf.doctor_probe import Probe, probe
from mixtura.hf.export import check_export
from mixtura.hf.families import selection_spec
from mixtura.hf.modeling import MixturaModel, routers
from mixtura.hf.native import native_mixtures
from mixtura.hf.stored import Stored, compare_with_files
from mixtura.hf.tensor_roles import TensorRole, coded_buffers, is_code, parameter_roles


@dataclasses.dataclass(frozen=True)
class Row:
    """Tensors of one role and layer that are alike.

    Attributes:
        role: see ``mixtura.hf.tensor_roles``; "adapters in ..." for those of PEFT.
        layer: number of the decoder layer; None outside of them.
        tensors: names.
        numbers: entries, all together.
        dtype: as in torch, without the prefix.
        device: where they are.
        quantized: whether they hold codes instead of weights.
        frozen: "no", "yes", or "experts 0-3".
        gradient: "yes", "zero", "none" (the backward call did not reach them), "experts 1, 4" (only those); "-" where
            they are frozen or there is no finite loss.
    """

    role: str
    layer: int | None
    tensors: tuple[str, ...]
    numbers: int
    dtype: str
    device: str
    quantized: bool
    frozen: str
    gradient: str


@dataclasses.dataclass(frozen=True)
class RouterFacts:
    """How one layer chooses.

    Attributes:
        layer: as on the tape.
        experts: E.
        k: experts a token; None if it is not known.
        selection: what differs from a softmax over all experts, of which the best k count; None if it is not known.
        balance: whether a balance loss of ``mixtura`` reaches the router; None if it was not tried.
        chosen_E: slots that the probe gave to each expert; None if it was not tried.
    """

    layer: str
    experts: int
    k: int | None
    selection: dict[str, Any] | None
    balance: bool | None
    chosen_E: list[int] | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What ``doctor`` saw.

    Attributes:
        model: class of the model.
        rows: tensors by role and layer.
        tied: names that share one parameter.
        routers: layer by layer.
        backend: the experts implementation that would run; "" if there are no experts that can change theirs.
        computing: what the backend "mixtura" does on this machine; None where there are no values or no such experts.
        export: for each stock family what it lacks, "" for nothing; empty if there is nothing to export.
        stored: comparison with the files; None if there were none.
        probe: the backward call; None if it could not be made.
        findings: the worst first.
    """

    model: str
    rows: tuple[Row, ...]
    tied: tuple[tuple[str, ...], ...]
    routers: tuple[RouterFacts, ...]
    backend: str
    computing: Computing | None
    export: dict[str, str]
    stored: Stored | None
    probe: Probe | None
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        fields = dataclasses.asdict(self)
        fields["stored"] = None if self.stored is None else self.stored._asdict()
        if self.probe is not None:
            fields["probe"]["live"] = {name: sorted(units) for name, units in self.probe.live.items()}
            fields["probe"]["loss"] = self.probe.loss if math.isfinite(self.probe.loss) else None  # JSON has no NaN
        return fields


def doctor(model: Any, *, folder: str | Path | None = None) -> Report:
    """Examine a model: one forward and one backward call on 128 random tokens, and every tensor looked at.

    The model stays as it is, its gradients and its mode too. Memory: the activations of 128 tokens, and one gradient at
    a time.

    Args:
        model: of transformers or of the family; dense, with mixtures, quantized or under PEFT. One on the meta device
            is examined as far as that goes.
        folder: that it was loaded from or saved to, to compare.

    Raises:
        NotExpressibleError: if it is no decoder.
        FileFormatError: if the folder's weights cannot be read.
    """
    stored = None if folder is None else compare_with_files(model, folder)
    return _report(model, stored, fresh=False)


def examine(name_or_path: str | Path) -> Report:
    """Load what ``load_model`` loads, or a PEFT folder, and examine it; what is too broken to be loaded too.

    Raises:
        MixturaError: as ``load_model`` does, if there is not even a configuration and weights that can be read.
    """
    from mixtura.hf.load import load_model

    path = Path(name_or_path)
    if (path / "adapter_config.json").is_file():
        return _report(_with_adapter(path), None, fresh=True)
    stored_there = (path / "config.json").is_file()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MixturaWarning)  # tensors without a place are among the findings
            model, _ = load_model(name_or_path)
    except FileFormatError as error:
        if not stored_there:
            raise
        return _unloadable(path, error)
    return _report(model, compare_with_files(model, path) if stored_there else None, fresh=True)


def _with_adapter(path: Path) -> Any:
    from peft import PeftConfig, PeftModel

    from mixtura.hf.load import load_model

    base, _ = load_model(str(PeftConfig.from_pretrained(str(path)).base_model_name_or_path))
    return PeftModel.from_pretrained(base, str(path), is_trainable=True).eval()


def _unloadable(path: Path, error: FileFormatError) -> Report:
    """Examine names and shapes alone, on the meta device.

    Raises:
        FileFormatError: the one that loading raised, if that is not possible either.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        stored = compare_with_files(model, path)
    except Exception:  # whatever a damaged configuration makes transformers raise, loading has said it better
        raise error from None
    report = _report(model, stored, fresh=True)
    finding = Finding("error", f"the model cannot be loaded: {error}")
    return dataclasses.replace(report, findings=(finding, *report.findings))


def _report(model: Any, stored: Stored | None, *, fresh: bool) -> Report:
    roles = parameter_roles(model)
    there = all(not role.tensor.is_meta for role in roles)
    seen, failure = _try_probe(model, roles) if there else (None, "")
    backend = _backend(model)
    export = check_export(model) if isinstance(model, MixturaModel) else {}
    found = findings(model, seen=seen, stored=stored, fresh=fresh, export=export)
    return Report(
        model=type(model).__name__,
        rows=tuple(_rows([*roles, *coded_buffers(model)], seen)),
        tied=tuple(_tied(model)),
        routers=tuple(_routers(model, seen)),
        backend=backend,
        computing=computing(model) if there and backend else None,
        export=export,
        stored=stored,
        probe=seen,
        findings=tuple([Finding("error", failure)] * bool(failure) + found),
    )


def _try_probe(model: Any, roles: Sequence[TensorRole]) -> tuple[Probe | None, str]:
    try:
        return probe(model, roles), ""
    except (RuntimeError, ValueError, TypeError, NotImplementedError, MixturaError) as error:
        return (
            None,
            f"no gradient could be looked at: the model failed on random tokens: {' '.join(str(error).split())}",
        )


def _rows(roles: Iterable[TensorRole], seen: Probe | None) -> Iterator[Row]:
    groups: dict[tuple[Any, ...], list[TensorRole]] = {}
    for role in roles:
        name = f"adapters in {role.role}" if role.adapter else role.role
        facts = (_dtype(role.tensor), str(role.tensor.device), is_code(role.tensor), _frozen(role))
        groups.setdefault((name, role.layer, *facts, _gradient(role, seen)), []).append(role)
    for (name, layer, *facts, gradient), found in groups.items():
        numbers = sum(role.tensor.numel() for role in found)
        yield Row(name, layer, tuple(role.name for role in found), numbers, *facts, gradient)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _frozen(role: TensorRole) -> str:
    frozen = role.frozen
    if len(frozen) == len(role.units):
        return "yes"
    return f"experts {ranges(frozen)}" if frozen else "no"


def _gradient(role: TensorRole, seen: Probe | None) -> str:
    if seen is None or not math.isfinite(seen.loss) or not role.tensor.requires_grad:
        return "-"
    if role.name not in seen.live:
        return "none"
    live, wanted = seen.live[role.name], set(role.units) - role.frozen
    if live >= wanted:
        return "yes"
    return f"experts {ranges(live)}" if live else "zero"


def _tied(model: nn.Module) -> Iterator[tuple[str, ...]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield from (tuple(group) for group in names.values() if len(group) > 1)


def _backend(model: Any) -> str:
    """Name of the experts implementation that a call would use now."""
    if not routers(model) and not native_mixtures(model):
        return ""
    return str(model.config._experts_implementation or "eager")


def _routers(model: Any, seen: Probe | None) -> Iterator[RouterFacts]:
    native = native_mixtures(model)
    spec = _native_spec(model) if native else None
    sizes = {layer: (m.num_experts, getattr(m.router, "spec", spec)) for layer, m in native.items()}
    sizes |= {layer: (router.num_experts, router.spec) for layer, router in routers(model).items()}
    for layer, (experts, chosen) in sorted(sizes.items(), key=lambda item: (int(item[0].split(".")[0]), item[0])):
        yield RouterFacts(
            layer=layer,
            experts=int(experts),
            k=None if chosen is None else chosen.k,
            selection=None if chosen is None else _differences(chosen),
            balance=None if seen is None else seen.gate_reached.get(layer),
            chosen_E=None if seen is None else seen.chosen_E.get(layer),
        )


def _native_spec(model: Any) -> SelectionSpec | None:
    try:
        return selection_spec(model.config)
    except (NotExpressibleError, UnknownNameError):
        return None


def _differences(spec: SelectionSpec) -> dict[str, Any]:
    plain = SelectionSpec(k=spec.k)
    pairs = ((field.name, getattr(spec, field.name)) for field in dataclasses.fields(spec))
    return {name: value for name, value in pairs if value != getattr(plain, name)}
