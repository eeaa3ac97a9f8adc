"""Callbacks and tools for training: Squishers, moving averages, masks, and elastic weight consolidation.

``callback`` and ``writing`` write the optimizer's second moments as a Fisher; ``gradients`` and ``average`` keep moving
averages of squared gradients, ``factors`` those of ``G G^T``; ``lora`` records the Fisher of a LoRA's merged weights;
``masked`` trains inside a mask; ``ewc`` trains under a penalty of earlier tasks.
"""

from typing import TYPE_CHECKING

from squisher_mergekit._deprecated import deprecated_names
from squisher_mergekit.training.average import FisherAverageCallback
from squisher_mergekit.training.callback import SquisherCallback
from squisher_mergekit.training.ewc import EWCCallback, live_squisher
from squisher_mergekit.training.factors import GradientFactors
from squisher_mergekit.training.gradients import GradientSquares
from squisher_mergekit.training.lora.recorder import LoraRecorder
from squisher_mergekit.training.masked import MaskCallback, MaskedTraining
from squisher_mergekit.training.writing import save_squisher

__all__ = [
    "EWCCallback",
    "FisherAverageCallback",
    "GradientFactors",
    "GradientSquares",
    "LoraRecorder",
    "MaskCallback",
    "MaskedTraining",
    "SquisherCallback",
    "live_squisher",
    "save_squisher",
]

if not TYPE_CHECKING:
    __getattr__ = deprecated_names(__name__, {"FisherAverage": f"{__name__}:FisherAverageCallback"})
