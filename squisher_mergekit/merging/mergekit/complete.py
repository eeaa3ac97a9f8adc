"""Plan of a whole model: mergekit's list of tensors, or that of the files where mergekit would lose some.

mergekit lists the tensors of a model by tables of its own, or by the names that the model has in memory. It leaves out
an optional tensor that it does not find under such a name, for example a layer that has another name on disk.
"""

import functools
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit.architecture.auto import infer_vocabulary_axes
from mergekit.architecture.base import ModelArchitecture, ModuleArchitecture, ModuleDefinition, WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache

from squisher_mergekit.errors import ConfigError, MismatchError, SquisherError
from squisher_mergekit.merging.mergekit.lookup import (
    converts_to,
    find_weight,
    gather_of,
    load_task,
    model_config,
    own_class,
)
from squisher_mergekit.merging.parameters import UBGM_SQUISHER
from squisher_mergekit.models.loading import LoadableModel, loadable
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.models.whole import ReadFiles, WholeModel, find_gaps, missing_parts, names_text

LOG = logging.getLogger("squisher_mergekit")
_ALLOW = "--allow-missing-weights (in YAML, allow_missing: true under parameters:)"
_MESSAGE = 60
_LAYER = re.compile(r"\.(\d+)\.")


def plan_whole(planner: Any, plan: Callable[[Any], Any]) -> WholeModel:
    """Let mergekit plan a merge, and make sure that the plan has the whole model.

    Where mergekit's list of tensors would lose some and the files of all models hold the same tensors, the merge is
    planned once more by the names in the files.

    Args:
        planner: mergekit's ``MergePlanner``.
        plan: Its own function that plans.

    Returns:
        The merged model, with the tensors that the merge loses, if the user allows that.

    Raises:
        MismatchError: The merge would lose tensors, or a model lacks one.
    """
    config = planner.config
    _check_modules(planner)
    models = None if config.modules or config.slices else config.models
    if getattr(planner.out_model_config, "quantization_config", None):
        del planner.out_model_config.quantization_config  # the weights are not quantised: loading would do it again
    model = loadable(planner.out_model_config)
    allowed = getattr(getattr(planner.options, "run", None), "allow_missing", False)
    allowed = allowed or (config.parameters or {}).get("allow_missing") is True
    failure = _failure_of(planner, plan)
    found = WholeModel() if failure else _examine(planner, model, sliced=models is None)
    needless = allowed and not (failure or found.lacking or found.gaps.unfilled)
    if models is not None and (failure or found.lacking or found.gaps) and not needless:
        kept = planner._tensors, config.models, config.modules, planner.arch_info
        architecture = _architecture_of_files(planner, [each.model for each in models], model)
        if architecture is not None:
            config.models, config.modules, planner.arch_info = models, None, architecture
            if _failure_of(planner, plan) is None:
                second = _examine(planner, model)
                if failure or found.lacking or len(second.gaps.lost()) < len(found.gaps.lost()):
                    why = failure or names_text(found.gaps.lost() or [name for _, name in found.lacking])
                    note = f"mergekit lists other tensors than the files hold ({why}): merged by the names in the files"
                    return _accepted(planner, replace(second, notes=(*found.notes, *second.notes, note)), allowed)
        planner._tensors, config.models, config.modules, planner.arch_info = kept
    if failure:
        raise ConfigError(f"mergekit must be able to plan the merge, but {failure}; merge other models")
    return _accepted(planner, found, allowed)


def _check_modules(planner: Any) -> None:
    """Refuse a name under ``modules:`` that is no module of the architecture."""
    known = list(planner.arch_info.modules)
    for name in planner.config.modules or ():
        if name not in known:
            raise ConfigError(
                f"modules.{name} must be a module of the architecture, which has {', '.join(known)}; correct "
                "the name, or list the models under models:"
            )


def _accepted(planner: Any, found: WholeModel, allowed: bool) -> WholeModel:
    """Return the model if it is whole, or if the user allows that it is not.

    Raises:
        MismatchError: The merge would lose tensors, or a model lacks one.
    """
    if found.lacking:
        label, name = found.lacking[0]
        more = f" and {len(found.lacking) - 1} more" if len(found.lacking) > 1 else ""
        raise MismatchError(
            f"every model must have the tensor {name}{more}, but {label} has not; leave that model out, or save all "
            "models by the same version of transformers"
        )
    if not found.gaps:
        return found
    if not allowed:
        raise MismatchError(
            f"{found.gaps.message()}; {found.gaps.prefix_cure() or f'write the model without them by {_ALLOW}'}"
        )
    LOG.warning("%s; written without them, as allowed", found.gaps.message())
    return replace(found, gaps=replace(found.gaps, sizes=_sizes(planner, found.gaps.lost())))


def _failure_of(planner: Any, plan: Callable[[Any], Any]) -> str | None:
    """Let mergekit plan; return its error in short, None if there is none."""
    try:
        _plan(planner, plan)
    except SquisherError:
        raise
    except (RuntimeError, ValueError, LookupError, AttributeError, TypeError) as error:
        text = " ".join(str(error).split())  # mergekit prints a whole config in the middle
        return text if len(text) <= 2 * _MESSAGE else f"{text[:_MESSAGE]} ... {text[-_MESSAGE:]}"
    return None


def _plan(planner: Any, plan: Callable[[Any], Any]) -> None:
    planner._tensors = []
    # mergekit caches architectures by planner, on the class, so that a planner and its tasks would never be freed.
    forget = getattr(getattr(type(planner), "_model_arch", None), "cache_clear", lambda: None)
    forget()
    plan(planner)
    forget()


def _examine(planner: Any, model: LoadableModel | None, sliced: bool = False) -> WholeModel:
    """Return the model that a plan writes.

    A tensor that no model has is taken out of the plan: mergekit would fail on it.
    """
    reading = _Reading()
    kept = [(weight, task) for weight, task in planner._tensors if reading.add(weight, task, model)]
    planner._tensors, written = kept, [weight.name for weight, _ in kept]
    files = reading.files()
    gaps = find_gaps(files, written, reading.asked, model, sliced)
    notes, buffers = [], None
    if model is not None:
        fills = model.fills(written)
        buffers = frozenset(name for name in written if model.is_buffer(fills[name]))
        if reading.asked and not gaps.unfilled:
            asked = names_text(reading.asked)
            notes.append(
                f"mergekit asks for {asked}, which no model has and {model.class_name} does not need: left out"
            )
    parts = [] if model is None or sliced else missing_parts(files, model)
    if model is not None:
        notes += _untie(planner.out_model_config, model, reading)
    return WholeModel(gaps, buffers, tuple(notes), (*reading.lacking, *_not_tied(reading), *parts))


def _not_tied(reading: "_Reading") -> list[tuple[str, str]]:
    """Return the pairs of a model and a tensor that mergekit would take from another one, which is not tied to it."""
    return [(str(each), name) for each, names in reading.tied.items() for name in names if _unties(each, name)]


def _untie(config: Any, model: LoadableModel, reading: "_Reading") -> list[str]:
    """Write into the output's config that its head is not tied, if that of one of the models is not.

    Returns:
        A note on the change; nothing if there is none.
    """
    parts = [part for part in (config, config.get_text_config()) if getattr(part, "tie_word_embeddings", False)]
    heads = [name for name in reading.written if model.is_copy(name)]
    for each in reading.models if parts and heads else ():
        other = model_config(each)
        if all(getattr(part, "tie_word_embeddings", False) for part in (other, other.get_text_config())):
            continue
        if any(_unties(each, name) for name in heads):
            for part in parts:
                part.tie_word_embeddings = False
            return [f"{each} does not tie {names_text(heads)}, so the config of the result does not either"]
    return []


class _Reading:
    """Tensors that the tasks of a plan read from each model's files.

    Attributes:
        asked: Names of required tensors that no model has.
        lacking: Pairs of a model and a required tensor that other models have.
        tied: Model -> tensors that are read under the name of a tied one.
        written: Names of the tensors that the plan writes.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.written: list[str] = []
        self.tied: dict[ModelReference, list[str]] = defaultdict(list)
        self.lacking: list[tuple[str, str]] = []
        self._read: dict[ModelReference, set[str]] = defaultdict(set)
        self._built: dict[ModelReference, set[str]] = defaultdict(set)
        self._bases: set[ModelReference] = set()

    def add(self, weight: WeightInfo, task: Any, model: LoadableModel | None) -> bool:
        """Add a task; return False if there is nothing to merge."""
        found = {each: find_weight(task, each) for each in task.model_order}
        without = [each for each, place in found.items() if place is None]
        for each in found:
            self._read[each].update(())  # a model from which nothing is read counts as well
        if task.method_name == UBGM_SQUISHER:
            self._bases.add(task.base_model)
        if len(without) == len(found):
            self.asked += [] if weight.optional else [weight.name]
            return False
        if without and model is not None and model.first_of_tied(weight.name) != weight.name:
            return False  # a second copy of a tied tensor, which some of the files have
        if not weight.optional:
            self.lacking += [(str(each), _name(task, each)) for each in without]
        for each, place in found.items():
            if place is not None:
                names = place.aliases if place.stored is None else (place.stored,)
                (self._built if place.stored is None else self._read)[each].update(names)
                if place.tied:
                    self.tied[each].append(_name(task, each))
        self.written.append(weight.name)
        return True

    @property
    def models(self) -> Collection[ModelReference]:
        """The merged models."""
        return self._read.keys()

    def files(self) -> list[ReadFiles]:
        """Return the files of each model, with the tensors that are read."""
        return [
            ReadFiles(
                str(each),
                _names(each),
                frozenset(names),
                functools.partial(_converts_to_any, each, frozenset(self._built[each])),
                each in self._bases,
                functools.partial(_unties, each),
            )
            for each, names in self._read.items()
        ]


def _converts_to_any(model: ModelReference, targets: frozenset[str], name: str) -> bool:
    return converts_to(model, name, targets)


def _unties(model: ModelReference, name: str) -> bool:
    """Return True if a model's own config does not tie a tensor to another one."""
    own = own_class(model)
    return own is not None and not own.is_tied(name)


def _name(task: Any, model: ModelReference) -> str:
    name: str = load_task(gather_of(task), model, model).tensor
    return name


def _names(model: ModelReference) -> frozenset[str]:
    return frozenset(LoaderCache().get(model).index.tensor_paths)


def _sizes(planner: Any, names: Collection[str]) -> dict[str, int]:
    """Return name -> number of entries of some tensors on disk, from headers; without those of pickled weights."""
    sizes: dict[str, int] = {}
    for reference in dict.fromkeys(each for _, task in planner._tensors for each in task.model_order):
        infos = Weights(Path(LoaderCache().get(reference).index.base_path)).infos
        sizes |= {name: math.prod(infos[name].shape) for name in names if name in infos}
    return sizes


class FileModule(ModuleArchitecture):  # type: ignore[misc]
    """Architecture of a module whose tensors are those in the files.

    Args:
        loose: Tensors outside the layers.
        layers: Tensors of each layer.
    """

    def __init__(self, loose: list[WeightInfo], layers: list[list[WeightInfo]]) -> None:
        self._loose, self._layers = loose, layers

    def pre_weights(self, config: Any) -> list[WeightInfo]:
        """Return the tensors outside the layers."""
        return self._loose

    def post_weights(self, config: Any) -> list[WeightInfo]:
        """Return no tensor."""
        return []

    def layer_weights(self, index: int, config: Any) -> list[WeightInfo]:
        """Return the tensors of a layer."""
        return self._layers[index]

    def num_layers_config_key(self) -> str:
        """Return no key: the files tell the number of layers."""
        return ""

    def num_layers(self, config: Any) -> int:
        """Return the number of layers."""
        return len(self._layers)


def _architecture_of_files(
    planner: Any, models: Collection[ModelReference], model: LoadableModel | None
) -> ModelArchitecture | None:
    """Return the architecture whose tensors are those in the files of all models; None if the files differ."""
    vocabularies = planner._tokenizer_task is not None or planner.options.unsafe_truncate_embeddings
    if vocabularies and model is None:
        return None
    config = planner.config
    bases = {config.base_model} if config.merge_method == UBGM_SQUISHER else set()
    names = [_kept(_names(each), model) for each in models if each not in bases]
    if not names or any(each != names[0] for each in names) or any(not names[0] <= _names(each) for each in bases):
        return None
    axes = _vocabulary_axes(names[0], model) if vocabularies and model is not None else {}
    modules = {
        prefix or "default": ModuleDefinition(architecture=module) for prefix, module in _modules(names[0], axes)
    }
    return planner.arch_info.model_copy(update={"modules": modules})


def architecture_without_tokens(model: ModelReference, options: Any) -> ModelArchitecture:
    """Return the architecture of a model without token embeddings: the tensors in its files.

    Args:
        model: The model.
        options: mergekit's options.
    """
    loader = model.lazy_loader(cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle)
    modules = {
        name or "default": ModuleDefinition(architecture=each) for name, each in _modules(loader.index.tensor_paths, {})
    }
    return ModelArchitecture(modules=modules, architectures=[], model_type="")


def _kept(names: Collection[str], model: LoadableModel | None) -> frozenset[str]:
    """Return the tensors on disk that belong to the model."""
    if model is None:
        return frozenset(names)
    return frozenset(name for name, found in model.fills(names).items() if found.keys or not model.is_ignored(name))


def _vocabulary_axes(names: Collection[str], model: LoadableModel) -> dict[str, int]:
    """Return the tensors on disk that have an axis of tokens, and that axis."""
    try:
        axes = infer_vocabulary_axes(model.module)
    except NotImplementedError:  # a class without token embeddings
        return {}
    fills = model.fills(names)
    return {name: axes[found.keys[0]] for name, found in fills.items() if found.keys and found.keys[0] in axes}


def _modules(names: Iterable[str], axes: Mapping[str, int]) -> Iterable[tuple[str, FileModule]]:
    """Yield a module for each stack of layers, and one for the tensors outside them."""
    loose: list[WeightInfo] = []
    stacks: dict[str, dict[int, list[WeightInfo]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names):
        weight, match = WeightInfo(name=name, vocabulary_axis=axes.get(name)), _LAYER.search(name)
        if match:
            stacks[name[: match.start()]][int(match[1])].append(weight)
        else:
            loose.append(weight)
    if loose:
        yield "", FileModule(loose, [])
    for prefix, layers in stacks.items():
        yield prefix, FileModule([], [layers[index] for index in range(max(layers) + 1)])
