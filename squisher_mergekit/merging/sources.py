"""From the parameter ``fisher:`` of a model to an open Fisher that fits its weights."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.errors import MismatchError, NotFoundError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.files import has_fisher, read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import difference, fingerprint
from squisher_mergekit.optimizers.load import find_state, load_fisher


@dataclass(frozen=True)
class ModelFiles:
    """A model as a merge sees it.

    ``label``: as the configuration names it. ``folder``: where its weights lie; ``file``: the one file, for single-file
    models. ``names``: all tensor names in its files. ``repo``: id and revision if it comes from the Hub. ``adapter``:
    it is a base with a LoRA applied. ``convertible`` says whether transformers makes its tensors of others at loading;
    it is a function, as the answer takes transformers half a second and is seldom needed.
    """

    label: str
    folder: Path
    names: frozenset[str]
    file: Path | None = None
    repo: tuple[str, str | None] | None = None
    adapter: bool = False
    convertible: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class Opened:
    """An open Fisher and what has to be said about it."""

    fisher: Fisher
    warning: str | None


class Sources:
    """Opens each Fisher of a merge once; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[tuple[object, ...], Opened] = {}

    def open(self, value: str, model: ModelFiles, base: Path | None = None, cache_dir: str | None = None) -> Opened:
        """Find, open and check the Fisher of a model.

        Args:
            value: ``auto``, a path or a Hub id.
            model: The model.
            base: The base model's folder, which tells frozen parameters apart.
            cache_dir: Where Hub files are kept.

        Returns:
            The Fisher, its names those of the model's weights.

        Raises:
            NotFoundError: There is none.
            MismatchError: It belongs to other weights, by its names, or to an adapter.
            RefusedError: Whatever reading it raises.
        """
        with self._lock:
            key = (value, model.label, base)
            if key not in self._opened:
                self._opened[key] = _open(locate(value, model, cache_dir), model, base)
            return self._opened[key]


def locate(value: str, model: ModelFiles, cache_dir: str | None = None) -> Path:
    """Return the file or folder that ``fisher: value`` means for a model.

    Raises:
        NotFoundError: There is none.
    """
    if value != "auto":
        path = Path(value).expanduser()
        return path if path.exists() else hub.resolve(value, cache_dir, state=False)
    if model.adapter:
        raise NotFoundError(
            f"{model.label} is a model with a LoRA applied, whose Fisher cannot be found beside it: the adapter's "
            "second moments say nothing of the merged weights; give fisher: PATH, made for the merged weights"
        )
    if has_fisher(model.folder) or find_state(model.folder) is not None:
        return model.folder
    if model.repo is not None:
        found = hub.find_beside(*model.repo, cache_dir)
        if isinstance(found, Path):
            return found
        raise NotFoundError(
            f"no Fisher for {model.label}: of {model.repo[0]} on the Hub, {found}; give the model fisher: PATH or "
            "fisher: org/name@revision, or publish one there with squisher push"
        )
    raise NotFoundError(
        f"no Fisher for {model.label}: {model.folder} has neither fisher.safetensors nor optimizer state "
        "(optimizer.pt of checkpoint-N); give the model fisher: PATH, or train with the optimizer state saved"
    )


def _open(path: Path, model: ModelFiles, base: Path | None) -> Opened:
    portable = path.suffix in (".safetensors", ".json") if path.is_file() else has_fisher(path)
    fisher = read_fisher(path) if portable else load_fisher(path, model=model.folder, base=base)
    fisher = hub.named(fisher, path)
    if fisher.config.parameters == "adapter":
        raise MismatchError(
            f"the Fisher for {model.label} must be of full weights, but {fisher.location} is of a LoRA adapter, whose "
            "second moments say nothing of the merged weights; merge adapters, or estimate a Fisher of the full model"
        )
    unknown = [name for name in fisher if name not in model.names]
    if unknown and not model.convertible():
        raise MismatchError(
            f"the names of a Fisher must be those of the weights, but {len(unknown)} of {len(fisher)} in "
            f"{fisher.location} are not in {model.label}, {unknown[0]} among them; give the Fisher of this model"
        )
    now = fingerprint(model.file or model.folder)
    changed = difference(fisher.config.weights_fingerprint, now)
    warning = None
    if changed:
        warning = f"the Fisher for {model.label}, {fisher.location}, was made at other weights: {changed}"
    return Opened(fisher, warning)


def find_name(fisher: Fisher, stored: str, aliases: tuple[str, ...]) -> str | None:
    """Return under which name a Fisher has the tensor that a model stores as ``stored``.

    ``aliases`` are other names of the same tensor in the architecture's eyes; tied names are no aliases: only the
    Fisher itself may say that it counts two uses together.
    """
    for name in (stored, *aliases):
        found = fisher.resolve(name)
        if found is not None:
            return found
    return None
