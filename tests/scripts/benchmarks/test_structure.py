"""``scripts.benchmarks.structure``: operations counted as the code does them."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmarks.structure import LARGE, coupled_shapes, operations
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.inputs import Input


@pytest.mark.parametrize("kind", ["rows", "columns", "kron"])
@pytest.mark.parametrize("models", [2, 3])
def test_counted_products_are_those_of_a_merge(kind, models):
    """Matrix products of a real merge, counted by torch, are the operations without systems and eigenvectors."""
    tall, wide, block = 96, 64, 16
    base, *thetas = (torch.randn(tall, wide) for _ in range(models + 1))
    inputs = [Input(theta, torch.rand(tall, wide)) for theta in thetas]
    with FlopCounterMode(display=False) as counter:
        merge_coupled(base, inputs, Structure(kind, block, steps=7), torch.float32)
    others, size = models - 1, tall if kind == "rows" else wide
    solved = size * block**2 * (1 / 3 + 2 * others) if kind != "kron" else (tall + wide) * block**2 * 9
    wanted = operations(kind, tall, wide, models, block, steps=7) - solved
    assert counter.get_total_flops() == pytest.approx(wanted, rel=1e-9)


def test_shapes_are_those_of_the_models():
    """The coupled matrices of Llama-2 7B and 70B have their numbers of weights, less the embedding and norms."""
    sizes = [sum(rows * columns * count for rows, columns, count in coupled_shapes(*each)) for each in LARGE.values()]
    assert [round(size / 1e9, 1) for size in sizes] == [6.6, 68.7]
