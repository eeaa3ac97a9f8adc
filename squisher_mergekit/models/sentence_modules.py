"""Modules that follow the transformer in a model of sentence-transformers, and their parameters."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.tensors.input_files import is_name, read_json
from squisher_mergekit.tensors.safetensors import read_header, safetensors_files

_FILE = "modules.json"
_NUMBER = re.compile(r"\d+")


def has_modules(folder: Path) -> bool:
    """Return True for the folder of a model of sentence-transformers."""
    return (folder / _FILE).is_file()


def module_parameters(folder: Path) -> list[ParameterInfo]:
    """Return the parameters of the modules after the transformer, in the order of the model; empty without modules.

    The name has the folder of the module: ``2_Dense/linear.weight``. The weights come before the biases.

    Args:
        folder: Folder of the model.

    Raises:
        CorruptFileError: ``modules.json`` or a module's file is damaged.
    """
    file = folder / _FILE
    modules: Any = read_json(file) if file.is_file() else []
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise CorruptFileError(f"{file} must be a list of modules; copy it again")
    return [parameter for module in modules for parameter in _parameters(folder, module.get("path"), file)]


def _parameters(folder: Path, path: Any, file: Path) -> Iterator[ParameterInfo]:
    if not path:  # the transformer, at the root
        return
    if not is_name(path) or Path(path).name != path or not _NUMBER.match(path):
        raise CorruptFileError(f"{file} must name folders beside it, found {path!r:.50}; copy it again")
    infos = {
        name: info for f in safetensors_files(folder / path, "model") for name, info in read_header(f).infos.items()
    }
    for name in sorted(infos, key=lambda name: (name.rpartition(".")[0], name.endswith("bias"))):
        if infos[name].is_floating_point:
            yield ParameterInfo(f"{path}/{name}", infos[name].shape, frozenset({path.partition("_")[2]}))
