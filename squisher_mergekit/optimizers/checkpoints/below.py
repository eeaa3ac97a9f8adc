"""Search for the one checkpoint below a folder that holds none itself: Lightning's ``version_0/checkpoints``."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from squisher_mergekit.errors import NamingError
from squisher_mergekit.optimizers.checkpoints import torch_save
from squisher_mergekit.optimizers.checkpoints.run_folder import steps_in
from squisher_mergekit.optimizers.checkpoints.trainers.foreign import whose

LOG = logging.getLogger("squisher_mergekit")
_DEPTH = 3  # lightning_logs/version_0/checkpoints
_MOST = 1_000  # folders that are looked at


def checkpoint_below(folder: Path, holds: Callable[[Path], bool]) -> Path | None:
    """Return the one folder below that holds a checkpoint or a run; None if there is none.

    Files under names that only their content explains (``*.ckpt``, ``*.pth``) count where no other folder is found, and
    no file is of a trainer whose checkpoints cannot be read.

    Args:
        folder: A folder without a checkpoint of its own.
        holds: Function that returns True for a folder with a Fisher or an optimizer's state.

    Raises:
        NamingError: Several folders hold one.

    Example:
        >>> checkpoint_below(Path("/nonexistent"), lambda folder: True) is None
        True
    """
    folders = dict(islice(_folders(folder, holds), _MOST))
    found = [path for path, is_source in folders.items() if is_source]
    if not found and whose(folder) is None:
        found = [path for path in folders if torch_save.others(path)]
    distinct = list({path.resolve(): path for path in found}.values())
    if len(distinct) > 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in distinct[:5])
        more = f" and {len(distinct) - 5} more" if len(distinct) > 5 else ""
        raise NamingError(
            f"{folder} must hold one checkpoint or run, found those in {listed}{more}; give the one to read"
        )
    if distinct:
        LOG.warning("%s holds no optimizer state itself; taking that in %s", folder, distinct[0].relative_to(folder))
    return distinct[0] if distinct else None


def _folders(folder: Path, holds: Callable[[Path], bool]) -> Iterator[tuple[Path, bool]]:
    """Yield the folders below, level by level, and whether each is a checkpoint or run, whose inside is left out."""
    level = [folder]
    for _ in range(_DEPTH):
        below = [path for parent in level for path in _inside(parent)]
        level = []
        for path in below:
            is_source = holds(path) or any(map(holds, steps_in(path).values()))
            yield path, is_source
            if not is_source:
                level.append(path)


def _inside(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # a folder that cannot be listed, or is missing
        return []
