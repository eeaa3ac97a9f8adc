"""Writer of a portable Fisher whose tensors come one after the other, as a merge makes them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch

from squisher_mergekit.fisher.config import CONFIG_NAME, Coverage, FisherConfig, in_range
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import Moments
from squisher_mergekit.fisher.write import SHARD_BYTES, name_shards
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room


class FisherStream:
    """Portable Fisher under construction in a folder; safe to use from several threads.

    Args:
        folder: An existing folder, which gets the files.
        names: Names of the tensors that can come.
        shard_bytes: Largest size of one file.

    Example:
        >>> import tempfile
        >>> from squisher_mergekit import load_fisher
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with FisherStream(Path(folder), ["w"]) as stream:
        ...         stream.add("w", torch.tensor([1.0, 4.0]))
        ...         _ = stream.finish(FisherConfig(estimator="merged", statistic="mean"))
        ...     load_fisher(folder)["w"]
        tensor([1., 4.])
    """

    def __init__(self, folder: Path, names: Sequence[str], shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._shard_bytes = folder, shard_bytes
        self._room = header_room(list(names), parts=2)  # each tensor has a digest as well
        self._lock, self._stack, self._moments = threading.Lock(), ExitStack(), Moments()
        self._writers: list[SafetensorsWriter] = []
        self._left = dict.fromkeys(names)

    def __enter__(self) -> FisherStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor in float32.

        Raises:
            ValuesError: An entry is NaN, infinite or negative.
        """
        with self._lock:
            fisher = Fisher({name: tensor}, FisherConfig(statistic="mean"))
            self._moments.add(fisher, name, tensor=tensor)
            self._writer_for(4 * tensor.numel()).add(name, tensor, torch.float32)
            self._left.pop(name, None)

    def _writer_for(self, nbytes: int) -> SafetensorsWriter:
        """Return the writer of the present file, or of a new one where the present one is full."""
        if not self._writers or (self._writers[-1].nbytes and self._writers[-1].nbytes + nbytes > self._shard_bytes):
            self._stack.close()
            file = self._folder / f"fisher-part-{len(self._writers)}.safetensors"
            self._writers.append(self._stack.enter_context(SafetensorsWriter(file, self._room, digests=True)))
        return self._writers[-1]

    def finish(self, config: FisherConfig, without: str = "not merged by its Fisher") -> FisherConfig:
        """Close the files, give them their names, and write ``fisher_config.json``.

        Args:
            config: The metadata; mean, norm, encoding and coverage are those of the tensors that came.
            without: Reason in the coverage for names that did not come.

        Returns:
            The metadata in the file.
        """
        self._writer_for(0)
        self._stack.close()
        shards = [writer.sizes for writer in self._writers]
        paths = [self._folder / f"fisher-part-{number}.safetensors" for number in range(len(shards))]
        name_shards(self._folder, paths, shards)
        lacking = {**dict.fromkeys(self._left, without), **config.coverage.without}
        written = config.model_copy(
            update={
                "mean": in_range(self._moments.mean),
                "norm": in_range(self._moments.norm),
                "encoding": {"default": "float32"},
                "coverage": Coverage(**{"with": sum(map(len, shards))}, without=lacking),
            }
        )
        (self._folder / CONFIG_NAME).write_text(written.to_json(), encoding="utf-8")
        return written
