"""Checkpoint of a running estimate, so that it can resume."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, CorruptFileError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.tensors.atomic import written_file
from squisher_mergekit.tensors.folder_moves import is_fixed
from squisher_mergekit.tensors.safetensors import SafetensorsStore, safetensors_notes
from squisher_mergekit.tensors.sharded import GatheredOnRead, OnRankZero, is_sharded, rank
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

_NOTE = "estimate"
# Values of the fields that checkpoints of earlier versions lack.
_ADDED_FIELDS = {"factors": None, "block": 128, "model_dtype": "fp32"}


@dataclass(frozen=True)
class EstimateCheckpoint:
    """Checkpoint of a running estimate, next to its output folder.

    Attributes:
        file: ``OUT.partial.safetensors``: the accumulators by names in memory, and the progress in its metadata.
        request: Everything the result depends on; only an equal request resumes.

    Example:
        >>> EstimateCheckpoint.beside(Path("fishers/math"), {}).file.as_posix()
        'fishers/math.partial.safetensors'
    """

    file: Path
    request: Mapping[str, Any]

    @classmethod
    def beside(cls, out: Path, request: Mapping[str, Any]) -> EstimateCheckpoint:
        """Return the checkpoint of an output folder; it is in the folder if that is a mount point."""
        place = out if is_fixed(out) else out.parent
        return cls(place / f"{out.name}.partial.safetensors", json.loads(json.dumps(request)))

    def num_batches(self) -> int:
        """Return the number of batches in the checkpoint; 0 without a checkpoint.

        Raises:
            ConfigError: The file is the checkpoint of another request.
            CorruptFileError: The file is damaged, or no checkpoint.
        """
        if not self.file.exists():
            return 0
        note = self._note()
        saved = _ADDED_FIELDS | note["request"]
        for key, value in self.request.items():
            if saved.get(key) != value:
                raise ConfigError(
                    f"{self.file} holds an estimate with {key} {saved.get(key)}, not {value}; repeat that "
                    "call to finish it, or remove the file to start again"
                )
        return int(note["batches"])

    def restore(self, accumulator: FisherAccumulator) -> None:
        """Load the accumulators; all processes must call this."""
        note = self._note()
        accumulator.restore(SafetensorsStore([self.file], str(self.file)).read, int(note["examples"]))
        if rank():  # rank 0 has all the sums
            accumulator.reset()

    def save(self, accumulator: FisherAccumulator, batches: int) -> None:
        """Write the checkpoint on rank 0; all processes must call this, after :meth:`FisherAccumulator.reduce`."""
        on_rank_zero, examples = OnRankZero(), accumulator.examples
        note = json.dumps({"request": dict(self.request), "batches": batches, "examples": examples})
        named = {name: on_rank_zero.add(t) if is_sharded(t) else t for name, t in accumulator.named_sums().items()}

        def work() -> None:
            room = header_room([*named, note])
            with written_file(self.file) as new, SafetensorsWriter(new, room) as writer:
                writer.note(_NOTE, note)
                for name, total in named.items():
                    writer.add(name, total.read() if isinstance(total, GatheredOnRead) else total)

        on_rank_zero.run(work)

    def remove(self) -> None:
        """Remove the file, on rank 0."""
        if rank() == 0:
            self.file.unlink(missing_ok=True)

    def _note(self) -> dict[str, Any]:
        """Return the progress from the file's metadata."""
        try:
            note: dict[str, Any] = json.loads(safetensors_notes(self.file)[_NOTE])
            return {key: note[key] for key in ("request", "batches", "examples")}
        except (CorruptFileError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise CorruptFileError(
                f"{self.file} must be the checkpoint of an estimate, but is damaged, of an earlier version or another "
                "file; remove it to start again"
            ) from error
