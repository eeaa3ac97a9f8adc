"""Checks of the weights of one output tensor, and of the base where an option needs it."""

from collections.abc import Sequence

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.merging.planning.records import Origin, Settings, WeightInput
from squisher_mergekit.merging.votes.options import VoteOptions


def check_base(name: str, inputs: Sequence[WeightInput], settings: Settings) -> None:
    """Refuse options of ``squisher`` that exclude each other, or that need a base where there is none.

    Raises:
        ConfigError: An option cannot be combined with a structure, or there is no base.
    """
    coupled, votes = settings.structure != "diagonal", settings.votes
    if coupled:
        _check_structure(name, inputs, settings)
    for item in inputs:
        if item.origin is not None or not item.moves:
            continue
        if coupled:
            raise ConfigError(
                f"structure: {settings.structure} needs base_model:, the model that all were trained from, but there "
                "is none; add it"
            )
        if item.density < 1:
            raise ConfigError(
                f"density below 1 needs base_model:, the model that all were trained from, whose values replace the "
                f"entries that are not kept, but there is none (density {item.density:g} of {item.model.label} for "
                f"{name}); add it"
            )
        if votes.of_origin:
            raise ConfigError(
                f"{votes.of_origin[0]} needs base_model:, the model that all were trained from, but there is none "
                f"(for {name}); add it"
            )


def _check_structure(name: str, inputs: Sequence[WeightInput], settings: Settings) -> None:
    """Refuse options of the vote that no structure takes."""
    votes, structure = settings.votes, f"structure: {settings.structure}"
    alone = [option for option in votes.given if option.split(":")[0] not in ("trimmed", "lambda")]
    if alone:
        raise ConfigError(
            f"{structure} takes lambda, write_fisher, and density with trimmed: abstain, but not {alone[0]}, found "
            f"for {name}; remove one of the two"
        )
    for item in inputs:
        if item.density < 1 and item.fisher == "none":
            raise ConfigError(
                f"density of {item.model.label} must be 1 with fisher: none, as F chooses the entries, found "
                f"{item.density:g} for {name}; give the model a Fisher, or remove one of the two"
            )
        if item.density < 1 and not votes.abstain:
            raise ConfigError(
                f"density of {item.model.label} must be 1 with {structure} and trimmed: base, found "
                f"{item.density:g} for {name}; set trimmed: abstain, or remove one of the two"
            )


def check_shapes(name: str, inputs: Sequence[WeightInput], resized: bool) -> None:
    """Refuse weights of different shapes, apart from vocabularies that mergekit brings to one size.

    Raises:
        MismatchError: The shapes differ.
    """
    known = [(item, item.info.shape) for item in inputs if item.info is not None]
    for item, shape in known[1:]:
        first, wanted = known[0]
        axis = item.vocabulary_axis
        same_but_rows = (
            axis is not None
            and len(shape) == len(wanted) > axis
            and all(a == b for i, (a, b) in enumerate(zip(shape, wanted, strict=True)) if i != axis)
        )
        if shape == wanted or (same_but_rows and resized):
            continue
        cure = "set tokenizer: {source: union}" if same_but_rows else "merge models of one architecture and size"
        raise MismatchError(
            f"{name} must have one shape in all models, but is {list(wanted)} in {first.model.label} and {list(shape)} "
            f"in {item.model.label}; {cure}"
        )


def short_of_rows(shape: Sequence[int], item: WeightInput) -> tuple[int, int] | None:
    """Return axis and size of the weight's vocabulary if a Fisher's shape lacks rows of it alone."""
    axis = item.vocabulary_axis
    if axis is None or item.info is None or len(shape) != len(item.info.shape):
        return None
    size = item.info.shape[axis]
    grown = [size if i == axis else length for i, length in enumerate(shape)]
    return (axis, size) if grown == list(item.info.shape) and shape[axis] < size else None


def check_origins(inputs: Sequence[WeightInput], votes: VoteOptions) -> None:
    """Refuse a base whose weight is missing or has another shape, where an option needs it.

    Raises:
        MismatchError: The weight is missing, or has another shape.
        ConfigError: An option needs one base weight, but slices give each model another one.
    """
    for item in inputs:
        if item.origin is not None and item.density < 1:
            _check_origin(item, item.origin, f"density below 1 of {item.model.label}", "density: 1")
        elif item.origin is not None and votes.of_origin:
            option = votes.of_origin[0]
            cure = "lambda: 1" if option.startswith("lambda") else "consensus: none"
            _check_origin(item, item.origin, f"{option} for {item.model.label}", cure)
    chosen = votes.abstain and any(item.density < 1 for item in inputs)
    common = [*votes.of_origin, *(["trimmed: abstain"] if chosen else [])]
    starts = {item.origin.name: item for item in inputs if item.origin is not None}
    if common and len(starts) > 1:
        (one, first), (other, second) = list(starts.items())[:2]
        raise ConfigError(
            f"{common[0]} needs one weight of the base for all models, but slices give {one} for {first.model.label} "
            f"and {other} for {second.model.label}; list the same layers of all models, or remove {common[0]}"
        )


def _check_origin(item: WeightInput, origin: Origin, option: str, cure: str) -> None:
    if origin.load is None:
        raise MismatchError(
            f"{option} needs every tensor of it in the base_model:, but {origin.label} "
            f"has no {origin.name}; give the model that it was trained from, or set {cure} for this tensor"
        )
    if origin.info is None or item.info is None:
        return
    found, wanted = list(origin.info.shape), list(item.info.shape)
    if origin.vocabulary_axis is not None and len(found) == len(wanted):
        found[origin.vocabulary_axis] = wanted[origin.vocabulary_axis]
    if found != wanted:
        raise MismatchError(
            f"{option} needs its tensors to be shaped as in the base_model:, but "
            f"{origin.name} is {list(item.info.shape)} and in {origin.label} {list(origin.info.shape)}; give the model "
            f"that it was trained from, or set {cure} for this tensor"
        )
