"""Merges of linear layers by given factors: rotated ones as a control, and factors that need data as references."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from scripts.experiments.structure_merges import Models, Weights, linear, structured
from squisher_mergekit import Fisher
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.mapping import SIDES, factors_in_memory
from squisher_mergekit.merging.coupling import equations as coupling
from squisher_mergekit.merging.parameters import DAMPING

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
    sides = SIDES if structure == "kron" else (structure,)
    fishers = {}
    for model, squares in models.fishers.items():
        changed: dict[Any, dict[str, Tensor]] = {side: {} for side in sides}
        for side, factors in changed.items():
            for name in matrices(models):
                factors[name] = change(model, f"{name} {side}", _factor(models, model, name, side))
        shapes = {name: tuple(square.shape) for name, square in squares.items()}
        given = factors_in_memory(changed, FactorsInfo(source="estimated", statistic="mean"), shapes)
        metadata = FisherConfig(estimator="squisher", statistic="mean")
        fishers[model] = Fisher(dict(squares), metadata, factors=given)
    return structured(replace(models, fishers=fishers), structure)


def _factor(models: Models, model: str, name: str, side: str) -> Tensor:
    """Return the factors of a matrix that follow from d and v, with the levels of v over its blocks."""
    step, square = models.weights[model][name] - models.base[name], models.fishers[model][name]
    step, square = (part.mT if side == "columns" else part for part in (step, square))
    steps, squares = (part.reshape(-1, min(BLOCK, len(part)), part.shape[-1]) for part in (step, square))
    levels = squares.sum((-2, -1), dtype=torch.float64)
    return coupling.row_factor(steps, squares) * (levels / levels.mean()).float()[:, None, None]


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
        shares = traces / traces.sum()
        over_rows, over_columns = (coupling.Side.of(torch.stack(side), shares) for side in (rows, columns))
        merged = coupling.couple_tiles(start, thetas, over_rows, over_columns, shares, DAMPING["kron"], STEPS)
        result[name] = merged[0, 0]
    return result


def _unit(factor: Tensor) -> Tensor:
    """Return a factor with mean eigenvalue 1."""
    return factor * (len(factor) / factor.trace().clamp_min(torch.finfo(factor.dtype).tiny))
