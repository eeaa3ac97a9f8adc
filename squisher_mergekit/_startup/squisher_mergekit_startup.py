"""What ``squisher_mergekit.start`` runs when an interpreter starts (PEP 829).

It stands outside the package because importing the package already installs the hook, and
``SQUISHER_MERGEKIT_AUTOLOAD=0`` must keep the package from being imported at all.
"""

import os


def start() -> None:
    """Make the merge methods known to mergekit, unless switched off; never raise."""
    if os.environ.get("SQUISHER_MERGEKIT_AUTOLOAD") == "0":
        return
    try:  # noqa: SIM105 - contextlib is not imported yet when an interpreter starts
        import squisher_mergekit  # noqa: F401
    except Exception:
        pass
