"""Safe unpickling of files that ``torch.save`` wrote: no code in them is ever run."""

import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.zip_checksums import ArchiveRecord, Checksums, check_archive
from squisher_mergekit.tensors.input_files import brief, open_input

_ZIP = b"PK\x03\x04"


class StandIn:
    """Inert replacement for a class of a library that is not needed: it keeps the saved data, and does nothing.

    Attributes:
        given: Constructor arguments of the object.
        state: Saved state of the object, where it is no mapping of attributes.
    """

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None:  # attributes in slots
            state = state[1]
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class QuantizedStandIn(Tensor):
    """Inert replacement for torchao's quantized tensors, with their parts as attributes.

    Attributes:
        codes: The codes.
        scale: The scales of the blocks.
        qmap: The levels; missing where the codes are float8.
        _shape: Shape of the tensor, where two codes are packed into a byte.
    """

    @classmethod
    def __torch_dispatch__(cls, *_: Any) -> Any:
        """Refuse to compute: the entries are in the parts."""
        return NotImplemented


class ShardedStandIn(QuantizedStandIn):
    """Inert replacement for FSDP1's sharded tensor.

    Attributes:
        state: The shards of this rank, and the metadata of all shards.
    """

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _ProcessGroupState(StandIn):
    pass


def _state_of_processes(*_: Any) -> type[StandIn]:
    """Replace ``getattr``, which FSDP1's pickles use to name one class and nothing else."""
    return _ProcessGroupState


_QUANTIZED = ("subclass_8bit.OptimState8bit", "subclass_4bit.OptimState4bit", "subclass_fp8.OptimStateFp8")
# Objects in the states of ScalableShampoo, in older and newer versions of pytorch_optimizer.
_OF_SCALABLE_SHAMPOO = {
    "shampoo_utils": ("PreConditioner", "BlockPartitioner", "PreConditionerType", "Graft", "SGDGraft", "SQRTNGraft",
                      "AdaGradGraft", "RMSPropGraft"),
    "utils.preconditioner": ("PreConditioner",),
    "utils.partition": ("BlockPartitioner", "PreConditionerType"),
    "utils.graft": ("Graft", "SGDGraft", "SQRTNGraft", "AdaGradGraft", "RMSPropGraft"),
}  # fmt: skip
_STAND_INS: list[Any] = (
    [
        (type(name.rpartition(".")[2], (StandIn,), {}), name)
        for name in (
            "argparse.Namespace",  # settings in the files of timm and others
            "deepspeed.runtime.fp16.loss_scaler.LossScaler",
            "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
            "deepspeed.runtime.zero.config.ZeroStageEnum",
            "deepspeed.utils.tensor_fragment.fragment_address",
            "torch.distributed._shard.metadata.ShardMetadata",
            "torch.distributed.remote_device._remote_device",
            "torch.distributed._shard.sharded_tensor.metadata.TensorProperties",
            "torch.distributed._shard.sharding_spec.chunk_sharding_spec.ChunkShardingSpec",
            "torch.distributed._shard.sharded_tensor.metadata.ShardedTensorMetadata",
            "torch.distributed._shard.sharded_tensor.shard.Shard",
            "torch.distributed._shard.sharded_tensor.metadata.MEM_FORMAT_ENCODING",
        )
    ]
    + [
        (ShardedStandIn, "torch.distributed._shard.sharded_tensor.api.ShardedTensor"),
        (_state_of_processes, "builtins.getattr"),
        (_ProcessGroupState, "torch.distributed._shard.sharded_tensor.api.ShardedTensor.ProcessGroupState"),
    ]
    + [
        (type(name, (StandIn,), {}), f"pytorch_optimizer.optimizer.{module}.{name}")
        for module, names in _OF_SCALABLE_SHAMPOO.items()
        for name in names
    ]
    + [
        (QuantizedStandIn, f"{home}.{name}")
        for name in _QUANTIZED
        for home in ("torchao.optim", "torchao.prototype.low_bit_optim")
    ]
)


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
        with torch.serialization.safe_globals(_STAND_INS):
            loaded = _torch_load(path, mmap=archive)
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
        needed = re.findall(r"(?:GLOBAL|global) `?([\w.]+\.\w+)", str(error))[:1]
        if needed:
            raise _refusal(path, needed) from None
        raise _corrupt(location, error) from None
    except Exception as error:
        raise _corrupt(location, error) from None


# Classes in the index of a distributed checkpoint. All of them are replaced by stand-ins; shapes and dtypes are not.
_METADATA = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "BytesStorageMetadata", "ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"),
    "pathlib._local": ("PosixPath", "WindowsPath"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Unpickler that accepts the classes of ``_METADATA`` by name, shapes and dtypes, and nothing else."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        # New classes for each pickle, as a pickle can write to the classes it is given.
        self._known: dict[tuple[str, str], Any] = {
            (module, name): type(name, (StandIn,), {}) for module, names in _METADATA.items() for name in names
        }

    def find_class(self, module_name: str, global_name: str) -> Any:
        found = self._known.get((module_name, global_name))
        if found is not None:
            return found
        value = getattr(torch, global_name, None) if module_name == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        raise UnsafeFileError(
            f"{self._path} must be the index of a distributed checkpoint, but its pickle asks for "
            f"{module_name}.{global_name}; nothing of it was run. Save the checkpoint again"
        )


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


def _refusal(path: Path, needed: Sequence[str]) -> UnsafeFileError | UnsupportedStateError:
    for name in needed:
        if name.partition(".")[0] in _PROJECTED:
            return UnsupportedStateError(
                f"a Fisher needs the mean squared gradient of each parameter, but {_PROJECTED[name.partition('.')[0]]} "
                f"keeps that of a projection ({path}); train with AdamW, or estimate a Fisher from data"
            )
    return UnsafeFileError(
        f"{path} must hold tensors only, but its pickle asks for {', '.join(needed)}; nothing of it was run. "
        "Save the optimizer's state_dict alone"
    )


def _corrupt(path: Path | str, error: Exception) -> CorruptFileError:
    if isinstance(error, CorruptFileError):
        return error if str(path) in str(error) else CorruptFileError(f"{path}: {error}; copy it again")
    return CorruptFileError(
        f"{path} must be a whole file that torch.save wrote, but it is truncated or damaged ({brief(error):.120}); "
        "copy it again"
    )


def _unsafe_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Return the globals that a pickle asks for: all for a zip archive, else the first, which torch's error names."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is no archive, or is damaged as well
        return re.findall(r"(?:GLOBAL|global) `?([\w.]+\.\w+)", str(error))[:1]
