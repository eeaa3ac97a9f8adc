"""FISH mask: the few weights that a task needs.

``choice`` selects them, ``resetting`` gives all others their pre-trained values back, ``difference`` keeps what changed
and ``patching`` puts it on or takes it off; ``files`` does so on disk. To train inside a mask, see
:class:`~squisher_mergekit.training.MaskedTraining`.
"""

from squisher_mergekit.applications.fish_mask.choice import Choice, select
from squisher_mergekit.applications.fish_mask.difference import Difference, read_difference
from squisher_mergekit.applications.fish_mask.files import reset_files, select_files
from squisher_mergekit.applications.fish_mask.patching import apply_files, patched, remove_files
from squisher_mergekit.applications.fish_mask.resetting import reset

__all__ = [
    "Choice",
    "Difference",
    "apply_files",
    "patched",
    "read_difference",
    "remove_files",
    "reset",
    "reset_files",
    "select",
    "select_files",
]
