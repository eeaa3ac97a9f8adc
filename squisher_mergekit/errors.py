"""Every error that this package raises.

    SquisherError
    ├── UnsupportedMergekitError     the installed mergekit is none that the plug-in knows
    └── RefusedError                 an input is refused; also a click.ClickException, so that
        │                            mergekit's own commands print one line and exit with 1
        ├── NotFoundError            no Fisher, optimizer state, model or file where one was named
        ├── ConfigError              a parameter of a merge, a flag or a metadata file is wrong
        ├── UnsupportedStateError    the optimizer keeps no second moment that can serve as a Fisher
        │   └── NothingKeptError     it keeps momentum alone, or nothing
        ├── NamingError              it cannot be told which tensor belongs to which parameter
        ├── MismatchError            names, shapes or weights do not fit each other
        ├── CorruptFileError         truncated, damaged, or not what its name says
        ├── UnsafeFileError          a pickle that would run code; nothing of it was run
        └── ValuesError              NaN, infinite or negative entries

A message says, in one line: what was required, where, what was found, and the cure.
"""

from __future__ import annotations

import click


class SquisherError(Exception):
    """Root of this package's errors."""


class SquisherWarning(UserWarning):
    """Something that the user should know and that does not stop the work."""


class UnsupportedMergekitError(SquisherError, click.ClickException):
    """The installed mergekit is none that the plug-in knows."""


class RefusedError(SquisherError, click.ClickException, ValueError):
    """An input is refused.

    Args:
        message: Requirement, place, what was found, and the cure. Line breaks become spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class NotFoundError(RefusedError):
    """There is no Fisher, optimizer state, model or file where one was named."""


class ConfigError(RefusedError):
    """A parameter of a merge, a flag or a metadata file is wrong."""


class UnsupportedStateError(RefusedError):
    """The optimizer keeps no second moment that can serve as a Fisher."""


class NothingKeptError(UnsupportedStateError):
    """The optimizer keeps momentum alone of a parameter; another may have kept more of the others."""


class NamingError(RefusedError):
    """It cannot be told which tensor belongs to which parameter."""


class MismatchError(RefusedError):
    """Names, shapes or weights do not fit each other."""


class CorruptFileError(RefusedError):
    """A file is truncated, damaged, or not what its name says."""


class UnsafeFileError(RefusedError):
    """A pickle would run code when loaded; nothing of it was run."""


class ValuesError(RefusedError):
    """A Fisher holds NaN, infinite or negative entries."""
