"""Fisher pruning: set the weights to 0 that add least to the loss.

Single weights: ``recipe`` has the options and the plan, ``modules`` prunes a model in memory, ``files`` a model on
disk, ``report`` has the result. Whole units: ``units`` finds filters, neurons and heads, ``structured`` scores and
masks them, ``shrinking`` makes the network smaller.
"""

from typing import TYPE_CHECKING

from squisher_mergekit._deprecated import deprecated_names
from squisher_mergekit.applications.masks import Mask, read_mask
from squisher_mergekit.applications.pruning.files import prune_files
from squisher_mergekit.applications.pruning.modules import choose_weights, prune
from squisher_mergekit.applications.pruning.recipe import PruningOptions, PruningRecipe, schedule
from squisher_mergekit.applications.pruning.report import PruningReport
from squisher_mergekit.applications.pruning.shrinking import shrink
from squisher_mergekit.applications.pruning.structured import UnitChoice, Units, UnitSlice, choose_units, mask_units
from squisher_mergekit.applications.pruning.units import chain_units, ffn_units, head_units

__all__ = [
    "Mask",
    "PruningOptions",
    "PruningRecipe",
    "PruningReport",
    "UnitChoice",
    "UnitSlice",
    "Units",
    "chain_units",
    "choose_units",
    "choose_weights",
    "ffn_units",
    "head_units",
    "mask_units",
    "prune",
    "prune_files",
    "read_mask",
    "schedule",
    "shrink",
]

if not TYPE_CHECKING:
    __getattr__ = deprecated_names(
        __name__, {"Recipe": f"{__name__}:PruningRecipe", "Report": f"{__name__}:PruningReport"}
    )
