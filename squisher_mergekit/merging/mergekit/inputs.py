"""Inputs of the merge of one tensor: the weights and Fishers of mergekit's entries, from a graph or from memory."""

from collections.abc import Mapping
from typing import Any

import torch
from mergekit.merge_methods.base import TensorEntry, TensorGroup

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging import parameters
from squisher_mergekit.merging.coupling.recorded import recorded_sides, sides_of
from squisher_mergekit.merging.density import Ranking, Trim, seed_of
from squisher_mergekit.merging.inputs import Input
from squisher_mergekit.merging.read import LoadedFisher, load_tensor
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.models.weights import refuse_float8
from squisher_mergekit.tensors.safetensors import check_shape


def is_origin_only(entry: TensorEntry, given: Mapping[str, Any], method: str) -> bool:
    """Return True for the base of ``squisher`` in memory that is theta_0 alone: weight 0 and no Fisher."""
    known = isinstance(given["fisher"][entry.id], Mapping)
    return method == parameters.SQUISHER and entry.is_base and given["weight"][entry.id] == 0 and not known


def input_of(
    entry: TensorEntry,
    name: str,
    loaded: LoadedFisher,
    weight: float,
    base: TensorEntry | None,
    options: VoteOptions,
    place: int,
) -> Input:
    """Return one model's part in the merge of a tensor.

    Raises:
        RefusedError: The Fisher or the base does not fit the weight.
    """
    fisher = loaded.tensor
    refuse_float8(entry.tensor.dtype, name, str(entry.id))
    if fisher is not None:
        check_shape(name, tuple(fisher.shape), tuple(entry.tensor.shape), loaded.location)
        fisher = fisher.to(entry.tensor.device)
    label = (loaded.name or name, loaded.location)
    start = None if base is None else base.tensor
    trim = None if entry.is_base else trim_of(entry.tensor, name, loaded, start, options, place)
    rows, columns = (None if factor is None else factor.to(entry.tensor.device) for factor in loaded.factors)
    return Input(entry.tensor, fisher, weight, loaded.scale, label, trim, str(entry.id), factors=(rows, columns))


def trim_of(
    theta: torch.Tensor,
    name: str,
    loaded: LoadedFisher,
    base: torch.Tensor | None,
    options: VoteOptions,
    place: int,
) -> Trim | None:
    """Return the choice of the kept entries of one model's tensor; None if all are kept.

    Args:
        theta: The model's weight.
        name: Name of the output tensor.
        loaded: The Fisher, with theta_0 where the base is no input.
        base: theta_0 where the base is an input; None otherwise.
        options: Options of the vote.
        place: Place of the model among the inputs.

    Raises:
        ConfigError: There is no base.
        MismatchError: The base's tensor has another shape.
    """
    fisher = loaded.tensor if loaded.scores is None else loaded.scores
    if loaded.density == 1 or fisher is None:
        return None
    origin = base if loaded.origin is None else loaded.origin
    if origin is None:
        raise ConfigError(
            f"density below 1 needs a base, the model that all were trained from, but for {name} none is given; "
            "give merge_state_dicts(base=...) or merge_tensors(base_index=...)"
        )
    if origin.shape != theta.shape:
        raise MismatchError(
            f"density below 1 needs a base's tensors to be shaped as the model's, but {name} is "
            f"{list(theta.shape)} and the base's {list(origin.shape)}; give the model that it was trained from"
        )
    scale = loaded.rank_scale if options.density_by == "change" or options.whole_model else 1.0
    positive = bool(options.of_choice)
    ranking = Ranking(options.density_by, theta.detach(), scale, seed_of(name, place), positive)
    return Trim(origin.to(theta.device), fisher.to(theta.device), loaded.density, loaded.rows, ranking, loaded.cut)


def from_memory(group: TensorGroup, name: str, given: Mapping[str, Any], method: str) -> dict[Any, LoadedFisher]:
    """Read the tensor from the mappings of an in-memory call.

    Raises:
        RefusedError: A mapping or a tensor is missing, or cannot be scaled.
    """
    sources = {entry.id: given["fisher"][entry.id] for entry in group.entries}
    base = next((entry.id for entry in group.entries if entry.is_base), None)
    for key, source in sources.items():
        if isinstance(source, Mapping):
            continue
        if source == "none" and key != base and given["density"][key] < 1:
            raise ConfigError(
                f"density of input {key!r} must be 1 with fisher: none, as F chooses the entries, found "
                f"{given['density'][key]:g}; pass its Fisher, or remove one of the two"
            )
        if source == "none" and ((key == base and method == parameters.UBGM_SQUISHER) or parameters.is_coupled(given)):
            continue
        raise ConfigError(
            f"{method} in memory needs a Fisher for input {key!r}: a mapping name -> tensor, found {source!r}; "
            "pass parameters={'fisher': [mapping, ...]}"
        )
    estimated = [source for source in sources.values() if isinstance(source, Fisher)]
    squishers = all(fisher.config.of_squishers for fisher in estimated)
    normalize = given["normalize"] if given["normalize"] != "auto" else "none" if squishers else "mean"
    loaded, missing = {}, []
    coupled = sides_of(given["structure"], False) if parameters.is_coupled(given) else ()
    for key, source in sources.items():
        if isinstance(source, Mapping) and name not in source:
            missing.append(key)
        sides: tuple[Side, ...] = ()
        if coupled and isinstance(source, Fisher) and name in source:
            sides = recorded_sides(source, source.resolve(name) or name, coupled, given["block"])
        loaded[key] = load_tensor(
            source if isinstance(source, Mapping) and name in source else None,
            name,
            scaling=given["scaling"],
            normalize=normalize,
            floor=given["floor"],
            fisher_scale=given["fisher_scale"][key],
            density=given["density"][key],
            density_by=given["density_by"],
            sides=sides,
        )
    if missing and given["missing"] == "error":
        raise MismatchError(
            f"{method} needs a Fisher of {name} for every input, but {', '.join(map(repr, missing))} has none; "
            "name the tensors (merge_tensors(name=...)), add it, or set missing='average'"
        )
    if missing:
        loaded = {key: LoadedFisher(name, "memory") for key in loaded}
    return loaded
