"""``scripts.benchmarks.on_paper``: sizes of real models, and costs that follow from bytes and rates."""

import pytest
import torch

from scripts.benchmarks.on_paper import CARD, FISHER_WIDTH, GB, LLAMAS, Rates, Shape, estimate_memory, merge_cost
from squisher_mergekit.fisher import compact


def test_parameters_are_those_of_the_models():
    """The shapes have the parameters of the published models."""
    assert [shape.parameters for shape in LLAMAS.values()] == [6738415616, 68976648192, 405853388800]


@pytest.mark.parametrize(
    ("dtype", "offload", "fits"),
    [("bf16", False, True), ("bf16", True, True), ("fp32", True, True), ("fp32", False, False)],
)
def test_a_model_of_7_billion_fits_a_card_in_bf16(dtype, offload, fits):
    """Batches of 8 x 512 tokens fit 80 GB in bfloat16, and in float32 if the sums are offloaded."""
    memory = estimate_memory(LLAMAS["Llama-2 7B"], dtype, offload)
    assert (memory.device < CARD * GB) == fits
    assert memory.host == (4 * LLAMAS["Llama-2 7B"].parameters if offload else 0)


@pytest.mark.parametrize("size", [1 << 12, 3 << 13])
def test_bytes_of_a_compact_entry_are_those_of_a_file(size):
    """An entry in log8 takes the bytes of the parts that are written."""
    parts = compact.encode(torch.rand(size) + 0.1, "log8", 4 * size)
    assert sum(part.nbytes for part in parts.values()) == size * FISHER_WIDTH["log8"]


@pytest.mark.parametrize(
    ("rates", "gpu", "bound"),
    [
        (Rates(read=0.2 * GB, decode=1e9), True, "disk, reading"),
        (Rates(read=50 * GB, write=50 * GB, decode=50e9, digest=50e9, link=2 * GB), True, "link"),
        (Rates(write=0.01 * GB), False, "disk, writing"),
        (Rates(core=1e6), False, "CPU"),
    ],
)
def test_the_slowest_resource_is_the_bound(rates, gpu, bound):
    """Seconds are bytes by rates, and the largest of them bounds the merge."""
    shape = Shape(64, 2, 96, 100, 32)
    cost = merge_cost(shape, rates, models=3, gpu=gpu)
    assert cost.bound == bound
    assert cost.seconds["disk, reading"] == pytest.approx(3 * shape.parameters * (2 + 1 + 1 / 32) / rates.read)
    assert cost.seconds["disk, writing"] == pytest.approx(2 * shape.parameters / rates.write)
