"""Start-up hook that adds the merge methods to mergekit; imports ``sys`` alone.

The installation adds ``squisher_mergekit_startup`` to every interpreter; it imports this package when mergekit is
imported. mergekit 0.1.5 loads no plug-ins. :func:`install` therefore puts a finder on ``sys.meta_path`` for a few
modules of mergekit: the other finders locate the module, and after its code has run, the finder calls
``squisher_mergekit.merging.mergekit.hooks.activate``. Until then the hook imports neither mergekit nor torch. A plug-in
must not break stock merges: any failure becomes a warning.
"""

import sys

# Importing mergekit runs this module: it must import nothing more, typing included.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

WATCHED = (
    "mergekit.architecture",
    "mergekit.config",
    "mergekit.merge",
    "mergekit.merge_methods.registry",
    "mergekit.merge_methods.task_adapter",
    "mergekit.plan",
    "mergekit.multigpu_executor",
    "mergekit.scripts.merge_raw_pytorch",
)


class _PostImportFinder:
    """Finder that wraps the loader of a watched module, which another finder returns."""

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
    """Change a loader to activate the plug-in after it has run the module ``name``."""
    execute = getattr(loader, "exec_module", None)
    if execute is None:
        return

    def exec_module(module: "ModuleType") -> None:
        execute(module)
        if module.__name__ == name:  # the loader of a zip file serves all its modules
            _activate(name, module)

    try:
        loader.exec_module = exec_module  # type: ignore[attr-defined]
    except Exception as error:  # a loader without assignable attributes
        _warn(error)


def _activate(name: str, module: "ModuleType") -> None:
    """Activate the plug-in in one module of mergekit, and turn any failure into a warning."""
    try:
        from squisher_mergekit.merging.mergekit.hooks import activate

        activate(name, module)
    except Exception as error:
        _warn(error)


def _warn(error: Exception) -> None:
    """Warn that the plug-in is not active."""
    import warnings

    text = f"squisher-mergekit is not active in mergekit, stock merges are not affected: {error!r}"
    warnings.warn(text, stacklevel=1)  # one place, so that several failing modules warn once


def installed() -> bool:
    """Return True if the finder is on ``sys.meta_path``."""
    return any(isinstance(finder, _PostImportFinder) for finder in sys.meta_path)


def install() -> None:
    """Watch for mergekit's modules, and activate the plug-in in those already imported; idempotent."""
    if installed():
        return
    sys.meta_path.insert(0, _PostImportFinder())
    for name in WATCHED:
        module = sys.modules.get(name)
        if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
            _activate(name, module)
