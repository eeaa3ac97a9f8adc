"""Validation of a whole merge document: keys at every level, empty lists, choices, filters.

The valid keys are the fields of mergekit's own classes, so that a key of a newer mergekit is known at once. Only
documents for the methods of this package are validated.
"""

import difflib
import importlib.resources
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.merging.parameters import METHODS, PARAMETERS, Block
from squisher_mergekit.tensors.input_files import parse_yaml

# mergekit-multi reads the name of each of its documents, and removes it before it reads the rest.
_FURTHER_KEYS = ("name",)
_PARAMETER_NAMES = tuple(parameter.name for parameter in PARAMETERS)
_PYDANTIC = "Value error, "
# Classes of mergekit and types of pydantic's errors, as a user writes them.
_FORMS = {
    "InputModelDefinition": "an entry with model: PATH",
    "ModelReference": "a path or a Hub id",
    "OutputSliceDefinition": "an entry with sources:",
    "InputSliceDefinition": "an entry with model: PATH and layer_range: [first, end]",
    "list_type": "a list",
    "tuple_type": "a list of two numbers, [first, end]",
    "string_type": "a text",
}
_OUTPUT_DTYPES = ("float32", "float16", "bfloat16", "float64")


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
                f"{key} must be one of {', '.join(_OUTPUT_DTYPES)}, found {name!r}{meant(name, _OUTPUT_DTYPES)}"
            )
    _check_chat_template(document.get("chat_template"))
    _check_listed_once(document.get("models"))


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
            f"{template!r:.60}{meant(template, known)}"
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


def meant(found: str, choices: Sequence[str]) -> str:
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
    return start + (meant(key, fields) or f"; valid are {', '.join(fields)}")


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
    if not isinstance(error, ValidationError):
        return ConfigError(f"the configuration must be one that mergekit reads, but {error}; correct it")
    first = error.errors()[0]
    loc, found = first["loc"], first["input"]
    if "ConditionalParameter" in loc:
        place = _place(loc[: loc.index("ConditionalParameter")])
        cure = "give a value, or remove the key"
        if isinstance(found, list) and any(isinstance(item, Mapping) for item in found):
            cure = "in a list with filters, write the value of all other tensors as {value: ...}, at the end"
        return ConfigError(
            f"{place} must be a value, a list of numbers (a gradient over the layers) or a list of {{filter: PART OF A "
            f"NAME, value: ...}}, found {found!s:.80}; {cure}"
        )
    form = _FORMS.get(str(first.get("ctx", {}).get("class_name", first["type"])))
    if form is not None:
        return ConfigError(f"{_place(loc)} must be {form}, found {found!s:.80}; correct it")
    place = _place(loc)
    text = f"{place}: {first['msg']}, found {found!s:.80}" if place else f"{first['msg'].removeprefix(_PYDANTIC)}"
    return ConfigError(f"the configuration must be one that mergekit reads, but {text}; correct it")


def _place(loc: Sequence[int | str]) -> str:
    """Return a place in the YAML, such as ``models[0].parameters``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


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
    for prefix, part in parts_of(config):
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


def name_files_alike(config: Any) -> Any:
    """Return a configuration of single files whose base has the name of the same file under models:.

    Raises:
        ConfigError: Two models are one file.
    """
    names: dict[Path, str] = {}
    for i, item in enumerate(config.models):
        first = names.setdefault(Path(item.model).resolve(), item.model)
        if first != item.model:
            raise ConfigError(
                f"models must list each file once, but models[{i}] ({item.model}) is {first} as well; remove one, and "
                "give the other their common weight"
            )
    if config.base_model is None:
        return config
    return config.model_copy(update={"base_model": names.get(Path(config.base_model).resolve(), config.base_model)})


def with_token_sources(tokenizer: Any, find: Callable[[str, Any], Any]) -> Any:
    """Return the part ``tokenizer:`` of a configuration with other references to the models that tokens come from.

    Args:
        tokenizer: mergekit's ``TokenizerConfig``.
        find: Function from a place in the YAML and a reference to the new one.
    """
    from mergekit.tokenizer.config import ModelTokenEmbedding, ZeroEmbedding

    tokens = dict(tokenizer.tokens or {})
    for token, each in tokens.items():
        place, source = f"tokenizer.tokens.{token}.source", each.source
        if isinstance(source, ModelTokenEmbedding):
            source = source.model_copy(update={"model": find(f"{place}.model", source.model)})
        elif source is not None and not isinstance(source, ZeroEmbedding):
            source = find(place, source)
        tokens[token] = each.model_copy(update={"source": source})
    return tokenizer.model_copy(update={"tokens": tokens}) if tokens else tokenizer


def parts_of(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a configuration that list models: itself and its modules, each with its place."""
    yield "", config
    for name, part in (getattr(config, "modules", None) or {}).items():
        yield f"modules.{name}.", part
