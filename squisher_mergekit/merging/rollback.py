"""What a merge has written, so that it can be taken away again."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path


class Output:
    """The folder of a merge as it was before; :meth:`remove` brings it back to that, but for overwritten files.

    Args:
        folder: The folder that the merge is about to write into.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = {path: _stamp(path) for path in folder.iterdir()} if folder.is_dir() else {}
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.settle: Callable[[], None] = lambda: None

    def remove(self) -> None:
        """Remove every file that is new or has changed, and the folders that did not exist."""
        self.settle()
        if self._made:
            shutil.rmtree(self._made[0], ignore_errors=True)
            # Of the folders above, those that nobody else has put anything into.
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
