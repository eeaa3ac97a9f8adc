"""Fishers of a merge: found by the parameter ``fisher:`` of a model, checked against its weights, closed at the end."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import MismatchError, NotFoundError, ValuesError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import has_signal
from squisher_mergekit.merging.lora.files import LoraFiles
from squisher_mergekit.merging.lora.filled import FilledFisher
from squisher_mergekit.merging.parameters import SQUISHER
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.checkpoints.run_folder import steps_in
from squisher_mergekit.optimizers.lifting.lift import OF_LORAS, lift
from squisher_mergekit.optimizers.load import find_source, find_state, is_portable, load_fisher, saved_weights
from squisher_mergekit.tensors.input_files import exists, expanded

# mergekit writes it beside every merged model.
_MERGE_FILE = "mergekit_config.yml"


@dataclass(frozen=True)
class ModelFiles:
    """Files of one model of a merge.

    Attributes:
        label: Name of the model in the configuration.
        weights: Headers and fingerprint of its safetensors; empty for pickled weights.
        names: Names of all tensors in its files.
        repo: Id and revision on the Hub; None for a local model.
        lora: Files of the LoRA of a base with a LoRA; None for a plain model.
        convertible: Function that returns whether transformers builds tensors of this model from others at loading; a
            function because the answer takes transformers half a second.
    """

    label: str
    weights: Weights
    names: frozenset[str]
    repo: tuple[str, str | None] | None = None
    lora: LoraFiles | None = None
    convertible: Callable[[], bool] = lambda: False

    @cached_property
    def start(self) -> str:
        """Fingerprint, or else folder, of the model without its LoRA."""
        weights = self.weights if self.lora is None else self.lora.base
        return weights.fingerprint or str(weights.folder.resolve())


def is_untouched(inputs: Iterable[tuple[ModelFiles, str | None]]) -> bool:
    """Return True for a weight that several models have from one base and that no LoRA changes: no F is needed.

    Args:
        inputs: Each model, and the name of the weight in its files.
    """
    pairs = list(inputs)
    if len(pairs) < 2 or all(model.lora is None for model, _ in pairs):
        return False
    kept = all(name is not None and (model.lora is None or model.lora.keeps(name)) for model, name in pairs)
    # In slices, one output tensor can be made of different layers.
    return kept and len({(model.start, name) for model, name in pairs}) == 1


class OpenFisher:
    """Fisher of one model, open until the merge ends; used after that, it opens its files again.

    Args:
        path: File or folder of the Fisher.
        model: The model's weights.
        base: Weights of the base model, which identify frozen parameters.
        lora: Files of the model's LoRA, of which a Fisher is lifted to the merged weights.

    Attributes:
        warning: Warning about other weights at which the Fisher was made; None if there is none.
        changed: Difference of the adapter from the one at which its Fisher was made; None if there is none.
        fills: Names of the weights whose F is the mean over layers of the same kind.
    """

    def __init__(self, path: Path, model: Weights, base: Weights | None = None, lora: LoraFiles | None = None) -> None:
        self.warning: str | None = None
        self.changed: str | None = None
        self.fills: frozenset[str] = frozenset()
        self._path = path
        self._folders = model.folder, None if base is None else base.folder
        self._weights: tuple[Weights, Weights | None] | None = (model, base)
        self._lora = lora
        self._lora_folders = None if lora is None else (lora.adapter.folder, lora.base.folder)
        self._fisher: Fisher | None = None

    def __getstate__(self) -> dict[str, Any]:
        # File mappings belong to one process; a copy in another one opens the files itself.
        return {**self.__dict__, "_fisher": None, "_weights": None, "_lora": None}

    @property
    def fisher(self) -> Fisher:
        """The Fisher; its names are those of the model's weights."""
        if self._fisher is None:
            self._fisher = self._read()
        return self._fisher

    def close(self) -> None:
        """Release the Fisher, the weights and their file mappings."""
        self._fisher = self._weights = self._lora = None

    def _read(self) -> Fisher:
        if self._lora is None and self._lora_folders is None:
            return self._as_found(*(self._weights or self._folders))
        if self._lora is None and self._lora_folders is not None:
            adapter, base = self._lora_folders
            self._lora = LoraFiles(Weights(adapter, "adapter_model"), Weights(base))
        assert self._lora is not None
        return self._lifted(self._lora)

    def _as_found(self, model: Weights | Path, base: Weights | Path | None) -> Fisher:
        """Open a portable Fisher, or the optimizer state of a model."""
        path = self._path
        found = read_fisher(path) if is_portable(path) else load_fisher(path, model=model, base=base)
        return hub.with_hub_location(found, path)

    def _lifted(self, files: LoraFiles) -> Fisher:
        """Open the Fisher of a base with a LoRA: one of the merged weights, or one of the adapter, which is lifted."""
        fisher = self._as_found(files.adapter, files.base)
        if fisher.config.parameters == "adapter":
            self.changed = files.adapter.difference_from(fisher.config.weights_fingerprint)
            fisher = lift(fisher, files.lora, fingerprint=False)
        if fisher.config.estimator not in OF_LORAS:
            return fisher
        shapes = {name: info.shape for name, info in files.base.infos.items()} or files.lora.names.shapes
        filled = FilledFisher(fisher, {name: shape for name, shape in shapes.items() if files.keeps(name)})
        self.fills = filled.fills
        return filled


class FisherSources:
    """Open Fishers of a merge, each opened once; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._opened: dict[tuple[object, ...], OpenFisher] = {}

    def open(
        self,
        value: str,
        model: ModelFiles,
        base: Weights | None = None,
        cache_dir: str | None = None,
        base_of: str | None = None,
    ) -> OpenFisher:
        """Find, open and check the Fisher of a model.

        Args:
            value: ``auto``, a path or a Hub id.
            model: The model.
            base: Weights of the base model, which identify frozen parameters.
            cache_dir: Folder for files from the Hub.
            base_of: Merge method whose base the model is; None for another model.

        Returns:
            The open Fisher.

        Raises:
            NotFoundError: The model has no Fisher.
            MismatchError: The Fisher has names of other weights, or is of an adapter of another model.
            ValuesError: The Fisher is 0 everywhere.
            RefusedError: The files cannot be read.
        """
        with self._lock:
            key = (value, model.label, None if base is None else base.folder)
            if key not in self._opened:
                opened = OpenFisher(locate(value, model, cache_dir, base_of), model.weights, base, model.lora)
                opened.warning = _check(opened, model)
                self._opened[key] = opened
            return self._opened[key]

    def close(self) -> None:
        """Close every Fisher."""
        with self._lock:
            for opened in self._opened.values():
                opened.close()
            self._opened.clear()


def locate(value: str, model: ModelFiles, cache_dir: str | None = None, base_of: str | None = None) -> Path:
    """Return the file or folder that ``fisher: value`` names for a model.

    In the folder of a run, the checkpoint with the model's own weights is taken.

    Raises:
        NotFoundError: Nothing is found; the message has a cure for a model in this role.
    """
    if value != "auto":
        path = expanded(value)
        return path if exists(path) else hub.download_fisher(value, cache_dir)
    weights, repo = (model.weights, model.repo) if model.lora is None else (model.lora.adapter, model.lora.repo)
    folder = weights.folder
    source = find_source(weights)
    if source is not None:
        return source
    if repo is not None:
        downloaded = hub.find_fisher(*repo, cache_dir)
        if isinstance(downloaded, Path):
            return downloaded
        raise NotFoundError(
            f"no Fisher for {model.label}: of {repo[0]} on the Hub, {downloaded}; {_cure(model, base_of)}"
        )
    raise NotFoundError(
        f"no Fisher for {model.label}: {folder} has neither fisher.safetensors nor optimizer state "
        f"(optimizer.pt of checkpoint-N); {_cure(model, base_of)}"
    )


def _cure(model: ModelFiles, base_of: str | None) -> str:
    """Return how a model without a Fisher can take part in a merge."""
    folder = model.weights.folder if model.lora is None else model.lora.adapter.folder
    of_run = _cure_of_run(folder)
    if model.lora is not None:
        return of_run or (
            "give the checkpoint-N of the LoRA's run, trained with the optimizer state saved, or give the model "
            "fisher: PATH, of the adapter or of the merged weights"
        )
    if base_of == SQUISHER:
        return f"take {model.label} out of models: (as base_model: alone it needs no Fisher), or give it fisher: PATH"
    if base_of is not None:
        return f"list {model.label} under models: with parameters: {{fisher: none}}, or give it fisher: PATH there"
    if (folder / _MERGE_FILE).is_file():
        return (
            "it is a merge, and a merge has no Fisher unless parameters: {write_fisher: true} made it: merge it again "
            "with that, merge all models in one configuration, or estimate one by "
            f"squisher estimate {folder} --data ... -o FISHER, and give fisher: FISHER"
        )
    if of_run:
        return of_run
    if model.repo is not None:
        return "give the model fisher: PATH or fisher: org/name@revision, or publish one there with squisher push"
    return "give the model fisher: PATH, or train with the optimizer state saved"


def _cure_of_run(run: Path) -> str:
    """Return how a model can take part whose weights are those of no checkpoint of its run; "" without checkpoints."""
    steps = [path for path in steps_in(run).values() if find_state(path) is not None] if run.is_dir() else []
    if not steps:
        return ""
    if not saved_weights(steps[0]).infos:  # FSDP in shards
        return (
            f"{steps[0].name} has an optimizer state but no safetensors to compare; if the model is of that step, give "
            f"it fisher: {steps[0]}"
        )
    names = ", ".join(path.name for path in steps[:3])
    return f"its weights are those of none of its checkpoints, {names}; merge one of them instead"


def _check(opened: OpenFisher, model: ModelFiles) -> str | None:
    """Check a Fisher against the weights; return a warning if it was made at other values of them."""
    fisher = opened.fisher
    unknown = [name for name in fisher if name not in model.names]
    if fisher.config.parameters == "adapter" and unknown:
        raise MismatchError(
            f"the Fisher for {model.label} must be of full weights, but {fisher.location} is of a LoRA adapter; write "
            "model: BASE+ADAPTER, where it is lifted to the merged weights, or estimate one of the full model: "
            f"squisher estimate {model.label} --data ... -o DIR"
        )
    if unknown and not model.convertible():
        raise MismatchError(
            f"the names of a Fisher must be those of the weights, but {len(unknown)} of {len(fisher)} in "
            f"{fisher.location} are not in {model.label}, {unknown[0]} among them; give the Fisher of this model"
        )
    if len(fisher) and not has_signal({name: fisher.info(name) for name in fisher}, fisher.__getitem__):
        raise ValuesError(
            f"the Fisher for {model.label} must have positive entries, but {fisher.location} is 0 everywhere; give a "
            "checkpoint saved after the first optimizer step"
        )
    changed = opened.changed or model.weights.difference_from(fisher.config.weights_fingerprint)
    if not changed and fisher.config.parameters == "adapter":
        return (
            f"{model.label} is an adapter alone, so that A and B are merged entry by entry, which needs LoRAs that "
            "began from one draw of A (one seed); merge LoRAs of other draws by mergekit-yaml and model: BASE+ADAPTER"
        )
    if not changed:
        return None
    return f"the Fisher for {model.label}, {fisher.location}, was made at other weights: {changed}"


def find_name(fisher: Fisher, stored: str, aliases: tuple[str, ...]) -> str | None:
    """Return the name under which a Fisher has a tensor of the model; None if it has none.

    Args:
        fisher: The Fisher.
        stored: Name in the model's files.
        aliases: Other names of the same tensor in the architecture. Tied names are no aliases: only the Fisher itself
            can tell that it counts both uses of a tied tensor.
    """
    for name in (stored, *aliases):
        found = fisher.resolve(name)
        if found is not None:
            return found
    return None
