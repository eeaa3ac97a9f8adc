"""OLMo's ``optim.safetensors``: a nested state whose keys are pickles in the header, as AI2 publishes OLMo 2.

Each key of the header is the urlsafe base64 of a pickle of the path and of a flag. Where the flag is set, the tensor
holds the bytes of a pickle. These pickles are read by an unpickler that knows no class at all.
"""

import base64
import io
import pickle
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, UnsafeFileError
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.tensors.safetensors import SafetensorsStore, read_header

FILE = "optim.safetensors"
_ENCODED = re.compile(r"gA[A-Za-z0-9_=-]{8,}")  # a pickle of protocol 2 or later
_LARGEST = 1 << 24  # bytes of a pickle; settings and names are small


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler of tuples, lists, dicts, texts and numbers; a pickle that asks for any class is refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Refuse.

        Raises:
            UnsafeFileError: Always.
        """
        raise UnsafeFileError(
            f"a pickle in OLMo's file must hold plain values, but asks for {module_name}.{global_name}; nothing of it "
            "was run. Take the file from another source"
        )


@dataclass(frozen=True)
class _Entry:
    """Tensor in the file, read when asked for.

    Attributes:
        store: The file.
        key: Key in the header.
    """

    store: SafetensorsStore
    key: str

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return torch.Size(self.store.infos[self.key].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.store.infos[self.key].dtype

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Empty: the tensor is read and not mapped."""
        return ()

    def read(self) -> Tensor:
        """Return the tensor."""
        return self.store.read(self.key)


def is_encoded(names: Collection[str]) -> bool:
    """Return True if names are pickles in base64, as OLMo writes them in its ``model.safetensors`` as well.

    Example:
        >>> is_encoded(["gASVGAAAAAAAAACMB3d0ZS5hYmOUhZSJhpQu"]), is_encoded(["model.norm.weight"])
        (True, False)
    """
    return bool(names) and all(_ENCODED.fullmatch(name) for name in names)


def find(folder: Path) -> Path | None:
    """Return the file in a folder; None if there is none."""
    return folder / FILE if (folder / FILE).is_file() else None


def read(file: Path, verify: bool) -> RawState:
    """Read the header and the settings.

    Raises:
        UnsafeFileError: A pickle asks for a class; nothing of it was run.
        CorruptFileError: A key is no such pickle, or the state is incomplete.
    """
    header = read_header(file)
    store = SafetensorsStore([file], str(file), {file: header}, verify)
    state: dict[Any, dict[str, Any]] = defaultdict(dict)
    settings: Any = None
    for key, info in store.infos.items():
        path, pickled = _path(key, file)
        if pickled and info.nbytes > _LARGEST:
            raise CorruptFileError(
                f"{file} must hold pickles of at most {_LARGEST} bytes, found {info.nbytes}; copy it again"
            )
        value: Any = _plain(store.read(key).numpy().tobytes(), file) if pickled else _Entry(store, key)
        if path[0] == "param_groups" and len(path) == 1:
            settings = value
        elif path[0] == "state" and len(path) == 3:
            small = isinstance(value, _Entry) and value.shape.numel() == 1
            state[path[1]][str(path[2])] = value.read() if small else value
    sound = isinstance(settings, list) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in settings
    )
    if not sound or not isinstance(settings, list):
        raise CorruptFileError(f"{file} must hold the optimizer's param_groups; copy it again")
    return RawState(file, ({"state": dict(state), "param_groups": settings},), layout="olmo")


def _path(key: str, file: Path) -> tuple[tuple[Any, ...], bool]:
    """Return the path of an entry in the nested state, and True if the entry is pickled."""
    try:
        decoded = base64.urlsafe_b64decode(key)
    except ValueError:
        decoded = b""
    content = _plain(decoded, file)
    if not isinstance(content, tuple) or len(content) != 2 or not isinstance(content[0], tuple) or not content[0]:
        raise CorruptFileError(f"{file} must have keys that OLMo wrote, found {key[:60]}; copy it again")
    return content[0], bool(content[1])


def _plain(data: bytes, file: Path) -> Any:
    """Return the content of a pickle of plain values.

    Raises:
        UnsafeFileError: The pickle asks for a class.
        CorruptFileError: The bytes are no pickle.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data)).load()
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{file}: {error}") from None
    except Exception as error:  # damage makes the unpickler fail in any way
        raise CorruptFileError(
            f"{file} must have keys and settings that OLMo wrote, but {error!r:.100}; copy it again"
        ) from None
