"""The model that another was trained from, by that one's names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import TensorInfo, TensorStore


def renamed(names: Collection[str], base: Collection[str]) -> dict[str, str]:
    """Return name -> the name that a base has for the same tensor, where it differs.

    A model with a head has its trunk in a module of its own, so that all its names begin with ``bert.`` where those of
    the model that was trained without a head do not; or the other way round. Of these three, the rule is taken that
    finds most names.

    Args:
        names: Of the model that was trained.
        base: Those of the base.

    Example:
        >>> renamed(["bert.embed.weight", "classifier.weight"], ["embed.weight"])
        {'bert.embed.weight': 'embed.weight'}
    """
    heads = sorted({name.partition(".")[0] for name in base})
    rules: list[Callable[[str], str]] = [lambda name: name, lambda name: name.partition(".")[2]]
    rules += [lambda name, head=head: f"{head}.{name}" for head in heads]  # type: ignore[misc]
    known = set(base)
    best = max(rules, key=lambda rule: sum(rule(name) in known for name in names))
    own = set(names) & known
    return {name: best(name) for name in names if name not in own and best(name) in known - own}


@dataclass(frozen=True)
class _Renamed:
    """A store whose tensors are asked for by other names."""

    store: TensorStore
    infos: Mapping[str, TensorInfo]
    names: Mapping[str, str]

    @property
    def location(self) -> str:
        """Where it is."""
        return self.store.location

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.store.read(self.names.get(name, name))


def under_names(base: Weights, names: Mapping[str, str]) -> Weights:
    """Return weights under other names.

    Args:
        base: The weights.
        names: New name -> name they have.
    """
    back = {old: new for new, old in names.items()}
    infos = {back.get(name, name): info for name, info in base.infos.items()}
    return base.with_store(_Renamed(base.store, infos, names))


def base_of(base: Weights, tuned: Weights) -> Weights:
    """Return a base by the names of the model that was trained from it (see :func:`renamed`)."""
    return under_names(base, renamed(tuned.infos, base.infos))
