"""Names of an optimizer's slots: given by the user, stored in the file, or the one assignment that fits the model."""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from squisher_mergekit.errors import CorruptFileError, MismatchError, NamingError, NotFoundError, RefusedError
from squisher_mergekit.models.adapters import adapter_names
from squisher_mergekit.models.checkpoint_names import checkpoint_names
from squisher_mergekit.models.decay_groups import layers_of_groups
from squisher_mergekit.models.names import NAMES_CURE, CheckpointNames, ParameterInfo, Shape
from squisher_mergekit.models.parameters import DDP, unwrapped
from squisher_mergekit.models.sentence_modules import assign_beside_loss, has_modules, module_parameters
from squisher_mergekit.models.weights import trained_parameters
from squisher_mergekit.optimizers.assign_names import Names, assign, divide
from squisher_mergekit.optimizers.checkpoints.fsdp_ranks import NAME as FSDP_RANK
from squisher_mergekit.optimizers.checkpoints.run_folder import Folders
from squisher_mergekit.optimizers.checkpoints.trainers.foreign import lora_without_order
from squisher_mergekit.optimizers.ivon import cut, is_flat, split
from squisher_mergekit.optimizers.slots import OptimizerSlot, OptimizerState, parameters_of
from squisher_mergekit.tensors.safetensors import check_shape

LOG = logging.getLogger("squisher_mergekit")
NamedSlots = dict[str, OptimizerSlot]


def name_slots(
    state: OptimizerState, folders: Folders, given: Sequence[str] | None
) -> tuple[NamedSlots, CheckpointNames | None]:
    """Name the slots of an optimizer.

    Args:
        state: The slots.
        folders: Folders of the config, the weights and the base.
        given: The user's names, one for each slot; None if there are none.

    Returns:
        Name -> slot, and the names of the model, by which names in memory become names on disk; None where the names
        are those on disk already. A slot without a second moment that fits several parameters is left out.

    Raises:
        NamingError: The names are not certain, or one is given twice.
        MismatchError: A name is not in the model, or a shape differs.
        NotFoundError: An adapter's names need its base model.
    """
    model = _names_of_model(folders, needed=given is None and not state.named and state.raw.model is None)
    if is_flat(state):
        state = _cut_flat(state, model, given, folders)
    named = _named(state, model, given, folders)
    if model is None and not folders.weights.infos and not _is_whole(state):
        _refuse_rank_file(state.location)
    slots, in_memory = _by_name(named, model, folders)
    if not in_memory or model is None:
        return slots, None
    shapes = {parameter.name: parameter.shape for parameter in model.parameters}
    for name, slot in slots.items():
        if slot.shape is not None and name in shapes:
            check_shape(name, slot.shape, shapes[name], str(state.location))
    return slots, model


def read_names(names: str | Path | Sequence[str] | None) -> list[str] | None:
    """Return the user's names: a list, or the lines of a text file; None if there are none.

    Args:
        names: The names, or their file.

    Raises:
        NotFoundError: There is no such text file.
    """
    if names is None or not isinstance(names, str | Path):
        return None if names is None else list(names)
    path = Path(names)
    if not path.is_file():
        raise NotFoundError(f"--names must be a text file with one name a line, but there is no {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows begins a text file with a mark
    except (OSError, ValueError) as error:
        raise NotFoundError(f"--names must be a text file with one name a line, but {path} is none: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


_RANK = re.compile(r"rank[_.-]?\d+|shard[_.-]?\d+|\d+[_-]of[_-]\d+", re.IGNORECASE)


def _is_whole(state: OptimizerState) -> bool:
    """Return True for Composer's file, always of rank 0, whose model in it has the shapes of the second moments."""
    model = state.raw.model if state.raw.layout == "composer" else None
    return model is not None and all(
        slot.shape is None or (slot.name in model and tuple(model[str(slot.name)].shape) == slot.shape)
        for slot in state.slots
    )


def _refuse_rank_file(location: Path) -> None:
    """Refuse the file of one rank where no shapes are known that its tensors can be compared with."""
    if location.is_file() and FSDP_RANK.fullmatch(location.name) is None and _RANK.search(location.name):
        raise NamingError(
            f"the tensors in {location} must be whole, but its name is that of one of several ranks or shards, and "
            "there are no weights to compare their shapes with; give --model DIR, a folder with config.json is enough"
        )


def _names_of_model(folders: Folders, needed: bool) -> CheckpointNames | None:
    """Return the names of the model; None where it cannot be built and the names are known otherwise."""
    if folders.adapter is not None:
        base = None if folders.base is None else folders.base.folder
        return adapter_names(folders.adapter, base) if needed or base is not None else None
    has_config = (folders.config.folder / "config.json").is_file()
    if not needed and not has_config:
        return None
    if not has_config and (whose := lora_without_order(folders.location.parent)) is not None:
        raise NamingError(
            f"the parameters in {folders.location} must be named, but they are numbered in the order in which {whose} "
            f"was made, which no file tells and which its weights, sorted by name, do not keep; give {NAMES_CURE}, as "
            "printed by the network's named_parameters()"
        )
    try:
        return checkpoint_names(folders.config.folder, folders.weights.infos)
    except CorruptFileError:
        if needed:
            raise
        return None


def _named(
    state: OptimizerState, model: CheckpointNames | None, given: Sequence[str] | None, folders: Folders
) -> list[tuple[str, OptimizerSlot]]:
    """Pair every slot with its name; slots that fit several parameters and need no name are left out."""
    slots = list(state.slots)
    if given is not None:
        if len(given) != len(slots):
            raise NamingError(
                f"--names must have one name for each of the {len(slots)} parameters in {state.location}, "
                f"found {len(given)}"
            )
        _refuse_contradiction(given, slots, state.location)
        return list(zip(given, slots, strict=True))
    if state.named:
        return [(str(slot.name), slot) for slot in slots]
    further = module_parameters(folders.location.parent)
    parameters = [*_in_order(state, model), *further]
    shapes = [[slot.shape for slot in group] for group in state.groups]
    trained = _trained(folders, model) if len(slots) < len(parameters) else None
    if len(state.optimizers) > 1:
        needed = [[slot.tensor is not None for slot in group] for group in state.groups]
        chosen = divide(shapes, parameters, trained, needed, str(state.location))
    elif len(slots) > len(parameters) and has_modules(folders.location.parent):
        chosen = assign_beside_loss(shapes, parameters, str(state.location))
        extra = len(slots) - len(parameters)
        LOG.warning("%s: left out, as of the loss: %d of the optimizer's parameters", folders.location, extra)
    else:
        settings = state.raw.states[0]["param_groups"]
        by_layers = _assign_by_layers(shapes, layers_of_groups(settings), parameters, str(state.location))
        chosen = by_layers or assign(shapes, parameters, trained, str(state.location))
    pairs = zip((name for group in chosen for name in group), slots, strict=True)
    left_out = {parameter.name for parameter in further}  # the Fisher is that of the transformer
    return [(name, slot) for name, slot in pairs if name is not None and name not in left_out]


def _assign_by_layers(
    slots: Sequence[Sequence[Shape | None]],
    layers: Sequence[Sequence[int]] | None,
    parameters: Sequence[ParameterInfo],
    location: str,
) -> Names | None:
    """Return the name of each slot, where each layer has the parameters after those of the one before; else None."""
    if layers is None or [k for layer in layers for k in layer] != list(range(len(slots))):
        return None
    if sum(map(len, slots)) != len(parameters):  # with frozen parameters, the borders of the layers are not known
        return None
    names: Names = []
    first = 0
    for layer in layers:
        groups = [slots[number] for number in layer]
        count = sum(map(len, groups))
        try:
            names += assign(groups, parameters[first : first + count], None, location)
        except RefusedError:  # the layers are in another order, or divided otherwise
            return None
        first += count
    return names


def _trained(folders: Folders, model: CheckpointNames | None) -> set[str] | None:
    """Return the parameters that differ from the base; None if there is no base to compare with."""
    if folders.base is None or folders.adapter is not None or model is None:
        return None
    return trained_parameters(folders.weights, folders.base, model)


def _frozen(folders: Folders, model: CheckpointNames | None) -> set[str]:
    """Return the parameters that equal the base's; one that the base lacks, such as a new head, is not among them."""
    trained = _trained(folders, model)
    if trained is None or model is None or folders.base is None:
        return set()
    compared = folders.weights.infos.keys() & folders.base.infos.keys()
    stored = (model.sources.get(model.aliases.get(name, name), ()) for name in compared)
    return {source for sources in stored for source in sources} - trained


def _refuse_contradiction(given: Sequence[str], slots: Sequence[OptimizerSlot], location: Path) -> None:
    """Refuse given names that are the file's own in another order; names of another kind are renamings."""
    for name, slot in zip(given, slots, strict=True):
        if slot.name is not None and slot.name != name and slot.name in given:
            raise NamingError(
                f"--names must follow {location}, which names its parameters itself: it has {slot.name} where {name} "
                "was given; leave --names out"
            )


def _cut_flat(
    state: OptimizerState, model: CheckpointNames | None, given: Sequence[str] | None, folders: Folders
) -> OptimizerState:
    """Cut flat second moments by the shapes of the parameters in the model or the weights."""
    names = given if given is not None else [slot.name for slot in state.slots] if state.named else None
    if names is None:
        parameters, frozen = _in_order(state, model), _frozen(folders, model)
        return split(state, [p for p in parameters if p.name not in frozen])
    shapes = {name: info.shape for name, info in folders.weights.infos.items()}
    if model is not None:
        shapes |= {parameter.name: parameter.shape for parameter in model.parameters}
    unknown = [name for name in names if name not in shapes]
    if unknown or len(names) != len(list(state.slots)):
        raise NamingError(
            f"the {len(list(state.slots))} parameters in {state.location} must each be named, and be of the model, but "
            f"{unknown[0] if unknown else len(names)} was given; give --model DIR with its config.json"
        )
    return cut(state, [shapes[str(name)] for name in names])


def _in_order(state: OptimizerState, model: CheckpointNames | None) -> Sequence[ParameterInfo]:
    """Return the parameters in the optimizer's order: that of the model, or that of the model saved in the file."""
    saved = state.raw.model
    if saved is None:
        if model is None:
            raise TypeError("a model is needed to name numbered parameters")
        return model.parameters
    if model is not None and {parameter.name for parameter in model.parameters} <= set(saved):
        return model.parameters
    return [ParameterInfo(name, shape) for name, shape in parameters_of(saved).items()]


def _without_wrappers(names: Sequence[str], model: CheckpointNames | None, folders: Folders) -> list[str]:
    """Strip the prefixes of torch.compile, DDP and FSDP from names that the model and the weights do not have.

    The attribute in which a user's module keeps the model is stripped as well, if all names have it.
    """
    known = {*(model.first if model is not None else ()), *folders.weights.infos}
    inner = [unwrapped(name).partition(".")[2] for name in names]
    if known and len({name.partition(".")[0] for name in names}) == 1 and not known & set(names):
        return inner if known.issuperset(inner) else [unwrapped(name) for name in names]
    if known or all(name.startswith(DDP) for name in names):
        return [name if name in known else unwrapped(name) for name in names]
    # A module of the user's can have DDP's name, so that some names alone begin with it.
    return [DDP * name.startswith(DDP) + unwrapped(name) for name in names]


def _of_one_attribute(
    named: Sequence[tuple[str, OptimizerSlot]], model: CheckpointNames | None, folders: Folders
) -> Sequence[tuple[str, OptimizerSlot]]:
    """Return the slots of the one attribute in which a user's module keeps the model, where it has more modules."""
    stored = folders.weights.infos
    known = {*(model.first if model is not None else ()), *stored}
    least = len(model.parameters if model is not None else stored) / 2
    prefixes: Counter[str] = Counter()
    for name, _ in named:
        parts = name.split(".")
        ends = [".".join(parts[:k]) for k in range(1, len(parts)) if ".".join(parts[k:]) in known]
        prefixes.update(f"{end}." for end in ends)
    whole = [
        prefix
        for prefix, count in prefixes.items()
        if count == sum(name.startswith(prefix) for name, _ in named) and count > least
    ]
    if len(whole) != 1 or prefixes[whole[0]] == len(named) or any(name in known for name, _ in named):
        return named
    present = {name.removeprefix(whole[0]) for name, _ in named if name.startswith(whole[0])}
    left_out = {slot.shape for name, slot in named if not name.startswith(whole[0])}
    if None in left_out or left_out & _missing_shapes(present, model, folders):
        return named  # a parameter of the model may have another name
    others = [name for name, _ in named if not name.startswith(whole[0])]
    LOG.warning(
        "%s: the model is %s of the module that was trained; left out: %s%s",
        folders.location,
        whole[0][:-1],
        others[0],
        f" and {len(others) - 1} more" if len(others) > 1 else "",
    )
    return [(name.removeprefix(whole[0]), slot) for name, slot in named if name.startswith(whole[0])]


def _missing_shapes(present: set[str], model: CheckpointNames | None, folders: Folders) -> set[Shape]:
    """Return the shapes of the model's parameters that are not among the names."""
    if model is not None and all(name in model.first for name in present):
        held = {model.first[name] for name in present}
        return {parameter.shape for parameter in model.parameters if parameter.name not in held}
    return {info.shape for name, info in folders.weights.infos.items() if name not in present}


def _refuse_untied(names: Sequence[str], model: CheckpointNames, folders: Folders) -> None:
    """Refuse second moments of two parameters that are one in the model.

    Raises:
        MismatchError: The state has both.
    """
    owner: dict[str, str] = {}
    for name in dict.fromkeys(names):
        other = owner.setdefault(model.first[name], name)
        if other != name:
            raise MismatchError(
                f"{name} and {other} were trained apart in {folders.location}, but the config in "
                f"{folders.config.folder} ties them; give the --model that was trained (tie_word_embeddings)"
            )


def _by_name(
    named: Sequence[tuple[str, OptimizerSlot]], model: CheckpointNames | None, folders: Folders
) -> tuple[NamedSlots, bool]:
    """Return name -> slot, and True if the names are those in memory, False if they are those on disk.

    Raises:
        NamingError: A name is given twice.
        MismatchError: A name is not in the model.
        NotFoundError: A name is an adapter's in memory, and there is no base model to turn it into that on disk.
    """
    named = _of_one_attribute(named, model, folders)
    names = _without_wrappers([name for name, _ in named], model, folders)
    in_memory = model is not None and all(name in model.first for name in names)
    if in_memory and model is not None:
        _refuse_untied(names, model, folders)
        names = [model.first[name] for name in names]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise NamingError(
            f"each parameter in {folders.location} must have its own name, but {doubled[0]} is given twice"
        )
    on_disk: set[str] = set(folders.weights.infos) or set(model.sources if model is not None else names)
    unknown = [name for name in names if name not in on_disk]
    if not in_memory and unknown:
        if folders.adapter is not None:
            adapter_names(folders.adapter, None)
        raise MismatchError(
            f"the names of the parameters in {folders.location} must be those of the model, but {unknown[0]} is not "
            f"among them ({len(unknown)} of {len(names)} are not); give the --model that was trained, or {NAMES_CURE}"
        )
    return dict(zip(names, (slot for _, slot in named), strict=True)), in_memory
