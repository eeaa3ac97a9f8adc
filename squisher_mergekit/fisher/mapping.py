"""A diagonal Fisher in memory: parameter name -> tensor, loaded when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.tensors.safetensors import TensorInfo, TensorStore


class Fisher(Mapping[str, torch.Tensor]):
    """A diagonal Fisher: a lazy mapping from parameter name (as in ``model.safetensors``) to the raw estimate.

    ``fisher[name]`` is the tensor as it was stored, shaped like the parameter, in units of one squared gradient;
    :meth:`scaled` applies the scale that the metadata imply. Other names of a stored tensor (``lm_head.weight`` of
    tied embeddings) are found too, but are not iterated over.

    Args:
        store: Where the tensors lie.
        config: The metadata.
        aliases: Other name -> name in the store.

    Example:
        >>> from squisher_mergekit.tensors.safetensors import MemoryStore
        >>> store = MemoryStore({"w": torch.tensor([1.0, 4.0])})
        >>> config = FisherConfig(estimator="squisher", statistic="ema", steps=1, optimizer={"beta2": 0.75})
        >>> Fisher(store, config).scaled("w")
        tensor([ 4., 16.])
    """

    def __init__(self, store: TensorStore, config: FisherConfig, aliases: Mapping[str, str] | None = None) -> None:
        self._store = store
        self.config = config
        self.aliases = dict(aliases or {})
        self._moments: dict[Scaling, tuple[float, float]] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        found = self.resolve(name)
        if found is None:
            raise KeyError(name)
        return self._store.read(found)

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.infos)

    def __len__(self) -> int:
        return len(self._store.infos)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.resolve(name) is not None

    def __repr__(self) -> str:
        return f"Fisher({self.config.estimator}, {len(self)} tensors, from {self.location})"

    @property
    def location(self) -> str:
        """Where the tensors lie, for messages."""
        return self._store.location

    def resolve(self, name: str) -> str | None:
        """Return the stored name of a parameter, through ties and aliases; None if there is none."""
        if name in self._store.infos:
            return name
        alias = self.aliases.get(name)
        return alias if alias in self._store.infos else None

    def info(self, name: str) -> TensorInfo:
        """Return shape, dtype and bytes of a tensor without reading it."""
        found = self.resolve(name)
        if found is None:
            raise KeyError(name)
        return self._store.infos[found]

    def factor(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return the scale factor of one parameter (see :meth:`FisherConfig.factor`)."""
        return self.config.factor(self.resolve(name) or name, scaling)

    def offset(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return what has to be taken off every entry of one parameter, rounded as the entries are stored.

        Adagrad's start of 0.7 is 0.69999999 in float32: taking off 0.7 would leave entries below 0.
        """
        return torch.tensor(self.config.offset(scaling), dtype=self.info(name).dtype).item()

    def scaled(self, name: str, scaling: Scaling = "debiased") -> torch.Tensor:
        """Return one tensor at the wanted scale.

        Args:
            name: Parameter name.
            scaling: ``raw``, ``debiased`` (mean square per step) or ``per_example``.

        Returns:
            A new float32 tensor (float64 if stored so), shaped like the parameter.

        Raises:
            KeyError: There is no such parameter.
            ConfigError: A number that the scaling needs is not recorded.
        """
        raw = self[name]
        dtype = torch.promote_types(raw.dtype, torch.float32)
        # The factor of an early step can leave float32 at the ends of its range; one rounding, at the end.
        return rescaled(raw, self.offset(name, scaling), self.factor(name, scaling)).to(dtype)

    def moments(self, scaling: Scaling = "debiased") -> tuple[float, float]:
        """Return mean and L2 norm over all entries, summed in float64 once; the recorded ones where they exist.

        Raises:
            ValuesError: An entry is NaN, infinite or negative.
        """
        config = self.config
        if scaling == "debiased" and config.mean is not None and config.norm is not None:
            return config.mean, config.norm
        if scaling not in self._moments:
            sums = Moments()
            for name in self:
                sums.add(self, name, scaling)
            self._moments[scaling] = (sums.mean, sums.norm)
        return self._moments[scaling]


def rescaled(raw: torch.Tensor, offset: float, factor: float) -> torch.Tensor:
    """Return ``(F - offset) factor`` as a new float64 tensor, see :meth:`Fisher.offset` and :meth:`Fisher.factor`."""
    return raw.to(torch.float64, copy=True).sub_(offset).mul_(factor)


class Moments:
    """Running mean and L2 norm of a Fisher, in float64, a block at a time."""

    BLOCK = 1 << 18  # its float64 copy fits a core's cache

    def __init__(self) -> None:
        self.total = 0.0
        self.squares = 0.0
        self.count = 0

    def add(self, fisher: Fisher, name: str, scaling: Scaling = "debiased", tensor: torch.Tensor | None = None) -> None:
        """Add one tensor, and check its entries.

        Args:
            fisher: Which has it.
            name: Its name.
            scaling: At which scale to add it.
            tensor: Its entries, if they have been read already.

        Raises:
            ConfigError: A number that the scaling needs is not recorded.
            ValuesError: An entry is NaN, infinite or negative.
        """
        offset, factor = fisher.offset(name, scaling), fisher.factor(name, scaling)
        flat = (fisher[name] if tensor is None else tensor).reshape(-1)
        for start in range(0, flat.numel(), self.BLOCK):
            entries = flat[start : start + self.BLOCK]
            low, high = torch.aminmax(entries)
            if not (low.item() >= 0 and high.item() < float("inf")):
                check_values(flat, name, fisher.location)
            block = entries.to(torch.float64)
            if offset:
                block = block - offset
            self.total += block.sum().item() * factor
            self.squares += torch.dot(block, block).item() * factor**2
        self.count += flat.numel()

    @property
    def mean(self) -> float:
        """Mean over all entries added."""
        return self.total / self.count if self.count else 0.0

    @property
    def norm(self) -> float:
        """L2 norm over all entries added."""
        return math.sqrt(self.squares)


def check_values(tensor: torch.Tensor, name: str, location: str) -> None:
    """Refuse NaN, infinite and negative entries.

    Raises:
        ValuesError: There is one; the message says which kind and how many.
    """
    if tensor.numel() == 0:
        return
    low, high = torch.aminmax(tensor)
    if not (low.item() >= 0 and high.item() < float("inf")):
        refuse_invalid(count_invalid(tensor), tensor.numel(), name, location)


def count_invalid(tensor: torch.Tensor) -> torch.Tensor:
    """Return how many entries are NaN, infinite and negative, on the tensor's device (three integers)."""
    return torch.stack([tensor.isnan().sum(), tensor.isinf().sum(), (tensor < 0).sum()])


def refuse_invalid(counts: torch.Tensor, total: int, name: str, location: str) -> None:
    """Refuse a Fisher by what :func:`count_invalid` found.

    Raises:
        ValuesError: A count is not 0; the message says which kind and how many.
    """
    kinds = zip(counts.tolist(), ("NaN", "infinite", "negative"), strict=True)
    found = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    if found:
        raise ValuesError(
            f"a Fisher must be finite and not negative; {name} in {location} has {found} of {total} entries; "
            "use a checkpoint from before training broke"
        )
