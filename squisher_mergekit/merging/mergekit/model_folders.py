"""Models that a merge document names: folders that exist and hold a model, runs, adapters, tokenizers."""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.merging.mergekit.document import meant, parts_of, with_token_sources
from squisher_mergekit.merging.parameters import SQUISHER
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.checkpoint_names import MOST_LAYERS
from squisher_mergekit.models.weights import Weights, check_folder
from squisher_mergekit.models.whole import names_text
from squisher_mergekit.optimizers.checkpoints.run_folder import steps_in
from squisher_mergekit.tensors import hub
from squisher_mergekit.tensors.input_files import exists, expanded, read_mapping

LOG = logging.getLogger("squisher_mergekit")
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "*.bin.index.json")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_LONGEST_ID = 300  # letters of org/name@revision; the Hub allows 96 each for the first two
_Key = tuple[str, str]
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")


def _references(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield place, owner and attribute of each model that a configuration names."""
    if config.base_model is not None:
        yield "base_model", config, "base_model"
    for prefix, part in parts_of(config):
        for i, item in enumerate(part.models or []):
            yield f"{prefix}models[{i}].model", item, "model"
        for i, piece in enumerate(getattr(part, "slices", None) or []):
            if piece.base_model is not None:
                yield f"{prefix}slices[{i}].base_model", piece, "base_model"
            for j, source in enumerate(piece.sources):
                yield f"{prefix}slices[{i}].sources[{j}].model", source, "model"


def resolve_models(
    config: Any, lora_cache: str | None = None, cache_dir: str | None = None, out: Path | None = None
) -> None:
    """Refuse local models that do not exist, and replace runs by their last checkpoint, adapters by base and LoRA.

    A base with a LoRA becomes a reference that adds the LoRA as tensors are read, unless mergekit has a folder for a
    copy of the whole model. Where all models are LoRAs of one base, it is the base of the merge as well.

    Args:
        config: mergekit's ``MergeConfiguration``; changed in place.
        lora_cache: mergekit's folder for models with a LoRA added; None if it has none.
        cache_dir: Folder for files from the Hub; None for the default.
        out: Output folder of the merge.

    Raises:
        NotFoundError: A path does not exist, or holds no model.
        ConfigError: A model is listed twice or in the output folder, or lacks a layer of a slice.
    """
    given: dict[_Key, Any] = {}
    for place, owner, attribute in _references(config):
        _check_range(owner, place)
        reference = getattr(owner, attribute)
        key = _key(reference)
        check_path(reference.model.path, place, "a model's folder or a Hub id")
        if reference.lora is None:
            reference = _with_base(reference, place, cache_dir)
        if reference.lora is not None:
            reference = _with_lora(reference, place, lora_cache)
        path = _model_folder(Path(reference.model.path), place)
        check_folder(path or Path(reference.model.path))
        if path is not None:
            model = reference.model.model_copy(update={"path": str(path)})
            reference = reference.model_copy(update={"model": model})
        setattr(owner, attribute, reference)
        given[key] = reference
        _check_layers(owner, place)
        _check_output(reference, place, out)
    _check_slices(config)
    _check_folders_once(config.models or [])
    _name_alike(config, given)
    if config.merge_method == SQUISHER and config.base_model is None:
        config.base_model = _common_base([item.model for item in config.models or []])
    _check_tokenizers(config)


def _common_base(models: Sequence[Any]) -> Any:
    """Return the reference to the base of which all models are LoRAs; None if there is no such base."""
    from squisher_mergekit.merging.mergekit.references import AdaptedReference

    adapted = [model for model in models if isinstance(model, AdaptedReference)]
    alike = len(adapted) == len(models) and len({model.model for model in adapted}) == 1
    return adapted[0].without_lora() if alike else None


def _with_base(reference: Any, place: str, cache_dir: str | None) -> Any:
    """Return the reference to an adapter's base with the adapter; the same reference for a model.

    Raises:
        NotFoundError: The adapter's config names no base, or one that does not exist.
    """
    local = adapter_in(Path(reference.model.path), place)
    folder = _adapter_on_hub(reference.model, cache_dir) if local is None else local
    if folder is None:
        return reference
    lora = reference.model if local is None else reference.model.model_copy(update={"path": str(local)})
    named = read_mapping(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise NotFoundError(
            f"{place} must be a model, but {lora.path} is a LoRA adapter whose {ADAPTER_CONFIG} names no base; write "
            f"BASE+{lora.path}"
        )
    check_path(named, place, f"the base of the LoRA adapter {lora.path} (or write BASE+{lora.path})")
    path, _, revision = named.partition("@") if not exists(Path(named)) else (named, "", "")
    model = reference.model.model_copy(update={"path": path, "revision": revision or None})
    return reference.model_copy(update={"model": model, "lora": lora})


def _adapter_on_hub(model: Any, cache_dir: str | None) -> Path | None:
    """Return the folder of the config of an adapter on the Hub; None for a model, or where the Hub gives no answer."""
    if exists(Path(model.path)):
        return None
    folder = hub.download(model.path, model.revision, [ADAPTER_CONFIG, "config.json"], cache_dir)
    if isinstance(folder, str) or (folder / "config.json").is_file():
        return None
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def _with_lora(reference: Any, place: str, lora_cache: str | None) -> Any:
    """Return the reference to a base with the checkpoint of a LoRA that is added as tensors are read.

    Raises:
        NotFoundError: The LoRA does not exist, or its folder holds none.
    """
    from squisher_mergekit.merging.mergekit.references import CACHE_CURE, AdaptedReference

    path = Path(reference.lora.path)
    check_path(reference.lora.path, place, "the folder of a LoRA after the +, or a Hub id")
    if lora_cache:
        return reference
    adapter = adapter_in(path, place)
    if adapter is None and exists(path):
        raise NotFoundError(
            f"{place} must have the folder of a LoRA after the +, but {path} has no {ADAPTER_CONFIG}; give the folder "
            f"that peft's save_pretrained wrote, or {CACHE_CURE}"
        )
    lora = reference.lora.model_copy(update={"path": str(adapter or path)})
    return AdaptedReference(model=reference.model, lora=lora, override_architecture=reference.override_architecture)


def adapter_in(folder: Path, place: str) -> Path | None:
    """Return the folder of an adapter: the given one, or the last checkpoint of a run of adapters; None for a model.

    Args:
        folder: The folder.
        place: Place in the configuration, for the warning.
    """
    if not folder.is_dir() or ((folder / "config.json").is_file() and any(_weights_in(folder))):
        return None
    if (folder / ADAPTER_CONFIG).is_file():
        return folder
    steps = [path for path in steps_in(folder).values() if (path / ADAPTER_CONFIG).is_file()]
    if not steps:
        return None
    LOG.warning("%s: %s is the folder of a run; taking its last checkpoint, %s", place, folder, steps[0])
    return steps[0]


def _check_tokenizers(config: Any) -> None:
    """Refuse a tokenizer's source that is misspelt, and local models without the tokenizer that the merge reads."""
    key = "tokenizer.source" if config.tokenizer else "tokenizer_source"
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return
    if not isinstance(source, str):
        path = source.model.path
        hint = "" if exists(Path(path)) else meant(path, ("union", "base"))
        if hint:
            raise ConfigError(f"{key} must be union, base or a model, found {path!r}{hint}")
        check_path(path, key, "union, base, a model's folder or a Hub id")
    for model in (*config.referenced_models(), *(() if isinstance(source, str) else (source,))):
        if lacks_tokenizer(model):
            raise NotFoundError(
                f"{key} needs the tokenizer of every model, but {model.model.path} has none; copy tokenizer.json and "
                f"tokenizer_config.json there, or remove {key.split('.')[0]}:"
            )


def lacks_tokenizer(model: Any) -> bool:
    """Return True for a reference to a local model whose folder has no file of a tokenizer."""
    folder = Path(model.model.path)
    return folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES)


def _check_range(source: Any, place: str) -> None:
    """Refuse layers that no model has, which mergekit would list one by one, and a range without layers.

    Raises:
        ConfigError: The range is empty, begins before the first layer, or ends beyond the limit.
    """
    layers = getattr(source, "layer_range", None)
    if layers is not None and not 0 <= layers[0] < layers[1] <= MOST_LAYERS:
        raise ConfigError(
            f"{place.removesuffix('model')}layer_range must be [first, end] with 0 <= first < end <= {MOST_LAYERS} "
            f"(the layer end is left out), found {list(layers)}"
        )


def _check_layers(source: Any, place: str) -> None:
    """Refuse layers beyond the last one of a local model, for which mergekit asks by name.

    Raises:
        ConfigError: The range ends beyond the last layer.
    """
    end = (getattr(source, "layer_range", None) or (0, 0))[1]
    folder = Path(source.model.model.path) if end else None
    if folder is None or place.startswith("modules.") or not exists(folder / "config.json"):
        return
    settings = Weights(folder).config or {}
    number = next((settings[key] for key in _LAYER_COUNTS if isinstance(settings.get(key), int)), None)
    if number is not None and end > number:
        raise ConfigError(
            f"{place.removesuffix('model')}layer_range must end at {number} at most, as {source.model} has {number} "
            f"layers, found {list(source.layer_range)}"
        )


def _check_slices(config: Any) -> None:
    """Refuse a slice whose sources have different numbers of layers.

    Raises:
        ConfigError: The numbers differ.
    """
    for prefix, part in parts_of(config):
        for i, piece in enumerate(getattr(part, "slices", None) or []):
            ranges = [list(source.layer_range) for source in piece.sources]
            if len({end - first for first, end in ranges}) > 1:
                raise ConfigError(
                    f"{prefix}slices[{i}].sources must have equal numbers of layers, found layer_range "
                    f"{' and '.join(map(str, ranges))}; write ranges of one length"
                )


def _check_folders_once(models: Sequence[Any]) -> None:
    """Refuse a folder that is listed twice, under whatever spelling.

    Raises:
        ConfigError: Two models are one folder.
    """
    places: dict[_Key, int] = {}
    for i, item in enumerate(models):
        key = _key(item.model)
        if places.setdefault(key, i) != i:
            first = places[key]
            raise ConfigError(
                f"models must list each model once, but models[{first}] ({models[first].model}) and models[{i}] "
                f"({item.model}) are one folder; remove one, and give the other their common weight"
            )


def _name_alike(config: Any, given: Mapping[_Key, Any]) -> None:
    """Give each model one name, also where base_model: or tokenizer: spell its folder in another way than models:.

    mergekit compares names: it would take a base with a slash at its end for a further model. ``given``: model in the
    document -> the one that stands for it.
    """
    names: dict[_Key, Any] = {}
    for _, owner, attribute in _references(config):
        reference = getattr(owner, attribute)
        setattr(owner, attribute, names.setdefault(_key(reference), reference))

    def of_merge(place: str, reference: Any) -> Any:
        found = names.get(_key(given.get(_key(reference), reference)))
        if found is None:
            raise ConfigError(f"{place} must be a model of the merge, found {reference}; name one that is listed")
        return found

    config.tokenizer_source = _with_tokenizer(config.tokenizer_source, given)
    if config.tokenizer is not None:
        tokenizer = with_token_sources(config.tokenizer, of_merge)
        config.tokenizer = tokenizer.model_copy(update={"source": _with_tokenizer(tokenizer.source, given)})


def _with_tokenizer(source: Any, given: Mapping[_Key, Any]) -> Any:
    """Return a tokenizer's source; of a run without a tokenizer of its own the checkpoint that stands for it."""
    if source is None or isinstance(source, str) or not lacks_tokenizer(source):
        return source
    return given.get(_key(source), source)


def _key(reference: Any) -> _Key:
    """Return the resolved places of a model and its adapter, equal for all spellings of one folder."""
    return _resolved(reference.model), _resolved(reference.lora)


def _resolved(path: Any) -> str:
    """Return the absolute path of a local model without links, and the name of a model on the Hub."""
    if path is None:
        return ""
    return str(Path(path.path).resolve()) if exists(Path(path.path)) else str(path)


def _check_output(reference: Any, place: str, out: Path | None) -> None:
    """Refuse an output folder that is a model of the merge, whose weights would be replaced.

    Raises:
        ConfigError: The output is the folder of a model, or of its LoRA.
    """
    if out is None or not exists(out):
        return
    for part in (reference.model, reference.lora):
        if part is not None and exists(Path(part.path)) and out.samefile(part.path):
            raise ConfigError(
                f"the output must be another folder than the models, but {out} is {place}, whose weights it would "
                "replace; choose another folder"
            )


def _model_folder(folder: Path, place: str) -> Path | None:
    """Return the checkpoint that stands for the folder of a run; None for a model or a Hub id.

    Raises:
        NotFoundError: The path holds no model.
    """
    if not exists(folder):
        return None
    if (folder / "config.json").is_file():
        _check_model(folder, place)
        return None
    if folder.is_file():
        cure = f"give its folder {folder.parent}, or merge single files by mergekit-pytorch"
        raise NotFoundError(f"{place} must be a model's folder, but {folder} is a file; {cure}")
    steps = [path for path in steps_in(folder).values() if (path / "config.json").is_file()]
    if not steps:
        raise NotFoundError(
            f"{place} must be a model's folder, but {folder} has no config.json, and no checkpoint-N with one; give "
            "the folder that save_pretrained wrote"
        )
    LOG.warning("%s: %s is the folder of a run; taking its last checkpoint, %s", place, folder, steps[0])
    return steps[0]


def _check_model(folder: Path, place: str) -> None:
    """Refuse a folder that mergekit cannot read as a model: without weights, or without the name of the class.

    Raises:
        NotFoundError: The folder has no weights in a form that mergekit reads.
        ConfigError: The config names no class.
    """
    if not any(_weights_in(folder)):
        found = names_text(sorted(path.name for path in folder.iterdir() if path.suffix != ".json")) or "config.json"
        raise NotFoundError(
            f"{place} must have weights as model.safetensors or pytorch_model.bin, but {folder} has {found} alone; "
            "save the model by save_pretrained"
        )
    if not (Weights(folder).config or {}).get("architectures"):
        raise ConfigError(
            f"{place} must name the class of the model, but {folder / 'config.json'} has no architectures; save the "
            "model by save_pretrained, or add it to the file, as in its base"
        )


def _weights_in(folder: Path) -> Iterator[Path]:
    """Yield the files of a model's weights in a folder."""
    for pattern in _WEIGHTS:
        yield from (path for path in folder.glob(pattern) if not path.name.startswith("adapter_model."))


def check_path(path: str, place: str, wanted: str, local: bool = False) -> None:
    """Refuse a local path that does not exist; unless ``local``, ``org/name`` and ``name`` can be on the Hub.

    Raises:
        NotFoundError: The path does not exist.
    """
    on_hub = len(path) <= _LONGEST_ID and path.count("/") < 2 and not path.startswith(("/", ".", "~"))
    if exists(Path(path)) or (on_hub and not local):
        return
    found = expanded(path)
    if exists(found):
        raise NotFoundError(f"{place} must not begin with ~, which mergekit does not expand; write {found}")
    raise NotFoundError(f"{place} must be {wanted}, but {describe_missing(found)}; correct the path")


def describe_missing(path: Path) -> str:
    """Describe a path that does not exist: its first missing part, and the neighbour of the nearest name."""
    absent = path
    while absent.parent not in (absent, Path()) and not exists(absent.parent):
        absent = absent.parent
    text = f"there is no {path}" + (f" (nor {absent})" if absent != path else "")
    if absent.parent.is_dir():
        nearest = difflib.get_close_matches(
            absent.name, sorted(entry.name for entry in absent.parent.iterdir()), n=1, cutoff=0.6
        )
        text += f"; did you mean {absent.parent / nearest[0]}?" if nearest else ""
    return text
