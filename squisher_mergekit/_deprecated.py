"""Old names of public objects, which still work for one version, with a warning that names the new import."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def deprecated_names(module_name: str, new_homes: Mapping[str, str], stacklevel: int = 2) -> Callable[[str], Any]:
    """Return a module ``__getattr__`` that finds old names at their new homes.

    Args:
        module_name: ``__name__`` of the module that had the names.
        new_homes: Old name -> ``module:name``.
        stacklevel: Frames from the warning to the user's code; one more where a function calls the returned one.

    Returns:
        The function, to be assigned to ``__getattr__`` of the module.

    Example:
        >>> __getattr__ = deprecated_names("old_module", {"square_root": "math:sqrt"})
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     __getattr__("square_root")(9)
        3.0
        >>> print(caught[0].message)
        old_module.square_root is deprecated; use: from math import sqrt
    """

    def __getattr__(name: str) -> Any:
        if name not in new_homes:
            raise AttributeError(f"module {module_name!r} has no attribute {name!r}")
        module, _, new_name = new_homes[name].partition(":")
        warnings.warn(
            f"{module_name}.{name} is deprecated; use: from {module} import {new_name}",
            DeprecationWarning,
            stacklevel=stacklevel,
        )
        return getattr(import_module(module), new_name)

    return __getattr__


def renamed_options(options: Mapping[str, Any], **new_names: str) -> dict[str, Any]:
    """Return keyword arguments under their new names, with a warning for each old name.

    Args:
        options: The keyword arguments that a function got.
        new_names: Old name -> new name.

    Example:
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     renamed_options({"least": 0.1, "seed": 3}, least="min_keep")
        {'seed': 3, 'min_keep': 0.1}
        >>> print(caught[0].message)
        least is deprecated; use min_keep
    """
    found = dict(options)
    for old, new in new_names.items():
        if old in found:
            warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=3)
            found[new] = found.pop(old)
    return found
