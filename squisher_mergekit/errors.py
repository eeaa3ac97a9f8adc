"""Errors of this package.

    SquisherError
    ├── UnsupportedMergekitError     the plug-in does not support the installed mergekit
    └── RefusedError                 an input is refused; also a click.ClickException, so that
        │                            mergekit's own commands print one line and exit with 1
        ├── NotFoundError            a Fisher, optimizer state, model or file is missing
        ├── ConfigError              a merge parameter, an option or a metadata file is wrong
        │   └── OutputError          an output cannot be written
        ├── UnsupportedStateError    the optimizer keeps no second moment that can serve as a Fisher
        │   └── NothingKeptError     the optimizer keeps only momentum, or nothing
        ├── NamingError              the parameter of a tensor is not certain
        ├── MismatchError            names, shapes or weights do not fit each other
        ├── CorruptFileError         a file is truncated, damaged, or of another format
        ├── UnsafeFileError          a pickle would run code; none of it ran
        └── ValuesError              entries are NaN, infinite or negative

Each message has four parts, in one line: requirement, place, found, cure. Warnings go to the logger
``squisher_mergekit``. The exceptions are deprecated names (``DeprecationWarning``) and the start-up hook, which warns
through :mod:`warnings` because it must work even if this package cannot be imported.
"""

from __future__ import annotations

import click


class SquisherError(Exception):
    """Base class of all errors of this package."""


class UnsupportedMergekitError(SquisherError, click.ClickException):
    """The plug-in does not support the installed mergekit."""


class RefusedError(SquisherError, click.ClickException, ValueError):
    """An input is refused.

    Args:
        message: Requirement, place, found, cure. Line breaks become spaces, other control characters are escaped, and
            the middle of a message of more than 4,000 characters is left out.
    """

    def __init__(self, message: str) -> None:
        # Names in files of others may hold control sequences of a terminal, or text that no terminal can print.
        printable = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(message.split()))
        text = "".join(printable)
        super().__init__(text if len(text) <= 4000 else f"{text[:3000]} ... {text[-900:]}")


class NotFoundError(RefusedError):
    """A Fisher, optimizer state, model or file is missing."""


class ConfigError(RefusedError):
    """A merge parameter, an option or a metadata file is wrong."""


class OutputError(ConfigError):
    """An output cannot be written: the disk is full, the place is read-only, or another process writes there."""


class UnsupportedStateError(RefusedError):
    """The optimizer keeps no second moment that can serve as a Fisher."""


class NothingKeptError(UnsupportedStateError):
    """The optimizer keeps only momentum of a parameter; another optimizer in the checkpoint may keep more."""


class NamingError(RefusedError):
    """The parameter of a tensor is not certain."""


class MismatchError(RefusedError):
    """Names, shapes or weights do not fit each other."""


class CorruptFileError(RefusedError):
    """A file is truncated, damaged, or of another format than its name says."""


class UnsafeFileError(RefusedError):
    """A pickle would run code when loaded; none of it ran."""


class ValuesError(RefusedError):
    """A Fisher has NaN, infinite or negative entries."""
