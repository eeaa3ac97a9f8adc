"""Atomic output: files are written beside their final name, synced, and renamed."""

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
    """Yield a new folder beside ``out`` whose files move to ``out`` on success; on failure the folder vanishes.

    The files are synced to disk before they move. The new folder has the name of ``out`` (inside a temporary folder),
    for callers that write that name into a text.
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
    """Write a file atomically: beside its final name, synced, then renamed."""
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
    """Write a report as JSON, atomically."""
    write_whole(path, (json.dumps(data, indent=2) + "\n").encode())
