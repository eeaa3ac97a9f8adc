"""The portable file: tensors in safetensors, sharded as Hugging Face shards weights, and ``fisher_config.json``."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, ValuesError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import CONFIG_NAME, Coverage, FisherConfig
from squisher_mergekit.fisher.encoded import EncodedStore, WithoutStart, parts_of, shape_note
from squisher_mergekit.fisher.mapping import Fisher, Moments, TensorInfo, TensorStore
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "fisher"
SHARD_BYTES = 5_000_000_000
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class MemoryStore:
    """Tensors that are in memory already."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], location: str = "memory") -> None:
        self._tensors = dict(tensors)
        self.location = location
        self.infos = {name: info_of(tensor) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        return self._tensors[name]


class SafetensorsStore:
    """Tensors in one or several safetensors files, memory-mapped when read."""

    def __init__(self, files: Iterable[Path], location: str) -> None:
        self.location = location
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for file in files:
            for name, info in tensor_infos(file).items():
                self.infos[name] = info
                self._file_of[name] = file

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file."""
        from safetensors import SafetensorError, safe_open

        file = self._file_of[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(str(file), framework="pt", device="cpu")
            tensor: torch.Tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CorruptFileError(
                f"{file} must be a whole safetensors file, but {name} cannot be read ({error!s:.100}); copy it again"
            ) from error
        return tensor


def info_of(tensor: torch.Tensor) -> TensorInfo:
    """Return what a header would say of a tensor."""
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.numel() * tensor.element_size())


def safetensors_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Read the header of a safetensors file: name -> entry, and where the data begin.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    header, start = _whole_header(file)
    header.pop("__metadata__", None)
    return header, start


def safetensors_notes(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file.

    Raises:
        CorruptFileError: The file is truncated or no safetensors file.
    """
    return _whole_header(file)[0].get("__metadata__") or {}


def _whole_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header claims {length} of {size} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        if any(not {"dtype", "shape"} <= entry.keys() for entry in entries):
            raise ValueError("a tensor in its header lacks dtype or shape")
        if not isinstance(header.get("__metadata__") or {}, dict):
            raise ValueError("the metadata in its header are no mapping")
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{file} must be a whole safetensors file, but {error}; copy it again") from error
    return header, 8 + length


def tensor_infos(file: Path) -> dict[str, TensorInfo]:
    """Return name -> shape, dtype and bytes of a safetensors file, from its header alone."""
    header, _ = safetensors_header(file)
    infos = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        infos[name] = TensorInfo(tuple(entry["shape"]), _DTYPES.get(entry["dtype"], torch.float32), end - begin)
    return infos


def safetensors_files(folder: Path, basename: str) -> list[Path]:
    """Return the files of ``basename.safetensors`` or of its shards; empty if there is neither.

    Raises:
        CorruptFileError: The index cannot be read, or names a file that is missing or outside the folder.
    """
    index = folder / f"{basename}.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{index} must be an index with a weight_map, but {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise CorruptFileError(f"{index} names {name}, which is not a file beside it; copy the missing shard")
        return [folder / name for name in names]
    single = folder / f"{basename}.safetensors"
    return [single] if single.is_file() else []


def has_fisher(folder: Path) -> bool:
    """Return whether a folder holds a portable Fisher."""
    return any((folder / f"{BASENAME}.safetensors{end}").is_file() for end in ("", ".index.json"))


def read_fisher(source: Path) -> Fisher:
    """Open a portable Fisher.

    Args:
        source: Its folder, or its ``fisher.safetensors`` or index file.

    Returns:
        The Fisher; tensors are read when asked for.

    Raises:
        NotFoundError: There is none, or its ``fisher_config.json`` is missing.
        CorruptFileError: A file is truncated or no safetensors file, or a part of a compact tensor is missing.
        ConfigError: The metadata do not fit, or an encoding is unknown to this version.
    """
    folder = source if source.is_dir() else source.parent
    single = source.is_file() and source.suffix == ".safetensors"
    files = [source] if single else safetensors_files(folder, BASENAME)
    if not files:
        raise NotFoundError(f"no {BASENAME}.safetensors in {folder}; make one with: squisher extract CHECKPOINT -o OUT")
    if not (folder / CONFIG_NAME).is_file():
        raise NotFoundError(f"{CONFIG_NAME} must lie beside {files[0].name}, but {folder} has none; copy it as well")
    config = FisherConfig.from_file(folder / CONFIG_NAME)
    codes = set(config.encoding.values()) - {"float32", "float64", "bfloat16"}
    unknown = codes - set(compact.NAMES)
    if unknown:
        raise ConfigError(f"{folder} is encoded as {', '.join(sorted(unknown))}, which this version cannot decode")
    store: TensorStore = SafetensorsStore(files, str(source))
    if codes:
        notes = {key: value for file in files for key, value in safetensors_notes(file).items()}
        store = EncodedStore(store, config.encoding, notes)
    return Fisher(store, config, tied_aliases(config))


TIED = "tied to "


def tied_aliases(config: FisherConfig) -> dict[str, str]:
    """Return other name -> kept name of the tied tensors that the coverage lists."""
    reasons = config.coverage.without
    return {name: why.removeprefix(TIED) for name, why in reasons.items() if why.startswith(TIED)}


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype that a Fisher is to be written in.

    Raises:
        ConfigError: It is neither float32 nor bfloat16.

    Example:
        >>> to_dtype("bfloat16")
        torch.bfloat16
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(
            f"dtype must be float32 or bfloat16, found {dtype!r}: a Fisher is written as one of these, float16 loses "
            "its small entries"
        )
    return found


def check_free(out: Path) -> None:
    """Refuse a place for a Fisher where one is already, or a file.

    Raises:
        ConfigError: So it is.
    """
    if out.exists() and (not out.is_dir() or has_fisher(out)):
        raise ConfigError(f"{out} must not hold a Fisher yet; remove it or choose another folder")


def write_fisher(
    fisher: Fisher,
    out: Path,
    dtype: torch.dtype = torch.float32,
    progress: Iterable[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    compress: str | None = None,
) -> FisherConfig:
    """Write a portable Fisher; nothing stays under the final name unless all of it was written.

    Args:
        fisher: What to write.
        out: The folder to make; it may exist, but must hold no Fisher yet.
        dtype: float32 or bfloat16. Never float16, which flushes entries below 6e-8 to zero. With ``compress``, of the
            tensors that stay whole.
        progress: The names of ``fisher``, wrapped in a progress bar.
        shard_bytes: Largest size of one file.
        compress: None, or a compact form (see :mod:`squisher_mergekit.fisher.compact`). ``log8`` and ``log4`` keep
            every F to 4 % and 40 %, zeros exactly; ``rank1`` keeps row and column means of matrices. Tensors that it
            would not make smaller stay whole; ``encoding`` names them. Adagrad's start is taken off first, and
            ``initial_accumulator_value`` is null then: F would drown in its rounding.

    Returns:
        The metadata as written, with mean and norm over all entries; of compact tensors over the decoded ones, so that
        they are those of what a reader gets.

    Raises:
        ConfigError: ``dtype`` is neither float32 nor bfloat16, ``compress`` is unknown, or ``out`` holds a Fisher
            already.
        ValuesError: An entry is NaN, infinite or negative.
    """
    compact.check_name(compress)
    to_dtype(dtype)
    check_free(out)
    if compress and fisher.config.offset("debiased"):
        fisher = _without_start(fisher)
    moments = Moments()
    with written_beside(out) as folder:
        names = progress or list(fisher)
        shards, whole = _write_shards(fisher, folder, dtype, names, shard_bytes, moments, compress)
        if moments.count and not moments.total and fisher.config.from_optimizer:
            raise ValuesError(
                f"an accumulator must hold squared gradients, but all {moments.count} entries of {fisher.location} are "
                "0; take a checkpoint from after training began"
            )
        config = fisher.config.model_copy(
            update={
                "mean": moments.mean,
                "norm": moments.norm,
                "encoding": _encoding(str(dtype).removeprefix("torch."), compress, whole, len(fisher)),
                "coverage": Coverage(**{"with": len(fisher)}, without=fisher.config.coverage.without),
            }
        )
        _name_shards(folder, shards)
        (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
    return config


def _encoding(plain: str, compress: str | None, whole: list[str], count: int) -> dict[str, str]:
    """Return the metadata on encodings, in which tensors that are not compact are named."""
    if compress is None or len(whole) == count:
        return {"default": plain}
    return {"default": compress} | dict.fromkeys(whole, plain)


def _without_start(fisher: Fisher) -> Fisher:
    """Return a Fisher whose sums begin at 0."""
    assert fisher.config.optimizer is not None
    optimizer = fisher.config.optimizer.model_copy(update={"initial_accumulator_value": None})
    return Fisher(WithoutStart(fisher), fisher.config.model_copy(update={"optimizer": optimizer}), fisher.aliases)


def _write_shards(
    fisher: Fisher,
    folder: Path,
    dtype: torch.dtype,
    names: Iterable[str],
    shard_bytes: int,
    moments: Moments,
    compress: str | None,
) -> tuple[list[dict[str, int]], list[str]]:
    """Write the shards one tensor after the other.

    Returns:
        The sizes of the tensors in each shard, and the names of those that are not compact.
    """
    room = header_room(list(fisher), parts=1 if compress is None else 3 if compress in compact.CODES else 2)
    writer = SafetensorsWriter(folder / "0.safetensors", room)
    shards, whole = [writer.sizes], []
    with ExitStack() as stack:
        stack.enter_context(writer)
        for name in names:
            parts = None if compress is None else parts_of(fisher, name, compress, dtype)
            tensors = parts or {"": fisher[name]}
            nbytes = sum(tensor.numel() * (tensor.dtype if parts else dtype).itemsize for tensor in tensors.values())
            if writer.nbytes and writer.nbytes + nbytes > shard_bytes:
                stack.close()
                writer = stack.enter_context(SafetensorsWriter(folder / f"{len(shards)}.safetensors", room))
                shards.append(writer.sizes)
            if parts and compress:
                shape = fisher.info(name).shape
                moments.add(fisher, name, tensor=compact.decode(parts, compress, shape))
                if compress in compact.CODES:
                    writer.note(f"{name}.shape", shape_note(shape))
            else:
                moments.add(fisher, name, tensor=tensors[""])
                whole.append(name)
            for suffix, tensor in tensors.items():
                writer.add(name + suffix, tensor, None if parts else dtype)
    return shards, whole


def _name_shards(folder: Path, shards: list[dict[str, int]]) -> None:
    """Give the shards Hugging Face's names, and write their index if there are several."""
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / f"{BASENAME}.safetensors")
        return
    weight_map = {}
    for number, shard in enumerate(shards):
        name = f"{BASENAME}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)}, "weight_map": weight_map}
    (folder / f"{BASENAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; on success its files move there, synced to disk; else it vanishes.

    The new folder bears the name of ``out`` (inside a temporary one), for those who write it into a text.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    folder = parent / out.name
    try:
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                sync(path)
        if out.is_dir():
            for path in folder.iterdir():
                path.replace(out / path.name)
        else:
            folder.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
