"""Cases of layouts that own code writes: made from a live optimizer, and read back."""

import pytest

from scripts.checkpoints.check import check
from scripts.checkpoints.foreign_states import layouts
from scripts.checkpoints.foreign_states.common import keep_case


@pytest.mark.parametrize("name", ["nanotron_1", "megatron_core_0"])
def test_a_case_is_made_and_read(name, tmp_path):
    """The second moments of the live optimizer are found under the names of the model."""
    case = layouts.CASES[name]
    keep_case(tmp_path, name, case, case.make(tmp_path, **case.options))
    assert check(tmp_path) == "ok, 30 tensors"
