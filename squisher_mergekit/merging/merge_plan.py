"""Plan of a whole merge: missing tensors, source of each Fisher, bytes to read, memory."""

from dataclasses import dataclass, field
from typing import Any

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.merging.parameters import no_signal
from squisher_mergekit.merging.planning.records import FisherUse, TensorPlan, WeightInput
from squisher_mergekit.models.whole import WholeModel, names_text

# Memory of Python, torch and mergekit before the first tensor is read, and of the chunks in work.
_RESIDENT = 500_000_000


@dataclass
class MergePlan:
    """Plan of a whole merge.

    Attributes:
        method: Name of the merge method.
        out_bytes_per_entry: Size of an entry of the output, in bytes.
        shard_bytes: Largest size of an output file, in bytes.
        tensors: Plans of the output tensors.
        whole: The merged model, with the tensors that the merge loses.
    """

    method: str
    out_bytes_per_entry: int = 4
    shard_bytes: int = 5_000_000_000
    tensors: list[TensorPlan] = field(default_factory=list)
    whole: WholeModel = field(default_factory=WholeModel)

    def check(self) -> None:
        """Refuse missing Fishers, and Fishers that fit no tensor.

        Raises:
            MismatchError: A tensor lacks a Fisher under ``missing: error``, or a Fisher fits no tensor at all.
        """
        lacking: dict[str, dict[str, str]] = {}
        for tensor in self.tensors:
            for label, why in tensor.missing.items():
                if tensor.settings.missing == "error" and not tensor.is_buffer:
                    lacking.setdefault(label, {})[tensor.name] = why
        for label, reasons in lacking.items():
            covered = sum(1 for tensor in self.tensors if self._needs(tensor, label)) - len(reasons)
            shown = ", ".join(f"{name} ({why})" for name, why in list(reasons.items())[:3])
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            raise MismatchError(
                f"the Fisher for {label} must cover every merged tensor, but covers {covered} of "
                f"{covered + len(reasons)}; missing {shown}{more}. Set missing: average to merge those by weighted "
                "mean, or give a Fisher that has them"
            )
        apart = next((item.model for tensor in self.tensors for item in tensor.inputs if item.model.lora), None)
        for model in self.models():
            if model["entries"] and not model["covered"] and apart is not None:
                raise MismatchError(
                    "LoRAs must change layers of a common kind, but every tensor that one of them changes lacks a "
                    f"Fisher in another model ({model['model']}); merge LoRAs of common target_modules"
                )
            if model["entries"] and not model["covered"]:
                raise MismatchError(
                    f"the names of a Fisher must be those of the weights, but none of {model['fisher']} fits "
                    f"{model['model']}; give the Fisher of this model"
                )

        self.whole_densities()

    def whole_densities(self) -> dict[Any, float]:
        """Return model -> density, for the models with one threshold for all their tensors.

        Raises:
            ConfigError: The density of a model differs between tensors.
        """
        densities: dict[Any, tuple[float, str]] = {}
        for tensor in self.tensors:
            for item in tensor.trimmed_by_model():
                density, name = densities.setdefault(item.key, (item.density, tensor.name))
                if density != item.density:
                    raise ConfigError(
                        f"density_scope: model needs one density of {item.model.label} for all tensors that it trims, "
                        f"found {density:g} for {name} and {item.density:g} for {tensor.name}; give one number (and 1 "
                        "for tensors to be kept whole), or set density_scope: tensor"
                    )
        return {model: density for model, (density, _) in densities.items()}

    @staticmethod
    def _needs(tensor: TensorPlan, label: str) -> bool:
        """Return True if a model's Fisher must have the tensor."""
        return not (tensor.is_buffer or tensor.is_untouched) and any(
            item.model.label == label for item in tensor.inputs
        )

    def warnings(self) -> list[str]:
        """Return the warnings about the Fishers, each once."""
        uses = [use for tensor in self.tensors for use in tensor.uses if use.opened is not None]
        warnings = [use.opened.warning for use in uses if use.opened is not None] + [use.warning for use in uses]
        return list(dict.fromkeys(warning for warning in warnings if warning))

    def models(self) -> list[dict[str, Any]]:
        """Return one summary per model: source of its Fisher, steps, beta2, scale, coverage."""
        summaries: dict[str, dict[str, Any]] = {}
        described: set[str] = set()
        for tensor in self.tensors:
            for use in tensor.uses:
                label = use.input.model.label
                if use.left:
                    summaries.setdefault(label, _blank(use.input))["entries"] += tensor.size
                    continue
                if label not in described:
                    counted = summaries.get(label, {"entries": 0})
                    summaries[label] = _describe(use, tensor) | {"entries": counted["entries"]}
                    described.add(label)
                summary = summaries[label]
                summary["covered"] += tensor.size
                low, high = summary["density"] or [1.0, 0.0]
                summary["density"] = [min(low, use.input.density), max(high, use.input.density)]
                summary["entries"] += tensor.size
            for item in () if tensor.uses else tensor.inputs:
                summary = summaries.setdefault(item.model.label, _blank(item))
                summary["entries"] += 0 if tensor.is_untouched else tensor.size
        for summary in summaries.values():
            summary["entries"] += sum(self.whole.gaps.absent_entries().values())
        return list(summaries.values())

    def fallbacks(self) -> dict[str, str]:
        """Return tensor -> reason why it is the weighted mean; without buffers."""
        return {
            tensor.name: "; ".join(f"{label}: {why}" for label, why in tensor.missing.items())
            for tensor in self.tensors
            if tensor.missing and not tensor.is_buffer
        }

    def options(self) -> dict[str, int]:
        """Return option of the vote, as in the YAML -> number of tensors on which it works."""
        found: dict[str, int] = {}
        for tensor in self.tensors:
            votes = tensor.settings.votes
            trimmed = any(item.density < 1 for item in tensor.inputs)
            for option in () if tensor.is_copied or tensor.is_buffer else votes.given:
                chosen = option in votes.of_choice
                if (chosen and trimmed and tensor.uses) or (
                    not chosen and (tensor.uses or option.startswith("lambda"))
                ):
                    found[option] = found.get(option, 0) + 1
        return found

    def uncoupled(self) -> dict[str, str]:
        """Return tensor -> reason why a structure leaves it to the diagonal."""
        return {tensor.name: tensor.uncoupled for tensor in self.tensors if tensor.uncoupled}

    def notes(self) -> list[str]:
        """Return one line each about buffers, copied tensors, tensors that mergekit does not list, and a structure."""
        buffers = [tensor.name for tensor in self.tensors if tensor.is_buffer]
        copied = [tensor.name for tensor in self.tensors if tensor.is_copied and not tensor.is_untouched]
        notes = list(self.whole.notes)
        if buffers:
            notes.append(f"{len(buffers)} buffers can have no Fisher and are the weighted mean ({names_text(buffers)})")
        if copied:
            notes.append(
                f"{len(copied)} tensors are copied, as one model alone has them or they are integers "
                f"({names_text(copied)})"
            )
        notes += self._lora_notes()
        for option, number in self.options().items():
            of_all = f"{number} of {len(self.tensors)}" if number < len(self.tensors) else "all"
            notes.append(f"{option}, for {of_all} tensors")
        if any(tensor.settings.write_fisher for tensor in self.tensors):
            notes.append("write_fisher: true, so that fisher: auto finds the Fisher of the result")
        uncoupled = self.uncoupled()
        for structure in dict.fromkeys(t.settings.structure for t in self.tensors if t.coupled or t.uncoupled):
            known = [tensor for tensor in self.tensors if tensor.settings.structure == structure]
            coupled = sum(tensor.coupled for tensor in known)
            left = sum(bool(tensor.uncoupled) for tensor in known)
            notes.append(f"structure: {structure} couples {coupled} tensors and leaves {left} to the diagonal")
        if any(use.opened and use.opened.fisher.config.of_lora for t in self.tensors if t.coupled for use in t.uses):
            notes.append(
                "task vector and Fisher of a LoRA have a low rank; in our experiments every structure merged LoRAs "
                "worse than the diagonal: compare both"
            )
        for reason in dict.fromkeys(uncoupled.values()):
            names = [name for name, why in uncoupled.items() if why == reason]
            count = f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
            notes.append(f"merged by the diagonal, as {reason}: {count} ({names_text(names)})")
        return notes + self._factor_notes()

    def _lora_notes(self) -> list[str]:
        """Return lines about weights that no LoRA changes, and about F of weights that some LoRA left alone."""
        untouched = [tensor.name for tensor in self.tensors if tensor.is_untouched]
        notes = []
        if untouched:
            notes.append(
                f"{len(untouched)} tensors are copied from the base, as no LoRA changes them ({names_text(untouched)})"
            )
        filled: dict[str, list[str]] = {}
        left: dict[str, list[str]] = {}
        for tensor in self.tensors:
            for use in tensor.uses:
                if use.filled or use.left:
                    (filled if use.filled else left).setdefault(use.input.model.label, []).append(tensor.name)
        notes += [
            f"{len(names)} tensors that the LoRA of {label} left alone are left to the other models, as its F there is "
            f"unknown ({names_text(names)})"
            for label, names in left.items()
        ]
        return notes + [
            f"{len(names)} tensors that the LoRA of {label} left alone and another one changed have the mean of its F "
            f"over layers of the same kind ({names_text(names)})"
            for label, names in filled.items()
        ]

    def _factor_notes(self) -> list[str]:
        """Return one line for each model with recorded factors: the matrices that take them."""
        coupled = [tensor for tensor in self.tensors if tensor.coupled]
        taken: dict[str, list[str]] = {}
        sources: dict[str, set[str]] = {}
        for tensor in coupled:
            for use in tensor.uses:
                if use.sides and use.opened is not None and (info := use.opened.fisher.factors.info):
                    taken.setdefault(use.input.model.label, []).append(tensor.name)
                    sources.setdefault(use.input.model.label, set()).add(info.source)
        return [
            f"{len(names)} of {len(coupled)} coupled matrices of {label} use factors of its Fisher "
            f"({', '.join(sorted(sources[label]))}; {names_text(names)}); factors that it lacks follow from d and v"
            for label, names in taken.items()
        ]

    def whole_size(self) -> dict[str, int]:
        """Return the number of tensors and entries of the whole model, lost ones included."""
        absent = self.whole.gaps.absent_entries()
        entries = sum(tensor.size for tensor in self.tensors) + sum(absent.values())
        return {"tensors": len(self.tensors) + len(absent), "entries": entries}

    def bytes_to_read(self) -> dict[str, int]:
        """Return the bytes of weights and of Fishers that the merge reads."""
        weights = sum(info.nbytes for tensor in self.tensors for info in tensor.weights())
        fishers = sum(_fisher_bytes(tensor) for tensor in self.tensors)
        twice = [tensor for tensor in self.tensors if tensor.trimmed_by_model()]
        weights += sum(info.nbytes for tensor in twice for info in tensor.weights())
        fishers += sum(_fisher_bytes(tensor) for tensor in twice)
        return {"weights": weights, "fishers": fishers}

    def memory(self) -> dict[str, int]:
        """Return an estimate in bytes: ``anonymous`` memory of the process, and the largest ``mapped`` file part."""
        out = [tensor.size * self.out_bytes_per_entry for tensor in self.tensors] or [0]
        mapped = [sum(info.nbytes for info in t.weights()) + _fisher_bytes(t) for t in self.tensors]
        shard = min(sum(out), self.shard_bytes + max(out))
        masks = max((_mask_bytes(tensor) for tensor in self.tensors), default=0)
        return {"anonymous": _RESIDENT + shard + max(out) + masks, "mapped": max(mapped, default=0)}

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain data: the preview."""
        return {
            "method": self.method,
            "tensors": len(self.tensors),
            "entries": sum(tensor.size for tensor in self.tensors),
            "whole": self.whole_size(),
            "lost": self.whole.gaps.lost(),
            "models": self.models(),
            "fallbacks": self.fallbacks(),
            "options": self.options(),
            "uncoupled": self.uncoupled(),
            "notes": self.notes(),
            "warnings": self.warnings(),
            "bytes_to_read": self.bytes_to_read(),
            "memory": self.memory(),
        }


def preview_text(preview: dict[str, Any]) -> str:
    """Return a preview (see :meth:`MergePlan.as_dict`) as text."""
    lines = [f"{preview['method']}: {size_text(preview)}"]
    for model in preview["models"]:
        share = model["covered"] / max(model["entries"], 1)
        lines += [f"  {model['model']}", f"    {describe_model(model)}", f"    covers {share:.1%} of the entries"]
    fallbacks = preview["fallbacks"]
    lacking = f"{len(fallbacks)} tensors lack a Fisher and are the weighted mean"
    lines.append(f"  {lacking}" if fallbacks else "  all needed Fishers are complete")
    lines += [f"    {name}: {why}" for name, why in list(fallbacks.items())[:20]]
    lines += [f"    ... and {len(fallbacks) - 20} more"] if len(fallbacks) > 20 else []
    lines.append(f"  entries with {no_signal(preview['method'])}")
    lines += [f"  {note}" for note in preview["notes"]]
    if preview["lost"]:
        lines.append(f"  warning: the merge loses {len(preview['lost'])} tensors ({names_text(preview['lost'])})")
    lines += [f"  warning: {warning}" for warning in preview["warnings"]]
    read, memory = preview["bytes_to_read"], preview["memory"]
    lines.append(f"  reads {_size(read['weights'])} of weights and {_size(read['fishers'])} of Fishers")
    lines.append(
        f"  memory about {_size(memory['anonymous'])}, and {_size(memory['mapped'])} of mapped files at a time"
    )
    return "\n".join(lines)


def size_text(preview: dict[str, Any]) -> str:
    """Return the size of the written model, and that of the whole model if the merge loses tensors."""
    whole = preview["whole"]
    if not preview["lost"]:
        return f"{preview['tensors']} tensors, {preview['entries']:,} entries"
    return f"{preview['tensors']} of {whole['tensors']} tensors, {preview['entries']:,} of {whole['entries']:,} entries"


def _describe(use: FisherUse, tensor: TensorPlan) -> dict[str, Any]:
    summary = _blank(use.input)
    if use.opened is None:
        alone = tensor.settings.structure != "diagonal"
        return summary | {"fisher": "none (structure from the task vectors alone)" if alone else "none (F = 0)"}
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
    keys = ("estimator", "layout", "optimizer", "steps", "beta2", "scaling", "normalize", "scale", "density")
    empty = dict.fromkeys(keys)
    return {"model": item.model.label, "fisher": item.fisher, **empty, "covered": 0, "entries": 0}


def describe_model(model: dict[str, Any]) -> str:
    """Return one line about a model's Fisher: source, estimator, steps, decay, scale."""
    details = [model["estimator"], model["layout"], model["optimizer"]]
    details += [f"{key} {model[key]}" for key in ("steps", "beta2") if model[key] is not None]
    if model["scale"] is not None:
        details.append(f"{model['scaling']} x{model['scale']:.4g}")
    if model["normalize"] not in (None, "none"):
        details.append(f"divided by its {model['normalize']}")
    low, high = model["density"] or (1.0, 1.0)
    if low < 1:
        details.append(f"density {low:g}" if low == high else f"density {low:g} to {high:g}")
    text = ", ".join(str(item) for item in details if item is not None)
    return f"fisher {model['fisher']}" + (f" ({text})" if text else "")


def _fisher_bytes(tensor: TensorPlan) -> int:
    total = 0
    for use in tensor.uses:
        if use.opened is not None:
            fisher = use.opened.fisher
            total += 4 * tensor.size if use.converted else fisher.info(use.name).nbytes
            total += sum(fisher.factors.side(side).nbytes(use.name) for side in use.sides)
    return total


def _mask_bytes(tensor: TensorPlan) -> int:
    """Return the bytes of the masks of ``density``: one byte per entry and model."""
    return tensor.size * len(tensor.differenced())


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
