"""Cases of layouts that own code writes: made from a live optimizer, and read back."""

import pytest

from scripts.checkpoints.check import check
from scripts.checkpoints.foreign_states import layouts
from scripts.checkpoints.foreign_states.common import keep_case


@pytest.mark.parametrize(
    ("name", "count"), [("bloom_1", 41), ("megatron_core_0", 30), ("neox_0", 40), ("nanogpt_1", 40)]
)
def test_a_case_is_made_and_read(name, count, tmp_path):
    """The second moments of the live optimizer are found under the names of the model."""
    case = layouts.CASES[name]
    keep_case(tmp_path, name, case, case.make(tmp_path, **case.options))
    assert check(tmp_path) == f"ok, {count} tensors"
