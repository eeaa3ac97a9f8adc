"""Parts of fused tensors: joined by rows in the table's order, and refused where one is missing or differs."""

from dataclasses import replace

import pytest
import torch

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.optimizers.second_moments import moment_of
from squisher_mergekit.optimizers.slots import OptimizerSlot
from squisher_mergekit.optimizers.translation.fused import fused
from squisher_mergekit.tensors.lazy import read

MOMENT = moment_of({"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}, {"betas": (0.9, 0.99)}, "a test")


def _slot(name, rows, columns=3, steps=5):
    tensor = torch.full((rows, columns), float(rows))
    return OptimizerSlot(0, name, MOMENT, tensor, steps, tuple(tensor.shape), momentum=tensor)


def test_parts_are_joined_whatever_their_order(tmp_path):
    """Names that are sorted put keys before queries, even in another group; the table's order counts."""
    groups = [[((1, 2), _slot("qk", 2)), (None, _slot("other", 1))], [((0, 2), _slot("qk", 4))]]
    first, second = fused(groups, tmp_path)
    assert [slot.name for slot in (*first, *second)] == ["qk", "other"]
    assert read(first[0].tensor)[:, 0].tolist() == [4, 4, 4, 4, 2, 2]
    assert first[0].shape == (6, 3)
    assert first[0].momentum is None


def test_parts_that_were_never_stepped_stay_without(tmp_path):
    """A frozen fused tensor has no part with a second moment."""
    parts = [((k, 2), OptimizerSlot(k, "qk")) for k in (0, 1)]
    ((slot,),) = fused([parts], tmp_path)
    assert slot.tensor is None


@pytest.mark.parametrize(
    "parts",
    [
        [_slot("qk", 2)],
        [_slot("qk", 2), _slot("qk", 2, steps=6)],
        [_slot("qk", 2), _slot("qk", 2, columns=4)],
        [_slot("qk", 2), replace(_slot("qk", 2), tensor=None)],
    ],
)
def test_other_parts_are_refused(parts, tmp_path):
    """A missing part, other steps, other columns, and a part without a second moment make up no tensor."""
    with pytest.raises(MismatchError, match="qk"):
        fused([[((k, 2), part) for k, part in enumerate(parts)]], tmp_path)
