"""Output folder of a merge, restored after a failure."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path


class OutputFolder:
    """Snapshot of an output folder before a merge; :meth:`restore` returns to it, except for overwritten files.

    Args:
        folder: The folder that the merge writes into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = {path: _stamp(path) for path in folder.iterdir()} if folder.is_dir() else {}
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.settle: Callable[[], None] = lambda: None

    def restore(self) -> None:
        """Remove every file that is new or has changed, and the folders that did not exist."""
        self.settle()
        if self._made:
            shutil.rmtree(self._made[0], ignore_errors=True)
            # Another process may have put files into the folders above; rmdir leaves those folders.
            with contextlib.suppress(OSError):
                for parent in self._made[1:]:
                    parent.rmdir()
            return
        for path in self.folder.iterdir():
            if self._before.get(path) != _stamp(path):
                path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino
