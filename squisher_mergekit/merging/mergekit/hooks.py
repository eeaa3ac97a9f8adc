"""How the methods hook into mergekit; with :mod:`.adapter` the one place that knows its internals.

``activate`` is called by the start-up hook right after one of mergekit's modules has run, and checks there what is
needed of it. It changes classes in place, so that it works in any order of imports:

* the registry gets the two methods;
* ``ExecuteMergeMethodTask`` gets one more dependency, the Fishers of its tensor (and a base's
  weights, where ``density`` needs them), and hands them to the method;
* ``MergePlanner`` refuses what headers can tell before any file is written, and leaves a base that ``squisher`` is
  only given for its tokenizer out of the sum;
* the executors remove what a failed merge has written, and report at the end.

Merges by other methods pass through unchanged.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from squisher_mergekit.errors import UnsupportedMergekitError
from squisher_mergekit.merging.parameters import METHODS, SQUISHER, Block, check_blocks

SUPPORTED = ">=0.1.5,<0.2"
_DONE = "_squisher_mergekit"


def activate(name: str, module: ModuleType) -> None:
    """Change one of mergekit's modules, right after it was imported; a second call does nothing.

    Args:
        name: The module's name.
        module: The module.

    Raises:
        UnsupportedMergekitError: A class or function that is needed is not there, or is called differently.
    """
    if getattr(module, _DONE, False):
        return
    try:
        _ACTIVATORS[name.removeprefix("mergekit.")](module)
    except (AttributeError, ImportError, TypeError, UnsupportedMergekitError) as error:
        # A missing module of our own says nothing of mergekit.
        if not str(getattr(error, "name", None)).startswith("squisher_mergekit"):
            _explain_unsupported(error)
        raise
    setattr(module, _DONE, True)


def need(owner: Any, name: str, *parameters: str) -> Any:
    """Return an attribute of mergekit's.

    Args:
        owner: The module or class.
        name: The attribute's name.
        *parameters: Names of parameters it must take.

    Returns:
        The attribute.

    Raises:
        UnsupportedMergekitError: It is not there, or does not take them.
    """
    found = getattr(owner, name, None)
    taken = inspect.signature(found).parameters if callable(found) and parameters else {}
    if found is None or any(parameter not in taken for parameter in parameters):
        raise UnsupportedMergekitError(f"{_unsupported()} ({getattr(owner, '__name__', owner)}.{name} differs)")
    return found


def _unsupported() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("mergekit")
    except PackageNotFoundError:
        found = "of unknown version"
    return (
        f"the methods {' and '.join(METHODS)} need mergekit {SUPPORTED}, found mergekit {found}; "
        f"pip install 'mergekit{SUPPORTED}'"
    )


def _explain_unsupported(error: Exception) -> None:
    """Make a request for our methods say which versions are supported; all others go on as they are."""
    message = getattr(error, "message", None) or f"{_unsupported()} ({error})"
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
    # The module registers its methods when it has run; it may be the one whose imports brought mergekit in.
    importlib.import_module("squisher_mergekit.merging.mergekit.methods")


# ---- one tensor


def _extend_tasks(adapter: ModuleType) -> None:
    from mergekit import graph
    from mergekit.io import tasks as io_tasks

    task = need(adapter, "ExecuteMergeMethodTask")
    for field in ("method_name", "gather_tensors", "model_order", "base_model", "output_weight", "input_parameters"):
        if field not in task.model_fields:
            raise UnsupportedMergekitError(f"{_unsupported()} (ExecuteMergeMethodTask.{field} is gone)")
    arguments, execute = need(task, "arguments"), need(task, "execute", "tensors")
    need(io_tasks.LoadTensor, "_resolve_name", "loader")
    need(io_tasks.GatherTensors, "group_label")
    need(io_tasks, "LoaderCache")

    @functools.wraps(arguments)
    def with_fishers(self: Any) -> Any:
        found = arguments(self)
        if self.method_name in METHODS:
            from squisher_mergekit.merging.mergekit.adapter import gather_fishers

            found["fishers"] = gather_fishers(self)
        return found

    @functools.wraps(execute)
    def execute_with_fishers(self: Any, tensors: Any, fishers: Any = None, **rest: Any) -> Any:
        if self.method_name not in METHODS or not fishers:
            return execute(self, tensors, **rest)
        from squisher_mergekit.merging.mergekit.methods import INJECTED

        injected = {model: {**self.input_parameters[model], INJECTED: fishers.get(model)} for model in self.model_order}
        return execute(self.model_copy(update={"input_parameters": injected}), tensors, **rest)

    task.arguments, task.execute = with_fishers, execute_with_fishers
    _extend_writer(io_tasks)
    _extend_executor(graph.Executor)


# ---- the whole merge


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
    def checked_plan(self: Any) -> Any:
        if self.config.merge_method not in METHODS:
            return plan(self)
        check_blocks(self.config.merge_method, _blocks(self.config))
        run = _begin(self.config.merge_method, self.options)
        result = plan(self)
        tasks = [task for _, task in self._tensors]
        _conclude(run, tasks, self.config.out_dtype or self.config.dtype, self.options.out_shard_size)
        return result

    planner.normalize_config, planner._plan = normalize_config, checked_plan


def _begin(method: str, options: Any) -> Any:
    from squisher_mergekit.merging.run import start_run

    return start_run(method, options.quiet)


def _conclude(run: Any, tasks: list[Any], dtype: str | None, shard_bytes: int) -> None:
    """Work out the plan, refuse what cannot be, and say where the Fishers come from."""
    import logging

    from mergekit.common import dtype_from_name

    from squisher_mergekit.errors import MismatchError
    from squisher_mergekit.merging.merge_plan import MergePlan, describe_model
    from squisher_mergekit.merging.mergekit.adapter import plan_task

    width = dtype_from_name(dtype).itemsize if dtype else 4
    run.plan = MergePlan(run.method, width, shard_bytes, [plan_task(task) for task in tasks])
    run.plan.check()
    for warning in run.plan.warnings():
        if run.strict:
            raise MismatchError(f"{warning}; merge without --strict if that is meant")
        logging.getLogger("squisher_mergekit").warning(warning)
    for model in run.plan.models():
        run.log(f"{run.method}: {model['model']}: {describe_model(model)}")


def _listed_models(part: Any) -> set[Any]:
    """Return the models that a configuration, or one of its modules, lists itself."""
    listed = {item.model for item in (part.models or [])}
    return listed | {source.model for piece in (part.slices or []) for source in piece.sources}


def _blocks(config: Any) -> Iterator[Block]:
    yield from _block("parameters", False, config.parameters)
    modules = [("", config)] + [(f"modules.{name}.", module) for name, module in (config.modules or {}).items()]
    for prefix, part in modules:
        if part is not config:
            yield from _block(f"{prefix}parameters", False, part.parameters)
        for i, item in enumerate(part.models or []):
            yield from _block(f"{prefix}models[{i}].parameters", True, item.parameters)
        for i, piece in enumerate(getattr(part, "slices", None) or []):
            yield from _block(f"{prefix}slices[{i}].parameters", False, piece.parameters)
            for j, source in enumerate(piece.sources):
                yield from _block(f"{prefix}slices[{i}].sources[{j}].parameters", True, source.parameters)


def _block(place: str, of_model: bool, settings: Any) -> Iterator[Block]:
    if settings:
        yield Block(place, of_model, settings)


def _extend_raw(module: ModuleType) -> None:
    plan_flat_merge = need(module, "plan_flat_merge", "config", "options")
    signature = inspect.signature(plan_flat_merge)

    @functools.wraps(plan_flat_merge)
    def checked(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        config, options = bound["config"], bound["options"]
        if config.merge_method not in METHODS:
            return plan_flat_merge(**bound)
        blocks = list(_block("parameters", False, config.parameters))
        for i, item in enumerate(config.models):
            blocks += _block(f"models[{i}].parameters", True, item.parameters)
        check_blocks(config.merge_method, blocks)
        listed = {item.model for item in config.models}
        if config.merge_method == SQUISHER and config.base_model not in listed:
            bound["config"] = config.model_copy(update={"base_model": None})
        run = _begin(config.merge_method, options)
        run.base = _raw_reference(config.base_model)
        tasks = plan_flat_merge(**bound)
        merges = [task.tensor_task for task in tasks if hasattr(task, "tensor_task")]
        _conclude(run, merges, config.out_dtype or config.dtype, options.out_shard_size)
        return tasks

    module.plan_flat_merge = checked  # type: ignore[attr-defined]


def _raw_reference(path: str | None) -> Any:
    """Return a single file's path as mergekit's commands for such files do."""
    from mergekit.common import ModelReference

    return None if path is None else ModelReference.model_validate({"model": {"path": path}})


def _extend_writer(io_tasks: ModuleType) -> None:
    writer_task = need(io_tasks, "TensorWriterTask")
    execute = need(writer_task, "execute")

    @functools.wraps(execute)
    def noted(self: Any, **rest: Any) -> Any:
        # Our methods' runs alone have loaded this; other merges must not depend on anything of ours.
        if "squisher_mergekit.merging.run" not in sys.modules:
            return execute(self, **rest)
        from squisher_mergekit.merging.rollback import Output
        from squisher_mergekit.merging.run import current_run

        output = Output(Path(self.out_path))
        writer = execute(self, **rest)
        output.settle = functools.partial(_settle, writer)
        current_run().output = output
        return writer

    writer_task.execute = noted


def _settle(writer: Any) -> None:
    """Wait for shards that are being written in the background."""
    executor = getattr(writer, "_executor", None) if getattr(writer, "use_async", False) else None
    if executor is not None:
        executor.shutdown(wait=True)


def _extend_executor(executor: Any) -> None:
    run_graph = need(executor, "run", "quiet")

    @functools.wraps(run_graph)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        if not _has_our_tasks(self):
            yield from run_graph(self, *args, **kwargs)
            return
        from squisher_mergekit.merging.run import current_run

        run = current_run()
        try:
            yield from run_graph(self, *args, **kwargs)
            run.check()
        except BaseException:
            if run.output is not None:
                run.output.remove()
            raise
        run.log_summary()

    executor.run = guarded


def _has_our_tasks(executor: Any) -> bool:
    return any(getattr(task, "method_name", None) in METHODS for task in executor.universe.tasks)


_ACTIVATORS: dict[str, Callable[[ModuleType], None]] = {
    "merge_methods.registry": _register,
    "merge_methods.task_adapter": _extend_tasks,
    "plan": _extend_planner,
    "multigpu_executor": lambda module: _extend_executor(need(module, "MultiGPUExecutor")),
    "scripts.merge_raw_pytorch": _extend_raw,
}
