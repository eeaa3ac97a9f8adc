"""Second moments in plain safetensors, without ``fisher_config.json``, as they are published beside some models.

The names are those of the weights, perhaps with the suffix ``.exp_avg_sq`` (then tensors with other suffixes, such as
``.exp_avg`` and ``.step``, may be in the same files). The entries are taken as stored.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsupportedStateError
from squisher_mergekit.fisher.config import (
    AS_STORED,
    MOST_COUNT,
    Coverage,
    FisherConfig,
    OptimizerInfo,
    SourceInfo,
    per_parameter,
)
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.fisher.write import BASENAME
from squisher_mergekit.tensors.dtypes import FLOAT8
from squisher_mergekit.tensors.read_ahead import FileRange
from squisher_mergekit.tensors.safetensors import (
    SafetensorsStore,
    TensorInfo,
    TensorStore,
    file_ranges,
    read_header,
    safetensors_files,
)

LOG = logging.getLogger("squisher_mergekit")
SUFFIX = ".exp_avg_sq"
_STEP = ".step"
_USUAL = "exp_avg_sq"
_README = re.compile(r"README.*|LICENSE.*", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
# Basenames of files of weights, and of files of this package and of OLMo, whose metadata must not be missing.
_OTHERS = re.compile(
    rf"{BASENAME}|model|adapter_model|pytorch_model|pytorch_lora_weights|diffusion_pytorch_model|consolidated.*|optim"
)


def is_bare(file: Path) -> bool:
    """Return True for a safetensors file whose name is neither that of weights nor that of a portable Fisher.

    Example:
        >>> is_bare(Path("export/exp_avg_sq.safetensors")), is_bare(Path("model-00001-of-00002.safetensors"))
        (True, False)
    """
    return file.suffix == ".safetensors" and not _OTHERS.fullmatch(_basename(file))


def is_weights(file: Path) -> bool:
    """Return True for a file, a shard or an index with a name of weights.

    Example:
        >>> is_weights(Path("runs/math/model.safetensors")), is_weights(Path("fishers/math/fisher.safetensors"))
        (True, False)
    """
    named = file.name.endswith((".safetensors", ".safetensors.index.json"))
    return named and bool(_OTHERS.fullmatch(_basename(file))) and _basename(file) not in (BASENAME, "optim")


def find_bare(folder: Path, usual: bool = False) -> list[Path]:
    """Return the files of second moments in a folder, ``exp_avg_sq.safetensors`` or its shards; empty if it has none.

    A file of any other name, or its shards, is accepted where the folder holds nothing else, but perhaps a README.

    Args:
        folder: The folder.
        usual: Accept no other name than the usual one.

    Raises:
        NotFoundError: The folder has several such files.
        CorruptFileError: The index cannot be read, or names a missing file.
    """
    if not folder.is_dir():
        return []
    names = sorted({_basename(file) for file in folder.glob("*.safetensors*") if is_bare(_without_index(file))})
    named = [name for name in names if _USUAL in name]
    others = [path for path in folder.iterdir() if path.name[:1] != "." and not _README.fullmatch(path.name)]
    alone = all(is_bare(_without_index(path)) for path in others)
    chosen = named or (names if alone and not usual else [])
    if len(chosen) > 1:
        raise NotFoundError(
            f"{folder} must hold the second moments of one model, found {', '.join(chosen)}; give the file to read"
        )
    return safetensors_files(folder, chosen[0]) if chosen else []


def read_bare(files: Sequence[Path], source: str, verify: bool = True) -> Fisher:
    """Open second moments that have no metadata; a warning says that they are taken as stored.

    Args:
        files: The safetensors files.
        source: File or folder, for messages.
        verify: Verify the digest of each tensor as it is read, where the files have digests.

    Returns:
        The Fisher, which reads a tensor on access.

    Raises:
        CorruptFileError: A file is truncated or not safetensors.
        UnsupportedStateError: A tensor is no float.
        ValuesError: The entries of the smallest tensor are no second moments: some are negative, NaN or infinite.
    """
    headers = {file: read_header(file) for file in files}
    store = _Unsuffixed(SafetensorsStore(files, source, headers, verify))
    if not store.infos:
        raise CorruptFileError(f"{source} must hold second moments, but has no tensors; copy it again")
    for name, info in store.infos.items():
        if not info.dtype.is_floating_point or info.dtype in FLOAT8:
            raise UnsupportedStateError(
                f"second moments must be floats of 16 bits or more, but {name} in {source} is "
                f"{str(info.dtype).removeprefix('torch.')}; export them again"
            )
    smallest = min(store.infos, key=lambda name: store.infos[name].nbytes)
    check_values(store.read(smallest), smallest, f"{source} (weights in the place of second moments?)")
    steps = store.steps()
    config = FisherConfig(
        estimator="squisher",
        statistic="ema",
        parameters="adapter" if any(".lora_" in name for name in store.infos) else "model",
        optimizer=OptimizerInfo(),
        steps=per_parameter(steps) if len(steps) == len(store.infos) else None,
        bias_corrected=False,
        encoding=_encoding(store.infos),
        source=SourceInfo(layout=AS_STORED, files=tuple(file.name for file in files)),
        coverage=Coverage.model_validate({"with": len(store.infos)}),
    )
    LOG.warning(
        "%s records neither its optimizer%s, so its second moments are taken as stored (scaling: raw); extract it with "
        "--steps and --beta2 to debias them",
        source,
        "" if config.steps else " nor its steps",
    )
    return Fisher(store, config)


@dataclass(frozen=True)
class _Unsuffixed:
    """Store of second moments under the names of the weights.

    Attributes:
        stored: Store with the names in the files.
    """

    stored: TensorStore

    @cached_property
    def _keys(self) -> dict[str, str]:
        suffixed = {key.removesuffix(SUFFIX): key for key in self.stored.infos if key.endswith(SUFFIX)}
        return suffixed or {key: key for key in self.stored.infos}

    @property
    def location(self) -> str:
        """File or folder, for messages."""
        return self.stored.location

    def file_ranges(self, name: str) -> list[FileRange]:
        """Return the parts of files with the bytes of a second moment."""
        return file_ranges(self.stored, self._keys[name])

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name of a weight -> header of its second moment."""
        return {name: self.stored.infos[key] for name, key in self._keys.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return the second moment of a weight."""
        return self.stored.read(self._keys[name])

    def steps(self) -> dict[str, int]:
        """Return name -> number of steps, where the files have them."""
        keys = {name: f"{name}{_STEP}" for name in self.infos}
        present = {name: key for name, key in keys.items() if key in self.stored.infos}
        numbers = {name: self.stored.read(key).reshape(-1) for name, key in present.items()}
        found = {name: number.item() for name, number in numbers.items() if number.numel() == 1}
        wrong = next((name for name, number in found.items() if not 0 <= number <= MOST_COUNT), None)
        if wrong is not None:
            raise CorruptFileError(
                f"{keys[wrong]} in {self.location} must be a number of steps, found {found[wrong]}; export it again"
            )
        return {name: int(number) for name, number in found.items()}


def _basename(file: Path) -> str:
    return _SHARD.sub("", _without_index(file).name.removesuffix(".safetensors"))


def _without_index(file: Path) -> Path:
    return file.with_name(file.name.removesuffix(".index.json"))


def _encoding(infos: Mapping[str, TensorInfo]) -> dict[str, str]:
    found = per_parameter({name: str(info.dtype).removeprefix("torch.") for name, info in infos.items()})
    return dict(found) if isinstance(found, dict) else {"default": str(found)}
