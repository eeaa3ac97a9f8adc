"""Atomic output: a file or folder appears whole under its final name, or not at all.

Each output is written into a temporary folder (see :mod:`.temporary`), synced, and moved:

* a new or empty folder by one rename;
* into a folder with other files, or one that a rename cannot replace (a mount point): the complete output is renamed to
  ``.squisher-add`` or ``.squisher-replace`` in it, then its files get their names, the entry points last, and the
  marker goes. After a crash, :func:`.recover` undoes an addition and completes a replacement. Until then
  :func:`.settled` returns the complete replacement to readers.
* a file by one rename; devices, pipes and standard output are written through.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.folder_moves import (
    NO_RENAME,
    Existing,
    check_unchanged,
    link,
    place_beside,
    put_folder,
    recover,
    sync,
    tensor_states,
)
from squisher_mergekit.tensors.input_files import FileState, file_state
from squisher_mergekit.tensors.output_errors import output_errors
from squisher_mergekit.tensors.temporary import temporary_folder

STANDARD_OUTPUT = "-"
# Seconds to wait for the process that reads a pipe.
_READER_DELAY = 10
_data_stream: list[BinaryIO] = []
# State of the files of :func:`one_writer` when their blocks began.
_before: dict[Path, FileState | None] = {}


@contextlib.contextmanager
def written_beside(
    out: Path, existing: Existing = "refuse", obsolete: Callable[[Path], Iterable[Path]] = lambda _: ()
) -> Iterator[Path]:
    """Yield a temporary folder that becomes ``out`` on success; on failure the folder vanishes.

    The temporary folder has the name of ``out``, for callers that write that name into a text.

    Args:
        out: The folder to make.
        existing: Treatment of files in an existing ``out``. ``refuse``: there must be none. ``keep``: they stay, and
            none may have the name of a new file. ``replace``: new files replace those of the same name.
        obsolete: Function from ``out`` to the files that the new ones replace, under other names.

    Raises:
        OutputError: The folder cannot be written, or another process has written into it meanwhile.
    """
    if str(out) == STANDARD_OUTPUT:
        raise OutputError("the output must be a folder, but - is standard output; give the name of a folder")
    target = Path(os.path.realpath(out))
    with output_errors(out, "folder"), _made_folders(target.parent):
        recover(target)
        before = tensor_states(target)
        with temporary_folder(place_beside(target), target.name) as scratch:
            folder = scratch / target.name
            folder.mkdir()
            yield folder
            for path in folder.rglob("*"):
                if path.is_file():
                    sync(path)
            if existing == "replace":
                check_unchanged(target, before)
            put_folder(folder, target, existing, obsolete)


@contextlib.contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files can be renamed into the one of :func:`written_beside`."""
    target = Path(os.path.realpath(out))
    with output_errors(out, "folder"), _made_folders(target.parent):
        recover(target)
        with temporary_folder(place_beside(target), target.name) as scratch:
            yield scratch


@contextlib.contextmanager
def _made_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; after a failure, remove those that are new and empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextlib.contextmanager
def written_file(file: Path, new: bool = False) -> Iterator[Path]:
    """Yield the path of a temporary file that becomes ``file`` on success.

    The target of a link is replaced, not the link. A device, a pipe and ``-`` (standard output) get the bytes.

    Args:
        file: The file to make.
        new: The file must not exist.

    Raises:
        OutputError: The file cannot be written, ``new`` and it exists, or another process has written it meanwhile
            (since :func:`one_writer` began, if the call is inside such a block).
    """
    with output_errors(file, "file"):
        if is_stream(file):
            with temporary_folder(Path(tempfile.gettempdir()), "output") as scratch:
                yield scratch / "output"
                with (scratch / "output").open("rb") as source, _stream(file) as stream:
                    shutil.copyfileobj(source, stream)
            return
        target = Path(os.path.realpath(file))
        before = _before.get(target, _state_if_any(target))
        with _made_folders(target.parent):
            inside = os.access(target.parent, os.W_OK | os.X_OK) or not target.is_file()
            place = target.parent if inside else Path(tempfile.gettempdir())
            with temporary_folder(place, target.name) as scratch:
                yield scratch / target.name
                sync(scratch / target.name)
                with _locked_folder(target.parent):
                    if not new and _state_if_any(target) != before:
                        raise OutputError(
                            f"{target} must have one writer, but another process has written it meanwhile; choose "
                            "another file"
                        )
                    _put_file(scratch / target.name, target, new)
                if target in _before:
                    _before[target] = _state_if_any(target)


@contextlib.contextmanager
def one_writer(file: Path) -> Iterator[None]:
    """Let :func:`written_file` refuse a file that another process makes or changes from now to the end of the block."""
    target = Path(os.path.realpath(file))
    _before[target] = _state_if_any(target)
    try:
        yield
    finally:
        _before.pop(target, None)


def _state_if_any(file: Path) -> FileState | None:
    """Return the state of a file; None if there is none."""
    try:
        return file_state(file)
    except OSError:
        return None


@contextlib.contextmanager
def _locked_folder(folder: Path) -> Iterator[None]:
    """Exclude other processes that put a file into a folder, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ImportError):
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed_folder(folder: Path) -> Iterator[None]:
    """Claim a folder for this process until the end of the block, where the file system has locks.

    Raises:
        OutputError: Another process has claimed it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"one process at a time may write to {folder.parent}, but another one does; wait for its end, or "
                    "choose another folder"
                ) from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically (see :func:`written_file`)."""
    with written_file(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, data: Any) -> None:
    """Write a report as JSON, atomically."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())


@contextlib.contextmanager
def text_on_standard_error() -> Iterator[None]:
    """Send printed text to standard error, so that standard output has the bytes of ``-`` alone."""
    _data_stream.append(sys.stdout.buffer)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _data_stream.pop()


def _put_file(temporary: Path, target: Path, new: bool) -> None:
    if new:
        try:
            link(temporary, target, temporary.parent)
        except FileExistsError as error:
            raise OutputError(f"{target} must be a new file, but exists; remove it or choose another") from error
    else:
        if target.is_file():
            shutil.copymode(target, temporary)
        try:
            temporary.replace(target)
        except OSError as error:
            # The file itself can be a mount point, or the only writable place.
            if error.errno not in NO_RENAME or not target.is_file():
                raise
            with temporary.open("rb") as source, target.open("wb") as stream:
                shutil.copyfileobj(source, stream)
    with contextlib.suppress(OSError):
        sync(target.parent)


def is_standard_output(file: Path) -> bool:
    """Return True for the names of standard output."""
    return str(file) in (STANDARD_OUTPUT, "/dev/stdout")


def is_stream(file: Path) -> bool:
    """Return True for standard output, a device, a pipe, or an open file under its number."""
    if str(file) == STANDARD_OUTPUT:
        return True
    try:
        mode = file.stat().st_mode
    except OSError:
        return False
    if stat.S_ISDIR(mode):
        return False
    place = str(file.absolute())
    return not stat.S_ISREG(mode) or place.startswith(("/dev/fd/", "/dev/std", "/proc/"))


@contextlib.contextmanager
def _stream(file: Path) -> Iterator[BinaryIO]:
    """Open a device or pipe for writing; a regular file behind a number is appended to."""
    standard = _data_stream[-1] if _data_stream else sys.stdout.buffer
    if is_standard_output(file):
        sys.stdout.flush()
        yield standard
        standard.flush()
    else:
        with os.fdopen(_open_stream(file), "ab") as stream:
            yield stream


def _open_stream(file: Path) -> int:
    """Open a device or pipe; wait a while for the reader of a pipe."""
    deadline = time.monotonic() + _READER_DELAY
    while True:
        try:
            descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            os.set_blocking(descriptor, True)
            return descriptor
