"""Factors of a Fisher as lazy mappings, in memory and in the files of a portable Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, MismatchError
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.blocks import CURE, block_shape, check_factor, from_low_rank
from squisher_mergekit.tensors.read_ahead import FileRange
from squisher_mergekit.tensors.safetensors import MemoryStore, TensorInfo, TensorStore, file_ranges

Side = Literal["rows", "columns"]
SIDES: tuple[Side, ...] = get_args(Side)
VECTORS, LEVEL = ".vectors", ".level"


class SideFactors(Mapping[str, Tensor]):
    """Factors over one side: a lazy mapping from the name of a matrix to its blocks, float32 or bfloat16.

    A factor in low-rank form is decoded on access. Each factor is checked as it is read.

    Args:
        store: The tensors ``NAME.SIDE``, or ``NAME.SIDE.vectors`` and ``NAME.SIDE.level``.
        side: The side.
        sizes: Name -> number of rows (or columns) of the matrix.
    """

    def __init__(self, store: TensorStore, side: Side, sizes: Mapping[str, int]) -> None:
        self._store, self.side, self._sizes = store, side, dict(sizes)

    def __getitem__(self, name: str) -> Tensor:
        size, stored = self._sizes[name], f"{name}.{self.side}"
        if stored in self._store.infos:
            factor = self._store.read(stored)
        else:
            vectors, level = self._store.read(stored + VECTORS), self._store.read(stored + LEVEL)
            check_factor(torch.diag_embed(level), stored + LEVEL, self._store.location)
            factor = from_low_rank(vectors, level, size)
        check_factor(factor, stored, self._store.location)
        return factor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def shape(self, name: str) -> tuple[int, int, int]:
        """Return the shape of a factor, from headers."""
        stored = f"{name}.{self.side}"
        blocks, width = self._store.infos[stored if stored in self._store.infos else stored + VECTORS].shape[:2]
        return blocks, width, width

    def size(self, name: str) -> int:
        """Return the number of rows (or columns) of the matrix."""
        return self._sizes[name]

    def parts(self, name: str) -> list[str]:
        """Return the names of the stored tensors of a factor."""
        stored = f"{name}.{self.side}"
        return [stored] if stored in self._store.infos else [stored + VECTORS, stored + LEVEL]

    def part(self, stored: str) -> Tensor:
        """Return a stored tensor as it is."""
        return self._store.read(stored)

    def nbytes(self, name: str) -> int:
        """Return the bytes of a factor in its file."""
        return sum(self._store.infos[part].nbytes for part in self.parts(name))

    def is_low_rank(self, name: str) -> bool:
        """Return True for a factor in low-rank form."""
        return len(self.parts(name)) == 2


@dataclass(frozen=True)
class Factors:
    """Factors of a Fisher.

    Attributes:
        rows: Factors over the rows.
        columns: Factors over the columns.
        info: The metadata; None if there are no factors.
    """

    rows: SideFactors
    columns: SideFactors
    info: FactorsInfo | None = None

    def __bool__(self) -> bool:
        return bool(len(self.rows) or len(self.columns))

    def side(self, side: Side) -> SideFactors:
        """Return the factors over a side."""
        return self.rows if side == "rows" else self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in their files."""
        return sum(part.nbytes(name) for part in (self.rows, self.columns) for name in part)

    @property
    def names(self) -> list[str]:
        """Names of the matrices with a factor over a side."""
        return list(dict.fromkeys((*self.rows, *self.columns)))


def no_factors() -> Factors:
    """Return the factors of a Fisher without factors."""
    empty = MemoryStore({})
    return Factors(SideFactors(empty, "rows", {}), SideFactors(empty, "columns", {}))


def factors_in_memory(
    factors: Mapping[Side, Mapping[str, Tensor]],
    info: FactorsInfo,
    shapes: Mapping[str, Sequence[int]],
    location: str = "memory",
) -> Factors:
    """Return factors in memory, after a check of their shapes.

    Args:
        factors: Side -> name -> blocks.
        info: The metadata; the names in it are set here.
        shapes: Name -> shape of the matrix.
        location: Source of the factors, for messages.

    Raises:
        MismatchError: A factor is of no matrix, or its shape does not fit it.
    """
    tensors = {f"{name}.{side}": tensor for side, some in factors.items() for name, tensor in some.items()}
    names: dict[str, tuple[str, ...]] = {side: tuple(factors.get(side, {})) for side in SIDES}
    known = info.model_copy(update=names)
    return factors_over(MemoryStore(tensors, location), known, shapes)


@dataclass(frozen=True)
class _Part:
    """Store of some tensors of another store."""

    whole: TensorStore
    infos: Mapping[str, TensorInfo] = field(repr=False)

    @property
    def location(self) -> str:
        return self.whole.location

    def read(self, name: str) -> Tensor:
        return self.whole.read(name)

    def file_ranges(self, name: str) -> list[FileRange]:
        return file_ranges(self.whole, name)


def split_store(store: TensorStore, config: FisherConfig) -> tuple[TensorStore, TensorStore]:
    """Split a store into that of the diagonal and that of the factors, by the names in the metadata.

    Raises:
        CorruptFileError: A factor in the metadata has no tensor.
    """
    if config.factors is None:
        return store, MemoryStore({}, store.location)
    taken: dict[str, TensorInfo] = {}
    for side in SIDES:
        for name in getattr(config.factors, side):
            stored = f"{name}.{side}"
            parts = [stored] if stored in store.infos else [stored + VECTORS, stored + LEVEL]
            missing = next((part for part in parts if part not in store.infos), None)
            if missing is not None:
                raise CorruptFileError(
                    f"each factor in fisher_config.json must have its tensor, but {store.location} lacks {stored}; "
                    "copy the files again"
                )
            taken |= {part: store.infos[part] for part in parts}
    rest = {name: info for name, info in store.infos.items() if name not in taken}
    return _Part(store, rest), _Part(store, taken)


def read_factors(store: TensorStore, config: FisherConfig, shapes: Mapping[str, Sequence[int]]) -> Factors:
    """Return the factors of a portable Fisher, after a check of their headers.

    Args:
        store: The tensors of the factors.
        config: The metadata of the Fisher.
        shapes: Name -> shape of the diagonal.

    Raises:
        CorruptFileError: A tensor is not float32 or bfloat16.
        MismatchError: A factor is of no matrix, or its shape does not fit it.
    """
    if config.factors is None:
        return no_factors()
    for stored, info in store.infos.items():
        if info.dtype not in (torch.float32, torch.bfloat16):
            raise CorruptFileError(
                f"a factor must be float32 or bfloat16, but {stored} in {store.location} is "
                f"{str(info.dtype).removeprefix('torch.')}; {CURE}"
            )
    return factors_over(store, config.factors, shapes)


def factors_over(store: TensorStore, info: FactorsInfo, shapes: Mapping[str, Sequence[int]]) -> Factors:
    """Return the factors in a store, after a check of their shapes.

    Args:
        store: The tensors, ``NAME.SIDE``.
        info: The metadata, with the names.
        shapes: Name -> shape of the matrix.

    Raises:
        MismatchError: A factor is of no matrix, or its shape does not fit it.
    """
    sides: dict[str, Any] = {}
    for axis, side in enumerate(SIDES):
        sizes = {}
        for name in getattr(info, side):
            shape = tuple(shapes.get(name, ()))
            if len(shape) != 2:
                raise MismatchError(
                    f"a factor must be of a matrix with a diagonal, but {name}.{side} in {store.location} is of "
                    f"{'a tensor with shape ' + str(list(shape)) if name in shapes else 'no tensor'}; {CURE}"
                )
            sizes[name] = shape[axis]
        factors = SideFactors(store, side, sizes)
        for name in factors:
            _check_shape(factors, name, store)
        sides[side] = factors
    return Factors(**sides, info=info)


def _check_shape(factors: SideFactors, name: str, store: TensorStore) -> None:
    """Refuse a factor whose shape does not fit its matrix."""
    size, found = factors.size(name), [list(store.infos[part].shape) for part in factors.parts(name)]
    first = found[0]
    fits = len(first) == 3 and tuple(first[:2]) == block_shape(size, first[1])[:2]
    whole = len(found) == 1
    if not (fits and (first[1] == first[2] if whole else found[1] == first[:1] and first[2] <= first[1])):
        blocks = block_shape(size, first[1] if len(first) == 3 and first[1] > 0 else size)
        raise MismatchError(
            f"the factor {name}.{factors.side} of {size} {factors.side} must have a shape such as {list(blocks)}, but "
            f"{store.location} has {' and '.join(map(str, found))}; {CURE}"
        )
