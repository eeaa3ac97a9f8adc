"""Sides of a model's matrices whose factors a structure needs."""

from __future__ import annotations

from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FactorsInfo
from squisher_mergekit.fisher.factors.mapping import SIDES, Side, factors_in_memory
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.convert import unchanged_matrices
from squisher_mergekit.models.layouts import layouts_in_memory
from squisher_mergekit.models.parameters import describe, unwrap_model

STRUCTURES = ("rows", "columns", "kron")


def check_settings(factors: str, block: int) -> None:
    """Refuse an unknown structure, or a block that is no whole number.

    Raises:
        ConfigError: An argument is out of its range.
    """
    if factors not in STRUCTURES:
        raise ConfigError(f"factors must be rows, columns or kron, found {factors!r}")
    check_count("block", block)


def check_count(name: str, value: int) -> None:
    """Refuse a number that is not whole and positive.

    Raises:
        ConfigError: The number is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name} of factors must be a whole number >= 1, found {value!r}")


def sides_in_memory(model: nn.Module, factors: str) -> dict[str, tuple[Side, ...]]:
    """Return the sides of each matrix of a model, as stored, that a structure of matrices ``[out, in]`` couples.

    Args:
        model: The model, wrapped or not.
        factors: ``rows``, ``columns``, or ``kron`` for both.

    Returns:
        Name in memory -> sides; without embeddings.

    Example:
        >>> sides_in_memory(nn.Linear(2, 3), "rows")
        {'weight': ('rows',)}
    """
    found: dict[str, tuple[Side, ...]] = {}
    for name, layout in layouts_in_memory(unwrap_model(model)).items():
        if not layout.embedding:
            turned: Side = "columns" if (factors == "columns") != layout.transposed else "rows"
            found[name] = SIDES if factors == "kron" else (turned,)
    return found


def names_on_disk(model: nn.Module, fisher: Fisher) -> dict[str, str]:
    """Return name in memory -> name in a Fisher of the matrices that are saved as they are."""
    described = describe(model, set(fisher))
    if described.adapter is not None:
        return {name: key for name, key in described.adapter.items() if key in fisher}
    return unchanged_matrices(described.checkpoint_names, {name: fisher.info(name).shape for name in fisher})


def attach(model: nn.Module, fisher: Fisher, moments: dict[Side, dict[str, Tensor]], info: FactorsInfo) -> Fisher:
    """Return a Fisher with factors; those of matrices that the Fisher lacks are left out.

    Args:
        model: The model, wrapped or not.
        fisher: The Fisher of the model.
        moments: Side -> name in memory -> blocks.
        info: The metadata.
    """
    names = names_on_disk(model, fisher)
    stored: dict[Side, dict[str, Tensor]] = {
        side: {names[name]: factor.detach().to("cpu").float() for name, factor in some.items() if name in names}
        for side, some in moments.items()
    }
    shapes = {name: fisher.info(name).shape for name in fisher}
    return fisher.with_factors(factors_in_memory(stored, info, shapes, fisher.location))
