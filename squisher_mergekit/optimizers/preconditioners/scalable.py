"""Recognition of ScalableShampoo of pytorch_optimizer, which keeps a factor over each side of each tile of a matrix.

Its state has two objects of its own: ``pre_conditioner`` with the factors, and ``graft``, which keeps squared gradients
if the optimizer grafts by RMSProp or AdaGrad. A file is read with inert stand-ins for both. The factor over a block of
rows is the sum over the tiles in the block, ``G G^T = sum_c G_c G_c^T``.

The state does not tell after how many steps the factors were updated (``statistics_compute_steps``). One step is
assumed, the optimizer's default; it matters for the diagonal of short runs alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.preconditioners.sums import FromSums, Preconditioned, Sums, square_matrix
from squisher_mergekit.optimizers.second_moments import Moment

KEYS = {"pre_conditioner", "graft"}
_CLASS = "ScalableShampoo"
_WHY = "ScalableShampoo keeps none of a tensor without factors, unless it grafts by RMSProp or AdaGrad"


@dataclass(frozen=True)
class Tiles:
    """Factor over one side of a matrix, in blocks, from those of its tiles.

    Attributes:
        tiles: Factor of each tile, ``[b, b]``; the tiles of a block follow one another, and the last block is smaller.
        across: Number of tiles of a block.

    Example:
        >>> Tiles((torch.ones(2, 2), torch.ones(2, 2), torch.ones(1, 1), torch.ones(1, 1)), across=2).read()[1]
        tensor([[2., 0.],
                [0., 0.]])
    """

    tiles: tuple[Tensor, ...]
    across: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the factor, ``[blocks, b, b]``."""
        width = len(self.tiles[0])
        return torch.Size((len(self.tiles) // self.across, width, width))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the entries."""
        return self.tiles[0].dtype

    @property
    def parts(self) -> Sequence[Tensor]:
        """The factors of the tiles."""
        return self.tiles

    def read(self) -> Tensor:
        """Return the factor, the last block padded with zeros."""
        factor = torch.zeros(self.shape, dtype=self.dtype, device=self.tiles[0].device)
        for number, tile in enumerate(self.tiles):
            factor[number // self.across, : len(tile), : len(tile)] += tile
        return factor


def scalable_shampoo(state: Mapping[str, Any], group: Mapping[str, Any], location: str) -> Preconditioned:
    """Read the state of one parameter of ScalableShampoo.

    Args:
        state: The optimizer's state of the parameter, with :data:`KEYS`.
        group: The settings of its parameter group.
        location: File and index, for messages.

    Raises:
        CorruptFileError: The parts of the state do not belong together.
    """
    found, graft = vars(state["pre_conditioner"]), state["graft"]
    shape = tuple(int(size) for size in found["original_shape"])
    beta2 = float(found["beta2"])
    of_factors = _kind("pre_conditioner", None if beta2 == 1 else beta2)
    sides = _sides(found, shape, location)
    factors, initial = (None, None) if sides is None else sides, 0.0 if sides is None else float(found["matrix_eps"])
    squares = vars(graft).get("statistics")
    if squares is not None:
        if type(squares) is not Tensor or not squares.is_floating_point() or tuple(squares.shape) != shape:
            raise CorruptFileError(f"the squares of {location} must be a tensor of its shape; save it again")
        moment = _kind("graft", None if type(graft).__name__ == "AdaGradGraft" else float(group["betas"][1]))
        return Preconditioned(moment, squares, factors, shape, initial=initial, of_factors=of_factors)
    if sides is None:
        return Preconditioned(of_factors, None, factors, shape, lacking=_WHY)
    left = initial * beta2 ** int(group["step"])
    rows, columns = (Sums(side, axis, initial=left * side.across, size=shape[axis]) for axis, side in enumerate(sides))
    return Preconditioned(of_factors, FromSums(rows, columns, torch.Size(shape)), factors, shape, initial=initial)


def _kind(key: str, decay: float | None) -> Moment:
    """Return the kind of a moving average, or of a sum, which has no decay."""
    return Moment(key, "sum" if decay is None else "ema", decay, _CLASS, decoupled=True)


def _sides(found: Mapping[str, Any], shape: tuple[int, ...], location: str) -> tuple[Tiles, Tiles] | None:
    """Return the factors over the rows and over the columns of a matrix; None if both axes are not preconditioned."""
    axes, rank = [int(size) for size in found["transformed_shape"]], int(found["rank"])
    if len(shape) != 2 or not len(found["statistics"]) or rank != len(axes):
        return None
    sizes = {int(axis): [int(size) for size in each] for axis, each in vars(found["partitioner"])["split_sizes"]}
    cuts = [sizes.get(axis, [size]) for axis, size in enumerate(axes)]
    wide = (rank - 2, rank - 1)  # axes of size 1 stand before a side that is longer than a block
    if tuple(axes[rank - 2 :]) != shape or math.prod(axes) != math.prod(shape):
        return None
    count = math.prod(map(len, cuts))
    if len(found["statistics"]) != count * rank:
        raise CorruptFileError(
            f"{location} must have {count * rank} factors of its tiles, found {len(found['statistics'])}; save it again"
        )
    down, across = (len(cuts[axis]) for axis in wide)
    made = []
    for place, axis in enumerate(wide):
        order = [(r, c) for r in range(down) for c in range(across)]
        order.sort(key=lambda tile, place=place: (tile[place], tile[1 - place]))  # type: ignore[misc]
        tiles = [square_matrix(found["statistics"][(r * across + c) * rank + axis], location) for r, c in order]
        wanted = [cuts[axis][tile[place]] for tile in order]
        if [len(tile) for tile in tiles] != wanted or any(size != wanted[0] for size in cuts[axis][:-1]):
            raise CorruptFileError(f"the factors of {location} must have the sizes of its tiles; save it again")
        made.append(Tiles(tuple(tiles), (across, down)[place]))
    return made[0], made[1]
