"""FISH masks: the few weights that a task needs.

``recipe`` selects the weights, ``resetting`` resets all others to their pre-trained values, ``difference`` stores the
change and ``patching`` applies or removes it; ``files`` works on models on disk. To train inside a mask, see
:class:`~squisher_mergekit.training.MaskedTraining`.
"""

from typing import TYPE_CHECKING

from squisher_mergekit._deprecated import deprecated_names
from squisher_mergekit.applications.fish_mask.difference import Difference, read_difference
from squisher_mergekit.applications.fish_mask.files import MaskReport, ResetReport, reset_files, select_files
from squisher_mergekit.applications.fish_mask.patching import apply_files, patched, remove_files
from squisher_mergekit.applications.fish_mask.recipe import FishMaskOptions, FishMaskRecipe, select
from squisher_mergekit.applications.fish_mask.resetting import reset
from squisher_mergekit.applications.masks import Mask, read_mask, write_mask

__all__ = [
    "Difference",
    "FishMaskOptions",
    "FishMaskRecipe",
    "Mask",
    "MaskReport",
    "ResetReport",
    "apply_files",
    "patched",
    "read_difference",
    "read_mask",
    "remove_files",
    "reset",
    "reset_files",
    "select",
    "select_files",
    "write_mask",
]

if not TYPE_CHECKING:
    __getattr__ = deprecated_names(__name__, {"Choice": f"{__name__}:FishMaskRecipe"})
