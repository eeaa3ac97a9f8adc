"""Diagonal Fisher as a lazy mapping from parameter name to tensor."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from squisher_mergekit.fisher.compact import Compression
from squisher_mergekit.fisher.config import FisherConfig, Scaling
from squisher_mergekit.fisher.encoded import EncodedStore, RankOneStore
from squisher_mergekit.fisher.factors.mapping import Factors, no_factors
from squisher_mergekit.fisher.values import Moments
from squisher_mergekit.fisher.write import to_dtype, write_fisher
from squisher_mergekit.tensors.devices.transfer import moved
from squisher_mergekit.tensors.input_files import expanded
from squisher_mergekit.tensors.read_ahead import FileRange
from squisher_mergekit.tensors.safetensors import MemoryStore, TensorInfo, TensorStore, file_ranges


class Fisher(Mapping[str, torch.Tensor]):
    """Diagonal Fisher: a lazy mapping from parameter name (as in ``model.safetensors``) to the raw estimate.

    ``fisher[name]`` is the stored tensor, shaped like the parameter, in units of one squared gradient. :meth:`scaled`
    applies the scale that the metadata imply. An alias of a stored tensor (``lm_head.weight`` of tied embeddings) is
    found too, but not iterated over.

    Args:
        store: The tensors: a mapping in memory, or a store that reads them.
        config: The metadata.
        aliases: Alias -> name in the store.
        factors: Factors over rows and columns of matrices; None if there are none. They are no entries of the mapping.

    Example:
        >>> config = FisherConfig(estimator="squisher", statistic="ema", steps=1, optimizer={"beta2": 0.75})
        >>> Fisher({"w": torch.tensor([1.0, 4.0])}, config).scaled("w")
        tensor([ 4., 16.])
    """

    def __init__(
        self,
        store: TensorStore | Mapping[str, torch.Tensor],
        config: FisherConfig,
        aliases: Mapping[str, str] | None = None,
        factors: Factors | None = None,
    ) -> None:
        self._store: TensorStore = MemoryStore(store) if isinstance(store, Mapping) else store
        self.factors = factors or no_factors()
        self.config = config.model_copy(update={"factors": self.factors.info})
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
        """Location of the tensors, for messages."""
        return self._store.location

    def resolve(self, name: str) -> str | None:
        """Return the stored name of a parameter or alias, or None."""
        if name in self._store.infos:
            return name
        alias = self.aliases.get(name)
        return alias if alias in self._store.infos else None

    def info(self, name: str) -> TensorInfo:
        """Return the shape, dtype and bytes of a tensor, from its header."""
        found = self.resolve(name)
        if found is None:
            raise KeyError(name)
        return self._store.infos[found]

    def file_ranges(self, name: str) -> list[FileRange]:
        """Return the parts of safetensors files with the bytes of a tensor; none if its store does not tell."""
        found = self.resolve(name)
        return [] if found is None else file_ranges(self._store, found)

    def kept_parts(self, name: str) -> dict[str, torch.Tensor] | None:
        """Return the compact parts in which a tensor is known, by suffix; None for a tensor known entry by entry."""
        return self._store.kept_parts(name) if isinstance(self._store, RankOneStore) else None

    def factor(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return the scale factor of one parameter (see :meth:`FisherConfig.factor`)."""
        return self.config.factor(self.resolve(name) or name, scaling, self.location or "this Fisher")

    def offset(self, name: str, scaling: Scaling = "debiased") -> float:
        """Return the number to subtract from raw entries of one parameter, rounded to their dtype.

        Adagrad's initial value of 0.7 is 0.69999999 in float32: subtracting 0.7 would leave negative entries.
        """
        return torch.tensor(self.config.offset(scaling), dtype=self.info(name).dtype, device="cpu").item()

    def scaled(self, name: str, scaling: Scaling = "debiased") -> torch.Tensor:
        """Return one tensor at a scale.

        Args:
            name: Parameter name.
            scaling: ``raw``, ``debiased`` (mean square per step) or ``per_example``.

        Returns:
            A new float32 tensor (float64 if stored so), shaped like the parameter.

        Raises:
            KeyError: The parameter has no Fisher.
            ConfigError: The scaling needs a number that the metadata lack.
        """
        raw = self[name]
        dtype = torch.promote_types(raw.dtype, torch.float32)
        # The factor of an early step can leave the range of float32: compute in float64 and round once, at the end.
        return rescaled(raw, self.offset(name, scaling), self.factor(name, scaling)).to(dtype)

    def save(
        self, path: str | Path, dtype: torch.dtype | str | None = None, compress: Compression | None = None
    ) -> FisherConfig:
        """Write this Fisher as a portable one, whole or not at all.

        Args:
            path: The folder to make. An existing folder must not hold a Fisher.
            dtype: float32 (default) or bfloat16, of all tensors that are not compact.
            compress: None, or a compact form: ``log8``, ``log4`` (each entry to 4 % or 40 %) or ``rank1`` (row and
                column means).

        Returns:
            The metadata in ``fisher_config.json``: those of this Fisher with mean, norm, encoding and coverage of the
            file.

        Raises:
            ConfigError: An argument is unknown, or ``path`` is a file or already holds a Fisher.
            ValuesError: An entry is NaN, infinite or negative.

        Example:
            >>> import tempfile
            >>> from squisher_mergekit import load_fisher
            >>> fisher = Fisher({"w": torch.tensor([1.0, 4.0])}, FisherConfig(estimator="empirical", statistic="mean"))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     config = fisher.save(f"{folder}/fisher")
            ...     load_fisher(f"{folder}/fisher")["w"]
            tensor([1., 4.])
            >>> config.mean, config.encoding
            (2.5, {'default': 'float32'})
        """
        return write_fisher(self, expanded(path), to_dtype(dtype or torch.float32), compress=compress)

    def with_factors(self, factors: Factors) -> Fisher:
        """Return the same Fisher with other factors."""
        return Fisher(self._store, self.config, self.aliases, factors)

    def on(self, device: torch.device) -> Fisher:
        """Return the same Fisher with tensors on a device, where compact ones are decoded; factors stay."""
        found = copy.copy(self)
        found._store = StoreOnDevice(self._store, device)
        return found

    def without_initial_value(self) -> Fisher:
        """Return the same Fisher less the optimizer's initial accumulator value (Adagrad's)."""
        assert self.config.optimizer is not None
        optimizer = self.config.optimizer.model_copy(update={"initial_accumulator_value": None})
        config = self.config.model_copy(update={"optimizer": optimizer})
        return Fisher(WithoutInitialValue(self), config, self.aliases, self.factors)

    def moments(self, scaling: Scaling = "debiased") -> tuple[float, float]:
        """Return the mean and L2 norm over all entries, from the metadata or else summed once in float64.

        Raises:
            ConfigError: The scaling needs a number that the metadata lack.
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
    """Return ``(F - offset) factor`` as a new float64 tensor (:meth:`Fisher.offset`, :meth:`Fisher.factor`)."""
    return raw.to(torch.float64, copy=True).sub_(offset).mul_(factor)


class StoreOnDevice:
    """Store of another store's tensors on a device."""

    def __init__(self, store: TensorStore, device: torch.device) -> None:
        self._store, self._device = store, device
        self.location, self.infos = store.location, store.infos

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, on the device."""
        if isinstance(self._store, EncodedStore | RankOneStore):
            return self._store.read_to(name, self._device)
        return moved(self._store.read(name), self._device)


class WithoutInitialValue:
    """Store of a sum less its initial value (Adagrad's), which would make a relative error larger than F."""

    def __init__(self, fisher: Fisher) -> None:
        self._fisher = fisher
        self.location = fisher.location
        self.infos = {name: fisher.info(name) for name in fisher}

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, in float32."""
        return self._fisher[name].to(torch.float32) - self._fisher.offset(name)
