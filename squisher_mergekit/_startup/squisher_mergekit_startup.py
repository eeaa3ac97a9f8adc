"""What an interpreter runs when it starts: ``squisher_mergekit.pth``, or its ``.start`` where PEP 829 is known.

Every interpreter of the environment pays for this module, so it is one small file outside the package: it waits until
somebody imports mergekit, and only then imports the package, whose own hook does the rest.
"""

import os
import sys


class _Watch:
    """Finds nothing; imports the package just before mergekit is looked for."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def] # no typing at start-up
        if name == "mergekit":
            try:
                import squisher_mergekit  # noqa: F401
            except Exception as error:
                import warnings

                text = f"squisher-mergekit is not active in mergekit, stock merges are not affected: {error!r}"
                warnings.warn(text, stacklevel=1)


def start() -> None:
    """Make the merge methods known to mergekit whenever it is imported, unless switched off."""
    if os.environ.get("SQUISHER_MERGEKIT_AUTOLOAD") != "0":
        sys.meta_path.insert(0, _Watch())
