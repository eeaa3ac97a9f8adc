"""Fisher-weighted model merging, with the squared gradients that Adam left in the checkpoint.

Importing the package costs milliseconds: it makes the merge methods ``squisher`` and ``ubgm_squisher``
known to mergekit (whenever mergekit is imported) and loads torch only when a public name is first used.
"""

from squisher_mergekit import _autoload

# This runs whenever mergekit is imported: it must import nothing more, typing included.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from squisher_mergekit.applications.ewc.penalty import EWCPenalty
    from squisher_mergekit.applications.pruning.files import prune_files
    from squisher_mergekit.applications.pruning.modules import prune
    from squisher_mergekit.estimators.estimate import estimate_fisher
    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher
    from squisher_mergekit.optimizers.load import extract, load_fisher
    from squisher_mergekit.training.average import FisherAverage
    from squisher_mergekit.training.callback import SquisherCallback
    from squisher_mergekit.training.ewc import EWCCallback
    from squisher_mergekit.training.gradients import GradientSquares
    from squisher_mergekit.training.masked import MaskCallback, MaskedTraining
    from squisher_mergekit.training.writing import save_squisher

__version__ = "0.1.0"
__all__ = [
    "EWCCallback",
    "EWCPenalty",
    "Fisher",
    "FisherAverage",
    "FisherConfig",
    "GradientSquares",
    "MaskCallback",
    "MaskedTraining",
    "SquisherCallback",
    "__version__",
    "estimate_fisher",
    "extract",
    "load_fisher",
    "prune",
    "prune_files",
    "save_squisher",
]

_HOMES = {
    "EWCCallback": "squisher_mergekit.training.ewc",
    "EWCPenalty": "squisher_mergekit.applications.ewc.penalty",
    "Fisher": "squisher_mergekit.fisher.mapping",
    "FisherAverage": "squisher_mergekit.training.average",
    "FisherConfig": "squisher_mergekit.fisher.config",
    "GradientSquares": "squisher_mergekit.training.gradients",
    "MaskCallback": "squisher_mergekit.training.masked",
    "MaskedTraining": "squisher_mergekit.training.masked",
    "SquisherCallback": "squisher_mergekit.training.callback",
    "estimate_fisher": "squisher_mergekit.estimators.estimate",
    "extract": "squisher_mergekit.optimizers.load",
    "load_fisher": "squisher_mergekit.optimizers.load",
    "prune": "squisher_mergekit.applications.pruning.modules",
    "prune_files": "squisher_mergekit.applications.pruning.files",
    "save_squisher": "squisher_mergekit.training.writing",
}

_autoload.install()


def __getattr__(name: str) -> "Any":
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
