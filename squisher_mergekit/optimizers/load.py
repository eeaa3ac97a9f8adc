"""Open a Fisher from any source: a portable file, the Hub, or the optimizer state that training left on disk."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, UnsupportedStateError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.bare import find_bare, read_bare
from squisher_mergekit.fisher.config import FisherConfig, OptimizerInfo
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.fits import check_base, check_headers
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import check_free, has_fisher, to_dtype, write_fisher
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.lora.pairs import read_lora
from squisher_mergekit.models.weights import BASENAME, Weights
from squisher_mergekit.optimizers.build import build_fisher
from squisher_mergekit.optimizers.checkpoints import layouts, torch_save
from squisher_mergekit.optimizers.checkpoints.below import checkpoint_below
from squisher_mergekit.optimizers.checkpoints.run_folder import STEP, steps_in
from squisher_mergekit.optimizers.checkpoints.trainers.foreign import whose
from squisher_mergekit.optimizers.lifting.lift import lift as lift_fisher
from squisher_mergekit.optimizers.slot_names import read_names
from squisher_mergekit.tensors.hub import download as download_files
from squisher_mergekit.tensors.hub import split_revision
from squisher_mergekit.tensors.input_files import exists, expanded

LOG = logging.getLogger("squisher_mergekit")
_BAR_DELAY = 2  # seconds
_STATE_PATTERNS = ["optimizer.pt", "optimizer.bin", "trainer_state.json", "config.json", "adapter_config.json"]
# Files of a model: weights of any trainer, or a config.
_MODEL_FILES = ["*.safetensors*", "*.bin*", "*.pt", "*.pth", "*.ckpt", "*.json", "*.distcp", "*.yaml"]


def find_state(folder: Path) -> Path | None:
    """Return the file or folder of the optimizer's state in a checkpoint; None if there is none."""
    found = layouts.find(folder)
    return found[1] if found else None


def download(source: str) -> Path:
    """Download the portable Fisher of a Hub id, or else its optimizer state.

    Args:
        source: ``org/name[@revision]``.

    Returns:
        The local folder.

    Raises:
        NotFoundError: ``source`` is not a Hub id, cannot be reached, or has neither.
    """
    found = hub.find_by_id(source)
    if isinstance(found, Path):
        return found
    folder = download_files(*split_revision(source), _STATE_PATTERNS, None)
    if isinstance(folder, Path) and any((folder / name).exists() for name in _STATE_PATTERNS[:2]):
        return folder
    raise NotFoundError(f"no fisher.safetensors and no optimizer state at {source} on the Hub or in its cache: {found}")


def load_fisher(
    source: str | Path,
    model: str | Path | Weights | None = None,
    base: str | Path | Weights | None = None,
    names: str | Path | Sequence[str] | None = None,
    *,
    verify: bool = True,
    lift: bool = False,
) -> Fisher:
    """Open a Fisher; its tensors are read when asked for.

    Args:
        source: A portable Fisher, an optimizer's file or folder, a checkpoint with either (of a run's folder, the
            checkpoint with the weights of ``model`` or of that folder, else the last), or a Hub id
            ``org/name[@revision]``.
        model: The model that the Fisher belongs to, or a folder with its ``config.json``, where ``source`` does not
            hold them.
        base: The model before training, which shows the frozen parameters; for a LoRA its base model.
        names: One name for each of the optimizer's parameters, in order: a list, or a text file with one name a line.
        verify: Verify the checksums of an optimizer's state, or the digests of a portable Fisher, as tensors are read.
        lift: Of a LoRA, return the Fisher of the merged weights that follows from that of A and B
            (:mod:`squisher_mergekit.optimizers.lifting.equations`); ``base`` is needed.

    Returns:
        The Fisher, under the names in ``model.safetensors`` (for a LoRA without ``lift``: in
        ``adapter_model.safetensors``).

    Raises:
        NotFoundError: The source holds no Fisher and no optimizer state.
        RefusedError: The source cannot be read safely, cannot be named with certainty, or does not fit the weights.

    Example:
        >>> load_fisher("nowhere")
        Traceback (most recent call last):
        squisher_mergekit.errors.NotFoundError: a Fisher must be a file, a folder or a Hub id org/name[@revision], ...
    """
    path = expanded(source)
    if not exists(path):
        path = download(str(source))
    tuned, before = _weights(model, "--model"), _weights(base, "--base")
    if path.is_dir():
        path = _checkpoint_in(path, tuned)
    if not lift:
        fisher = _opened(path, tuned, before, names, verify)
        if before is not None and fisher.config.parameters != "adapter":
            check_base(fisher, before)
        return fisher
    adapter = _adapter_of(path, tuned)
    if before is None:
        raise NotFoundError(
            f"the Fisher of merged weights needs the base model of the LoRA in {adapter.folder}; give --base DIR"
        )
    lora = read_lora(adapter, before)
    return lift_fisher(_opened(path, tuned, before, names, verify), lora)


def _opened(
    path: Path,
    tuned: Weights | None,
    before: Weights | None,
    names: str | Path | Sequence[str] | None,
    verify: bool,
) -> Fisher:
    """Open the Fisher of a local file or folder."""
    fisher = _portable(path, verify)
    if fisher is not None:
        if names is not None:
            raise ConfigError(
                f"--names is for optimizer states that number their parameters, but {path} has the names already; "
                "leave it out"
            )
        if tuned is not None:
            adapter = fisher.config.parameters == "adapter"
            check_headers(fisher, Weights(tuned.folder, "adapter_model") if adapter else tuned)
        return fisher
    layout, location = _state_of(path) if path.is_file() else _state_in(path)
    return build_fisher(layout.load(location, verify), tuned, before, read_names(names))


def is_portable(path: Path) -> bool:
    """Return True for a portable Fisher, or a file of plain second moments; False for an optimizer's state."""
    if path.is_dir():
        return has_fisher(path)
    return path.suffix in (".safetensors", ".json") and not layouts.claims(path)


def _portable(path: Path, verify: bool) -> Fisher | None:
    """Open a portable Fisher, or plain second moments; return None for anything else."""
    if is_portable(path):
        return read_fisher(path, verify)
    if path.is_file():
        return None
    files = find_bare(path)
    return read_bare(files, str(path), verify) if files else None


def _adapter_of(path: Path, tuned: Weights | None) -> Weights:
    """Return the weights of the LoRA that a Fisher belongs to.

    Raises:
        ConfigError: Neither the Fisher's folder nor the model's holds an adapter.
    """
    inside = path if path.is_dir() else path.parent
    # Above a checkpoint is the run, whose final adapter may be of another step.
    above = [] if STEP.fullmatch(inside.name) else [inside.parent]
    folders = [*([] if tuned is None else [tuned.folder]), inside, *above]
    folder = next((folder for folder in folders if (folder / ADAPTER_CONFIG).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"lift needs a LoRA, but {folders[0]} has no {ADAPTER_CONFIG}; give the adapter's folder as --model, or "
            "leave out --lift for full weights"
        )
    return Weights(folder, "adapter_model")


def extract(
    source: str | Path,
    out: str | Path,
    model: str | Path | None = None,
    base: str | Path | None = None,
    names: str | Path | Sequence[str] | None = None,
    dtype: torch.dtype | str | None = None,
    compress: str | None = None,
    *,
    examples_per_step: float | None = None,
    tokens_per_step: float | None = None,
    steps: int | None = None,
    beta2: float | None = None,
    verify: bool = True,
    progress: bool = False,
    lift: bool = False,
) -> Fisher:
    """Write the Fisher of a source as a portable file.

    Args:
        source: As for :func:`load_fisher`.
        out: The folder to make.
        model: As for :func:`load_fisher`.
        base: As for :func:`load_fisher`.
        names: As for :func:`load_fisher`.
        dtype: float32 (default) or bfloat16.
        compress: None, ``log8``, ``log4`` or ``rank1``: see :func:`write_fisher`.
        examples_per_step: Examples behind one optimizer step, over all processes and accumulation, for the metadata.
        tokens_per_step: The same in tokens.
        steps: Number of optimizer steps, where the source does not record it.
        beta2: Decay of the moving average, where the source does not record it.
        verify: As for :func:`load_fisher`.
        progress: Show a progress bar.
        lift: As for :func:`load_fisher`. Lifted tensors are kept as row means and column means.

    Returns:
        The Fisher as written.

    Raises:
        ConfigError: An argument is out of its range, or ``out`` holds a Fisher already.
        RefusedError: As for :func:`load_fisher`, or an entry is NaN, infinite or negative. Nothing is left at ``out``.
    """
    from tqdm import tqdm

    wanted = to_dtype(dtype or torch.float32)
    known = {"examples_per_step": examples_per_step, "tokens_per_step": tokens_per_step}
    changes = {key: value for key, value in known.items() if value is not None}
    for key, value in changes.items():
        if not 0 < value < float("inf"):
            raise ConfigError(f"{key} must be a positive number, found {value}")
    check_free(Path(out))
    fisher = load_fisher(source, model, base, names, verify=verify, lift=lift)
    fisher.config = _supplied(fisher.config.model_copy(update=changes), steps, beta2, str(source))
    with tqdm(list(fisher), desc="Extracting", unit="tensor", disable=not progress, delay=_BAR_DELAY) as bar:
        write_fisher(fisher, Path(out), wanted, bar, compress=compress)
    return read_fisher(Path(out))


def _supplied(config: FisherConfig, steps: int | None, beta2: float | None, source: str) -> FisherConfig:
    """Return metadata with the steps and the decay that the user supplies for a source without them.

    Raises:
        ConfigError: A number is out of its range, or the source records another.
    """
    optimizer = config.optimizer or OptimizerInfo()
    supplied = (("steps", config.steps, steps), ("beta2", optimizer.beta2, beta2))
    for key, recorded, given in supplied:
        if given is not None and recorded is not None and recorded != given:
            raise ConfigError(
                f"--{key} is for sources that do not record it, but {source} records {recorded}; leave --{key} out"
            )
    if steps is not None and steps < 1:
        raise ConfigError(f"steps must be a positive number, found {steps}")
    if beta2 is not None and not 0 <= beta2 < 1:
        raise ConfigError(f"beta2 must be from 0 to less than 1, found {beta2}")
    changes: dict[str, object] = {} if steps is None else {"steps": steps}
    if beta2 is not None:
        changes["optimizer"] = optimizer.model_copy(update={"beta2": beta2})
    return config.model_copy(update=changes)


def _weights(given: str | Path | Weights | None, option: str) -> Weights | None:
    """Return the weights in the folder that an option names, or in the folder of the file it names.

    Raises:
        NotFoundError: The folder or file does not exist, or the folder has no file of a model.
    """
    if given is None or isinstance(given, Weights):
        return given
    path = expanded(given)
    if not exists(path):
        raise NotFoundError(
            f"{option} must be a local folder with weights or their config.json, but there is no {path}"
        )
    folder = path if path.is_dir() else path.parent
    if not any(path.match(each) if path.is_file() else any(folder.glob(each)) for each in _MODEL_FILES):
        raise NotFoundError(
            f"{option} must be a folder with weights or their config.json, but {path} is none; give the folder that "
            "save_pretrained wrote"
        )
    return Weights(folder)


def find_source(weights: Weights) -> Path | None:
    """Return the folder of a model's Fisher or optimizer state; None if there is none.

    The folder is the model's own, or the checkpoint with equal weights where the model's folder is that of a run
    (the Trainer's ``load_best_model_at_end``).

    Args:
        weights: The model's weights.
    """
    if _has_source(weights.folder):
        return weights.folder
    return next((path for path in _equal_checkpoints(weights.folder, weights) if _has_source(path)), None)


def _has_source(folder: Path) -> bool:
    """Return True if a folder holds a portable Fisher, ``exp_avg_sq.safetensors``, or an optimizer's state."""
    return has_fisher(folder) or find_state(folder) is not None or bool(find_bare(folder, usual=True))


def _equal_checkpoints(run: Path, weights: Weights) -> Iterator[Path]:
    """Yield the checkpoints of a run that hold equal weights, the last first."""
    for path in steps_in(run).values() if weights.fingerprint is not None else ():
        try:
            if saved_weights(path).fingerprint == weights.fingerprint:
                yield path
        except CorruptFileError:  # damage in another checkpoint does not concern this one
            continue


def saved_weights(folder: Path) -> Weights:
    """Return the weights of a folder, of its adapter if it holds one."""
    return Weights(folder, "adapter_model" if (folder / ADAPTER_CONFIG).is_file() else BASENAME)


def _checkpoint_in(folder: Path, tuned: Weights | None) -> Path:
    """Return the checkpoint to read in a run's folder, or in the one folder below with a run; else the folder itself.

    The checkpoint is the last one with the weights of the model, or of the run's folder; else the last one with a
    Fisher or an optimizer's state. A warning names it where the run has several.

    Args:
        folder: The folder of a checkpoint or of a run.
        tuned: The model that the Fisher belongs to; None if it is not given.

    Raises:
        NamingError: Several folders below hold checkpoints.
    """
    if _has_source(folder) or find_bare(folder):
        return folder
    steps = steps_in(folder)
    if not any(map(_has_source, steps.values())) and not torch_save.others(folder):
        below = checkpoint_below(folder, _has_source)
        return folder if below is None else _checkpoint_in(below, tuned)
    model = saved_weights(folder if tuned is None else tuned.folder)
    equal = next((path for path in _equal_checkpoints(folder, model) if _has_source(path)), None)
    chosen = equal or next((path for path in steps.values() if _has_source(path)), None)
    if chosen is None:
        return folder
    if len(steps) > 1:
        LOG.warning("%s is a run with %d checkpoints; taking %s", folder, len(steps), _why(chosen, equal, steps, model))
    return chosen


def _why(chosen: Path, equal: Path | None, steps: Mapping[int, Path], model: Weights) -> str:
    """Return the chosen checkpoint and the reason, in words."""
    if equal is not None:
        return f"{equal.name}, which has the weights of {model.folder}"
    step = next(step for step, path in steps.items() if path == chosen)
    newest = next(iter(steps.values()))
    lacking = f"; {newest.name} has none" if chosen != newest else ""
    other = (
        "" if model.fingerprint is None else f"; no checkpoint with optimizer state has the weights of {model.folder}"
    )
    return f"the last with optimizer state, {step}{lacking}{other}"


def _state_of(file: Path) -> tuple[layouts.Layout, Path]:
    """Return the layout of a file, and the file or folder to read.

    Raises:
        UnsupportedStateError: The file is of a trainer whose checkpoints cannot be read.
    """
    foreign = None if layouts.claims(file) else whose(file)
    if foreign is not None:
        raise UnsupportedStateError(f"{file} must be an optimizer's state that can be read, but {foreign}")
    return layouts.of(file)


def _state_in(folder: Path) -> tuple[layouts.Layout, Path]:
    """Return the optimizer's state in a checkpoint.

    Raises:
        NotFoundError: The folder holds no optimizer state, or several files that may hold it.
    """
    found = layouts.find(folder)
    if found is not None:
        return found
    files = torch_save.others(folder)
    last = torch_save.newest(files)
    if last is not None and len(files) > 1:
        LOG.warning("%s holds %d checkpoints; taking %s", folder, len(files), last.name)
        files = [last]
    if len(files) == 1:
        return layouts.of(files[0])
    foreign = whose(folder)
    several = f"; give the one of {', '.join(file.name for file in files)} that holds it" if files else ""
    unread = f"; {foreign}" if foreign else ""
    raise NotFoundError(
        f"no optimizer state in {folder}: neither fisher.safetensors nor {' nor '.join(torch_save.NAMES)} nor that of "
        f"FSDP or DeepSpeed, there or in a checkpoint-N below{several}{unread}; save with save_only_model=False and "
        "point at checkpoint-N, not at the final model"
    )
