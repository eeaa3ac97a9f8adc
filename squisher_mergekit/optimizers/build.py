"""From an optimizer's file to a Fisher: who is who, under which name on disk, and what is known beside."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import CorruptFileError, MismatchError, NamingError
from squisher_mergekit.fisher.files import tied_aliases
from squisher_mergekit.fisher.fits import check
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.adapters import ADAPTER_CONFIG, adapter_names
from squisher_mergekit.models.checkpoint_names import NAMES_CURE, CheckpointNames, Parameter, checkpoint_names
from squisher_mergekit.models.convert import store_moments
from squisher_mergekit.models.weights import changed, headers
from squisher_mergekit.optimizers.assign_names import assign, divide
from squisher_mergekit.optimizers.checkpoints.flat_buffers import prove
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.run_folder import STEP, steps_in
from squisher_mergekit.optimizers.ivon import cut, is_flat, split
from squisher_mergekit.optimizers.metadata import LOG, make_config, make_coverage, warnings_of
from squisher_mergekit.optimizers.slots import OptimizerState, Slot, parameters_of, parse
from squisher_mergekit.optimizers.swap_check import doubtful
from squisher_mergekit.tensors.safetensors import SafetensorsStore, TensorInfo, check_shape, safetensors_files


@dataclass(frozen=True)
class Place:
    """Which folder holds what.

    ``file``: the optimizer's. ``described``: folder of the ``config.json``. ``weighed``: folder of the trained weights.
    ``given``: what the user names as the model, if anything. ``adapter``: folder of an adapter's config, if it is one.
    """

    file: Path
    described: Path
    weighed: Path
    given: Path | None
    adapter: Path | None

    @property
    def basename(self) -> str:
        """How the files of the weights begin."""
        return "adapter_model" if self.adapter else "model"


def open_state(saved: RawState, model: Path | None, base: Path | None, names: Sequence[str] | None) -> Fisher:
    """Open what a layout has read as a Fisher.

    Args:
        saved: It.
        model: Folder of the weights or their ``config.json``, where the file's own folder does not hold them.
        base: Folder of the model before training.
        names: The user's names, one for each of the optimizer's parameters.

    Returns:
        The Fisher; tensors are read when asked for.

    Raises:
        RefusedError: It cannot be read safely, named with certainty, or does not fit the weights.
    """
    file, state = saved.place, parse(saved)
    place = _find(file, model)
    _refuse_adapter_for_full(place)
    weights = headers(place.weighed, place.basename)
    bones = _checkpoint_names(place, base, weights, needed=names is None and not state.named and saved.model is None)
    if is_flat(state):
        state = _cut(state, bones, names, place, base, weights)
    slots, in_memory = _by_names(_name_slots(state, bones, names, place, base), bones, weights, place)
    if not in_memory:
        bones = None
    moments = {name: slot.tensor for name, slot in slots.items() if slot.tensor is not None}
    _check_shapes(slots, bones, file)
    store = store_moments(str(file), moments, bones, weights, saved.verify)
    lost = set(moments) - {source for recipe in store.recipes.values() for source in recipe.sources}
    if lost and (place.adapter or not store.recipes):
        raise MismatchError(
            f"{sorted(lost)[0]} in {file} has no name on disk, or not all that is saved with it was trained; "
            "estimate a Fisher from data"
        )
    if saved.masters and saved.model is None:
        _prove(saved, place, bones)
    coverage = make_coverage(slots, store, bones, weights)
    described = place.adapter or place.described
    config = make_config(saved, slots, store, coverage, described, place.adapter is not None)
    fisher = Fisher(store, config, tied_aliases(config))
    check(fisher, weights, place.weighed)
    if place.given is not None and place.given != place.weighed:
        check(fisher, headers(place.given, place.basename), place.given)
    for warning in warnings_of(slots, file.parent):
        LOG.warning("%s: %s", file, warning)
    if not state.named:
        _warn_of_swaps(slots, place, base, bones)
    return fisher


def _prove(saved: RawState, place: Place, bones: CheckpointNames | None) -> None:
    """Hold buffers that were cut against the weights beside them; warn where there are none."""
    weights = SafetensorsStore(safetensors_files(place.weighed, place.basename), str(place.weighed))
    on_disk = {sources[0]: stored for stored, sources in bones.sources.items() if len(sources) == 1} if bones else {}
    names = {name: on_disk.get(name, name) for name in saved.masters}
    there = {name: weights.read(stored) for name, stored in names.items() if stored in weights.infos}
    if not prove(saved.masters, there, saved.place):
        LOG.warning(
            "%s: nothing could be held against the weights, as there are none here; give their folder as --model, so "
            "that it is certain which part of its buffers is which parameter",
            saved.place,
        )


def _warn_of_swaps(slots: Mapping[str, Slot], place: Place, base: Path | None, bones: CheckpointNames | None) -> None:
    """Warn where weights from before, a base or an earlier checkpoint, hint at parameters that are named wrongly."""
    before = base if base is not None else _earlier(place.file.parent)
    if place.adapter is not None or before is None:
        return
    swapped = doubtful(slots, place.weighed, before, bones)
    if swapped:
        name, other = next(iter(swapped.items()))
        LOG.warning(
            "%s: %d parameters changed since %s rather as the state of another one says (%s as that of %s): were they "
            "given to the optimizer in the model's order? If not, give %s",
            place.file,
            len(swapped),
            before.name,
            name,
            other,
            NAMES_CURE,
        )


def _earlier(folder: Path) -> Path | None:
    """Return the checkpoint before this one in its run, if it has weights."""
    steps = steps_in(folder.parent) if STEP.fullmatch(folder.name) else {}
    number = next((step for step, path in steps.items() if path == folder), None)
    before = [path for step, path in steps.items() if number is not None and step < number]
    try:
        return next((path for path in before if headers(path)), None)
    except CorruptFileError:  # what another checkpoint lacks is no fault of this one
        return None


def _find(file: Path, model: Path | None) -> Place:
    # A folder of shards lies in the checkpoint's, and is sometimes that itself.
    own = [file.parent, *([file] if file.is_dir() else [])]
    folders = [folder for folder in (model, *own) if folder is not None]
    adapter = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    described = next((folder for folder in folders if (folder / "config.json").is_file()), file.parent)
    basename = "adapter_model" if adapter else "model"
    # The weights beside the optimizer are those that it trained.
    weighed = next((folder for folder in reversed(folders) if headers(folder, basename)), file.parent)
    return Place(file, described, weighed, model, adapter)


def _refuse_adapter_for_full(place: Place) -> None:
    """Refuse a LoRA's state for full weights: the moments of A and B do not tell those of W + BA."""
    adapter, given = place.adapter, place.given
    if adapter is not None and given is not None and given != adapter and headers(given, "model"):
        raise MismatchError(
            f"{given} holds full weights, but {place.file} is the state of a LoRA, which says nothing of them; merge "
            "full fine-tunings or estimate a Fisher from data (to extract the adapter's, name the base as --base)"
        )


def _checkpoint_names(
    place: Place, base: Path | None, weights: Collection[str], needed: bool
) -> CheckpointNames | None:
    """Build the model if it can be described; a failure matters only where names cannot be had otherwise."""
    if place.adapter is not None:
        return adapter_names(place.adapter, base) if needed or base is not None else None
    if not needed and not (place.described / "config.json").is_file():
        return None
    try:
        return checkpoint_names(place.described, weights)
    except CorruptFileError:
        if needed:
            raise
        return None


def _name_slots(
    state: OptimizerState, bones: CheckpointNames | None, names: Sequence[str] | None, place: Place, base: Path | None
) -> list[tuple[str, Slot]]:
    """Give every slot its name: the user's word, the file's own names, or the one mapping that fits the model.

    A slot that was never stepped and could be one of several parameters gets none and is left out.
    """
    slots = list(state.slots)
    if names is not None:
        if len(names) != len(slots):
            raise NamingError(
                f"--names must have one name for each of the {len(slots)} parameters in {state.file}, "
                f"found {len(names)}"
            )
        _refuse_contradiction(names, slots, state.file)
        return list(zip(names, slots, strict=True))
    if state.named:
        return [(str(slot.name), slot) for slot in slots]
    parameters = _in_order(state, bones)
    shapes = [[slot.shape for slot in group] for group in state.groups]
    trained = None
    if base is not None and bones is not None and place.adapter is None and len(slots) < len(parameters):
        trained = changed(place.weighed, base, bones)
    if len(state.optimizers) > 1:
        needed = [[slot.tensor is not None for slot in group] for group in state.groups]
        chosen = divide(shapes, parameters, trained, needed, str(state.file))
    else:
        chosen = assign(shapes, parameters, trained, str(state.file))
    pairs = zip((name for group in chosen for name in group), slots, strict=True)
    return [(name, slot) for name, slot in pairs if name is not None]


def _refuse_contradiction(names: Sequence[str], slots: Sequence[Slot], file: Path) -> None:
    """Refuse the user's names where they are the file's own in another order; names of another kind are renamings."""
    for name, slot in zip(names, slots, strict=True):
        if slot.name is not None and slot.name != name and slot.name in names:
            raise NamingError(
                f"--names must follow {file}, which names its parameters itself: it has {slot.name} where {name} was "
                "given; leave --names out"
            )


def _cut(
    state: OptimizerState,
    bones: CheckpointNames | None,
    names: Sequence[str] | None,
    place: Place,
    base: Path | None,
    weights: Mapping[str, TensorInfo],
) -> OptimizerState:
    """Cut flat second moments by the shapes of the parameters, of which the model or the weights tell."""
    given = names if names is not None else [slot.name for slot in state.slots] if state.named else None
    if given is None:
        parameters = _in_order(state, bones)
        trained = changed(place.weighed, base, bones) if base is not None and bones is not None else None
        return split(state, [p for p in parameters if trained is None or p.name in trained])
    shapes = {name: info.shape for name, info in weights.items()}
    if bones is not None:
        shapes |= {parameter.name: parameter.shape for parameter in bones.parameters}
    unknown = [name for name in given if name not in shapes]
    if unknown or len(given) != len(list(state.slots)):
        raise NamingError(
            f"the {len(list(state.slots))} parameters in {state.file} must each be named, and be of the model, but "
            f"{unknown[0] if unknown else len(given)} was given; give --model DIR with its config.json"
        )
    return cut(state, [shapes[str(name)] for name in given])


def _in_order(state: OptimizerState, bones: CheckpointNames | None) -> Sequence[Parameter]:
    """Return the parameters in the order in which the optimizer got them: the model's, or that of one saved beside."""
    if state.saved.model is None:
        if bones is None:
            raise TypeError("a model is needed to name numbered parameters")
        return bones.parameters
    if bones is not None and {parameter.name for parameter in bones.parameters} <= set(state.saved.model):
        return bones.parameters
    if len(state.optimizers) == 1 and sum(bool(group) for group in state.groups) > 1:
        raise NamingError(
            f"{state.file} keeps its parameters in several groups, and how they were split does not follow from the "
            f"model saved in it; give --model DIR with its config.json, or {NAMES_CURE}"
        )
    return [Parameter(name, shape) for name, shape in parameters_of(state.saved.model).items()]


def _by_names(
    named: Sequence[tuple[str, Slot]], bones: CheckpointNames | None, weights: Mapping[str, TensorInfo], place: Place
) -> tuple[dict[str, Slot], bool]:
    """Return name -> slot, and whether these are names in memory (else those on disk).

    Raises:
        NamingError: A name is given twice.
        MismatchError: A name is none of the model's.
        NotFoundError: It is an adapter's name in memory, and there is no base model to turn it into that on disk.
    """
    names = [name for name, _ in named]
    in_memory = bones is not None and all(name in bones.first for name in names)
    if in_memory and bones is not None:
        names = [bones.first[name] for name in names]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise NamingError(f"each parameter in {place.file} must have its own name, but {doubled[0]} is given twice")
    on_disk = set(weights) or set(bones.sources if bones is not None else names)
    unknown = [name for name in names if name not in on_disk]
    if not in_memory and unknown:
        if place.adapter is not None:
            adapter_names(place.adapter, None)
        raise MismatchError(
            f"the names of the parameters in {place.file} must be those of the model, but {unknown[0]} is not among "
            f"them ({len(unknown)} of {len(names)} are not); give the --model that was trained, or {NAMES_CURE}"
        )
    return dict(zip(names, (slot for _, slot in named), strict=True)), in_memory


def _check_shapes(slots: Mapping[str, Slot], bones: CheckpointNames | None, file: Path) -> None:
    shapes = {parameter.name: parameter.shape for parameter in bones.parameters} if bones is not None else {}
    for name, slot in slots.items():
        if slot.shape is not None and name in shapes:
            check_shape(name, slot.shape, shapes[name], str(file))
