"""Options that decide who votes on an entry, with which weight, and how far the result goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VoteOptions:
    """Options of the vote on one tensor; with the defaults every model votes by its Fisher.

    Attributes:
        power: Exponent of every F.
        consensus: ``sign`` if only models vote that move in the elected direction, else ``none``.
        trimmed: ``base`` if an entry that is not kept votes for the base value, ``abstain`` if it has no vote.
        density_by: Score that chooses the kept entries: ``fisher``, ``change``, ``magnitude`` or ``random``.
        density_scope: ``tensor`` if each tensor keeps its share, ``model`` for one threshold for the whole model.
        extent: Factor on the step from the base to the result, lambda.
    """

    power: float = 1.0
    consensus: str = "none"
    trimmed: str = "base"
    density_by: str = "fisher"
    density_scope: str = "tensor"
    extent: float = 1.0

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VoteOptions:
        """Return the options in the parameters of a merge, where ``lambda`` is the extent.

        Example:
            >>> VoteOptions.of({"lambda": 1.5, "scaling": "raw"}).extent
            1.5
        """
        known = {key: given[key] for key in cls.__dataclass_fields__ if key in given}
        return cls(**known | ({"extent": given["lambda"]} if "lambda" in given else {}))

    @property
    def elected(self) -> bool:
        """True if a sign is elected."""
        return self.consensus == "sign"

    @property
    def abstain(self) -> bool:
        """True if an entry that is not kept has no vote."""
        return self.trimmed == "abstain"

    @property
    def whole_model(self) -> bool:
        """True if one threshold holds for the whole model."""
        return self.density_scope == "model"

    @property
    def of_origin(self) -> tuple[str, ...]:
        """The options that need theta_0 whatever the densities are, as in the YAML."""
        found = [f"consensus: {self.consensus}"] if self.elected else []
        return (*found, *([f"lambda: {self.extent:g}"] if self.extent != 1 else []))

    @property
    def of_choice(self) -> tuple[str, ...]:
        """The options of the choice of kept entries that differ from the default, as in the YAML."""
        default = VoteOptions()
        names = ("density_by", "density_scope", "trimmed")
        return tuple(
            f"{name}: {getattr(self, name)}" for name in names if getattr(self, name) != getattr(default, name)
        )

    @property
    def given(self) -> tuple[str, ...]:
        """The options that differ from the default, as in the YAML."""
        return (*([f"power: {self.power:g}"] if self.power != 1 else []), *self.of_choice, *self.of_origin)
