"""Output of a merge: a temporary folder until all tensors are written."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from squisher_mergekit.tensors.atomic import written_beside


def _nothing() -> None:
    """Do nothing."""


@dataclass
class OutputFolder:
    """Temporary folder that the tensors of a merge are written into.

    Attributes:
        path: The temporary folder.
        settle: Function that waits for files still being written.
    """

    path: Path
    settle: Callable[[], None] = _nothing


@contextmanager
def output_folder(out: Path, obsolete: Callable[[Path], Iterable[Path]] = lambda _: ()) -> Iterator[OutputFolder]:
    """Yield a temporary folder whose files move to ``out`` on success.

    After a failure ``out`` is unchanged, whatever it contains and whoever wrote it.

    Args:
        out: Output folder of the merge; older files of the same names are replaced at the end.
        obsolete: Function from ``out`` to files that the new ones replace, under other names.

    Raises:
        OutputError: The folder cannot be written, or another process has written tensors into it meanwhile.
    """
    with written_beside(out, existing="replace", obsolete=obsolete) as path:
        output = OutputFolder(path)
        try:
            yield output
        except BaseException:
            output.settle()
            raise
