"""Base model under the names of the model that was trained from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import TensorInfo, TensorStore


def renamed(names: Collection[str], base: Collection[str]) -> dict[str, str]:
    """Return name -> name of the same tensor in a base model, where the two differ.

    A model with a head has its trunk in a submodule, so that names begin with ``bert.``; a model without a head lacks
    the prefix. The rule (no change, prefix removed, prefix added) that finds the most names applies.

    Args:
        names: Names of the trained model.
        base: Names of the base model.

    Example:
        >>> renamed(["bert.embed.weight", "classifier.weight"], ["embed.weight"])
        {'bert.embed.weight': 'embed.weight'}
    """
    heads = sorted({name.partition(".")[0] for name in base})
    rules: list[Callable[[str], str]] = [lambda name: name, lambda name: name.partition(".")[2]]
    rules += [lambda name, head=head: f"{head}.{name}" for head in heads]  # type: ignore[misc]
    known = set(base)
    best = max(rules, key=lambda rule: sum(rule(name) in known for name in names))
    shared = set(names) & known
    return {name: best(name) for name in names if name not in shared and best(name) in known - shared}


@dataclass(frozen=True)
class RenamedStore:
    """Store whose tensors have other names.

    Attributes:
        store: The tensors.
        infos: New name -> header.
        names: New name -> name in ``store``, where the two differ.
    """

    store: TensorStore
    infos: Mapping[str, TensorInfo]
    names: Mapping[str, str]

    @property
    def location(self) -> str:
        """Location of the tensors, for messages."""
        return self.store.location

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.store.read(self.names.get(name, name))


def under_names(base: Weights, names: Mapping[str, str]) -> Weights:
    """Return weights under new names.

    Args:
        base: The weights.
        names: New name -> present name.
    """
    back = {old: new for new, old in names.items()}
    infos = {back.get(name, name): info for name, info in base.infos.items()}
    return base.with_store(RenamedStore(base.store, infos, names))


def base_of(base: Weights, tuned: Weights) -> Weights:
    """Return a base model under the names of the model that was trained from it (see :func:`renamed`)."""
    return under_names(base, renamed(tuned.infos, base.infos))
