"""Adapter from mergekit's merge tasks to plans: the weights and Fishers of each task, read from headers.

With :mod:`.hooks`, which imports it when a merge by our methods is planned, the module that knows how mergekit's tasks
name and load weights.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.io.tasks import LoaderCache

from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging import tensor_plan as planning
from squisher_mergekit.merging.coupling.execution import Structure
from squisher_mergekit.merging.lora.files import LoraFiles
from squisher_mergekit.merging.merge_plan import MergePlan
from squisher_mergekit.merging.mergekit.lookup import (
    converts,
    find_weight,
    gather_of,
    load_task,
    model_type,
    raw_loader,
    weight_converts,
)
from squisher_mergekit.merging.mergekit.references import AdaptedLoader, AdaptedReference, lora_files
from squisher_mergekit.merging.mergekit.tasks import FisherMergeTask, FisherRequest
from squisher_mergekit.merging.mergekit.thresholds import ThresholdTask
from squisher_mergekit.merging.parameters import SQUISHER, is_coupled
from squisher_mergekit.merging.planning.records import FisherUse, Origin, Settings, TensorPlan, WeightInput
from squisher_mergekit.merging.run import Run
from squisher_mergekit.merging.sources import ModelFiles
from squisher_mergekit.merging.votes.options import VoteOptions
from squisher_mergekit.models.layouts import MatrixLayout, layouts_on_disk
from squisher_mergekit.models.lora.pairs import AdaptedWeights
from squisher_mergekit.models.weights import Weights, refuse_quantised
from squisher_mergekit.models.whole import WholeModel, names_text
from squisher_mergekit.tensors.safetensors import TensorInfo


def add_fishers(
    tasks: Sequence[Any],
    method: str,
    options: Any,
    dtype: str | None,
    base: ModelReference | None = None,
    whole: WholeModel | None = None,
    opened: Mapping[Path, Weights] = MappingProxyType({}),
) -> list[FisherMergeTask]:
    """Plan a merge, refuse what headers show to be wrong, and add the Fishers to its tasks.

    Args:
        tasks: mergekit's ``ExecuteMergeMethodTask`` of each output tensor.
        method: Name of the merge method.
        options: mergekit's options; their ``run``, if they have one, is the merge's.
        dtype: Name of the output's dtype; None for that of the weights.
        base: Base model of a merge of single files, which mergekit does not know.
        whole: The merged model; None for single files, which have no class.
        opened: Folder -> weights that are open already.

    Returns:
        The tasks that read the Fishers as well.

    Raises:
        RefusedError: A Fisher cannot be found, read, or does not fit.
    """
    run = getattr(options, "run", None) or Run(method, options.quiet)
    whole = whole or WholeModel()
    run.opened.update(opened)
    try:
        for model in {model: None for task in tasks for model in task.model_order}:
            if isinstance(model, AdaptedReference):
                _model_files(model, LoaderCache().get(model), run)
        _check_one_base(run)
        plans = [_plan(task, task.base_model or base, run, whole) for task in tasks]
        width = dtype_from_name(dtype).itemsize if dtype else 4
        plan = MergePlan(method, width, options.out_shard_size, plans, whole)
        plan.check()
        run.begin(plan)
        merges = [_with_fishers(task, each, base, run) for task, each in zip(tasks, plans, strict=True)]
        return _with_thresholds(merges, plan, run)
    except BaseException:
        run.close()
        raise


def check_models(models: Iterable[ModelReference]) -> dict[Path, Weights]:
    """Refuse models whose weights are quantised: their tensors have other names, which a plan would miss first.

    Returns:
        Folder -> weights, with the headers that are read by then.

    Raises:
        UnsupportedStateError: A weight is stored as float8, or as packed integers.
    """
    opened: dict[Path, Weights] = {}
    for model in models:
        folder = Path(LoaderCache().get(model).index.base_path)
        refuse_quantised(opened.setdefault(folder, Weights(folder)), str(model))
    return opened


def check_same_names(files: Sequence[str]) -> None:
    """Refuse single files of which one lacks a tensor of another.

    Raises:
        MismatchError: A tensor is missing.
    """
    names = {file: set(raw_loader(file).index.tensor_paths) for file in files}
    for file, found in names.items():
        lacking = sorted(set().union(*names.values()) - found)
        if lacking:
            raise MismatchError(
                f"every file must have the same tensors, but {file} lacks {names_text(lacking)}; give "
                "--tensor-intersection to leave them out, or --tensor-union to copy them from the others"
            )


def names_of(tasks: Sequence[Any]) -> dict[str | None, set[str]]:
    """Return the names that a filter can match: those of each model's weights, and under None those of all."""
    names: dict[str | None, set[str]] = {None: set()}
    for task in tasks:
        gather = gather_of(task)
        for model in task.model_order:
            found = gather.weight_info[model].name if hasattr(gather, "weight_info") else task.output_weight.name
            names.setdefault(str(model), set()).add(found)
            names[None] |= {found, task.output_weight.name}
    return names


def _plan(task: Any, base: ModelReference | None, run: Run, whole: WholeModel) -> TensorPlan:
    inputs = [item for model in task.model_order if (item := _weight_input(task, model, base, run)) is not None]
    given = dict(task.parameters.items())
    cache_dir: str | None = LoaderCache().hf_cache_dir
    return planning.plan_tensor(
        task.method_name,
        task.output_weight.name,
        inputs,
        Settings.of(given),
        run.sources,
        base=_base_weights(task, run),
        passed_through=task.output_weight.optional and len(inputs) == 1 < len(task.model_order),
        is_buffer=None if whole.buffers is None else task.output_weight.name in whole.buffers,
        can_convert=_can_convert,
        layout=_layout(task, inputs, run),
        cache_dir=cache_dir,
        resized=hasattr(task.gather_tensors, "gather_tensors"),
    )


def _layout(task: Any, inputs: Sequence[WeightInput], run: Run) -> MatrixLayout:
    """Return the form of a tensor, which only a structure beyond the diagonal needs."""
    first = next((item for item in inputs if item.stored is not None), None)
    if not is_coupled(dict(task.parameters.items())) or first is None:
        return MatrixLayout()
    if first.key not in run.layouts:
        run.layouts[first.key] = layouts_on_disk(first.model.weights)
    return run.layouts[first.key].get(str(first.stored), MatrixLayout())


def _with_fishers(task: Any, plan: TensorPlan, base: ModelReference | None, run: Run) -> FisherMergeTask:
    without = plan.inputs if plan.missing else ()
    fields = {name: getattr(task, name) for name in type(task).model_fields}
    return FisherMergeTask(
        **(fields | (_uncast(task, plan) if plan.is_integer else {})),
        run=run,
        curvature=Structure.of(dict(task.parameters.items())) if plan.coupled else None,
        transposed=plan.transposed,
        copied=plan.is_untouched,
        requests=tuple(
            [_request(use, plan) for use in plan.uses]
            + [FisherRequest(model=item.key, opened=None, name=plan.name) for item in without]
        ),
        origins=tuple((item.key, item.origin.load) for item in plan.differenced() if item.origin is not None),
        origin_model=(task.base_model or base) if plan.differenced() else None,
        spare=_spare(task, run),
    )


def _spare(task: Any, run: Run) -> tuple[ModelReference, Any] | None:
    """Return the base, and the task that reads its rows for tokens that no model in the sum has; None without."""
    tokenizer, base = getattr(task.gather_tensors, "tokenizer_task", None), task.base_model
    if tokenizer is None or base in task.model_order or base not in tokenizer.referenced_models:
        return None
    origin = _origin(task, gather_of(task), task.model_order[0], base, run)
    return None if origin is None or origin.load is None else (base, origin.load)


def _with_thresholds(merges: list[FisherMergeTask], plan: MergePlan, run: Run) -> list[FisherMergeTask]:
    """Let the merges of tensors wait for the thresholds of whole models, where the plan has some."""
    densities = plan.whole_densities()
    if not densities:
        return merges
    run.densities = densities
    run.trimmed = [
        (each.name, trimmed, each.size, task)
        for task, each in zip(merges, plan.tensors, strict=True)
        if (trimmed := frozenset(item.key for item in each.trimmed_by_model()))
    ]
    waiting, thresholds = {name for name, *_ in run.trimmed}, ThresholdTask(run=run)
    return [
        task.model_copy(update={"thresholds": thresholds}) if each.name in waiting else task
        for task, each in zip(merges, plan.tensors, strict=True)
    ]


def _uncast(task: Any, plan: TensorPlan) -> dict[str, Any]:
    """Return the fields of a task that copies integers: ``dtype:`` is for real numbers, and mergekit casts all."""
    if not hasattr(task.gather_tensors, "weight_info"):
        return {}
    fields = {"gather_tensors": task.gather_tensors.model_copy(update={"dtype": None})}
    # Of integers, mergekit knows this dtype alone.
    if all(item.info is not None and item.info.dtype == torch.int64 for item in plan.inputs):
        fields["output_weight"] = task.output_weight.model_copy(update={"force_dtype": "int64"})
    return fields


def _request(use: FisherUse, plan: TensorPlan) -> FisherRequest:
    return FisherRequest(
        model=use.input.key,
        opened=use.opened,
        name=use.name,
        scaling=plan.settings.scaling,
        normalize=plan.normalize,
        floor=plan.settings.floor,
        fisher_scale=use.input.fisher_scale,
        density=use.input.density,
        density_by=plan.settings.votes.density_by,
        model_type=model_type(use.input.key) if use.converted else None,
        padding=use.padding,
        sides=use.sides,
        zeros=use.input.info.shape if use.left and use.input.info is not None else None,
    )


def _base_weights(task: Any, run: Run) -> Weights | None:
    """Return the weights of the base model; None for single files, whose parameters have no known order."""
    if task.base_model is None or Path(task.base_model.model.path).is_file():
        return None
    return _model_files(task.base_model, LoaderCache().get(task.base_model), run).weights


def _weight_input(task: Any, model: Any, base: Any, run: Run) -> WeightInput | None:
    """Describe one model's weight; None if the model has none (mergekit then leaves the model out)."""
    found = find_weight(task, model)
    if found is None:
        return None
    gather, stored = gather_of(task), found.stored
    files = _model_files(model, found.loader, run)
    values, is_base = task.input_parameters[model], model == task.base_model
    moved = values["weight"] > 0 and not is_base
    trimmed = moved and values["density"] < 1
    given = dict(task.parameters.items())
    needed = moved and (is_coupled(given) or bool(VoteOptions.of(given).of_origin))
    return WeightInput(
        key=model,
        model=files,
        stored=stored,
        aliases=found.aliases,
        info=_info(files, stored),
        fisher=values["fisher"],
        weight=values["weight"],
        fisher_scale=values["fisher_scale"],
        density=values["density"] if trimmed else 1.0,
        origin=_origin(task, gather, model, base, run) if trimmed or needed else None,
        is_base=is_base,
        vocabulary_axis=task.output_weight.vocabulary_axis,
    )


def _origin(task: Any, gather: Any, model: Any, base: Any, run: Run) -> Origin | None:
    """Describe the base's weight of the same name; None without a base, or if the base is an input."""
    if base is None or task.method_name != SQUISHER:
        return None
    if hasattr(gather, "weight_info"):
        load, loader = load_task(gather, model, base), LoaderCache().get(base)
        stored, name = load._resolve_name(loader), load.tensor
        found = stored is not None or weight_converts(base, loader, (name, *(load.aliases or ())))
    else:
        name = gather.tensors[model].tensor_name
        path = base.model.path
        load, loader = gather.tensors[model].model_copy(update={"model": path}), raw_loader(path)
        stored, found = name, name in loader.index.tensor_paths
    tokenizer = getattr(task.gather_tensors, "tokenizer_task", None)
    if tokenizer is not None and base not in tokenizer.referenced_models:
        raise ConfigError(
            f"{_needing_base(task)} with tokenizer: needs the base at the top level, whose tokenizer mergekit reads, "
            f"but {base} is the base_model: of a slice alone; name it as the top-level base_model:"
        )
    return Origin(
        label=str(base),
        name=name,
        load=load if found else None,
        stored=stored,
        info=_info(_model_files(base, loader, run), stored) if found else None,
        vocabulary_axis=None if task.gather_tensors is gather else task.output_weight.vocabulary_axis,
    )


def _needing_base(task: Any) -> str:
    """Return the option that needs theta_0."""
    return next(iter(VoteOptions.of(dict(task.parameters.items())).of_origin), "density below 1")


def _model_files(model: Any, loader: Any, run: Run) -> ModelFiles:
    if model not in run.models:
        local = Path(model.model.path)
        single = local.is_file()
        folder = local if single else Path(loader.index.base_path)
        lora = _lora_files(model, loader)
        weights = AdaptedWeights(lora.lora) if isinstance(loader, AdaptedLoader) and lora else run.opened.get(folder)
        if weights is None:  # of a single file, or of no mergekit-yaml
            weights = Weights(folder)
            refuse_quantised(weights, str(model))
        if not single:
            _refuse_two_versions(weights, loader)
        run.models[model] = ModelFiles(
            label=str(model),
            weights=weights,
            names=frozenset(loader.index.tensor_paths),
            repo=None if local.exists() else (model.model.path, model.model.revision),
            lora=lora,
            convertible=lambda: not single and converts(model_type(model)),
        )
    return run.models[model]


def _lora_files(model: Any, loader: Any) -> LoraFiles | None:
    """Return the files of a model's LoRA; None for a plain model."""
    if model.lora is None:
        return None
    if isinstance(loader, AdaptedLoader):
        return loader.files
    return lora_files(model.model, model.lora, LoaderCache().hf_cache_dir)


def _check_one_base(run: Run) -> None:
    """Refuse LoRAs that were trained from different bases.

    Raises:
        MismatchError: Two bases differ.
    """
    models = [run.models[key] for key in run.models if isinstance(key, AdaptedReference)]
    other = next((model for model in models if model.start != models[0].start), None)
    if other is not None and other.lora is not None and models[0].lora is not None:
        raise MismatchError(
            f"LoRAs must be of one base, but {models[0].label} is of {models[0].lora.base.folder} and {other.label} of "
            f"{other.lora.base.folder}, whose weights differ; merge LoRAs of one base"
        )


def _refuse_two_versions(weights: Weights, loader: Any) -> None:
    """Refuse a folder of which transformers loads a single file, and mergekit the shards of an index.

    Raises:
        MismatchError: The folder has both forms.
        CorruptFileError: The index names a shard that lacks the tensor.
    """
    for name, file in loader.index.tensor_paths.items() if weights.files else ():
        header = weights.headers.get(weights.folder / file)
        if header is not None and name not in header.infos:
            raise CorruptFileError(
                f"the index of {weights.folder} must name the shard of each tensor, but {file} has no {name}; copy the "
                "index and the shards again"
            )
    loaded = {shard.filename for shard in loader.index.shards}
    ours = {file.name for file in weights.files}
    if ours and loaded != ours:
        raise MismatchError(
            f"{weights.folder} must hold the weights once, but transformers would load {', '.join(sorted(ours))} and "
            f"mergekit the shards of an index, {sorted(loaded)[0]} and others; remove the files that are out of date, "
            "with model.safetensors.index.json if it is theirs"
        )


def _info(files: ModelFiles, name: str | None) -> TensorInfo | None:
    """Return the header of a weight; None for pickled weights, which have no headers."""
    return None if name is None else files.weights.infos.get(name)


def _can_convert(model: Any, fisher: Fisher, name: str) -> bool:
    if Path(model.model.path).is_file() or not converts(model_type(model)):
        return False
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    return bool(can_convert_checkpoint_keys(model_type(model), set(fisher), name))
