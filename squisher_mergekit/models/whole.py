"""Completeness of a merge: tensors of the files and of the model's class that the merge would lose."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from squisher_mergekit.models.loading import FilledKeys, LoadableModel
from squisher_mergekit.models.parameters import DDP, WRAPPERS

_SHOWN = 3
_PREFIXES = (*WRAPPERS, DDP, "base_model.model.")


@dataclass(frozen=True)
class ReadFiles:
    """Tensors in the files of one model, and those that the merge reads.

    Attributes:
        label: Name of the model in the configuration.
        names: Names of all tensors in its files.
        read: Names that the merge reads.
        converts: Function that returns whether transformers converts a tensor of that name to one that the merge reads.
        is_base: True for the base of ``ubgm_squisher``.
        unties: Function that returns whether a tensor is not tied to another one in the model itself.
    """

    label: str
    names: frozenset[str]
    read: frozenset[str]
    converts: Callable[[str], bool] = lambda name: False
    is_base: bool = False
    unties: Callable[[str], bool] = lambda name: False


@dataclass(frozen=True)
class Gaps:
    """Tensors that a merge loses.

    Attributes:
        class_name: Class of the merged model; None if it cannot be built.
        dropped: Model -> names in its files that go into no tensor of the result.
        totals: Model -> number of tensors in its files.
        unfilled: Key of the class that no written tensor fills -> number of entries.
        absent: Names that mergekit asks for and that no model has; empty if the class needs none of them.
        sizes: Dropped name -> number of entries, if the headers tell.
    """

    class_name: str | None = None
    dropped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    unfilled: Mapping[str, int] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    sizes: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.dropped or self.unfilled or self.absent)

    def message(self) -> str:
        """Return the losses in one line: number and first names."""
        parts = []
        if self.absent:
            parts.append(f"mergekit asks for {len(self.absent)} that no model has ({names_text(self.absent)})")
        groups: dict[tuple[str, ...], list[str]] = {}
        for label, names in self.dropped.items():
            groups.setdefault(names, []).append(label)
        for names, labels in groups.items():
            parts.append(
                f"{len(names)} of the {self.totals[labels[0]]} tensors in the files of {' and of '.join(labels)} go "
                f"into no tensor of the result ({names_text(names)})"
            )
        if self.unfilled:
            origin = "" if self.dropped else ", which no model has"
            parts.append(
                f"{self.class_name} would draw {len(self.unfilled)} at random when loaded "
                f"({names_text(tuple(self.unfilled))}){origin}"
            )
        return f"the merge must write every tensor of the model, but {'; '.join(parts)}"

    def prefix_cure(self) -> str | None:
        """Return the cure where a wrapper's prefix hides all tensors of the models; None where there is none."""
        names = [name for group in self.dropped.values() for name in group]
        prefix = next((each for each in _PREFIXES if names and all(name.startswith(each) for name in names)), None)
        if prefix is None:
            return None
        return f"save the models without the wrapper whose prefix is {prefix}, by save_pretrained of the model inside"

    def lost(self) -> list[str]:
        """Return the names of the tensors that are lost."""
        return list(self.absent_entries())

    def absent_entries(self) -> Mapping[str, int]:
        """Return the lost tensors, each once, with the number of entries of each."""
        dropped = dict.fromkeys(name for names in self.dropped.values() for name in names)
        return {name: self.sizes.get(name, 0) for name in dropped} if dropped else self.unfilled


@dataclass(frozen=True)
class WholeModel:
    """Merged model, and the part of it that the merge writes.

    Attributes:
        gaps: Tensors that the merge loses.
        buffers: Written tensors that are buffers, which no gradient reaches; None if no class tells.
        notes: Deviations from mergekit's own list of tensors.
        lacking: Pairs of a model and a required tensor that the model lacks.
    """

    gaps: Gaps = Gaps()
    buffers: frozenset[str] | None = None
    notes: tuple[str, ...] = ()
    lacking: tuple[tuple[str, str], ...] = ()


def names_text(names: Sequence[str]) -> str:
    """Return the first names and the number of the others.

    Example:
        >>> names_text(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def find_gaps(
    models: Sequence[ReadFiles],
    written: Collection[str],
    asked: Sequence[str],
    model: LoadableModel | None,
    sliced: bool = False,
) -> Gaps:
    """Return the tensors that a merge would lose.

    Args:
        models: The merged models.
        written: Names of the tensors that the merge writes.
        asked: Names that mergekit asks for and that no model has.
        model: The merged model's class; None if it cannot be built.
        sliced: True if the user chose layers, so that a layer may be left out.
    """
    fills = {} if model is None else model.fills({*written, *(name for each in models for name in each.names)})
    filled = _filled(written, fills, model)
    whole = _filled([name for name in written if not fills[name].converted], fills, model) if model else set()
    dropped: dict[str, tuple[str, ...]] = {}
    for each in models:
        kinds = {_template(name) for name in each.read} if sliced else set()
        lost = [
            name
            for name in each.names - each.read
            if _template(name) not in kinds and _is_lost(name, each, fills.get(name), whole, model)
        ]
        if lost:
            dropped[each.label] = tuple(sorted(lost, key=_natural))
    needed = {} if model is None else model.needed()
    unfilled = {key: size for key, size in needed.items() if key not in filled}
    return Gaps(
        model.class_name if model is not None else None,
        dropped,
        {each.label: len(each.names) for each in models},
        unfilled,
        tuple(asked) if model is None or unfilled else (),
    )


def missing_parts(models: Sequence[ReadFiles], model: LoadableModel) -> list[tuple[str, str]]:
    """Return the pairs of a model and a tensor that it lacks, such as one expert, of those that loading joins to one.

    Args:
        models: The merged models.
        model: The merged model's class.
    """
    fills = model.fills({name for each in models for name in each.names})
    parts: dict[str, dict[str, set[str]]] = {}
    for each in models:
        for name in each.names:
            for key in fills[name].keys if fills[name].converted else ():
                parts.setdefault(key, {}).setdefault(each.label, set()).add(name)
    return [
        (label, name)
        for key, by_model in parts.items()
        for known in [set().union(*by_model.values())]
        for label, names in by_model.items()
        for name in sorted((known | _series(known, model.shapes[key][:1])) - names, key=_natural)
    ]


def _series(names: Collection[str], length: tuple[int, ...]) -> set[str]:
    """Return the names of all tensors that are stacked to one, of which some are given.

    Args:
        names: Names on disk of some parts, which differ in one number.
        length: Size of the first axis of the whole; empty for a number.

    Example:
        >>> sorted(_series({"experts.0.up", "experts.1.up"}, (3,)) - {"experts.0.up", "experts.1.up"})
        ['experts.2.up']
    """
    split = [name.split(".") for name in names]
    widths = {len(parts) for parts in split}
    if len(widths) != 1 or not length:
        return set()
    varying = [i for i in range(widths.pop()) if len({p[i] for p in split}) > 1 and all(p[i].isdigit() for p in split)]
    if len(varying) != 1 or max(int(parts[varying[0]]) for parts in split) >= length[0]:
        return set()
    return {
        ".".join([*parts[: varying[0]], str(i), *parts[varying[0] + 1 :]]) for parts in split for i in range(length[0])
    }


def _filled(written: Collection[str], fills: Mapping[str, FilledKeys], model: LoadableModel | None) -> set[str]:
    """Return the keys that written tensors fill, of tied keys the first."""
    if model is None:
        return set()
    return {model.first_of_tied(key) for name in written for key in fills[name].keys}


def _is_lost(
    name: str, files: ReadFiles, found: FilledKeys | None, whole: Collection[str], model: LoadableModel | None
) -> bool:
    """Return True for a tensor that is not read and whose values enter the result in no other way."""
    if model is None or found is None:
        return not files.converts(name)
    if not found.keys:
        # A base may have heads that the models trained from it have not.
        return not files.is_base and not model.is_ignored(name)
    if any(model.first_of_tied(key) not in whole for key in found.keys):
        return True
    # A second copy of a tied tensor is no loss, unless the model that has it does not tie it.
    return not files.is_base and model.is_copy(name) and files.unties(name)


def _template(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1#", name)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
