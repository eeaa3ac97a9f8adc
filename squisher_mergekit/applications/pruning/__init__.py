"""Fisher pruning: make the weights 0 whose absence the loss would notice least.

Single weights: ``recipe`` says what is asked for and has the choice, ``modules`` prunes a live model, ``files`` one on
disk, ``report`` says what became of each layer. Whole units: ``units`` finds filters, neurons and heads, ``structured``
scores and masks them, ``shrinking`` makes the network smaller.
"""

from squisher_mergekit.applications.pruning.files import prune_files
from squisher_mergekit.applications.pruning.modules import choose_weights, prune
from squisher_mergekit.applications.pruning.recipe import Recipe, schedule
from squisher_mergekit.applications.pruning.report import Report
from squisher_mergekit.applications.pruning.shrinking import shrink
from squisher_mergekit.applications.pruning.structured import choose_units, mask_units
from squisher_mergekit.applications.pruning.units import chain_units, ffn_units, head_units

__all__ = [
    "Recipe",
    "Report",
    "chain_units",
    "choose_units",
    "choose_weights",
    "ffn_units",
    "head_units",
    "mask_units",
    "prune",
    "prune_files",
    "schedule",
    "shrink",
]
