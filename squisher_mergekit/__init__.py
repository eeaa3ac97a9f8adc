"""Fisher-weighted model merging, with the squared gradients that Adam left in the checkpoint.

``import squisher_mergekit`` costs milliseconds: torch loads when a public name is first used. The import also makes the
merge methods ``squisher`` and ``ubgm_squisher`` known to mergekit.
"""

from squisher_mergekit import _autoload

# Importing mergekit runs this module: it must import nothing more, typing included.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from squisher_mergekit.errors import SquisherError
    from squisher_mergekit.estimators.estimate import estimate_fisher
    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher
    from squisher_mergekit.optimizers.load import extract, load_fisher
    from squisher_mergekit.training.callback import SquisherCallback
    from squisher_mergekit.training.writing import save_squisher

__version__ = "0.1.0"
__all__ = [
    "Fisher",
    "FisherConfig",
    "SquisherCallback",
    "SquisherError",
    "estimate_fisher",
    "extract",
    "load_fisher",
    "save_squisher",
]

_MODULES = {
    "Fisher": "squisher_mergekit.fisher.mapping",
    "FisherConfig": "squisher_mergekit.fisher.config",
    "SquisherCallback": "squisher_mergekit.training.callback",
    "SquisherError": "squisher_mergekit.errors",
    "estimate_fisher": "squisher_mergekit.estimators.estimate",
    "extract": "squisher_mergekit.optimizers.load",
    "load_fisher": "squisher_mergekit.optimizers.load",
    "save_squisher": "squisher_mergekit.training.writing",
}
# Names of version 0.1 that moved; they go with the next version.
_MOVED = {
    "EWCCallback": "squisher_mergekit.training:EWCCallback",
    "EWCPenalty": "squisher_mergekit.applications.ewc:EWCPenalty",
    "FisherAverage": "squisher_mergekit.training:FisherAverageCallback",
    "GradientSquares": "squisher_mergekit.training:GradientSquares",
    "MaskCallback": "squisher_mergekit.training:MaskCallback",
    "MaskedTraining": "squisher_mergekit.training:MaskedTraining",
    "prune": "squisher_mergekit.applications.pruning:prune",
    "prune_files": "squisher_mergekit.applications.pruning:prune_files",
}

_autoload.install()

# A type checker sees the imports above alone, so that it rejects any other name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _MODULES:
            from importlib import import_module

            return getattr(import_module(_MODULES[name]), name)
        if name in _MOVED:
            from squisher_mergekit._deprecated import deprecated_names

            return deprecated_names(__name__, _MOVED, stacklevel=3)(name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
