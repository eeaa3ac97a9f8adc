"""Temporary folders that vanish: at the end of a block, at a signal, and after a crash at the next run.

A temporary folder is named ``.NAME.xxxxxxxx.squisher`` and contains a file ``lock``, which the process keeps locked by
``flock``. The system releases the lock when the process dies, so that a folder whose lock is free has no owner.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

_SUFFIX = ".squisher"
_LOCK = "lock"
_LONGEST_NAME = 200  # bytes, of which there is room for a suffix: file systems allow 255
# A lock that another host sees as free may still be held: not every network file system shares locks.
_FOREIGN_AGE = 24 * 3600  # seconds
# Signals that end a process, and that a process can catch.
ENDINGS = (signal.SIGINT, *([signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else [signal.SIGTERM]))
# Clean-up functions of the open blocks, each with the process that opened the block; a forked child has none.
_cleanups: dict[object, tuple[int, Callable[[], None]]] = {}


def shortened(name: str) -> str:
    """Return the beginning of a name that leaves room for a suffix; letters beyond ASCII take several bytes.

    Example:
        >>> shortened("out"), len(shortened("ä" * 255))
        ('out', 100)
    """
    return os.fsencode(name)[:_LONGEST_NAME].decode(errors="ignore")


@contextlib.contextmanager
def temporary_folder(place: Path, name: str) -> Iterator[Path]:
    """Yield a new folder in ``place``, which is removed at the end; first remove the folders of dead processes.

    Args:
        place: Folder to create it in.
        name: Name of the output, for the name of the folder.
    """
    remove_stale(place)
    short = shortened(name)
    while True:
        folder = place / f".{short}.{secrets.token_hex(4)}{_SUFFIX}"
        with cleaned_up(lambda folder=folder: _remove(folder)):  # type: ignore[misc]
            folder.mkdir(mode=0o700)
            lock = _locked(folder)
            if lock is None:  # another process took the folder for a stale one
                continue
            try:
                yield folder
            finally:
                os.close(lock)
        return


def is_temporary(path: Path) -> bool:
    """Return True for the name of a temporary folder."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_stale(place: Path) -> bool:
    """Remove the temporary folders of dead processes; return True if a folder of a living process remains."""
    try:
        folders = [path for path in place.iterdir() if is_temporary(path)]
    except OSError:
        return False
    for folder in folders:
        with contextlib.suppress(OSError):
            _remove_if_dead(folder)
    return any(folder.exists() for folder in folders)


def _remove_if_dead(folder: Path) -> None:
    """Remove a temporary folder if no process has its lock."""
    # An empty folder has no lock yet: its process is dead, or makes another folder.
    with contextlib.suppress(OSError):
        folder.rmdir()
        return
    lock = os.open(folder / _LOCK, os.O_RDWR)
    try:
        _flock(lock)
        host = os.read(lock, 256).decode(errors="replace")
        if host != socket.gethostname():
            newest = max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
            if time.time() - newest < _FOREIGN_AGE:
                return
        _remove(folder)
    finally:
        os.close(lock)


def _remove(folder: Path) -> None:
    """Remove a temporary folder; the lock goes last, so that a part that remains after a crash is known as stale."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != _LOCK:
                path.unlink(missing_ok=True)
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _locked(folder: Path) -> int | None:
    """Return the descriptor of the locked file in a new folder; None if another process removes the folder."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except FileNotFoundError:
        return None
    try:
        _flock(lock)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:  # a file system without locks; its folders never look stale
        return lock
    try:
        os.write(lock, socket.gethostname().encode())
        if (folder / _LOCK).exists():
            return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def _flock(descriptor: int) -> None:
    """Lock a file for this process, without waiting.

    Raises:
        BlockingIOError: Another process has the lock.
        OSError: The file system has no locks.
    """
    try:
        import fcntl
    except ImportError as error:  # Windows
        raise OSError("no file locks") from error
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def cleaned_up(cleanup: Callable[[], None]) -> Iterator[None]:
    """Call a function at the end of the block, or at a signal (see :func:`cleaned_up_at_signals`)."""
    key = object()
    _cleanups[key] = (os.getpid(), cleanup)
    try:
        yield
    finally:
        cleanup()
        del _cleanups[key]


@contextlib.contextmanager
def cleaned_up_at_signals(signals: Sequence[signal.Signals]) -> Iterator[None]:
    """Clean up at signals that end the process, which then dies of the signal.

    Handlers of the caller stay. Outside of the main thread, Python allows no handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced = {
        number: signal.signal(number, _clean_up_and_die)
        for number in signals
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
    }
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


def _clean_up_and_die(number: int, frame: FrameType | None) -> None:
    """Call the clean-up functions of this process, newest first, and end it by the signal."""
    for process, cleanup in reversed(list(_cleanups.values())):
        if process == os.getpid():
            with contextlib.suppress(Exception):
                cleanup()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
