"""Writer of portable Fishers: safetensors, sharded as Hugging Face shards weights, and ``fisher_config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from squisher_mergekit.errors import ConfigError, ValuesError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import CONFIG_NAME, Coverage, FisherConfig, in_range
from squisher_mergekit.fisher.encoded import parts_of, shape_note
from squisher_mergekit.fisher.factors.encode import FactorWriter
from squisher_mergekit.fisher.values import DiagonalFisher, Moments, zeros_refusal
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.folder_moves import Existing, recover, settled
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "fisher"
SHARD_BYTES = 5_000_000_000


def has_fisher(folder: Path) -> bool:
    """Return True if a folder contains a portable Fisher."""
    place = settled(folder)
    return any((place / f"{BASENAME}.safetensors{end}").is_file() for end in ("", ".index.json"))


def fisher_files(folder: Path) -> list[Path]:
    """Return the files of a portable Fisher in a folder."""
    place = settled(folder)
    shards = sorted(place.glob(f"{BASENAME}-*-of-*.safetensors"))
    names = (CONFIG_NAME, f"{BASENAME}.safetensors", f"{BASENAME}.safetensors.index.json")
    return [file for file in (*shards, *(place / name for name in names)) if file.is_file()]


def to_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype for files of a Fisher.

    Raises:
        ConfigError: The dtype is neither float32 nor bfloat16.

    Example:
        >>> to_dtype("bfloat16")
        torch.bfloat16
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = known.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise ConfigError(
            f"dtype must be float32 or bfloat16 in the files of a Fisher, found {dtype!r}; float16 would lose small "
            "entries"
        )
    return found


def check_free(out: Path) -> None:
    """Raise if ``out`` cannot become the folder of a new Fisher.

    Raises:
        ConfigError: ``out`` is a file or already holds a Fisher.
    """
    recover(out)
    if out.exists() and (not out.is_dir() or has_fisher(out)):
        raise ConfigError(f"{out} must not hold a Fisher yet; remove it or choose another folder")


def write_fisher(
    fisher: DiagonalFisher,
    out: Path,
    dtype: torch.dtype = torch.float32,
    progress: Iterable[str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    compress: str | None = None,
    existing: Existing = "keep",
) -> FisherConfig:
    """Write a portable Fisher, whole or not at all.

    Args:
        fisher: The Fisher.
        out: The folder to make. An existing folder must not hold a Fisher, unless ``existing`` is ``replace``.
        dtype: float32 or bfloat16. float16 is refused: it flushes entries below 6e-8 to zero. With ``compress``, the
            dtype of the tensors that stay whole.
        progress: The names of ``fisher``, wrapped in a progress bar.
        shard_bytes: Largest size of one file.
        compress: None, or a compact form (see :mod:`squisher_mergekit.fisher.compact`). ``log8`` and ``log4`` keep
            every entry to 4 % and 40 %, and zeros exactly; ``rank1`` keeps the row and column means of matrices.
            Tensors that would not get smaller stay whole; ``encoding`` names them. Adagrad's initial value is
            subtracted first, because the error relative to it could exceed F; ``initial_accumulator_value`` is then
            null. Factors are bfloat16 with ``log8``, and of low rank with ``log4`` and ``rank1``.
        existing: ``keep`` or ``replace`` (see :func:`~squisher_mergekit.tensors.atomic.written_beside`).

    Returns:
        The metadata in the file. Mean and norm are those of the entries that a reader decodes.

    Raises:
        ConfigError: ``dtype`` is neither float32 nor bfloat16, ``compress`` is unknown, or ``out`` already holds a
            Fisher.
        ValuesError: An entry is NaN, infinite or negative.
    """
    compact.check_name(compress)
    to_dtype(dtype)
    if existing != "replace":
        check_free(out)
    if compress and fisher.config.offset("debiased"):
        fisher = fisher.without_initial_value()
    moments = Moments()
    with written_beside(out, existing, fisher_files) as folder:
        names = progress or list(fisher)
        factors = FactorWriter(fisher.factors, dtype, compress)
        shards, codes = _write_shards(fisher, folder, dtype, names, shard_bytes, moments, compress, factors)
        if moments.count and not moments.total and fisher.config.from_optimizer:
            raise ValuesError(zeros_refusal(fisher.location))
        config = fisher.config.model_copy(
            update={
                "mean": in_range(moments.mean),
                "norm": in_range(moments.norm),
                "encoding": _encoding(str(dtype).removeprefix("torch."), compress, codes),
                "coverage": Coverage(**{"with": len(fisher)}, without=fisher.config.coverage.without),
                "factors": factors.info,
            }
        )
        name_shards(folder, [folder / f"{number}.safetensors" for number in range(len(shards))], shards)
        (folder / CONFIG_NAME).write_text(config.to_json(), encoding="utf-8")
    return config


def _encoding(plain: str, compress: str | None, codes: Mapping[str, str | None]) -> dict[str, str]:
    """Return the encoding of each tensor for the metadata."""
    used = {code for code in codes.values() if code is not None}
    default = compress if compress in used else next(iter(used), plain)
    encodings = {name: code or plain for name, code in codes.items()}
    return {"default": default} | {name: code for name, code in encodings.items() if code != default}


def _write_shards(
    fisher: DiagonalFisher,
    folder: Path,
    dtype: torch.dtype,
    names: Iterable[str],
    shard_bytes: int,
    moments: Moments,
    compress: str | None,
    factors: FactorWriter,
) -> tuple[list[dict[str, int]], dict[str, str | None]]:
    """Write the shards, one tensor at a time, and the factors after the diagonal.

    Returns:
        The sizes of the tensors in each shard, and name -> compact form; None for a tensor that stays whole.
    """
    # Twice the parts: each has a digest as well.
    kept = any(fisher.kept_parts(name) for name in fisher)
    parts_each = 5 if compress in compact.CODES else 4 if compress or kept else 2
    room = header_room(list(fisher), parts=parts_each)
    room += header_room(factors.names, parts=2)
    writer = SafetensorsWriter(folder / "0.safetensors", room, digests=True)
    shards: list[dict[str, int]] = [writer.sizes]
    codes: dict[str, str | None] = {}
    with ExitStack() as stack:
        stack.enter_context(writer)

        def writer_for(nbytes: int) -> SafetensorsWriter:
            """Return the writer of the present shard, or of a new one where the present shard is full."""
            nonlocal writer
            if writer.nbytes and writer.nbytes + nbytes > shard_bytes:
                stack.close()
                file = folder / f"{len(shards)}.safetensors"
                writer = stack.enter_context(SafetensorsWriter(file, room, digests=True))
                shards.append(writer.sizes)
            return writer

        for name in names:
            parts = fisher.kept_parts(name)
            code = compress if parts is None else "rank1"
            if parts is None and code is not None:
                parts = parts_of(fisher, name, code, dtype)
            codes[name] = code if parts else None
            tensors = parts or {"": fisher[name]}
            nbytes = sum(tensor.numel() * (tensor.dtype if parts else dtype).itemsize for tensor in tensors.values())
            shard = writer_for(nbytes)
            if parts and code:
                shape = fisher.info(name).shape
                moments.add(fisher, name, tensor=compact.decode(parts, code, shape))
                if code in compact.CODES:
                    shard.note(f"{name}.shape", shape_note(shape))
            else:
                moments.add(fisher, name, tensor=tensors[""].to(dtype))
            for suffix, tensor in tensors.items():
                shard.add(name + suffix, tensor, None if parts else dtype)
        for stored, tensor in factors.tensors():
            writer_for(tensor.numel() * tensor.itemsize).add(stored, tensor)
    return shards, codes


def name_shards(folder: Path, paths: list[Path], shards: list[dict[str, int]]) -> None:
    """Give the shards of a Fisher Hugging Face's names, and write the index of several shards.

    Args:
        folder: Folder of the Fisher.
        paths: The shards.
        shards: For each of them, name of a tensor -> its size in bytes.
    """
    if len(shards) == 1:
        paths[0].rename(folder / f"{BASENAME}.safetensors")
        return
    weight_map = {}
    for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        name = f"{BASENAME}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)}, "weight_map": weight_map}
    (folder / f"{BASENAME}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
