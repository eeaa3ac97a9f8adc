"""Output that appears whole or not at all: written beside, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """Yield a new folder beside ``out``; on success its files move there, synced to disk; else it vanishes.

    The new folder bears the name of ``out`` (inside a temporary one), for those who write it into a text.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    parent = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    folder = parent / out.name
    try:
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            if path.is_file():
                sync(path)
        if out.is_dir():
            for path in folder.iterdir():
                path.replace(out / path.name)
        else:
            folder.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its final name, sync and rename it, so that no half of it is ever found there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    beside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.chmod(0o644)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write a report as JSON."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())
