"""Code that an interpreter runs at its start, by ``squisher_mergekit.pth`` or, since PEP 829, its ``.start`` file.

Every interpreter of the environment imports this module, so it is one small file outside the package. It imports the
package when mergekit is imported; the package's own hook does the rest.
"""

import os
import sys


class _Watch:
    """Finder that imports the package before another finder locates mergekit."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def] # no typing at start-up
        if name == "mergekit":
            try:
                import squisher_mergekit  # noqa: F401
            except Exception as error:
                import warnings

                text = f"squisher-mergekit is not active in mergekit, stock merges are not affected: {error!r}"
                warnings.warn(text, stacklevel=1)


def start() -> None:
    """Add the merge methods to mergekit when it is imported, unless the environment variable switches it off."""
    if os.environ.get("SQUISHER_MERGEKIT_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _Watch())
