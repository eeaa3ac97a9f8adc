"""Merge methods ``squisher`` and ``ubgm_squisher`` in the form of mergekit's registry."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import (
    BasePolicy,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    OptionalTensorPolicy,
    ParameterScope,
    ParameterSpec,
    TensorEntry,
    TensorGroup,
)

from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.factors.mapping import Side
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging import execution, parameters
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.coupling.recorded import recorded_sides, sides_of
from squisher_mergekit.merging.density import Ranking, Trim, seed_of
from squisher_mergekit.merging.read import LoadedFisher, load_tensor
from squisher_mergekit.merging.run import Run
from squisher_mergekit.merging.votes.inputs import Ballot
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.models.layouts import layout_by_name
from squisher_mergekit.models.weights import refuse_float8
from squisher_mergekit.tensors.safetensors import check_shape


@dataclass(frozen=True)
class ResolvedFisher:
    """Value of the parameter ``fisher`` in a graph, where a task has read the tensor.

    Attributes:
        loaded: The tensor and its scale.
        run: The merge that gets the outcome.
        structure: Structure of the Fishers of this tensor; None for the diagonal.
        transposed: True for a matrix ``[in, out]``.
    """

    loaded: LoadedFisher
    run: Run
    structure: Structure | None = None
    transposed: bool = False


class _Spec(ParameterSpec):  # type: ignore[misc]
    """Parameter that refuses a value by a one-line error of this package."""

    def validate(self, value: Any) -> Any:
        return _CHECKS[self.name].validate(value)


_CHECKS = {parameter.name: parameter for parameter in parameters.PARAMETERS}


def _specs(method: str) -> tuple[ParameterSpec, ...]:
    return tuple(
        _Spec(
            name=parameter.name,
            value_type=Any,
            scope=ParameterScope.INPUT if parameter.per_model else ParameterScope.SHARED,
            default=parameter.default,
            description=parameter.meaning,
        )
        for parameter in parameters.of_method(method)
    )


class FisherMergeMethod(GroupMergeMethod):  # type: ignore[misc]
    """Merge of weights that are weighted by their Fishers.

    The parameter ``fisher`` of each input is a :class:`ResolvedFisher` in a graph (from YAML). In memory
    (``merge_tensors``, ``merge_state_dicts``) it is a mapping from tensor name to tensor, or a
    :class:`~squisher_mergekit.fisher.mapping.Fisher`.
    """

    def __init__(self, spec: MergeMethodSpec) -> None:
        self.spec = spec

    def validate_inputs(
        self, input_ids: Sequence[Any], base_id: Any | None = None, *, group_name: str | None = None
    ) -> None:
        """Check the number of models and the base.

        Raises:
            ConfigError: There are too few models, or no base.
        """
        try:
            super().validate_inputs(input_ids, base_id, group_name=group_name)
        except ValueError as error:
            needs = {
                parameters.SQUISHER: "needs one or more models",
                parameters.UBGM_SQUISHER: "needs base_model: (listed in every slice's sources, if slices are used) "
                "and at least one other model",
            }[self.spec.name]
            raise ConfigError(f"{self.spec.name} {needs}; {error}") from None

    def merge_group(self, group: TensorGroup, /, **given: Any) -> torch.Tensor:
        """Merge one tensor.

        Raises:
            ConfigError: The weights are all 0, or a Fisher is missing.
        """
        name = group.metadata.name or "the tensor"
        resolved = {e.id: f for e in group.entries if isinstance(f := given["fisher"][e.id], ResolvedFisher)}
        loaded, base = {key: fisher.loaded for key, fisher in resolved.items()}, group.base
        structure, transposed = _structure(resolved, group, name, given)
        if not resolved:
            group = replace(group, entries=[e for e in group.entries if not self._is_origin_only(e, given)])
            loaded = _from_memory(group, name, given, self.spec.name)
        options = VoteOptions.of(given)
        inputs = [
            _input(entry, name, loaded[entry.id], given["weight"][entry.id], base, options, place)
            for place, entry in enumerate(group.entries)
        ]
        weights = [item.weight for item, entry in zip(inputs, group.entries, strict=True) if self._weighted(entry)]
        if not any(weight > 0 for weight in weights):
            raise ConfigError(f"the weights of {name} must not all be 0; give one model a positive weight")
        ballot = self._ballot(name, base, inputs, loaded, options, bool(resolved), given["write_fisher"])
        if structure is None:
            outcome = self._merge(group, inputs, given, ballot)
        else:
            origin = _origin(name, base, loaded)
            reported, dtype = any(fisher.run.reported for fisher in resolved.values()), group.entries[0].tensor.dtype
            outcome = merge_coupled(origin, inputs, structure, dtype, transposed, reported, ballot)
        if resolved:
            labels = [str(entry.id) for entry in group.entries if self._weighted(entry)]
            next(iter(resolved.values())).run.record(name, labels, outcome)
        else:
            outcome.check(name)
        return outcome.values

    def _weighted(self, entry: TensorEntry) -> bool:
        return not (self.spec.name == parameters.UBGM_SQUISHER and entry.is_base)

    def _is_origin_only(self, entry: TensorEntry, given: Mapping[str, Any]) -> bool:
        """Return True for the base of ``squisher`` in memory that is theta_0 alone: weight 0 and no Fisher."""
        known = isinstance(given["fisher"][entry.id], Mapping)
        return self._weighted(entry) and entry.is_base and given["weight"][entry.id] == 0 and not known

    def _ballot(
        self,
        name: str,
        base: TensorEntry | None,
        inputs: Sequence[execution.Input],
        loaded: Mapping[Any, LoadedFisher],
        options: VoteOptions,
        planned: bool,
        recorded: bool,
    ) -> Ballot:
        """Return the rules of the vote; where no entry is trimmed, abstention changes nothing.

        Raises:
            ConfigError: An option needs a base, and a call in memory gives none.
        """
        if recorded and not planned:
            raise ConfigError(
                "write_fisher: true needs a merge that writes files, as mergekit-yaml does, but tensors in memory were "
                "given; remove it"
            )
        if not any(item.trim is not None for item in inputs):
            options = replace(options, trimmed="base")
        if self.spec.name != parameters.SQUISHER or not (options.abstain or options.of_origin):
            return Ballot(options, recorded=recorded)
        origins = [item for item in loaded.values() if item.origin is not None]
        if base is None and not origins:
            if planned:  # a buffer, on which no option works
                return Ballot(replace(options, extent=1.0))
            raise ConfigError(
                f"{[*options.of_origin, 'trimmed: abstain'][0]} needs a base, the model that all were trained from, "
                f"but for {name} none is given; give merge_state_dicts(base=...) or merge_tensors(base_index=...)"
            )
        origin = base.tensor if base is not None else origins[0].origin
        assert origin is not None
        device = inputs[0].theta.device
        return Ballot(options, origin.detach().to(device), _based(origins, inputs[0].theta), recorded)

    def _merge(
        self, group: TensorGroup, inputs: list[execution.Input], given: Mapping[str, Any], ballot: Ballot
    ) -> execution.Outcome:
        dtype = group.entries[0].tensor.dtype
        if self.spec.name == parameters.SQUISHER:
            return execution.merge_squisher(inputs, dtype, ballot)
        others = [item for item, entry in zip(inputs, group.entries, strict=True) if not entry.is_base]
        base = next(item for item, entry in zip(inputs, group.entries, strict=True) if entry.is_base)
        return execution.merge_ubgm(base, others, given["prior"], dtype, ballot)


def _based(loaded: Sequence[LoadedFisher], theta: torch.Tensor) -> torch.Tensor | None:
    """Return the mask of the entries that the base has in a re-ordered vocabulary; None for all."""
    rows = next((item.rows for item in loaded if item.rows is not None and len(item.rows.unbased)), None)
    if rows is None:
        return None
    return torch.ones_like(theta, dtype=torch.bool).index_fill_(rows.axis, rows.unbased.to(theta.device), False)


def _structure(
    resolved: Mapping[Any, ResolvedFisher], group: TensorGroup, name: str, given: Mapping[str, Any]
) -> tuple[Structure | None, bool]:
    """Return the structure of a tensor's Fishers, and whether the tensor is ``[in, out]``."""
    if resolved:
        first = next(iter(resolved.values()))
        return first.structure, first.transposed
    ndim = group.entries[0].tensor.ndim
    if not parameters.is_coupled(given) or ndim != 2 or layout_by_name(name, ndim).embedding:
        return None, False
    return Structure.of(given), False


def _origin(name: str, base: TensorEntry | None, loaded: Mapping[Any, LoadedFisher]) -> torch.Tensor:
    """Return theta_0."""
    origin: torch.Tensor | None = None if base is None else base.tensor
    if origin is None:
        origin = next((item.origin for item in loaded.values() if item.origin is not None), None)
    if origin is None:
        raise ConfigError(
            f"a structure beyond the diagonal needs a base, the model that all were trained from, but for {name} none "
            "is given; give merge_state_dicts(base=...) or merge_tensors(base_index=...)"
        )
    return origin


def _input(
    entry: TensorEntry,
    name: str,
    loaded: LoadedFisher,
    weight: float,
    base: TensorEntry | None,
    options: VoteOptions,
    place: int,
) -> execution.Input:
    fisher = loaded.tensor
    refuse_float8(entry.tensor.dtype, name, str(entry.id))
    if fisher is not None:
        check_shape(name, tuple(fisher.shape), tuple(entry.tensor.shape), loaded.location)
        fisher = fisher.to(entry.tensor.device)
    label = (loaded.name or name, loaded.location)
    start = None if base is None else base.tensor
    trim = None if entry.is_base else trim_of(entry.tensor, name, loaded, start, options, place)
    rows, columns = (None if factor is None else factor.to(entry.tensor.device) for factor in loaded.factors)
    return execution.Input(
        entry.tensor, fisher, weight, loaded.scale, label, trim, str(entry.id), factors=(rows, columns)
    )


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


def _from_memory(group: TensorGroup, name: str, given: Mapping[str, Any], method: str) -> dict[Any, LoadedFisher]:
    """Read the tensor from the mappings of an in-memory call."""
    sources = {entry.id: given["fisher"][entry.id] for entry in group.entries}
    for key, source in sources.items():
        if isinstance(source, Mapping):
            continue
        base = next((entry.id for entry in group.entries if entry.is_base), None)
        if source == "none" and ((key == base and method == parameters.UBGM_SQUISHER) or parameters.is_coupled(given)):
            continue
        raise ConfigError(
            f"{method} in memory needs a Fisher for input {key!r}: a mapping name -> tensor, found {source!r}; "
            "pass parameters={'fisher': [mapping, ...]}"
        )
    estimated = [source for source in sources.values() if isinstance(source, Fisher)]
    squishers = all(fisher.config.from_optimizer for fisher in estimated)
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
            ranked=given["density_by"] in ("fisher", "change"),
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


SQUISHER = FisherMergeMethod(
    MergeMethodSpec(
        name=parameters.SQUISHER,
        parameters=_specs(parameters.SQUISHER),
        contract=InputContract(base=BasePolicy.IGNORED, min_inputs=1),
        pretty_name="Squisher (Fisher merging)",
        reference_url="https://arxiv.org/abs/2111.09832",
        optional_tensor_policy=OptionalTensorPolicy.PASSTHROUGH_SINGLETON,
    )
)

UBGM_SQUISHER = FisherMergeMethod(
    MergeMethodSpec(
        name=parameters.UBGM_SQUISHER,
        parameters=_specs(parameters.UBGM_SQUISHER),
        contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2),
        pretty_name="Squisher (uncertainty-based gradient matching)",
        reference_url="https://arxiv.org/abs/2310.12808",
    )
)

# A mergekit that loads entry points may have registered the methods already.
_PRESENT = {method.spec.name for method in registry.registered_methods()}
for _method in (SQUISHER, UBGM_SQUISHER):
    if _method.spec.name not in _PRESENT:
        registry.register(_method)
