"""``density``: the mask of the largest F, and merges of trimmed weights."""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from squisher_mergekit.merging import execution
from squisher_mergekit.merging.density import Ranking, Rows, Trim, seed_of
from squisher_mergekit.merging.execution import merge_squisher, merge_ubgm
from squisher_mergekit.merging.inputs import Input
from squisher_mergekit.merging.mergekit.tasks import permute_rows, shared_rows
from squisher_mergekit.merging.read import load_tensor
from tests.merging.reference import (
    assert_within,
    keep_largest,
    largest,
    squisher_reference,
    ubgm_reference,
)


def test_the_rows_of_a_vocabulary() -> None:
    """The choice is among the shared rows.

    Rows that the base lacks are kept, and rows that the model lacks are dropped.
    """
    rows = shared_rows({0: 0, 1: -1, 2: 1, 3: 2}, {0: 5, 1: 0, 2: 3}, rows=5, axis=0)
    assert [rows.shared.tolist(), rows.unbased.tolist()] == [[0, 2], [3, 4]]
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [4.0, 0.0, 3.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    mask = Trim(torch.zeros(5, 3), scores, 0.5, rows).kept().int().tolist()
    assert mask == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
    across = Trim(torch.zeros(3, 5), scores.t(), 0.5, Rows(rows.shared, rows.unbased, axis=1)).kept().int()
    assert across.t().tolist() == mask


def test_the_inputs_of_the_choice_move_to_a_device() -> None:
    """A loaded Fisher moves to the device of the arithmetic with all tensors of the choice."""
    loaded = load_tensor(
        {"w": torch.rand(3, 5)}, "w", scaling="raw", normalize="none", floor=0.5, fisher_scale=1.0, density=0.5
    )
    rows = Rows(torch.arange(2), torch.arange(2, 3), 0)
    moved = replace(loaded, origin=torch.rand(3, 5), rows=rows).to(torch.device("meta"))
    tensors = [moved.tensor, moved.scores, moved.origin, moved.rows.shared, moved.rows.unbased]
    assert ([t.device.type for t in tensors], moved.rows.axis) == (["meta"] * 5, 0)


class _OneDevice(TorchFunctionMode):
    """Mode that fails when an operation mixes devices, as on a GPU but not on the device `meta`."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim]
        assert len({tensor.device for tensor in tensors}) <= 1, function
        return function(*args, **(kwargs or {}))


def test_an_accelerator_reads_and_moves_no_values() -> None:
    """theta_0 is aligned, chosen by and merged on a device without readable values."""
    seen, fisher = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
    rows = Rows(torch.arange(2, device="meta"), torch.arange(2, 4, device="meta"), 0)
    with _OneDevice():
        base = permute_rows(seen, {0: 1, 1: -1, 2: 0}, 5, axis=0)
        inputs = [
            Input(torch.empty_like(fisher), fisher, trim=Trim(base, fisher, 0.5, given)) for given in (None, rows)
        ]
        for outcome in (merge_squisher(inputs, torch.bfloat16), merge_ubgm(Input(base, None), inputs, 0.0, torch.half)):
            assert (outcome.values.device.type, outcome.values.shape) == ("meta", (5, 4))


SIZE = 2 * execution.CHUNK + 7919


SHARES = (0.2, 0.5, 1.0)


@functools.cache
def _drawn_inputs(size: int, dtype: torch.dtype, levels: int) -> tuple[Tensor, list[Input], list[Tensor]]:
    """Draw models whose F takes few values, so that the choice has ties; return their trimmed weights too."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(size, generator=generator).to(dtype)
    inputs, trimmed = [], []
    for share in SHARES:
        theta = torch.randn(size, generator=generator).to(dtype)
        fisher = torch.randint(0, levels, [size], generator=generator) / levels
        trim = None if share == 1 else Trim(base, fisher, share)
        inputs.append(Input(theta, fisher, 0.5 + share, 1.0, ("w", "f"), trim))
        trimmed.append(keep_largest(theta, base, fisher, share))
    return base, inputs, trimmed


@pytest.mark.parametrize("threads", [1, 3])
def test_the_choice_is_of_the_whole_tensor(threads: int) -> None:
    """The k largest of the whole tensor are kept over several chunks and a pool. Ties go to the first."""
    base, inputs, trimmed = _drawn_inputs(SIZE, torch.bfloat16, levels=11)
    fishers, weights = [item.fisher for item in inputs], [item.weight for item in inputs]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        outcome = merge_squisher(inputs, torch.float32)
        matched = merge_ubgm(Input(base, None), inputs, 0.1, torch.float32)
    finally:
        torch.set_num_threads(before)
    size = largest([base, *(item.theta for item in inputs)])
    assert_within(outcome.values, squisher_reference(trimmed, fishers, weights), size)
    reference = ubgm_reference(base, torch.zeros(SIZE), trimmed, fishers, weights, 0.1)
    assert_within(matched.values, reference, 7 * size)


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("ubgm", [False, True])
def test_the_path_of_an_accelerator_agrees(device: torch.device, ubgm: bool) -> None:
    """The fused pass merges trimmed weights like the chunks, also with a base of another dtype."""
    base, inputs, trimmed = _drawn_inputs(1009, torch.bfloat16, levels=1 << 20)
    there = [_moved(item, base.to(device), device) for item in inputs]
    fishers, weights = [item.fisher for item in inputs], [item.weight for item in inputs]
    size = largest([base, *(item.theta for item in inputs)])
    if ubgm:
        outcome = merge_ubgm(Input(base.to(device), None), there, 0.1, torch.float32)
        reference = ubgm_reference(base, torch.zeros(1009), trimmed, fishers, weights, 0.1)
        assert_within(outcome.values.cpu(), reference, 7 * size)
        return
    wide = base.float() + 1e-4
    there = [_moved(item, wide.to(device), device) for item in inputs]
    trimmed = [keep_largest(i.theta, wide, i.fisher, share) for i, share in zip(inputs, SHARES, strict=True)]
    merged = merge_squisher(there, torch.float32).values.cpu()
    assert_within(merged, squisher_reference(trimmed, fishers, weights), size)


def _moved(item: Input, origin: Tensor, device: torch.device) -> Input:
    """Return an input on a device, trimmed from another base."""
    assert item.fisher is not None
    fisher = item.fisher.to(device)
    trim = None if item.trim is None else Trim(origin, fisher, item.trim.density)
    return Input(item.theta.to(device), fisher, item.weight, 1.0, item.label, trim)


def test_a_base_in_double_precision_is_kept_so() -> None:
    """A float64 base makes the arithmetic float64, so dropped entries have the base's bits."""
    base = torch.tensor([1 / 3, 1 / 7, 1 / 9], dtype=torch.float64)
    fisher = torch.tensor([1.0, 2.0, 3.0])
    one = Input(torch.ones(3), fisher, trim=Trim(base, fisher, 1 / 3))
    assert merge_squisher([one], torch.float64).values.tolist() == [1 / 3, 1 / 7, 1.0]


def test_random_scores_are_the_same_inside_another_default(device: torch.device) -> None:
    """The numbers are drawn in host memory also by mergekit's workers for several GPUs."""
    trim = Trim(torch.zeros(7, 3), torch.zeros(7, 3), 0.5, ranking=Ranking("random", seed=5))
    expected = trim.ranked()
    there = replace(trim, origin=trim.origin.to(device), scores=trim.scores.to(device))
    with torch.device("meta"):
        found = [block.cpu() for block in there.blocks()]
    torch.testing.assert_close(torch.cat(found).reshape(7, 3), expected, rtol=0, atol=0)


def test_tensors_and_models_draw_random_numbers_of_their_own() -> None:
    """No two of 400 tensors have the same random order, though torch's generator looks at 32 bits of a seed alone."""
    fisher = torch.zeros(7)
    seeds = [seed_of(f"layers.{layer}.up.weight", place) for layer in range(200) for place in range(2)]
    drawn = {tuple(Ranking("random", seed=seed).scores(fisher, fisher, slice(0, 7)).tolist()) for seed in seeds}
    assert len(drawn) == 400
