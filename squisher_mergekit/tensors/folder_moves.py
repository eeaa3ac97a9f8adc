"""Moves of complete folders to their final names, and recovery after a crash (see :mod:`.atomic`)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from squisher_mergekit.errors import OutputError
from squisher_mergekit.tensors.input_files import FileState, file_state
from squisher_mergekit.tensors.temporary import cleaned_up, is_temporary, remove_stale, temporary_folder

Existing = Literal["refuse", "keep", "replace"]
# Errors of a rename that a copy can replace.
NO_RENAME = {errno.EXDEV, errno.EBUSY, errno.EPERM, errno.EACCES, errno.EROFS}
_ADD, _REPLACE = ".squisher-add", ".squisher-replace"
_OBSOLETE = ".obsolete.json"
# Entries that a new volume has.
_OF_VOLUMES = {"lost+found"}


def is_new(out: Path) -> bool:
    """Return True if ``out`` does not exist or is an empty folder, after :func:`recover`."""
    recover(out)
    return not out.exists() or (out.is_dir() and not _entries(out))


def recover(out: Path) -> None:
    """Remove all that dead processes left beside and in ``out``: undo their additions, complete replacements."""
    remove_stale(out.parent)
    if not out.is_dir() or remove_stale(out):
        return
    with contextlib.suppress(OSError):
        _undo(out)
        _complete(out)


def settled(folder: Path) -> Path:
    """Return the folder that contains the complete output of ``folder``, while a replacement is under way."""
    replacement = folder / _REPLACE
    return replacement if replacement.is_dir() else folder


def _entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name not in _OF_VOLUMES and not is_temporary(path)]


def place_beside(out: Path) -> Path:
    """Return the place for temporary files: beside ``out`` if a rename can put a folder there, else ``out`` itself."""
    return out if out.is_dir() and (is_fixed(out) or any(out.iterdir())) else out.parent


def is_fixed(folder: Path) -> bool:
    """Return True for a folder that a rename must not replace: a mount point, the working directory, or similar."""
    if not folder.is_dir():
        return False
    parent = folder.resolve().parent
    return os.path.ismount(folder) or folder.samefile(Path.cwd()) or not os.access(parent, os.W_OK | os.X_OK)


def put_folder(folder: Path, out: Path, existing: Existing, obsolete: Callable[[Path], Iterable[Path]]) -> None:
    """Move a complete folder to its final name."""
    if folder.parent.parent != out:
        try:
            if out.is_dir():
                _copy_owner(out, folder)
            folder.rename(out)
            sync(out.parent)
            return
        except OSError as error:
            if error.errno not in NO_RENAME | {errno.ENOTEMPTY, errno.EEXIST} or not out.is_dir():
                raise
    if existing == "refuse" and _entries(out):
        raise OutputError(f"{out} must be new or empty, but another process has written into it; choose another folder")
    with contextlib.ExitStack() as stack:
        if folder.parent.parent != out:
            scratch = stack.enter_context(temporary_folder(out, out.name))
            folder = Path(shutil.copytree(folder, scratch / out.name))
            for path in folder.rglob("*"):
                if path.is_file():
                    sync(path)
        if existing == "replace":
            _replace_in(folder, out, obsolete)
        else:
            _add_to(folder, out)


def _add_to(folder: Path, out: Path) -> None:
    """Add the files of a complete folder to ``out``, which has none of their names; all or none."""
    marker, scratch = _mark(folder, out / _ADD), folder.parent
    with cleaned_up(lambda: _undo(out)):
        for name in _in_order(marker):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                link(marker / name, out / name, scratch)
            except FileExistsError as error:
                raise OutputError(
                    f"{out} must not have {name} yet, but another process wrote it; choose another folder"
                ) from error
        sync(out)
        marker.rename(scratch / "done")


def _replace_in(folder: Path, out: Path, obsolete: Callable[[Path], Iterable[Path]]) -> None:
    """Replace files in ``out`` by those of a complete folder; readers find the new ones from the first rename on."""
    names = [os.path.relpath(path, out) for path in obsolete(out) if not (folder / path.relative_to(out)).exists()]
    if names:
        (folder / _OBSOLETE).write_text(json.dumps(names), encoding="utf-8")
        sync(folder / _OBSOLETE)
    with cleaned_up(lambda: _complete(out)):
        _mark(folder, out / _REPLACE)
        sync(out)


def _mark(folder: Path, marker: Path) -> Path:
    """Rename a complete folder to the marker in its output; the marker excludes other processes."""
    try:
        folder.rename(marker)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise OutputError(f"{marker.parent} must have one writer, but another process writes into it") from error
        raise
    return marker


def _undo(out: Path) -> None:
    """Remove the files that an unfinished addition has made; does nothing after a finished one."""
    marker = out / _ADD
    if not marker.is_dir():
        return
    for name in _in_order(marker):
        if _is_copy(marker / name, out / name):
            (out / name).unlink()
    for path in sorted(marker.rglob("*"), reverse=True):
        if path.is_dir():
            with contextlib.suppress(OSError):
                (out / path.relative_to(marker)).rmdir()
    shutil.rmtree(marker)


def _complete(out: Path) -> None:
    """Give the files of a replacement their names, remove the obsolete files, then the marker."""
    marker = out / _REPLACE
    if not marker.is_dir():
        return
    with temporary_folder(out, out.name) as scratch:
        for number, name in enumerate(_in_order(marker)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            link(marker / name, scratch / str(number), scratch)
            (scratch / str(number)).replace(out / name)
            # A rename between two names of one file does nothing.
            (scratch / str(number)).unlink(missing_ok=True)
        listed = marker / _OBSOLETE
        for name in json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else ():
            (out / name).unlink(missing_ok=True)
        sync(out)
        marker.rename(scratch / "done")


def _in_order(folder: Path) -> list[str]:
    """Return the files of a folder: those first that no program takes for a model or a Fisher without the others."""

    def place(name: str) -> tuple[bool, bool, str]:
        entry = name.endswith((".safetensors", ".bin")) and "-of-" not in name
        return name.endswith(".index.json"), entry, name

    files = (os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())
    return sorted((name for name in files if name != _OBSOLETE), key=place)


def link(source: Path, target: Path, scratch: Path) -> None:
    """Give a file a second name, which must be new; a copy on file systems without hard links."""
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:
        copy = Path(shutil.copy2(source, scratch / "copy"))
        sync(copy)
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        copy.rename(target)


def _is_copy(source: Path, target: Path) -> bool:
    """Return True if a file is the link or copy that :func:`link` makes."""
    try:
        ours, theirs = source.stat(), target.stat()
    except OSError:
        return False
    same = (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)
    return os.path.samestat(ours, theirs) or same


def tensor_states(folder: Path) -> dict[str, FileState]:
    """Return the state of the files with tensors in a folder."""
    if not folder.is_dir():
        return {}
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    return {path.name: file_state(path) for path in files if path.is_file()}


def check_unchanged(out: Path, before: dict[str, FileState]) -> None:
    """Raise if another process has written tensors into a folder since it was looked at."""
    changed = sorted(name for name, state in tensor_states(out).items() if before.get(name) != state)
    if changed:
        raise OutputError(
            f"{out} must have one writer, but another process has written {changed[0]} meanwhile; choose another folder"
        )


def _copy_owner(source: Path, target: Path) -> None:
    """Give a folder the mode and, where allowed, the owner of another one."""
    state = source.stat()
    with contextlib.suppress(OSError):
        os.chown(target, state.st_uid, state.st_gid)
    target.chmod(stat.S_IMODE(state.st_mode))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
