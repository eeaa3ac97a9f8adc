"""Files of a model of a merge that is a base with a LoRA."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.models.lora.pairs import LoraAdapter, read_lora
from squisher_mergekit.models.weights import Weights


@dataclass(frozen=True)
class LoraFiles:
    """Files of a LoRA and of its base.

    Attributes:
        adapter: The adapter's own tensors.
        base: The base model, W0.
        repo: Id and revision of the adapter on the Hub; None for a local one.
    """

    adapter: Weights
    base: Weights
    repo: tuple[str, str | None] | None = None

    @cached_property
    def lora(self) -> LoraAdapter:
        """The LoRA over the base, read from headers.

        Raises:
            RefusedError: It is no plain LoRA of linear layers, or does not fit the base.
        """
        return read_lora(self.adapter, self.base)

    def keeps(self, name: str) -> bool:
        """Return True for a weight that the adapter does not change; False for all of an adapter of another kind."""
        try:
            return name not in self.lora.touched
        except UnsupportedStateError:  # merged by peft, with a Fisher that the user names
            return False
