"""Loading what ``torch.save`` wrote, without running a line of it."""

import pickle
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
        UnsupportedStateError: It holds tensors of a library's own class.
        CorruptFileError: It is truncated, damaged, or no such file.
    """
    if not path.is_file():
        raise NotFoundError(f"a file written by torch.save must be at {path}, but there is none")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        needed = _globals(path)
        if not needed:
            raise CorruptFileError(
                f"{path} must be a file that torch.save wrote, but it cannot be read: {_brief(error)}; copy it again"
            ) from None
        names = ", ".join(sorted(needed))
        if all(name.startswith("torchao.") for name in needed):
            raise UnsupportedStateError(
                f"the second moments in {path} are quantized by torchao ({names}), which this version cannot read; "
                "train with optim adamw_torch"
            ) from None
        raise UnsafeFileError(
            f"{path} must hold tensors only, but its pickle asks for {names}; nothing of it was run. "
            "Save the optimizer's state_dict alone"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise CorruptFileError(
            f"{path} must be a whole file that torch.save wrote, but it is truncated or damaged "
            f"({_brief(error)}); copy it again"
        ) from None


def _globals(path: Path) -> list[str]:
    try:
        return list(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError):
        return []


def _brief(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
