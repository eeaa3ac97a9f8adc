"""Reader of portable Fishers: safetensors, sharded as Hugging Face shards weights, and ``fisher_config.json``."""

from __future__ import annotations

from pathlib import Path

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import CONFIG_NAME, FisherConfig
from squisher_mergekit.fisher.encoded import EncodedStore
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import BASENAME
from squisher_mergekit.tensors.folder_moves import settled
from squisher_mergekit.tensors.safetensors import SafetensorsStore, TensorStore, safetensors_files, safetensors_notes


def read_fisher(source: Path) -> Fisher:
    """Open a portable Fisher.

    Args:
        source: The folder, or the ``fisher.safetensors`` or index file in it.

    Returns:
        The Fisher, which reads a tensor on access.

    Raises:
        NotFoundError: ``fisher.safetensors`` or ``fisher_config.json`` is missing.
        CorruptFileError: A file is truncated or not safetensors, or a part of a compact tensor is missing.
        ConfigError: A value in the metadata does not fit, or this version does not know an encoding.
    """
    folder = settled(source) if source.is_dir() else source.parent
    single = source.is_file() and source.suffix == ".safetensors"
    files = [source] if single else safetensors_files(folder, BASENAME)
    if not files:
        raise NotFoundError(f"no {BASENAME}.safetensors in {folder}; make one with: squisher extract CHECKPOINT -o OUT")
    if not (folder / CONFIG_NAME).is_file():
        raise NotFoundError(
            f"{CONFIG_NAME} must be in the folder of {files[0].name}, but {folder} has none; copy it as well"
        )
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
    """Return the tied tensors in the coverage: other name -> stored name."""
    reasons = config.coverage.without
    return {name: why.removeprefix(TIED) for name, why in reasons.items() if why.startswith(TIED)}
