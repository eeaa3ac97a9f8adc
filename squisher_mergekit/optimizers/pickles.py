"""Loading what ``torch.save`` wrote, without running a line of it."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError


def load(path: Path) -> Any:
    """Load a file of tensors: ``weights_only`` always, memory-mapped where the file is a zip archive.

    Files in torch's format from before 1.6 are no archives and cannot be mapped; they are read whole.

    Args:
        path: The file.

    Returns:
        What was saved; its tensors are views of the mapped file and must not be written to.

    Raises:
        NotFoundError: There is no such file.
        UnsafeFileError: Its pickle needs more than tensors and plain containers; nothing was run.
        UnsupportedStateError: It holds tensors of a quantizing library's own class.
        CorruptFileError: It is truncated, damaged, or no such file.
    """
    if not path.is_file():
        raise NotFoundError(f"a file written by torch.save must be at {path}, but there is none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        needed = sorted(_unsafe_globals(path, error))
        if needed:
            raise _refusal(path, needed) from None
        raise _corrupt(path, error) from None
    # A damaged stream can make the unpickler fail in any way: wrong opcodes, types, indices, encodings.
    except Exception as error:
        raise _corrupt(path, error) from None


def _refusal(path: Path, needed: list[str]) -> UnsafeFileError | UnsupportedStateError:
    names = ", ".join(needed)
    if all(name.startswith("torchao.") for name in needed):
        return UnsupportedStateError(
            f"the second moments in {path} are quantized by torchao ({names}), which this version cannot read; "
            "train with optim adamw_torch, or estimate a Fisher from data"
        )
    return UnsafeFileError(
        f"{path} must hold tensors only, but its pickle asks for {names}; nothing of it was run. "
        "Save the optimizer's state_dict alone"
    )


def _corrupt(path: Path, error: Exception) -> CorruptFileError:
    brief = (" ".join(str(error).split()) or type(error).__name__)[:120]
    return CorruptFileError(
        f"{path} must be a whole file that torch.save wrote, but it is truncated or damaged ({brief}); copy it again"
    )


def _unsafe_globals(path: Path, error: pickle.UnpicklingError) -> list[str]:
    """Name what a pickle asks for; torch lists it for zip archives only, of other files its error names the first."""
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # the file is no archive, or damaged in any way as well
        return re.findall(r"(?:GLOBAL|global) `?([\w.]+\.\w+)", str(error))[:1]
