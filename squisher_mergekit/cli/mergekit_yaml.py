"""``squisher-mergekit-yaml``: mergekit's own command, for environments where the start-up hook is switched off."""

from __future__ import annotations

from squisher_mergekit import _autoload


def main() -> None:
    """Make the merge methods known, then run ``mergekit-yaml`` with the arguments of this process."""
    _autoload.install()
    from squisher_mergekit.merging.mergekit.console import mergekit_yaml

    mergekit_yaml()
