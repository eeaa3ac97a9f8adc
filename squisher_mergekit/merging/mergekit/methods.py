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
from mergekit.merge_methods.dtype import align_dtype

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging import execution, parameters
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.inputs import Ballot, Input, Outcome
from squisher_mergekit.merging.mergekit.inputs import from_memory, input_of, is_origin_only
from squisher_mergekit.merging.mergekit.thresholds import choices_in_memory
from squisher_mergekit.merging.read import LoadedFisher
from squisher_mergekit.merging.run import Run
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.models.layouts import layout_by_name


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

    def _execute(
        self, groups: Sequence[TensorGroup], parameters: list[dict[str, Any]], options: Any, **dtypes: Any
    ) -> tuple[torch.Tensor, ...]:
        """Merge some tensors, those of a whole model if they are in memory."""
        if parameters and parameters[0]["density_scope"] == "model" and _in_memory(groups[0], parameters[0]):
            aligned = [align_dtype(group, dtype) for group, dtype in zip(groups, dtypes["input_dtypes"], strict=True)]
            choices = choices_in_memory(aligned, parameters, self.spec.name)
            parameters = [{**given, "choices": choices} for given in parameters]
        merged: tuple[torch.Tensor, ...] = super()._execute(groups, parameters, options, **dtypes)
        return merged

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
            group = replace(group, entries=[e for e in group.entries if not is_origin_only(e, given, self.spec.name)])
            loaded = from_memory(group, name, given, self.spec.name)
            cuts = {key: choices[name].cut for key, choices in given.get("choices", {}).items() if name in choices}
            loaded = {key: replace(item, cut=cuts.get(key)) for key, item in loaded.items()}
        options = VoteOptions.of(given)
        inputs = [
            input_of(entry, name, loaded[entry.id], given["weight"][entry.id], base, options, place)
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

    def _ballot(
        self,
        name: str,
        base: TensorEntry | None,
        inputs: Sequence[Input],
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
        origin = _given_origin(base, loaded)
        assert origin is not None
        device = inputs[0].theta.device
        return Ballot(options, origin.detach().to(device), _based(origins, inputs[0].theta), recorded)

    def _merge(self, group: TensorGroup, inputs: list[Input], given: Mapping[str, Any], ballot: Ballot) -> Outcome:
        dtype = group.entries[0].tensor.dtype
        if self.spec.name == parameters.SQUISHER:
            return execution.merge_squisher(inputs, dtype, ballot)
        others = [item for item, entry in zip(inputs, group.entries, strict=True) if not entry.is_base]
        base = next(item for item, entry in zip(inputs, group.entries, strict=True) if entry.is_base)
        return execution.merge_ubgm(base, others, given["prior"], dtype, ballot)


def _in_memory(group: TensorGroup, given: Mapping[str, Any]) -> bool:
    """Return True for a call in memory, False for a task of a graph."""
    return not any(isinstance(given["fisher"][entry.id], ResolvedFisher) for entry in group.entries)


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


def _given_origin(base: TensorEntry | None, loaded: Mapping[Any, LoadedFisher]) -> torch.Tensor | None:
    """Return theta_0: that of the plan, because in slices the base can be an input by another layer; else the base."""
    planned = next((item.origin for item in loaded.values() if item.origin is not None), None)
    return base.tensor if planned is None and base is not None else planned


def _origin(name: str, base: TensorEntry | None, loaded: Mapping[Any, LoadedFisher]) -> torch.Tensor:
    """Return theta_0.

    Raises:
        ConfigError: There is none.
    """
    origin = _given_origin(base, loaded)
    if origin is None:
        raise ConfigError(
            f"a structure beyond the diagonal needs a base, the model that all were trained from, but for {name} none "
            "is given; give merge_state_dicts(base=...) or merge_tensors(base_index=...)"
        )
    return origin


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
