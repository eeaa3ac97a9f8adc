"""Versions of mergekit that the methods support, and the check of the parts that they need."""

import inspect
from typing import Any

from squisher_mergekit.errors import UnsupportedMergekitError
from squisher_mergekit.merging.parameters import METHODS

SUPPORTED = ">=0.1.5,<0.2"


def need(owner: Any, name: str, *parameters: str) -> Any:
    """Return an attribute of mergekit.

    Args:
        owner: Module or class.
        name: Name of the attribute.
        *parameters: Names of parameters that the attribute must accept.

    Returns:
        The attribute.

    Raises:
        UnsupportedMergekitError: The attribute is missing, or does not accept the parameters.
    """
    found = getattr(owner, name, None)
    taken = inspect.signature(found).parameters if callable(found) and parameters else {}
    if found is None or any(parameter not in taken for parameter in parameters):
        raise UnsupportedMergekitError(f"{unsupported()} ({getattr(owner, '__name__', owner)}.{name} differs)")
    return found


def unsupported() -> str:
    """Return the message that this mergekit is not supported."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("mergekit")
    except PackageNotFoundError:
        found = "of unknown version"
    return (
        f"the methods {' and '.join(METHODS)} need mergekit {SUPPORTED}, found mergekit {found}; "
        f"pip install 'mergekit{SUPPORTED}'"
    )
