"""Hooks into mergekit: the methods in its registry, checks and Fishers in its planner, clean-up in its executors.

``activate`` is called by the start-up hook right after one of mergekit's modules has run. It checks the parts of
mergekit that are needed, and changes classes in place, so that the order of imports does not matter:

* the registry gets the two methods;
* the classes of merge documents refuse keys that they would ignore, where a document is for our methods;
* ``MergePlanner`` and the planner of ``mergekit-pytorch`` refuse what headers show to be wrong before any file is
  written, replace each merge task of our methods by one that reads the Fishers, and leave out of the sum a base that
  ``squisher`` is only given for its tokenizer;
* the executors write into a temporary folder until the merge is complete, report at the end, and close the merge;
  meanwhile they move large tensors through pinned memory. Merges by other methods pass through unchanged.
"""

import contextlib
import functools
import importlib
import inspect
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from squisher_mergekit.errors import SquisherError, UnsupportedMergekitError
from squisher_mergekit.merging.mergekit.supported import need, unsupported
from squisher_mergekit.merging.parameters import METHODS, SQUISHER, check_blocks, check_filters

_DONE = "_squisher_mergekit"


def activate(name: str, module: ModuleType) -> None:
    """Change one of mergekit's modules, right after it was imported; a second call does nothing.

    Args:
        name: Name of the module.
        module: Module to change.

    Raises:
        UnsupportedMergekitError: A class or function is missing, or has other parameters.
    """
    if getattr(module, _DONE, False):
        return
    try:
        _ACTIVATORS[name.removeprefix("mergekit.")](module)
    except (AttributeError, ImportError, TypeError, UnsupportedMergekitError) as error:
        # A missing module of this package is no fault of mergekit's.
        if not str(getattr(error, "name", None)).startswith("squisher_mergekit"):
            _explain_unsupported(error)
        raise
    setattr(module, _DONE, True)


def _explain_unsupported(error: Exception) -> None:
    """Refuse our methods with the supported versions of mergekit; other methods keep working."""
    message = getattr(error, "message", None) or f"{unsupported()} ({error})"
    registry = sys.modules.get("mergekit.merge_methods.registry")
    for owner in (registry, sys.modules.get("mergekit.merge_methods")):
        stock = getattr(owner, "get", None)
        if stock is None or getattr(stock, _DONE, False):
            continue

        @functools.wraps(stock)
        def get(name: str, *args: Any, _stock: Callable[..., Any] = stock, **kwargs: Any) -> Any:
            if name in METHODS:
                raise UnsupportedMergekitError(message)
            return _stock(name, *args, **kwargs)

        setattr(get, _DONE, True)
        setattr(owner, "get", get)  # noqa: B010


# ---- the registry


def _register(registry: ModuleType) -> None:
    base = __import__("mergekit.merge_methods.base", fromlist=["base"])
    for name in ("GroupMergeMethod", "InputContract", "OptionalTensorPolicy", "ParameterScope", "TensorGroup"):
        need(base, name)
    need(base, "MergeMethodSpec", "name", "parameters", "contract", "optional_tensor_policy")
    need(base, "ParameterSpec", "name", "value_type", "scope", "default")
    need(registry, "register", "method")
    need(registry, "registered_methods")
    # Importing the module registers the methods. Its own imports may have brought mergekit in.
    importlib.import_module("squisher_mergekit.merging.mergekit.methods")


# ---- the planners


def _extend_architecture(module: ModuleType) -> None:
    get_architecture_info = need(module, "get_architecture_info", "config", "options")

    @functools.wraps(get_architecture_info)
    def of_files_at_need(config: Any, options: Any) -> Any:
        try:
            return get_architecture_info(config, options)
        except NotImplementedError:  # mergekit asks every class for token embeddings, and some have none
            if config.merge_method not in METHODS:
                raise
        from squisher_mergekit.merging.mergekit.complete import architecture_without_tokens

        return architecture_without_tokens(config.referenced_models()[0], options)

    for owner in (module, sys.modules.get("mergekit.merge")):
        if getattr(owner, "get_architecture_info", None) is get_architecture_info:
            setattr(owner, "get_architecture_info", of_files_at_need)  # noqa: B010


def _extend_planner(plan_module: ModuleType) -> None:
    planner = need(plan_module, "MergePlanner")
    plan, normalize = need(planner, "_plan"), need(planner, "normalize_config")

    @functools.wraps(normalize)
    def normalize_config(self: Any) -> Any:
        base = self.config.base_model
        if self.config.merge_method != SQUISHER or base is None:
            return normalize(self)
        everywhere = _listed_models(self.config)
        listed = {name: _listed_models(module) for name, module in (self.config.modules or {}).items()}
        result = normalize(self)
        for name, module in self.config.modules.items():
            if base not in listed.get(name, everywhere):
                for part in module.slices:
                    part.sources = [source for source in part.sources if source.model != base]
        return result

    @functools.wraps(plan)
    def plan_with_fishers(self: Any) -> None:
        config = self.config
        if config.merge_method not in METHODS:
            plan(self)
            return
        from squisher_mergekit.merging.mergekit.adapter import add_fishers, check_models, names_of
        from squisher_mergekit.merging.mergekit.complete import plan_whole
        from squisher_mergekit.merging.mergekit.document import blocks_of

        blocks = list(blocks_of(config))
        check_blocks(config.merge_method, blocks)
        opened = check_models(config.referenced_models())
        whole = plan_whole(self, plan)
        tasks, dtype = [task for _, task in self._tensors], config.out_dtype or config.dtype
        check_filters(blocks, names_of(tasks))
        tasks = add_fishers(tasks, config.merge_method, self.options, dtype, whole=whole, opened=opened)
        self._tensors = [(task.output_weight, task) for task in tasks]

    planner.normalize_config, planner._plan = normalize_config, plan_with_fishers


def _listed_models(part: Any) -> set[Any]:
    """Return the models in the lists of a configuration, or of one of its modules."""
    listed = {item.model for item in (part.models or [])}
    return listed | {source.model for piece in (part.slices or []) for source in piece.sources}


def _extend_raw(module: ModuleType) -> None:
    plan_flat_merge = need(module, "plan_flat_merge", "config", "options", "tensor_union", "tensor_intersection")
    signature = inspect.signature(plan_flat_merge)

    @functools.wraps(plan_flat_merge)
    def plan_with_fishers(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        config, options = bound["config"], bound["options"]
        if config.merge_method not in METHODS:
            return plan_flat_merge(**bound)
        from squisher_mergekit.merging.mergekit.adapter import add_fishers, check_same_names, names_of
        from squisher_mergekit.merging.mergekit.commands import mergekit_errors
        from squisher_mergekit.merging.mergekit.document import blocks_of, name_files_alike
        from squisher_mergekit.merging.mergekit.model_folders import check_path

        blocks = list(blocks_of(config))
        check_blocks(config.merge_method, blocks, layers=False)
        for i, item in enumerate(config.models):
            check_path(item.model, f"models[{i}].model", "a file of weights", local=True)
        config = bound["config"] = name_files_alike(config)
        listed = {item.model for item in config.models}
        if config.merge_method == SQUISHER and config.base_model not in listed:
            # mergekit would sum the base.
            bound["config"] = config.model_copy(update={"base_model": None})
        if not (bound["tensor_union"] or bound["tensor_intersection"]):
            check_same_names([item.model for item in config.models])
        with mergekit_errors():
            *saves, finalize = plan_flat_merge(**bound)
        merges, base = [save.tensor_task for save in saves], _raw_reference(config.base_model)
        check_filters(blocks, names_of(merges))
        merges = add_fishers(merges, config.merge_method, options, config.out_dtype or config.dtype, base)
        saves = [save.model_copy(update={"tensor_task": task}) for save, task in zip(saves, merges, strict=True)]
        return [*saves, finalize.model_copy(update={"tensor_save_tasks": tuple(saves)})]

    module.plan_flat_merge = plan_with_fishers  # type: ignore[attr-defined]
    _extend_schema(need(module, "RawPyTorchMergeConfig"))


# ---- the documents


def _extend_schema(schema: Any) -> None:
    """Let a class of documents refuse what it would ignore, where the document is for our methods."""
    validate = need(schema, "model_validate", "obj").__func__

    @functools.wraps(validate)
    def model_validate(cls: Any, obj: Any, **options: Any) -> Any:
        from squisher_mergekit.merging.mergekit import document

        if not document.is_ours(obj):
            if isinstance(obj, Mapping) and not _is_registered(obj.get("merge_method")):
                document.refuse_misspelt_method(obj.get("merge_method"))
            return validate(cls, obj, **options)
        document.check_document(obj, cls)
        try:
            return validate(cls, obj, **options)
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise document.unreadable(error) from None

    schema.model_validate = classmethod(model_validate)  # type: ignore[arg-type]


def _is_registered(method: Any) -> bool:
    """Return True for the name of one of mergekit's methods, and for a missing name."""
    from mergekit.merge_methods import registry

    return method is None or any(found.spec.name == method for found in registry.registered_methods())


def _extend_merge(module: ModuleType) -> None:
    run_merge = need(module, "run_merge", "merge_config", "out_path", "options", "config_source")
    signature = inspect.signature(run_merge)

    @functools.wraps(run_merge)
    def run_with_models(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        if bound["merge_config"].merge_method not in METHODS:
            return run_merge(**bound)
        from squisher_mergekit.merging.mergekit.commands import mergekit_errors
        from squisher_mergekit.merging.mergekit.document import read_yaml
        from squisher_mergekit.merging.mergekit.lookup import forget_files
        from squisher_mergekit.merging.mergekit.model_folders import resolve_models

        forget_files()
        if bound.get("config_source") is not None:
            read_yaml(bound["config_source"])
        options, out = bound["options"], Path(bound["out_path"])
        resolve_models(bound["merge_config"], options.lora_merge_cache, options.transformers_cache, out)
        with mergekit_errors(bound["merge_config"]):
            return run_merge(**bound)

    from squisher_mergekit.merging.mergekit.commands import with_tokenizer_warning, without_hub

    copy_tokenizer = need(module, "_copy_tokenizer", "merge_config", "out_path", "options")
    module._copy_tokenizer = with_tokenizer_warning(copy_tokenizer)  # type: ignore[attr-defined]
    module.run_merge = run_with_models  # type: ignore[attr-defined]
    module.generate_card = without_hub(need(module, "generate_card", "config", "config_yaml", "name"))  # type: ignore[attr-defined]


def _raw_reference(path: str | None) -> Any:
    """Return mergekit's reference to a single file."""
    from mergekit.common import ModelReference

    return None if path is None else ModelReference.model_validate({"model": {"path": path}})


# ---- the executors


def _extend_tasks(adapter: ModuleType) -> None:
    from mergekit import graph
    from mergekit.io import tasks as io_tasks

    task = need(adapter, "ExecuteMergeMethodTask")
    for field in ("method_name", "gather_tensors", "model_order", "base_model", "output_weight", "input_parameters"):
        if field not in task.model_fields:
            raise UnsupportedMergekitError(f"{unsupported()} (ExecuteMergeMethodTask.{field} is missing)")
    need(task, "arguments")
    need(task, "execute", "tensors")
    need(io_tasks.LoadTensor, "_resolve_name", "loader")
    need(io_tasks, "GatherTensors")
    _refuse_damaged_weights(need(io_tasks, "LoaderCache"))
    need(io_tasks, "TensorWriterTask")
    _extend_executor(graph.Executor)


def _refuse_damaged_weights(loader_cache: Any) -> None:
    """Turn any error for a damaged file of weights, for which mergekit prints a traceback, into one line."""
    get = need(loader_cache, "get", "model")
    if getattr(get, _DONE, False):
        return

    @functools.wraps(get)
    def get_whole(self: Any, model: Any) -> Any:
        from squisher_mergekit.models.weights import refuse_damaged

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, about the protocols of pickles
                return get(self, model)
        except SquisherError:
            raise
        except Exception as error:  # a damaged file can make safetensors, torch and mergekit raise nearly anything
            refuse_damaged(Path(str(model.model.path)), error)

    setattr(get_whole, _DONE, True)
    loader_cache.get = get_whole


def _extend_executor(executor: Any) -> None:
    from squisher_mergekit.merging.mergekit.transfers import RUNNING, extend_moves

    extend_moves(executor)
    run_graph = need(executor, "run", "quiet")

    @functools.wraps(run_graph)
    def run_and_close(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        run = _run_of(self.universe)
        if run is None:
            yield from run_graph(self, *args, **kwargs)
            return
        from squisher_mergekit.merging.mergekit.tasks import scheduled_names
        from squisher_mergekit.tensors.temporary import cleaned_up_at_signals

        with run, RUNNING.merge():
            output = _atomic_output(self.universe, run)
            ahead = run.reading_ahead(scheduled_names(self))
            with cleaned_up_at_signals([signal.SIGTERM]), output as folder, run.writing(folder), ahead:
                yield from run_graph(self, *args, **kwargs)
                run.check()
            run.log_summary()

    executor.run = run_and_close


def _run_of(universe: Any) -> Any:
    """Return the run that the tasks of a graph belong to; None for a merge by another method."""
    ours = (task for task in universe.tasks if getattr(task, "method_name", None) in METHODS)
    return next((task.run for task in ours if hasattr(task, "run")), None)


@contextlib.contextmanager
def _atomic_output(universe: Any, run: Any) -> Iterator[Path | None]:
    """Write the tensors into a temporary folder, whose files move to the output when the graph has run to its end.

    Yields:
        The temporary folder; None for a graph that writes no files.
    """
    from mergekit.io.tasks import TensorWriterTask

    from squisher_mergekit.merging.mergekit.tasks import TrackedWriterTask
    from squisher_mergekit.merging.output_folder import output_folder

    path = None
    with contextlib.ExitStack() as stack:
        for i, task in enumerate(universe.tasks):
            if isinstance(task, TensorWriterTask):
                folder = stack.enter_context(output_folder(Path(task.out_path), run.obsolete))
                path = folder.path
                universe.tasks[i] = TrackedWriterTask(**{**dict(task), "out_path": str(folder.path)}, folder=folder)
        yield path


_ACTIVATORS: dict[str, Callable[[ModuleType], None]] = {
    "architecture": _extend_architecture,
    "config": lambda module: _extend_schema(need(module, "MergeConfiguration")),
    "merge": _extend_merge,
    "merge_methods.registry": _register,
    "merge_methods.task_adapter": _extend_tasks,
    "plan": _extend_planner,
    "multigpu_executor": lambda module: _extend_executor(need(module, "MultiGPUExecutor")),
    "scripts.merge_raw_pytorch": _extend_raw,
}
