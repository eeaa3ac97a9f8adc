"""Validation of a whole merge document: keys at every level, empty lists, filters, models that exist.

The valid keys are the fields of mergekit's own classes, so that a key of a newer mergekit is known at once. Only
documents for the methods of this package are validated.
"""

import difflib
import importlib.resources
import logging
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.merging.parameters import METHODS, PARAMETERS, Block
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.checkpoint_names import MOST_LAYERS
from squisher_mergekit.models.weights import Weights, check_folder
from squisher_mergekit.models.whole import names_text
from squisher_mergekit.optimizers.checkpoints.run_folder import steps_in
from squisher_mergekit.tensors.input_files import parse_yaml

LOG = logging.getLogger("squisher_mergekit")
# mergekit-multi reads the name of each of its documents, and removes it before it reads the rest.
_FURTHER_KEYS = ("name",)
_PARAMETER_NAMES = tuple(parameter.name for parameter in PARAMETERS)
_OUTPUT_DTYPES = ("float32", "float16", "bfloat16", "float64")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.spm", "*.tiktoken")


def is_ours(document: Any) -> bool:
    """Return True if a document asks for a method of this package, under whatever spelling of ``merge_method``."""
    if not isinstance(document, Mapping):
        return False
    if "merge_method" in document:
        return document["merge_method"] in METHODS
    return any(value in METHODS for value in document.values() if isinstance(value, str))


def check_document(document: Mapping[str, Any], schema: type[BaseModel]) -> None:
    """Refuse keys that mergekit would ignore, empty lists, and values that mergekit refuses late.

    Args:
        document: The parsed YAML.
        schema: mergekit's class for it.

    Raises:
        ConfigError: A key is unknown or in the wrong place, a list is empty, or a value is none of those possible.
    """
    _check_mapping(document, (schema,), "", _FURTHER_KEYS)
    for key in ("dtype", "out_dtype"):
        name = document.get(key)
        if isinstance(name, str) and name.removeprefix("torch.") not in _OUTPUT_DTYPES:
            raise ConfigError(
                f"{key} must be one of {', '.join(_OUTPUT_DTYPES)}, found {name!r}{_meant(name, _OUTPUT_DTYPES)}"
            )
    _check_chat_template(document.get("chat_template"))
    _check_listed_once(document.get("models"))
    for place, layers in _layer_ranges(document):
        whole = isinstance(layers, list | tuple) and len(layers) == 2 and all(type(each) is int for each in layers)
        if whole and not 0 <= layers[0] < layers[1]:
            raise ConfigError(
                f"{place} must be [first, end] with 0 <= first < end (the layer end is left out), found {list(layers)}"
            )


def _layer_ranges(document: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield place and value of each ``layer_range`` of a document."""
    modules = document.get("modules")
    further = modules.items() if isinstance(modules, Mapping) else ()
    parts = {"": document} | {f"modules.{name}.": part for name, part in further}
    for prefix, part in parts.items():
        pieces = part.get("slices") if isinstance(part, Mapping) else None
        for i, piece in enumerate(pieces if isinstance(pieces, list) else ()):
            sources = piece.get("sources") if isinstance(piece, Mapping) else None
            for j, source in enumerate(sources if isinstance(sources, list) else ()):
                if isinstance(source, Mapping):
                    yield f"{prefix}slices[{i}].sources[{j}].layer_range", source.get("layer_range")


def _check_chat_template(template: Any) -> None:
    """Refuse a chat template that mergekit refuses after the merge."""
    if not isinstance(template, str) or template in ("", "auto") or (len(template) >= 20 and "{" in template):
        return
    from mergekit._data import chat_templates

    files = importlib.resources.files(chat_templates).iterdir()
    known = sorted(file.name.removesuffix(".jinja") for file in files if file.name.endswith(".jinja"))
    if template not in known:
        raise ConfigError(
            f"chat_template must be auto, one of {', '.join(known)}, or the text of a template, found "
            f"{template!r:.60}{_meant(template, known)}"
        )


def _check_listed_once(models: Any) -> None:
    """Refuse a model that is listed twice."""
    places: dict[str, int] = {}
    for i, item in enumerate(models if isinstance(models, list) else ()):
        name = item.get("model") if isinstance(item, Mapping) else None
        if isinstance(name, str) and places.setdefault(name, i) != i:
            raise ConfigError(
                f"models must list each model once, but models[{places[name]}] and models[{i}] are both {name}; remove "
                "one, and give the other their common weight"
            )


def _meant(found: str, choices: Sequence[str]) -> str:
    """Return the end of a message: the choice that a misspelt value is close to."""
    nearest = difflib.get_close_matches(found, choices, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def _check_value(value: Any, annotation: Any, place: str) -> None:
    if isinstance(value, BaseModel):
        return
    if isinstance(value, list | tuple):
        if not value:
            raise ConfigError(f"{place} must not be empty, found []; fill the list in, or remove {place}")
        for i, item in enumerate(value):
            for inner in _arguments(annotation, (list, tuple)):
                _check_value(item, inner, f"{place}[{i}]")
    elif isinstance(value, Mapping):
        schemas = tuple(part for part in _options(annotation) if _is_schema(part))
        tables = list(_arguments(annotation, (dict,)))
        if schemas:
            _check_mapping(value, schemas, place)
        elif tables:
            for key, item in value.items():
                _check_value(item, tables[-1], f"{place}.{key}")


def _check_mapping(
    value: Mapping[str, Any], schemas: Sequence[type[BaseModel]], place: str, further: Sequence[str] = ()
) -> None:
    fields = {name: field.annotation for schema in schemas for name, field in schema.model_fields.items()}
    for key, item in value.items():
        where = f"{place}.{key}" if place else str(key)
        if key in fields:
            _check_value(item, fields[key], where)
        elif key not in further:
            raise ConfigError(_unknown_key(str(key), place, list(fields)))


def _unknown_key(key: str, place: str, fields: list[str]) -> str:
    start = f"{place or 'the configuration'} has no key {key!r}, which mergekit would ignore"
    if key in _PARAMETER_NAMES and "parameters" in fields:
        return f"{start}; write parameters: {{{key}: ...}} there"
    return start + (_meant(key, fields) or f"; valid are {', '.join(fields)}")


def _options(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union, or the one type."""
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) in (typing.Union, type(int | str)):
        for part in parts:
            yield from _options(part)
    else:
        yield annotation


def _arguments(annotation: Any, origins: tuple[type, ...]) -> Iterator[Any]:
    """Yield the types of the elements of the collections that an annotation allows."""
    for option in _options(annotation):
        if typing.get_origin(option) in origins:
            yield from (part for part in typing.get_args(option) if part is not Ellipsis)


def _is_schema(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def unreadable(error: Exception) -> ConfigError:
    """Return the one-line error for a document that mergekit cannot read."""
    text = str(error)
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the configuration"
        text = f"{place}: {first['msg']}, found {str(first['input'])[:80]}"
    return ConfigError(f"the configuration must be one that mergekit reads, but {text}; correct it")


def refuse_misspelt_method(method: Any) -> None:
    """Refuse the name of a merge method that is close to one of this package's.

    Raises:
        ConfigError: The name is misspelt.
    """
    name = str(method).lower().replace("-", "_")
    nearest = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.6)
    meant = (
        nearest[0] if nearest else next((METHODS[i] for i, word in enumerate(("fisher", "ubgm")) if word in name), None)
    )
    if meant is not None:
        raise ConfigError(
            f"merge_method must be the name of a merge method, found {method!r}; did you mean {meant}? This "
            f"package has {' and '.join(METHODS)}"
        )


def read_yaml(text: str) -> Any:
    """Parse a YAML document, and refuse a key that stands twice in one mapping, where the last would win.

    Raises:
        ConfigError: The text is no YAML, or has a key twice.
    """
    document = parse_yaml(text, "the configuration must be YAML", _StrictLoader)
    if not isinstance(document, Mapping):
        raise ConfigError(
            f"the configuration must be a mapping with merge_method: and models:, found {type(document).__name__}; see "
            "squisher plan --help"
        )
    return document


class _StrictLoader(yaml.SafeLoader):
    """Safe loader that refuses a key that stands twice in one mapping."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise ConfigError(
                        f"{key.value}: stands twice in one mapping of the configuration, the second time in line "
                        f"{key.start_mark.line + 1}, and only the last would count; join them"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# ---- blocks of parameters


def blocks_of(config: Any) -> Iterator[Block]:
    """Yield the ``parameters:`` blocks of a configuration, of ``mergekit-yaml`` or of ``mergekit-pytorch``."""
    for prefix, part in _parts(config):
        yield from _block(f"{prefix}parameters", None, part.parameters)
        for i, item in enumerate(part.models or []):
            yield from _block(f"{prefix}models[{i}].parameters", item.model, item.parameters)
        for i, piece in enumerate(getattr(part, "slices", None) or []):
            yield from _block(f"{prefix}slices[{i}].parameters", None, piece.parameters)
            for j, source in enumerate(piece.sources):
                yield from _block(f"{prefix}slices[{i}].sources[{j}].parameters", source.model, source.parameters)


def _block(place: str, model: Any, settings: Any) -> Iterator[Block]:
    if settings:
        yield Block(place, None if model is None else str(model), settings)


# ---- models


def _parts(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a configuration that list models: itself and its modules, each with its place."""
    yield "", config
    for name, part in (getattr(config, "modules", None) or {}).items():
        yield f"modules.{name}.", part


def _references(config: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield place, owner and attribute of each model that a configuration names."""
    if config.base_model is not None:
        yield "base_model", config, "base_model"
    for prefix, part in _parts(config):
        for i, item in enumerate(part.models or []):
            yield f"{prefix}models[{i}].model", item, "model"
        for i, piece in enumerate(getattr(part, "slices", None) or []):
            if piece.base_model is not None:
                yield f"{prefix}slices[{i}].base_model", piece, "base_model"
            for j, source in enumerate(piece.sources):
                yield f"{prefix}slices[{i}].sources[{j}].model", source, "model"


def resolve_models(config: Any) -> None:
    """Refuse local models that do not exist, and replace the folder of a run by its last checkpoint.

    Args:
        config: mergekit's ``MergeConfiguration``; changed in place.

    Raises:
        NotFoundError: A path does not exist, or holds no model.
    """
    for place, owner, attribute in _references(config):
        _check_range(owner, place)
        reference = getattr(owner, attribute)
        check_path(reference.model.path, place, "a model's folder or a Hub id")
        if reference.lora is not None:
            check_path(reference.lora.path, place, "the folder of a LoRA after the +, or a Hub id")
        path = _model_folder(Path(reference.model.path), place)
        check_folder(path or Path(reference.model.path))
        if path is not None:
            model = reference.model.model_copy(update={"path": str(path)})
            setattr(owner, attribute, reference.model_copy(update={"model": model}))
    _check_tokenizers(config)


def _check_tokenizers(config: Any) -> None:
    """Refuse a tokenizer's source that is misspelt, and local models without the tokenizer that the merge reads."""
    key = "tokenizer.source" if config.tokenizer else "tokenizer_source"
    source = config.tokenizer.source if config.tokenizer else config.tokenizer_source
    if source is None:
        return
    if not isinstance(source, str):
        path = source.model.path
        meant = "" if Path(path).exists() else _meant(path, ("union", "base"))
        if meant:
            raise ConfigError(f"{key} must be union, base or a model, found {path!r}{meant}")
        check_path(path, key, "union, base, a model's folder or a Hub id")
    for model in config.referenced_models():
        folder = Path(model.model.path)
        if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
            raise NotFoundError(
                f"{key} needs the tokenizer of every model, but {folder} has none; copy tokenizer.json and "
                f"tokenizer_config.json there, or remove {key.split('.')[0]}:"
            )


def _check_range(source: Any, place: str) -> None:
    """Refuse a range of more layers than any model has, which mergekit would list one by one.

    Raises:
        ConfigError: The range ends beyond the limit.
    """
    last = max(getattr(source, "layer_range", None) or (0,))
    if last > MOST_LAYERS:
        raise ConfigError(
            f"the layer_range beside {place} must end at the last layer of the model, at most {MOST_LAYERS}, found "
            f"{last}; correct it"
        )


def _model_folder(folder: Path, place: str) -> Path | None:
    """Return the checkpoint that stands for the folder of a run; None for a model or a Hub id.

    Raises:
        NotFoundError: The path holds no model.
    """
    if not folder.exists():
        return None
    if (folder / "config.json").is_file():
        _check_model(folder, place)
        return None
    if folder.is_file():
        cure = f"give its folder {folder.parent}, or merge single files by mergekit-pytorch"
        raise NotFoundError(f"{place} must be a model's folder, but {folder} is a file; {cure}")
    if (folder / ADAPTER_CONFIG).is_file():
        raise NotFoundError(
            f"{place} must be a model's folder, but {folder} is a LoRA adapter; write BASE+{folder}, or merge the "
            "adapter_model.safetensors files by mergekit-pytorch"
        )
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
    if not any(any(folder.glob(f"*{ending}")) for ending in (".safetensors", ".bin", ".index.json")):
        found = names_text(sorted(path.name for path in folder.iterdir()))
        raise NotFoundError(
            f"{place} must have weights as model.safetensors or pytorch_model.bin, but {folder} has {found} alone; "
            "save the model by save_pretrained"
        )
    if not (Weights(folder).config or {}).get("architectures"):
        raise ConfigError(
            f"{place} must name the class of the model, but {folder / 'config.json'} has no architectures; save the "
            "model by save_pretrained, or add it to the file, as in its base"
        )


def check_path(path: str, place: str, wanted: str, local: bool = False) -> None:
    """Refuse a local path that does not exist; unless ``local``, ``org/name`` and ``name`` can be on the Hub.

    Raises:
        NotFoundError: The path does not exist.
    """
    if Path(path).exists() or not (local or path.startswith(("/", ".", "~")) or path.count("/") > 1):
        return
    expanded = Path(path).expanduser()
    if expanded.exists():
        raise NotFoundError(f"{place} must not begin with ~, which mergekit does not expand; write {expanded}")
    raise NotFoundError(f"{place} must be {wanted}, but {describe_missing(expanded)}; correct the path")


def describe_missing(path: Path) -> str:
    """Describe a path that does not exist: its first missing part, and the neighbour of the nearest name."""
    absent = path
    while absent.parent not in (absent, Path()) and not absent.parent.exists():
        absent = absent.parent
    text = f"there is no {path}" + (f" (nor {absent})" if absent != path else "")
    if absent.parent.is_dir():
        nearest = difflib.get_close_matches(
            absent.name, sorted(entry.name for entry in absent.parent.iterdir()), n=1, cutoff=0.6
        )
        text += f"; did you mean {absent.parent / nearest[0]}?" if nearest else ""
    return text
