"""Draft of a merge configuration: commented YAML that states what the plan found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.merging.merge_plan import describe_model
from squisher_mergekit.merging.mergekit.commands import plan_config, read_config, resolved_models
from squisher_mergekit.merging.parameters import PARAMETERS, SQUISHER, UBGM_SQUISHER

_WIDE = 10**6
# Settings of all models that a draft states, with a comment on when to change them.
_HINTS = {
    "normalize": "mean or l2 levels Fishers of different scales",
    "missing": "average merges tensors without a Fisher by the weighted mean",
    "prior": "d of the method, relative to the mean F of a tensor",
}
_STRUCTURE_HINTS = {
    "block": "rows or columns that are coupled; must divide recorded blocks",
    "damping": "in units of the mean eigenvalue; auto is the default of the structure",
}


def draft(
    models: Sequence[str],
    base: str | None = None,
    method: str = SQUISHER,
    structure: str | None = None,
    *,
    strict: bool = False,
    **options: Any,
) -> str:
    """Plan a merge with the defaults, and return its configuration as commented YAML.

    Args:
        models: Folders or Hub ids of the models.
        base: Folder or Hub id of the base model, which ``ubgm_squisher`` and a structure need.
        method: Name of the merge method.
        structure: ``rows``, ``columns`` or ``kron``; None for the diagonal.
        strict: Refuse a Fisher made at other weights.
        **options: Fields of mergekit's ``MergeOptions``.

    Returns:
        The text of the configuration, which ``squisher plan`` accepts.

    Raises:
        RefusedError: ``squisher plan`` would refuse the merge.
    """
    document: dict[str, Any] = {"merge_method": method, "models": [{"model": model} for model in models]}
    if base is not None:
        document["base_model"] = base
    if structure is not None:
        document["parameters"] = {"structure": structure}
    known = resolved_models(_config(document), bool(options.get("trust_remote_code")))
    bare = []  # a base that is listed without a Fisher
    try:
        preview = plan_config(_config(document), strict=strict, **options)
    except NotFoundError:
        if method != UBGM_SQUISHER or base is None or base in models:
            raise
        bare = [base]
        document["models"].append({"model": base, "parameters": {"fisher": "none"}})
        preview = plan_config(_config(document), strict=strict, **options)
    found = {each["model"]: each for each in preview["models"]}
    lines = [*_head(len(models), preview), f"merge_method: {method}", *_base_lines(base, method)]
    lines.append("models:")
    for model, (label, _) in zip(models, known, strict=True):
        lines += _model_lines(model, found.get(label))
    for model in bare:
        lines += [f"  - {_entry('model', model)}", "    parameters:", "      fisher: none  # none was found: F_0 = 0"]
    adapters = any("lora" in str(each.get("estimator")) for each in found.values())
    lines += ["parameters:", *_settings(method, structure, adapters)]
    lines += _dtype_lines([dtype for _, dtype in known])
    return "\n".join(lines) + "\n"


def _config(document: Mapping[str, Any]) -> Any:
    """Return a new configuration: a plan turns the models of its own into slices."""
    return read_config(yaml.safe_dump(document))


def _head(count: int, preview: Mapping[str, Any]) -> list[str]:
    """Return the comment at the top: the next commands, and the remarks of the plan."""
    lines = [
        f"# Fisher-weighted merge of {count} model{'s' if count > 1 else ''}, drafted by squisher new. Next:",
        "#   squisher plan merge.yml",
        "#   squisher merge merge.yml merged",
    ]
    remarks = [*preview["notes"], *(f"warning: {warning}" for warning in preview["warnings"])]
    return lines + [f"# {_comment(remark)}" for remark in remarks]


def _base_lines(base: str | None, method: str) -> list[str]:
    if base is not None:
        return [_entry("base_model", base)]
    return [] if method == UBGM_SQUISHER else ["# base_model: FOLDER  # needed by ubgm_squisher, density and structure"]


def _model_lines(model: str, found: dict[str, Any] | None) -> list[str]:
    lines = [f"  - {_entry('model', model)}"]
    if found is not None:
        share = found["covered"] / max(found["entries"], 1)
        lines.append(f"    # {_comment(describe_model(found))}; covers {share:.1%} of the entries")
    return [
        *lines,
        "    parameters:",
        "      fisher: auto  # or a path, a Hub id, or none",
        "      weight: 1.0  # importance of the model beside its Fisher",
    ]


def _settings(method: str, structure: str | None, adapters: bool) -> list[str]:
    """Return the settings of all models with their defaults; a structure is no suggestion for LoRAs."""
    defaults = {parameter.name: parameter.default for parameter in PARAMETERS if method in parameter.methods}
    hints = {name: hint for name, hint in _HINTS.items() if name in defaults}
    lines = [f"  {name}: {defaults[name]}  # {hint}" for name, hint in hints.items()]
    if structure is not None:
        lines.append(f"  structure: {structure}  # couples the weights of each matrix")
        lines += [f"  {name}: {defaults[name]}  # {hint}" for name, hint in _STRUCTURE_HINTS.items()]
    elif method == SQUISHER and not adapters:
        lines.append("  # structure: kron  # couples the weights of each matrix, for different tasks; needs base_model")
    return lines


def _dtype_lines(dtypes: Sequence[str | None]) -> list[str]:
    """Return the dtype of the output: that of the models, or float32 if they differ."""
    known = {dtype for dtype in dtypes if dtype is not None}
    if not known:
        return ["dtype: float32  # no model states its own"]
    if len(known) == 1:
        return [f"dtype: {known.pop()}  # that of the models"]
    return [f"dtype: float32  # the models have {', '.join(sorted(known))}"]


def _entry(key: str, value: str) -> str:
    """Return a key and a text as one line of YAML."""
    return yaml.safe_dump({key: value}, width=_WIDE, allow_unicode=True).rstrip("\n")


def _comment(text: str) -> str:
    return " ".join(text.split())
