"""From a merge task of mergekit's to what it reads: which weights and Fishers, where they lie, what they are.

Beside :mod:`.hooks`, which imports it once a merge by our methods is planned, the one place that knows how
mergekit's tasks name and load weights.
"""

import functools
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache, LoadTensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging import tensor_plan as planning
from squisher_mergekit.merging.mergekit.tasks import FisherRequest, GatherFishers, hold
from squisher_mergekit.merging.parameters import SQUISHER
from squisher_mergekit.merging.run import Run, current_run
from squisher_mergekit.merging.sources import ModelFiles
from squisher_mergekit.merging.tensor_plan import FisherUse, Origin, Settings, TensorPlan, WeightInput
from squisher_mergekit.tensors.safetensors import TensorInfo, tensor_infos


def gather_fishers(task: Any) -> GatherFishers:
    """Return the task that loads what an ``ExecuteMergeMethodTask`` needs beside its weights.

    Raises:
        RefusedError: As :func:`plan_task`.
    """
    plan = current_run().planned(task) or plan_task(task)
    source = task.gather_tensors
    none = plan.inputs if plan.missing else ()
    requests = [_request(use, plan) for use in plan.uses] + [
        FisherRequest(
            model=item.key, number=None, name=plan.name, scaling="raw", normalize="none", floor=0.0, fisher_scale=1.0
        )
        for item in none
    ]
    return GatherFishers(
        requests=tuple(requests),
        origins=tuple((item.key, item.origin.load) for item in plan.trimmed() if item.origin is not None),
        label=source.group_label(),
        base=_base_model(task, current_run()) if plan.trimmed() else None,
        tokenizer_task=getattr(source, "tokenizer_task", None),
        vocabulary_axis=task.output_weight.vocabulary_axis or 0,
        pad_to_multiple_of=getattr(source, "pad_to_multiple_of", None),
        truncate=hasattr(source, "weight_info") and hasattr(source, "gather_tensors"),
    )


def _request(use: FisherUse, plan: TensorPlan) -> FisherRequest:
    return FisherRequest(
        model=use.input.key,
        number=None if use.opened is None else hold(use.opened.fisher),
        name=use.name,
        scaling=plan.settings.scaling,
        normalize=plan.normalize,
        floor=plan.settings.floor,
        fisher_scale=use.input.fisher_scale,
        density=use.input.density,
        model_type=_model_type(use.input.key) if use.converted else None,
    )


def plan_task(task: Any) -> TensorPlan:
    """Plan one ``ExecuteMergeMethodTask``.

    Raises:
        RefusedError: The Fishers cannot be found, read, or do not fit.
    """
    run = current_run()
    inputs = [item for model in task.model_order if (item := _weight_input(task, model, run)) is not None]
    given = dict(task.parameters.items())
    settings = Settings(**{key: given[key] for key in Settings.__dataclass_fields__ if key in given})
    plan = planning.plan_tensor(
        task.method_name,
        task.output_weight.name,
        inputs,
        settings,
        run.sources,
        base=_base_folder(task),
        passed_through=task.output_weight.optional and len(inputs) == 1 < len(task.model_order),
        can_convert=_can_convert,
        cache_dir=_cache_dir(),
    )
    return run.keep(task, plan)


def _base_folder(task: Any) -> Path | None:
    """Return where the base model's weights lie; None for single files, which no order of parameters follows from."""
    if task.base_model is None or Path(task.base_model.model.path).is_file():
        return None
    return Path(LoaderCache().get(task.base_model).index.base_path)


def _base_model(task: Any, run: Run) -> Any:
    """Return the model that task vectors start at, if there is one."""
    return task.base_model or run.base


def _cache_dir() -> str | None:
    found: str | None = LoaderCache().hf_cache_dir
    return found


def _weight_input(task: Any, model: Any, run: Run) -> WeightInput | None:
    """Describe one model's weight, or return None where it has none (mergekit then leaves the model out)."""
    gather = getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)
    if hasattr(gather, "weight_info"):
        load, loader = _load_task(gather, model, model), LoaderCache().get(model)
        stored, own = load._resolve_name(loader), (load.tensor, *(load.aliases or ()))
        # A tied name is another tensor's, which stands in for this one: its Fisher is that tensor's.
        aliases = own if stored is None or stored in own else ()
        if stored is None and load.optional and not _weight_converts(model, loader, own):
            return None
    else:
        loader, stored, aliases = _raw_loader(gather.tensors[model].model), gather.tensors[model].tensor_name, ()
        if stored not in loader.index.tensor_paths:
            return None
    if model not in run.models:
        run.models[model] = _model_files(model, loader)
    values, is_base = task.input_parameters[model], model == task.base_model
    trimmed = values["density"] < 1 and values["weight"] > 0 and not is_base
    return WeightInput(
        key=model,
        model=run.models[model],
        stored=stored,
        aliases=tuple(name for name in aliases if name != stored),
        info=_stored_info(loader, stored),
        fisher=values["fisher"],
        weight=values["weight"],
        fisher_scale=values["fisher_scale"],
        density=values["density"] if trimmed else 1.0,
        origin=_origin(task, gather, model, run) if trimmed else None,
        is_base=is_base,
    )


def _origin(task: Any, gather: Any, model: Any, run: Run) -> Origin | None:
    """Describe the base's weight of the name that a model's has; None without a base, or where the merge has it."""
    base = _base_model(task, run)
    if base is None or task.method_name != SQUISHER:
        return None
    if hasattr(gather, "weight_info"):
        load, loader = _load_task(gather, model, base), LoaderCache().get(base)
        stored, name = load._resolve_name(loader), load.tensor
        found = stored is not None or _weight_converts(base, loader, (name, *(load.aliases or ())))
    else:
        name = gather.tensors[model].tensor_name
        load, loader = gather.tensors[model].model_copy(update={"model": base.model.path}), _raw_loader(base.model.path)
        stored, found = name, name in loader.index.tensor_paths
    tokenizer = getattr(task.gather_tensors, "tokenizer_task", None)
    if tokenizer is not None and base not in tokenizer.referenced_models:
        raise ConfigError(
            f"density below 1 beside tokenizer: needs the base at the top level, whose tokenizer mergekit reads, but "
            f"{base} is the base_model: of a slice alone; name it as the top-level base_model:"
        )
    return Origin(
        label=str(base),
        name=name,
        load=load if found else None,
        stored=stored,
        info=_stored_info(loader, stored) if found else None,
        vocabulary_axis=None if task.gather_tensors is gather else task.output_weight.vocabulary_axis,
    )


def _load_task(gather: Any, model: ModelReference, owner: ModelReference) -> LoadTensor:
    """Return the task that reads the tensor which ``model`` contributes from the files of ``owner``."""
    weight = gather.weight_info[model]
    # Equal to those of GatherTensors.arguments, so that the graph reads a tensor once.
    return LoadTensor(
        model=owner,
        tensor=weight.name,
        dtype=weight.force_dtype or gather.dtype,
        device=gather.device,
        optional=weight.optional,
        aliases=weight.aliases,
        tied_names=weight.tied_names,
    )


def _raw_loader(model: str) -> Any:
    from mergekit.scripts.merge_raw_pytorch import SimpleLoaderCache

    return SimpleLoaderCache().get(model)


def _model_files(model: Any, loader: Any) -> ModelFiles:
    local = Path(model.model.path)
    return ModelFiles(
        label=str(model),
        folder=Path(loader.index.base_path or "."),
        names=frozenset(loader.index.tensor_paths),
        file=local if local.is_file() else None,
        repo=None if local.exists() else (model.model.path, model.model.revision),
        adapter=model.lora is not None,
        convertible=lambda: not local.is_file() and _converts(_model_type(model)),
    )


@functools.lru_cache(maxsize=256)
def _infos(file: Path, stamp: int) -> dict[str, TensorInfo]:
    return tensor_infos(file)


def _stored_info(loader: Any, name: str | None) -> TensorInfo | None:
    """Read a weight's header; None for pickled weights, whose headers cannot be read apart."""
    if name is None:
        return None
    file = Path(loader.index.base_path) / loader.index.tensor_paths[name]
    return _infos(file, file.stat().st_mtime_ns).get(name) if file.suffix == ".safetensors" else None


@functools.cache
def _model_type(model: Any) -> str | None:
    found: str | None = model.config(trust_remote_code=LoaderCache().trust_remote_code).model_type
    return found


@functools.cache
def _converts(model_type: str | None) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(model_type and get_checkpoint_conversion_mapping(model_type))


def _weight_converts(model: Any, loader: Any, names: tuple[str, ...]) -> bool:
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    stored = set(loader.index.tensor_paths)
    return any(can_convert_checkpoint_keys(_model_type(model), stored, name) for name in names)


def _can_convert(model: Any, fisher: Fisher, name: str) -> bool:
    if Path(model.model.path).is_file() or not _converts(_model_type(model)):
        return False
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    return bool(can_convert_checkpoint_keys(_model_type(model), set(fisher), name))
