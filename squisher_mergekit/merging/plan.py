"""What a merge will do, from headers alone: for every tensor, whose Fisher weights it and what falls back."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.config import Scaling
from squisher_mergekit.fisher.mapping import Fisher, TensorInfo, check_shape
from squisher_mergekit.merging.parameters import UBGM_SQUISHER
from squisher_mergekit.merging.sources import ModelFiles, Opened, Sources, find_name

# What Python, torch and mergekit hold before the first tensor is read, and the chunks being worked on.
_RESIDENT = 500_000_000


@dataclass(frozen=True)
class Settings:
    """The parameters that hold for all models of a tensor."""

    scaling: Scaling = "debiased"
    normalize: str = "auto"
    floor: float = 0.0
    missing: str = "error"
    prior: float = 0.0


@dataclass(frozen=True)
class WeightInput:
    """One model's weight for one output tensor.

    ``stored``: its name in the model's files, None if it is put together from other tensors when read. ``aliases``:
    other names of the same tensor. ``info``: its header, None if unknown.
    """

    key: Hashable
    model: ModelFiles
    stored: str | None
    aliases: tuple[str, ...]
    info: TensorInfo | None
    fisher: str
    weight: float
    fisher_scale: float
    is_base: bool = False


@dataclass(frozen=True)
class FisherUse:
    """Which tensor of which Fisher weights one model's weight; ``opened`` is None for F = 0 (``fisher: none``).

    ``converted``: no tensor bears a name of the weight, but transformers' checkpoint conversion gives it.
    """

    input: WeightInput
    opened: Opened | None
    name: str
    converted: bool = False


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor is made.

    ``uses``: empty if no Fisher is needed (a buffer, a tensor that one model alone has). ``missing``: model label ->
    why it has no Fisher here; then all Fishers of this tensor are left out and the weighted mean is taken.
    """

    name: str
    size: int
    settings: Settings
    normalize: str
    uses: tuple[FisherUse, ...]
    missing: dict[str, str]
    inputs: tuple[WeightInput, ...]


CanConvert = Callable[[Hashable, Fisher, str], bool]


def plan_tensor(
    method: str,
    name: str,
    inputs: Sequence[WeightInput],
    settings: Settings,
    sources: Sources,
    *,
    base: Path | None,
    passed_through: bool,
    can_convert: CanConvert,
    cache_dir: str | None = None,
) -> TensorPlan:
    """Plan one output tensor.

    Args:
        method: ``squisher`` or ``ubgm_squisher``.
        name: Name of the output tensor.
        inputs: The weights that will be loaded.
        settings: Parameters for all models.
        sources: Opens the Fishers.
        base: Folder of the base model, for Fishers of partly frozen models.
        passed_through: Whether mergekit copies the tensor, as one model alone has it.
        can_convert: Whether a Fisher's tensors give a weight by transformers' conversion.
        cache_dir: Where Hub files are kept.

    Returns:
        The plan.

    Raises:
        ConfigError: All weights are 0, or ``fisher: none`` where a Fisher is needed.
        RefusedError: A Fisher cannot be found, read, or does not fit the weights.
    """
    known = next((item.info for item in inputs if item.info is not None), None)
    size = math.prod(known.shape) if known is not None else 0

    def plan(
        uses: tuple[FisherUse, ...] = (), missing: dict[str, str] | None = None, normalize: str = "none"
    ) -> TensorPlan:
        return TensorPlan(name, size, settings, normalize, uses, missing or {}, tuple(inputs))

    if any(item.info is not None and not item.info.dtype.is_floating_point for item in inputs):
        return plan()
    if passed_through:
        return plan()
    merged = [item for item in inputs if not (method == UBGM_SQUISHER and item.is_base)]
    if not any(item.weight > 0 for item in merged):
        raise ConfigError(f"the weights of {name} must not all be 0; give one model a positive weight")
    uses, missing = [], {}
    for item in inputs:
        use = _plan_input(method, item, sources, base, can_convert, cache_dir)
        if isinstance(use, str):
            missing[item.model.label] = use
        else:
            uses.append(use)
    fishers = [use.opened.fisher for use in uses if use.opened is not None]
    normalize = settings.normalize
    if normalize == "auto":
        normalize = "none" if all(fisher.config.from_optimizer for fisher in fishers) else "mean"
    return plan(() if missing else tuple(uses), missing, normalize)


def _plan_input(
    method: str, item: WeightInput, sources: Sources, base: Path | None, can_convert: CanConvert, cache_dir: str | None
) -> FisherUse | str:
    """Return the use of a Fisher, or why there is none."""
    label = item.model.label
    names = tuple(name for name in (item.stored, *item.aliases) if name is not None)
    if item.fisher == "none":
        if method == UBGM_SQUISHER and item.is_base:
            return FisherUse(item, None, names[0])
        raise ConfigError(f"fisher: none is for the base of {UBGM_SQUISHER} alone, found it for {label}; remove it")
    opened = sources.open(item.fisher, item.model, base if base != item.model.folder else None, cache_dir)
    fisher = opened.fisher
    found = find_name(fisher, names[0], names[1:])
    if found is not None:
        if item.info is not None:
            check_shape(f"{names[0]} for {label}", fisher.info(found).shape, item.info.shape, fisher.location)
        return FisherUse(item, opened, found)
    for name in names:
        if can_convert(item.key, fisher, name):
            return FisherUse(item, opened, name, converted=True)
    return fisher.config.coverage.without.get(names[0], "not in it")


@dataclass
class MergePlan:
    """The whole merge before it runs; ``str()`` of it is the preview that ``squisher plan`` prints."""

    method: str
    out_bytes_per_entry: int = 4
    shard_bytes: int = 5_000_000_000
    tensors: list[TensorPlan] = field(default_factory=list)

    def check(self) -> None:
        """Refuse what ``missing: error`` and the use of each Fisher forbid.

        Raises:
            MismatchError: Tensors lack a Fisher, or a Fisher serves no tensor at all.
        """
        lacking: dict[str, dict[str, str]] = {}
        for tensor in self.tensors:
            for label, why in tensor.missing.items():
                if tensor.settings.missing == "error":
                    lacking.setdefault(label, {})[tensor.name] = why
        for label, reasons in lacking.items():
            covered = sum(1 for tensor in self.tensors if self._has(tensor, label)) - len(reasons)
            shown = ", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:3])
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            raise MismatchError(
                f"the Fisher for {label} must cover every merged tensor, but covers {covered} of "
                f"{covered + len(reasons)}; missing {shown}{more}. Set missing: average to merge those by weighted "
                "mean, or give a Fisher that has them"
            )
        for model in self.models():
            if model["entries"] and not model["covered"]:
                raise MismatchError(
                    f"the names of a Fisher must be those of the weights, but none of {model['fisher']} fits "
                    f"{model['model']}; give the Fisher of this model"
                )

    @staticmethod
    def _has(tensor: TensorPlan, label: str) -> bool:
        return any(item.model.label == label for item in tensor.inputs)

    def warnings(self) -> list[str]:
        """Return what has to be said about the Fishers, each once."""
        found = [use.opened.warning for tensor in self.tensors for use in tensor.uses if use.opened is not None]
        return list(dict.fromkeys(warning for warning in found if warning))

    def models(self) -> list[dict[str, Any]]:
        """Return one summary a model: where its Fisher comes from, steps, beta2, scale, coverage."""
        summaries: dict[str, dict[str, Any]] = {}
        for tensor in self.tensors:
            for use in tensor.uses:
                label = use.input.model.label
                summary = summaries[label] = summaries.get(label) or _describe(use, tensor)
                summary["covered"] += tensor.size
                summary["entries"] += tensor.size
            for item in tensor.inputs:
                if tensor.missing:
                    summary = summaries.setdefault(item.model.label, _blank(item))
                    summary["entries"] += tensor.size
        return list(summaries.values())

    def fallbacks(self) -> dict[str, str]:
        """Return tensor -> why it will be the weighted mean."""
        return {
            tensor.name: "; ".join(f"{label}: {why}" for label, why in tensor.missing.items())
            for tensor in self.tensors
            if tensor.missing
        }

    def bytes_to_read(self) -> dict[str, int]:
        """Return the bytes of weights and of Fishers that the merge will read."""
        weights = sum(item.info.nbytes for t in self.tensors for item in t.inputs if item.info is not None)
        fishers = sum(_fisher_bytes(tensor) for tensor in self.tensors)
        return {"weights": weights, "fishers": fishers}

    def memory(self) -> dict[str, int]:
        """Return an estimate in bytes: ``anonymous`` memory of the process, and the largest ``mapped`` file part."""
        out = [tensor.size * self.out_bytes_per_entry for tensor in self.tensors] or [0]
        mapped = [
            sum(item.info.nbytes for item in t.inputs if item.info is not None) + _fisher_bytes(t) for t in self.tensors
        ]
        held = min(sum(out), self.shard_bytes + max(out))
        return {"anonymous": _RESIDENT + held + max(out), "mapped": max(mapped, default=0)}

    def as_dict(self) -> dict[str, Any]:
        """Return the preview as plain data."""
        return {
            "method": self.method,
            "tensors": len(self.tensors),
            "entries": sum(tensor.size for tensor in self.tensors),
            "models": self.models(),
            "fallbacks": self.fallbacks(),
            "warnings": self.warnings(),
            "bytes_to_read": self.bytes_to_read(),
            "memory": self.memory(),
        }

    def __str__(self) -> str:
        data = self.as_dict()
        lines = [f"{self.method}: {data['tensors']} tensors, {data['entries']:,} entries"]
        for model in data["models"]:
            share = model["covered"] / max(model["entries"], 1)
            lines += [f"  {model['model']}", f"    {describe_model(model)}", f"    covers {share:.1%} of the entries"]
        fallbacks = data["fallbacks"]
        lines.append(
            f"  {len(fallbacks)} tensors fall back to the weighted mean" if fallbacks else "  nothing falls back"
        )
        lines += [f"    {name}: {why}" for name, why in list(fallbacks.items())[:20]]
        lines += [f"    ... and {len(fallbacks) - 20} more"] if len(fallbacks) > 20 else []
        lines += [f"  warning: {warning}" for warning in data["warnings"]]
        read, memory = data["bytes_to_read"], data["memory"]
        lines.append(f"  reads {_size(read['weights'])} of weights and {_size(read['fishers'])} of Fishers")
        lines.append(
            f"  memory about {_size(memory['anonymous'])}, and {_size(memory['mapped'])} of mapped files at a time"
        )
        return "\n".join(lines)


def _describe(use: FisherUse, tensor: TensorPlan) -> dict[str, Any]:
    summary = _blank(use.input)
    if use.opened is None:
        return summary | {"fisher": "none (F = 0)"}
    fisher, config = use.opened.fisher, use.opened.fisher.config
    optimizer = config.optimizer
    factor = fisher.factor(use.name, tensor.settings.scaling) if not use.converted else None
    return summary | {
        "fisher": fisher.location,
        "estimator": config.estimator,
        "layout": config.source.layout,
        "optimizer": optimizer.class_ if optimizer else None,
        "steps": config.steps_of(use.name),
        "beta2": config.beta2_of(use.name),
        "scaling": tensor.settings.scaling,
        "normalize": tensor.normalize,
        "scale": factor * use.input.fisher_scale if factor is not None else None,
    }


def _blank(item: WeightInput) -> dict[str, Any]:
    empty = dict.fromkeys(("estimator", "layout", "optimizer", "steps", "beta2", "scaling", "normalize", "scale"))
    return {"model": item.model.label, "fisher": item.fisher, **empty, "covered": 0, "entries": 0}


def describe_model(model: dict[str, Any]) -> str:
    """Return one line about a model's Fisher: source, estimator, steps, decay, scale."""
    told = [model["estimator"], model["layout"], model["optimizer"]]
    told += [f"{key} {model[key]}" for key in ("steps", "beta2") if model[key] is not None]
    if model["scale"] is not None:
        told.append(f"{model['scaling']} x{model['scale']:.4g}")
    if model["normalize"] not in (None, "none"):
        told.append(f"divided by its {model['normalize']}")
    details = ", ".join(str(item) for item in told if item is not None)
    return f"fisher {model['fisher']}" + (f" ({details})" if details else "")


def _fisher_bytes(tensor: TensorPlan) -> int:
    total = 0
    for use in tensor.uses:
        if use.opened is not None:
            fisher = use.opened.fisher
            total += 4 * tensor.size if use.converted else fisher.info(use.name).nbytes
    return total


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
