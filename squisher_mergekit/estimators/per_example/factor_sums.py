"""Sums of ``G_n G_n^T`` and ``G_n^T G_n`` over examples, in blocks, from the gradients of linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.per_example.layer_kinds import exact, rule_of
from squisher_mergekit.estimators.per_example.linear_embedding import chunk_of, factors, products
from squisher_mergekit.estimators.per_example.tape import Uses
from squisher_mergekit.fisher.factors.blocks import block_shape, second_moments
from squisher_mergekit.fisher.factors.mapping import SIDES, Side

Sums = dict[nn.Parameter, Tensor]


class FactorSums:
    """Running sums of ``G_n G_n^T`` (rows) and ``G_n^T G_n`` (columns) of the gradients of matrices.

    The diagonal of a sum over the rows is the row sum of the squared gradients. Only linear layers, Conv1D of GPT-2
    included, have per-example gradients here; a parameter that another kind of layer uses gets none.

    Args:
        sides: Parameter -> sides, of the tensor as stored.
        block: Number of consecutive rows (or columns) in a block.

    Attributes:
        sums: Side -> parameter -> sum, ``[blocks, b, b]``, float32 or float64.
        left_out: Parameters that another kind of layer uses; their sums are not whole.
    """

    def __init__(self, sides: Mapping[nn.Parameter, tuple[Side, ...]], block: int) -> None:
        self.block = block
        self.sums: dict[Side, Sums] = {"rows": {}, "columns": {}}
        self.left_out: set[nn.Parameter] = set()
        for parameter, some in sides.items():
            for side in some:
                shape = block_shape(parameter.shape[SIDES.index(side)], block)
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self.sums[side][parameter] = torch.zeros(shape, dtype=dtype, device=parameter.device)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return any(parameter in sums for sums in self.sums.values())

    def __iter__(self) -> Iterator[tuple[nn.Parameter, Side, Tensor]]:
        for side, sums in self.sums.items():
            for parameter, total in sums.items():
                yield parameter, side, total

    def add(self, parameter: nn.Parameter, uses: Uses, size: int) -> None:
        """Add the per-example gradients of a parameter.

        Args:
            parameter: The parameter.
            uses: Calls of its modules; calls without a gradient count as 0.
            size: Number of examples.
        """
        uses = [use for use in uses if use[1].gradient is not None]
        if parameter not in self or not uses:
            return
        if {rule_of(name, call.module) for name, call in uses} != {"matrix"}:
            self.left_out.add(parameter)
            return
        with exact(parameter.device):
            pairs = [factors(call, size) for _, call in uses]
            for start in range(0, size, chunk := chunk_of(parameter)):
                some = slice(start, min(start + chunk, size))
                parts = [products(b[some], a[some]) for b, a in pairs]
                self.add_gradients(parameter, sum(parts[1:], start=parts[0]))

    def add_gradients(self, parameter: nn.Parameter, gradients: Tensor) -> None:
        """Add gradients, ``[n, rows, columns]``."""
        for side, sums in self.sums.items():
            if parameter not in sums:
                continue
            total = sums[parameter]
            matrices = gradients if side == "rows" else gradients.mT
            # One product over all examples: their columns stand side by side.
            wide = matrices.to(total.dtype).transpose(0, 1).flatten(1)
            total.add_(second_moments(wide, self.block))
