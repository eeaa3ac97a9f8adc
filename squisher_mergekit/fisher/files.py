"""Reader of portable Fishers: safetensors, sharded as Hugging Face shards weights, and ``fisher_config.json``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, UnsupportedStateError, ValuesError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.bare import is_bare, is_weights, read_bare
from squisher_mergekit.fisher.config import CONFIG_NAME, FisherConfig
from squisher_mergekit.fisher.encoded import EncodedStore
from squisher_mergekit.fisher.factors.mapping import read_factors, split_store
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import zeros_refusal
from squisher_mergekit.fisher.write import BASENAME
from squisher_mergekit.tensors.dtypes import FLOAT8
from squisher_mergekit.tensors.folder_moves import settled
from squisher_mergekit.tensors.safetensors import (
    SafetensorsHeader,
    SafetensorsStore,
    read_header,
    safetensors_files,
)

_INDEX = ".safetensors.index.json"
LOG = logging.getLogger("squisher_mergekit")


def read_fisher(source: Path, verify: bool = True) -> Fisher:
    """Open a portable Fisher.

    Args:
        source: The folder, the ``fisher.safetensors`` or index file in it, or a plain safetensors file of second
            moments without ``fisher_config.json``.
        verify: Verify the digest of each tensor as it is read.

    Returns:
        The Fisher, which reads a tensor on access.

    Raises:
        NotFoundError: ``fisher.safetensors`` or ``fisher_config.json`` is missing.
        CorruptFileError: A file is truncated or not safetensors, or a part of a compact tensor or a factor is missing.
        MismatchError: The shape of a factor does not fit its matrix.
        ConfigError: A value in the metadata does not fit, or this version does not know an encoding.
        ValuesError: The metadata say that all entries of an accumulator are 0.
    """
    if not source.is_dir() and is_weights(source):
        raise NotFoundError(
            f"a Fisher must be a folder with {BASENAME}.safetensors and {CONFIG_NAME}, but {source} is a file of "
            "weights; name the checkpoint's folder if it has optimizer state, or make a Fisher by squisher extract or, "
            "from data, squisher estimate"
        )
    if source.is_file() and source.suffix == ".json" and source.name not in (CONFIG_NAME, f"{BASENAME}{_INDEX}"):
        raise CorruptFileError(
            f"a Fisher must be a folder with {BASENAME}.safetensors and {CONFIG_NAME}, but {source} is another JSON "
            "file; name the folder of the Fisher, or of the checkpoint"
        )
    folder = settled(source) if source.is_dir() else source.parent
    single = source.is_file() and source.suffix == ".safetensors"
    files = [source] if single else safetensors_files(folder, BASENAME)
    if not files:
        raise NotFoundError(f"no {BASENAME}.safetensors in {folder}; make one with: squisher extract CHECKPOINT -o OUT")
    if not (folder / CONFIG_NAME).is_file() and single and is_bare(source):
        return read_bare(files, str(source), verify)
    if not (folder / CONFIG_NAME).is_file():
        raise NotFoundError(
            f"{CONFIG_NAME} must be in the folder of {files[0].name}, but {folder} has none; copy it as well"
        )
    config = FisherConfig.from_file(folder / CONFIG_NAME)
    codes = set(config.encoding.values()) - {"float32", "float64", "bfloat16"}
    unknown = codes - set(compact.NAMES)
    if unknown:
        raise ConfigError(
            f"{folder} is encoded as {', '.join(sorted(unknown))}, which this version cannot decode; "
            "upgrade squisher-mergekit, or extract it again"
        )
    if config.from_optimizer and config.mean == 0:
        raise ValuesError(zeros_refusal(str(folder)))
    headers = {file: read_header(file) for file in files}
    if verify:
        _check_digests(headers)
    store, factor_store = split_store(SafetensorsStore(files, str(source), headers, verify), config)
    if codes:
        notes = {key: value for header in headers.values() for key, value in header.metadata.items()}
        store = EncodedStore(store, config.encoding, notes)
    for name, info in store.infos.items():
        if info.dtype in FLOAT8:
            raise UnsupportedStateError(
                f"a Fisher must be float32 or bfloat16, but {name} in {source} is "
                f"{str(info.dtype).removeprefix('torch.')}, in which small entries are 0; extract it again"
            )
        if not info.dtype.is_floating_point:
            raise CorruptFileError(
                f"a Fisher must hold floats, but {name} in {source} is {str(info.dtype).removeprefix('torch.')} and "
                "encoded as none of the compact forms; copy fisher_config.json again"
            )
    factors = read_factors(factor_store, config, {name: info.shape for name, info in store.infos.items()})
    return Fisher(store, config, tied_aliases(config), factors)


def _check_digests(headers: Mapping[Path, SafetensorsHeader]) -> None:
    """Log the files without digests, and refuse files with digests of some tensors alone."""
    without = [file for file, header in headers.items() if header.entries and not header.digests]
    for header in headers.values():
        lacking = next((name for name in header.entries if header.digests and name not in header.digests), None)
        if lacking is not None:
            raise CorruptFileError(
                f"{header.file} must have a digest of each tensor, but lacks that of {lacking}; copy the file again "
                "(squisher extract FISHER --no-verify -o OUT accepts it, and notes new digests)"
            )
    if without:
        LOG.warning(
            "%s has no digests, so its tensors are read unverified; squisher extract FISHER -o OUT adds them",
            without[0],
        )


TIED = "tied to "


def tied_aliases(config: FisherConfig) -> dict[str, str]:
    """Return the tied tensors in the coverage: other name -> stored name."""
    reasons = config.coverage.without
    return {name: why.removeprefix(TIED) for name, why in reasons.items() if why.startswith(TIED)}
