"""The portable file: tensors in safetensors, sharded as Hugging Face shards weights, and ``fisher_config.json``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

import torch

from squisher_mergekit.errors import ConfigError, NotFoundError, ValuesError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import CONFIG_NAME, Coverage, FisherConfig
from squisher_mergekit.fisher.encoded import EncodedStore, WithoutStart, parts_of, shape_note
from squisher_mergekit.fisher.mapping import Fisher, Moments
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.safetensors import SafetensorsStore, TensorStore, safetensors_files, safetensors_notes
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

BASENAME = "fisher"
SHARD_BYTES = 5_000_000_000


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
