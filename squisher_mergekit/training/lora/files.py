"""State of a recorder in a checkpoint, so that a resumed run continues its averages exactly."""

from __future__ import annotations

import json
from pathlib import Path

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.safetensors import SafetensorsStore, read_header
from squisher_mergekit.tensors.sharded import rank
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room
from squisher_mergekit.training.lora.recorder import LoraRecorder

RECORDER_FOLDER = "lora_recorder"
_FILE, _KEY = "averages.safetensors", "recorder"


def write_state(recorder: LoraRecorder, checkpoint: Path) -> None:
    """Write the state of a recorder into a checkpoint, in the first process."""
    if rank() != 0:
        return
    state = recorder.state_dict()
    averages = state.pop("averages")
    settings = json.dumps(state)
    room = header_room(list(averages), parts=2) + header_room([settings])
    with (
        written_beside(checkpoint / RECORDER_FOLDER, "replace") as folder,
        SafetensorsWriter(folder / _FILE, room, digests=True) as writer,
    ):
        writer.note(_KEY, settings)
        for name, tensor in averages.items():
            writer.add(name, tensor)


def read_state(recorder: LoraRecorder, checkpoint: Path) -> None:
    """Continue a recorder from the state in a checkpoint.

    Raises:
        NotFoundError: The checkpoint has no state of a recorder.
        RefusedError: The state is damaged, or does not fit the recorder.
    """
    file = checkpoint / RECORDER_FOLDER / _FILE
    if not file.is_file():
        raise NotFoundError(
            f"a recorder continues from {RECORDER_FOLDER} in the checkpoint, but {checkpoint} has none; train from the "
            'start with SquisherCallback(lift="record"), or accept averages of the further steps alone'
        )
    header = read_header(file)
    store = SafetensorsStore([file], str(file), {file: header})
    settings = json.loads(header.metadata[_KEY])
    recorder.load_state_dict(settings | {"averages": {name: store.read(name) for name in store.infos}})
