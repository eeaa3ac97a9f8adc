"""The hook that makes the merge methods known to mergekit; ``sys`` alone is imported.

An installation puts ``squisher_mergekit_startup`` into every interpreter; it imports this package when somebody imports
mergekit. mergekit 0.1.5 loads no plug-ins, so :func:`install` puts a finder on ``sys.meta_path`` that answers for a few
of mergekit's modules alone: it lets the other finders locate the module and, right after its code has run, calls
``squisher_mergekit.merging.mergekit.hooks.activate``. Nothing of mergekit, torch or this package is imported before.
A plug-in must not break stock merges: whatever fails in there becomes a warning.
"""

import sys

# This runs while mergekit is being imported, and in whatever imports this package: nothing more, typing included.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

WATCHED = (
    "mergekit.merge_methods.registry",
    "mergekit.merge_methods.task_adapter",
    "mergekit.plan",
    "mergekit.multigpu_executor",
    "mergekit.scripts.merge_raw_pytorch",
)


class _PostImportFinder:
    """Finds nothing itself; wraps the loader that another finder gives for a watched module."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                _wrap(spec.loader, name)
                return spec
        return None


def _wrap(loader: object, name: str) -> None:
    """Make a loader activate the plug-in once it has run the module ``name``."""
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        if module.__name__ == name:  # the loader of a zip file serves all its modules
            _activate(name, module)

    try:
        loader.exec_module = exec_module  # type: ignore[attr-defined]
    except Exception as error:  # a loader that takes no attributes
        _warn(error)


def _activate(name: str, module: "ModuleType") -> None:
    try:
        from squisher_mergekit.merging.mergekit.hooks import activate

        activate(name, module)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    import warnings

    text = f"squisher-mergekit is not active in mergekit, stock merges are not affected: {error!r}"
    warnings.warn(text, stacklevel=1)  # one place, so that five failing modules warn once


def installed() -> bool:
    """Return whether the finder is in place."""
    return any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path)


def install() -> None:
    """Watch for mergekit's modules, and activate the plug-in in those imported already; a second call does nothing."""
    if installed():
        return
    sys.meta_path.insert(0, _PostImportFinder())
    for name in WATCHED:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _activate(name, module)
