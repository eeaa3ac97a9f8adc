"""Safe unpickling of files that ``torch.save`` wrote: no code in them is ever run."""

import io
import logging
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.stand_ins import STAND_INS, StandIn, container, inert, is_data
from squisher_mergekit.optimizers.checkpoints.zip_checksums import ArchiveRecord, Checksums, check_archive
from squisher_mergekit.tensors.input_files import brief, open_input, substitute

LOG = logging.getLogger("squisher_mergekit")
_SHOWN = 8
_ZIP = b"PK\x03\x04"


def load(path: Path, checksums: Checksums | None = None) -> Any:
    """Load a file of tensors with ``weights_only``, memory-mapped where the file is a zip archive.

    Files in torch's format from before 1.6 are no archives and cannot be mapped; they are read whole. Objects of
    DeepSpeed and torchao are replaced by stand-ins.

    Args:
        path: The file.
        checksums: Collects the checksums of the archive, by which its tensors are verified when they are read.

    Returns:
        The saved object; its tensors are views of the mapped file and must not be written to.

    Raises:
        NotFoundError: The file does not exist.
        UnsafeFileError: The pickle needs more than tensors and plain containers; nothing of it was run.
        CorruptFileError: The file is truncated, damaged, or was not written by ``torch.save``.
    """
    if not path.is_file():
        raise NotFoundError(f"a file written by torch.save must be at {path}, but there is none")
    try:
        with open_input(path) as stream:
            archive = stream.read(4) == _ZIP or zipfile.is_zipfile(stream)
            # Before torch reads anything: a compressed pickle of a megabyte can expand to gigabytes.
            records = check_archive(stream) if archive else {}
        loaded = _with_stand_ins(path, archive)
        if archive and checksums is not None:
            checksums.add(path, records, loaded)
    except pickle.UnpicklingError as error:
        needed = sorted(_unsafe_globals(path, error))
        if needed:
            raise _refusal(path, needed) from None
        raise _corrupt(path, error) from None
    # Damage makes the unpickler fail in any way: wrong opcodes, types, indices, encodings.
    except Exception as error:
        raise _corrupt(path, error) from None
    return loaded


# Distinct classes in a file; more are no state of a training.
_MOST_REPLACED = 200


def _with_stand_ins(path: Path, archive: bool) -> Any:
    """Load a file; classes of other libraries that hold data are replaced by inert stand-ins and named in a warning.

    Raises:
        pickle.UnpicklingError: The file is damaged, or asks for a global that is refused.
    """
    replaced: dict[str, Any] = {}
    while True:
        try:
            with torch.serialization.safe_globals([*STAND_INS, *replaced.values()]):
                loaded = _torch_load(path, mmap=archive)
            break
        except pickle.UnpicklingError as error:
            # torch names the first global that it does not know, so that each try finds at least one.
            new = {name: inert(name) for name in _unsafe_globals(path, error) if name not in replaced}
            if not new and (kind := container(str(error))) is not None:
                new = {kind[0]: kind[1]}
            refused = not new or len(replaced) + len(new) > _MOST_REPLACED or not all(map(is_data, new))
            if refused or any(_projection(name) for name in new):
                raise
            replaced |= new
    if replaced:
        _report(path, tuple(sorted(replaced)))
    return loaded


@lru_cache(maxsize=256)
def _report(path: Path, replaced: tuple[str, ...]) -> None:
    """Warn, once per file, of the objects that were replaced."""
    shown = ", ".join(replaced[:_SHOWN]) + (f" and {len(replaced) - _SHOWN} more" if len(replaced) > _SHOWN else "")
    LOG.warning("%s holds objects that a Fisher does not need, left unread: %s", path, shown)


def _torch_load(source: Any, mmap: bool = False) -> Any:
    """Call ``torch.load`` without its warnings, about pickle protocols and classes of old files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


class _Region(io.RawIOBase):
    """Part of an open file, as a file of its own."""

    def __init__(self, stream: Any, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        self._stream.seek(self._start + self._at)
        count = self._stream.readinto(view) if view else 0
        self._at += count or 0
        return count or 0


def load_part(path: Path, start: int, length: int) -> Any:
    """Load a small object that ``torch.save`` wrote into part of a file.

    Args:
        path: The file.
        start: Offset of the part, in bytes.
        length: Length of the part, in bytes.

    Returns:
        The saved object, in memory.

    Raises:
        UnsafeFileError: The pickle needs more than tensors and plain containers; nothing of it was run.
        CorruptFileError: The file is too short, or the part is damaged or was not written by ``torch.save``.
    """
    with _part(path, start, length) as (stream, _):
        return _torch_load(stream)


def read_part(path: Path, start: int, length: int, into: Tensor, verify: bool) -> None:
    """Read one tensor that ``torch.save`` wrote into part of a file.

    Args:
        path: The file.
        start: Offset of the part, in bytes.
        length: Length of the part, in bytes.
        into: Tensor to fill, of the saved shape and dtype.
        verify: Verify the checksum in the archive.

    Raises:
        UnsafeFileError: The pickle needs more than tensors and plain containers; nothing of it was run.
        CorruptFileError: The part is damaged, or holds something else.
    """
    with _part(path, start, length) as (stream, records):
        with torch.serialization.skip_data():
            described = _torch_load(stream)
        if not isinstance(described, Tensor) or described.shape != into.shape or described.dtype != into.dtype:
            raise CorruptFileError(
                f"{path} must hold a part of shape {list(into.shape)} at byte {start}, as its index says, "
                "but holds something else; copy the checkpoint again"
            )
        found = [record for name, record in records.items() if "/data/" in name]
        nbytes = into.numel() * into.itemsize
        if not nbytes:
            return
        if len(found) != 1 or not described.is_contiguous() or described.storage_offset() or found[0].size != nbytes:
            raise ValueError("a tensor that is not all of its storage")
        target = into if into.is_contiguous() else torch.empty(into.shape, dtype=into.dtype)
        flat = target.reshape(-1).view(torch.uint8).numpy()
        stream.seek(found[0].offset)
        if stream.readinto(flat.data) != nbytes:
            raise ValueError("the file has become shorter")
        if verify:
            found[0].check_bytes(flat, path)
        if target is not into:
            into.copy_(target)


@contextmanager
def _part(path: Path, start: int, length: int) -> Iterator[tuple[Any, dict[str, ArchiveRecord]]]:
    """Open part of a file, and turn every failure with it into an error of this package."""
    location = f"{path} from byte {start} on"
    try:
        if start < 0 or length < 0 or start + length > path.stat().st_size:
            raise ValueError(f"the file has {path.stat().st_size} bytes")
        with open_input(path) as file:
            stream = io.BufferedReader(_Region(file, start, length))
            records = check_archive(stream)
            stream.seek(0)
            yield stream, records
    except CorruptFileError:
        raise
    except pickle.UnpicklingError as error:
        needed = _named_global(error)
        if needed:
            raise _refusal(path, needed) from None
        raise _corrupt(location, error) from None
    except Exception as error:
        raise _corrupt(location, error) from None


_LAYOUT = ("torch.serialization", "_get_layout")


class _IndexObject(StandIn):
    """Inert replacement for an object in an index; entries of containers are not kept."""

    def __setitem__(self, _: Any, __: Any) -> None:
        """Keep nothing."""

    def append(self, _: Any) -> None:
        """Keep nothing."""

    extend = add = append


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler of an index: shapes and dtypes as they are, stand-ins for all classes that hold data, and no more.

    Torch, OLMo-core and Megatron-Core pickle objects of their own classes, the plans of saving among them.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        # New classes for each pickle, as a pickle can write to the classes it is given.
        self._known: dict[tuple[str, str], Any] = {}

    def find_class(self, module_name: str, global_name: str) -> Any:
        value = getattr(torch, global_name, None) if module_name == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        if (module_name, global_name) == ("collections", "OrderedDict"):
            return OrderedDict
        foreign = module_name.partition(".")[0] != "torch" or (module_name, global_name) == _LAYOUT
        known = foreign or module_name.startswith("torch.distributed.")
        if not known or not is_data(f"{module_name}.{global_name}"):
            raise UnsafeFileError(
                f"{self._path} must be the index of a distributed checkpoint, but its pickle asks for "
                f"{module_name}.{global_name}; nothing of it was run. Save the checkpoint again"
            )
        new = type(global_name.rpartition(".")[2], (_IndexObject,), {})
        return self._known.setdefault((module_name, global_name), new)


def load_metadata(path: Path) -> Any:
    """Load ``.metadata``, the index of a distributed checkpoint, which is a plain pickle.

    Args:
        path: The file.

    Returns:
        A stand-in with the attributes of ``torch.distributed.checkpoint.metadata.Metadata``.

    Raises:
        UnsafeFileError: The pickle asks for classes that no such index has; nothing of it was run.
        CorruptFileError: The file is truncated, damaged, or no index.
    """
    try:
        with open_input(path) as raw, io.BufferedReader(raw) as stream:  # type: ignore[type-var]
            return _MetadataUnpickler(stream, path).load()
    except UnsafeFileError:
        raise
    except Exception as error:
        raise _corrupt(path, error) from None


# Libraries whose optimizers pickle an object in their state, and keep no second moment of the parameters.
_PROJECTED = {"galore_torch": "GaLore", "apollo_torch": "APOLLO"}


def _projection(name: str) -> str | None:
    """Return the name of an optimizer of projections whose library a global is of; None for any other global."""
    return _PROJECTED.get(name.partition(".")[0])


def _refusal(path: Path, needed: Sequence[str]) -> UnsafeFileError | UnsupportedStateError:
    for name in needed:
        if _projection(name) is not None:
            return UnsupportedStateError(
                f"a Fisher needs the mean squared gradient of each parameter, but {_projection(name)} "
                f"keeps that of a projection ({path}); train with AdamW, or estimate a Fisher from data"
            )
    refused = [name for name in needed if not is_data(name)] or needed
    return UnsafeFileError(
        f"{path} must hold tensors only, but its pickle asks for {', '.join(refused)}; nothing of it was run. "
        "Save the optimizer's state_dict alone"
    )


def _corrupt(path: Path | str, error: Exception) -> CorruptFileError:
    if isinstance(error, CorruptFileError):
        return error if str(path) in str(error) else CorruptFileError(f"{path}: {error}; copy it again")
    damaged = f"it is truncated, damaged or of another format ({brief(error):.120})", "copy it again"
    reason, cure = substitute(path) or damaged
    return CorruptFileError(f"{path} must be a whole file that torch.save wrote, but {reason}; {cure}")


def _unsafe_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Return the globals that a pickle asks for: all for a zip archive, else the first, which torch's error names."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is no archive, or is damaged as well
        return _named_global(error)


def _named_global(error: pickle.UnpicklingError) -> list[str]:
    """Return the global that torch's error names, if it names one; torch leaves ``builtins`` out of names."""
    found = re.search(r"GLOBAL `?([\w.]+)", str(error))
    return [] if found is None else [found[1] if "." in found[1] else f"builtins.{found[1]}"]
