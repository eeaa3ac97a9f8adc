"""From raw optimizer states to a Fisher: parse, name, convert, describe, check; one call per stage."""

from collections.abc import Mapping, Sequence

from squisher_mergekit.errors import MismatchError, ValuesError
from squisher_mergekit.fisher.files import tied_aliases
from squisher_mergekit.fisher.fits import check_headers
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import has_signal, zeros_refusal
from squisher_mergekit.models.convert import MomentStore, store_moments
from squisher_mergekit.models.names import NAMES_CURE, CheckpointNames
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.checkpoints.flat_buffers import verify_masters
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.checkpoints.run_folder import STEP, Folders, find_folders, previous_weights
from squisher_mergekit.optimizers.metadata import LOG, make_config, make_coverage, warnings_of
from squisher_mergekit.optimizers.preconditioners.attach import factors_of
from squisher_mergekit.optimizers.slot_names import name_slots
from squisher_mergekit.optimizers.slots import OptimizerSlot, parse
from squisher_mergekit.optimizers.swap_check import of_another_run, swapped_names
from squisher_mergekit.optimizers.translation.flat_units import unflatten
from squisher_mergekit.optimizers.translation.translate import translate, without_own_weights


def build_fisher(raw: RawState, model: Weights | None, base: Weights | None, names: Sequence[str] | None) -> Fisher:
    """Build a Fisher from optimizer states.

    Args:
        raw: The states as their layout stores them.
        model: The model that the user names, or a folder with its ``config.json`` alone.
        base: The model before training.
        names: The user's names, one for each of the optimizer's parameters.

    Returns:
        The Fisher; tensors are read when asked for.

    Raises:
        RefusedError: The state cannot be read safely, cannot be named with certainty, or does not fit the weights.
    """
    state = parse(raw)
    folders = find_folders(raw.location, model, base, raw.beside)
    state = unflatten(state, folders)
    if names is None:
        folders = without_own_weights(folders)
        state = translate(state, folders)
    raw = state.raw
    weights = folders.weights
    slots, checkpoint_names = name_slots(state, folders, names)
    moments = {name: slot.tensor for name, slot in slots.items() if slot.tensor is not None}
    store = store_moments(str(raw.location), moments, checkpoint_names, weights.infos, raw.verify)
    _refuse_lost(store, folders)
    _refuse_zeros(store)
    _verify_cuts(raw, weights, checkpoint_names)
    coverage = make_coverage(slots, store, checkpoint_names, weights.infos)
    adapter = folders.adapter is not None
    config = make_config(raw, slots, store, coverage, folders.config.config, folders.beside.fingerprint, adapter)
    fisher = Fisher(store, config, tied_aliases(config), factors_of(slots, store))
    check_headers(fisher, weights)
    if folders.given is not None and folders.given is not weights:
        check_headers(fisher, folders.given)
    for warning in warnings_of(slots, raw.location.parent):
        LOG.warning("%s: %s", raw.location, warning)
    if not adapter:
        _warn_by_change(slots, folders, checkpoint_names, state.named)
    return fisher


def _refuse_lost(store: MomentStore, folders: Folders) -> None:
    """Refuse second moments without a name on disk, where a Fisher without them would be empty or an adapter's."""
    converted = {source for origin in store.conversions.values() for source in origin.sources}
    lost = set(store.moments) - converted
    if lost and (folders.adapter or not store.conversions):
        raise MismatchError(
            f"{sorted(lost)[0]} in {store.location} has no name on disk, or not all that is saved with it was trained; "
            "estimate a Fisher from data"
        )


def _refuse_zeros(store: MomentStore) -> None:
    """Refuse second moments that are all 0.

    Raises:
        ValuesError: All entries are 0.
    """
    if store.infos and not has_signal(store.infos, store.read):
        raise ValuesError(zeros_refusal(store.location))


def _verify_cuts(raw: RawState, weights: Weights, checkpoint_names: CheckpointNames | None) -> None:
    """Verify the cuts of flat buffers against the weights; warn where there are no weights."""
    if not raw.masters or raw.model is not None:
        return
    sources = checkpoint_names.sources.items() if checkpoint_names else ()
    on_disk = {made_of[0]: stored for stored, made_of in sources if len(made_of) == 1}
    names = {name: on_disk.get(name, name) for name in raw.masters}
    saved = {name: weights.read(stored) for name, stored in names.items() if stored in weights.infos}
    if not verify_masters(raw.masters, saved, raw.location):
        LOG.warning(
            "%s: the cuts of its buffers could not be verified, as there are no weights here; give the folder of the "
            "weights as --model, so that each part of a buffer is certain to be its parameter's",
            raw.location,
        )


def _warn_by_change(
    slots: Mapping[str, OptimizerSlot], folders: Folders, checkpoint_names: CheckpointNames | None, named: bool
) -> None:
    """Warn where the change since earlier weights contradicts the state: another run's, or two names exchanged."""
    previous = previous_weights(folders.location.parent)
    before = previous or folders.base
    if before is None or not before.infos or not folders.weights.infos:
        return
    swapped = {} if named else swapped_names(slots, folders.weights, folders.base or before, checkpoint_names)
    if swapped:
        name, other = next(iter(swapped.items()))
        LOG.warning(
            "%s: %d parameters changed since %s rather as the state of another one says (%s as that of %s): were they "
            "given to the optimizer in the model's order? If not, give %s",
            folders.location,
            len(swapped),
            (folders.base or before).folder.name,
            name,
            other,
            NAMES_CURE,
        )
        return
    # The base of a merge need not be the start of the training, the run's own checkpoint is a part of it.
    reason = of_another_run(
        slots, folders.weights, before, checkpoint_names, _steps_since(previous, slots), same_run=previous is not None
    )
    if reason is not None:
        LOG.warning(
            "%s: it seems to be of another run than the weights in %s: since %s, %s. Give the optimizer's state that "
            "was saved with the weights",
            folders.location,
            folders.weights.folder,
            before.folder,
            reason,
        )


def _steps_since(previous: Weights | None, slots: Mapping[str, OptimizerSlot]) -> int:
    """Return the number of steps since the run's previous checkpoint, or since the start of training; 0 if unknown."""
    steps = max((slot.steps or 0 for slot in slots.values()), default=0)
    checkpoint = None if previous is None else STEP.fullmatch(previous.folder.name)
    return max(steps - int(checkpoint[1]), 0) if checkpoint else steps
