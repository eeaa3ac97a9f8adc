"""Merges of linear layers by given factors: rotated ones as a control, and factors that need data as references."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scripts.experiments.structure_merges import DAMPING, Models, Weights, diagonal, linear
from squisher_mergekit.merging.coupling.equations import (
    Side,
    couple_rows,
    couple_tiles,
    row_factor,
    shares_by_trace,
)

BLOCK, STEPS = 128, 10
Change = Callable[[str, str, Tensor], Tensor]
Moments = Mapping[str, tuple[Tensor, Tensor]]


def matrices(models: Models) -> list[str]:
    """Return the names of the matrices of linear layers."""
    return [name for name, origin in models.base.items() if origin.ndim == 2 and ".encoder." in name]


def by_factors(models: Models, structure: str, change: Change) -> Weights:
    """Return the merge by a structure with the package's defaults, whose factors are changed.

    Args:
        models: The models; the sides of their matrices are multiples of the block.
        structure: ``rows``, ``columns`` or ``kron``.
        change: Function from a model, a tensor and factors ``[blocks, b, b]`` to the factors to use.
    """
    found = dict(diagonal(models))
    for name in matrices(models):
        if structure == "kron":
            found[name] = _kron(models, name, found[name], change)
        else:
            found[name] = _rows(models, name, change, turned=structure == "columns")
    return found


def _sides(models: Models, name: str, turned: bool) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Return weights, second moments and base of a matrix, transposed if ``turned``."""
    thetas = {model: weights[name] for model, weights in models.weights.items()}
    squares = {model: fisher[name] for model, fisher in models.fishers.items()}
    if not turned:
        return thetas, squares, models.base[name]
    return _transposed(thetas), _transposed(squares), models.base[name].mT


def _transposed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.mT for key, tensor in tensors.items()}


def _blocks(matrix: Tensor) -> Tensor:
    return matrix.reshape(-1, min(BLOCK, len(matrix)), matrix.shape[-1])


def _rows(models: Models, name: str, change: Change, *, turned: bool) -> Tensor:
    thetas, squares, origin = _sides(models, name, turned)
    kind = "columns" if turned else "rows"
    factors = [
        change(model, f"{name} {kind}", row_factor(_blocks(theta - origin), _blocks(squares[model])))
        for model, theta in thetas.items()
    ]
    traces = torch.stack([_blocks(square).sum((-2, -1), dtype=torch.float64) for square in squares.values()])
    shares = shares_by_trace(traces, torch.ones(len(traces), dtype=torch.float64))
    merged, _ = couple_rows([_blocks(theta) for theta in thetas.values()], factors, shares, DAMPING[kind])
    matrix = merged.reshape(origin.shape)
    return (matrix.mT if turned else matrix).contiguous()


def _kron(models: Models, name: str, start: Tensor, change: Change) -> Tensor:
    sides = []
    for turned, kind in ((False, "rows"), (True, "columns")):
        thetas, squares, origin = _sides(models, name, turned)
        sides.append(
            [
                change(model, f"{name} {kind}", _levelled(theta - origin, squares[model]))
                for model, theta in thetas.items()
            ]
        )
    thetas, squares, _ = _sides(models, name, False)
    traces = torch.stack([square.sum(dtype=torch.float64) for square in squares.values()])
    tiles = _coupled(_tiles(start), [_tiles(theta) for theta in thetas.values()], sides, traces / traces.sum())
    return tiles.transpose(1, 2).reshape(start.shape).contiguous()


def _coupled(start: Tensor, thetas: Sequence[Tensor], sides: Sequence[Sequence[Tensor]], shares: Tensor) -> Tensor:
    """Merge tiles by the factors of both sides."""
    rows, columns = (Side.of(torch.stack(list(factors)), shares) for factors in sides)
    return couple_tiles(start, thetas, rows, columns, shares, DAMPING["kron"], STEPS)


def _levelled(step: Tensor, square: Tensor) -> Tensor:
    """Return factors of blocks of rows, of mean eigenvalue 1 over the matrix."""
    levels = _blocks(square).sum((-2, -1), dtype=torch.float64)
    return row_factor(_blocks(step), _blocks(square)) * (levels / levels.mean()).float()[:, None, None]


def _tiles(matrix: Tensor) -> Tensor:
    height, width = (min(BLOCK, side) for side in matrix.shape)
    return matrix.reshape(len(matrix) // height, height, -1, width).transpose(1, 2)


def rotation(seed: int) -> Change:
    """Return a change that turns each factor by a random rotation, ``Q L Q^T``: the eigenvalues stay."""
    generator = torch.Generator().manual_seed(seed)

    def change(model: str, tensor: str, factors: Tensor) -> Tensor:
        turn = torch.linalg.qr(torch.randn(factors.shape, generator=generator)).Q
        turned: Tensor = turn @ factors @ turn.mT
        return (turned + turned.mT) / 2

    return change


def moments(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the second moments of inputs ``[in, in]`` and output gradients ``[out, out]`` of each linear layer.

    Sums over tokens that are no padding; the gradients are those of each text's loss with its true label.
    """
    model.eval()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        real = batch["attention_mask"].bool()
        with _recorded(model, real, found):
            (model(**batch).loss * len(real)).backward()
        model.zero_grad()
    return found


@contextmanager
def _recorded(model: nn.Module, real: Tensor, found: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Context that adds the moments of one forward and backward pass to ``found``."""

    def hook(name: str, layer: nn.Linear) -> Any:
        if name not in found:
            sides = (layer.in_features, layer.out_features)
            found[name] = (torch.zeros(sides[0], sides[0]), torch.zeros(sides[1], sides[1]))

        def forward(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            _add(found[name][0], given[0].detach()[real])
            output.register_hook(lambda gradient: _add(found[name][1], gradient[real]))

        return layer.register_forward_hook(forward)

    handles = [
        hook(f"{name}.weight", layer)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and ".encoder." in name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _add(total: Tensor, rows: Tensor) -> None:
    """Add the second moments of rows."""
    total.addmm_(rows.mT, rows)


def regmean(models: Models, found: Mapping[str, Moments], off_diagonal: float = 0.9) -> Weights:
    """Return RegMean: ``W = (sum_i W_i G_i) (sum_i G_i)^-1``, G with its off-diagonal entries scaled; else the average.

    Args:
        models: The models.
        found: :func:`moments` of each model.
        off_diagonal: Factor on the entries off the diagonal, 0.9 as published.
    """
    result = dict(linear(models))
    for name in matrices(models):
        total, right = 0.0, 0.0
        for model, weights in models.weights.items():
            gram = found[model][name][0].double() * off_diagonal
            gram.diagonal().div_(off_diagonal)
            total, right = total + gram, right + weights[name].double() @ gram
        result[name] = torch.linalg.solve(total, right, left=False).float()
    return result


def kfac(models: Models, found: Mapping[str, Moments]) -> Weights:
    """Return the merge by K-FAC's factors from data, as MaTS does; tensors that are no matrices are averaged."""
    result = dict(linear(models))
    for name in matrices(models):
        factors = [found[model][name] for model in models.weights]
        traces = torch.stack([a.trace().double() * s.trace().double() for a, s in factors])
        rows, columns = ([_unit(pair[side])[None] for pair in factors] for side in (1, 0))
        thetas = [weights[name][None, None] for weights in models.weights.values()]
        start = result[name][None, None]
        result[name] = _coupled(start, thetas, [rows, columns], traces / traces.sum())[0, 0]
    return result


def _unit(factor: Tensor) -> Tensor:
    """Return a factor with mean eigenvalue 1."""
    return factor * (len(factor) / factor.trace().clamp_min(torch.finfo(factor.dtype).tiny))
