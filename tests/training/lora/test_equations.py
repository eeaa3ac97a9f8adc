"""Equations of the recorder: signs, factor of the optimizer's gradients, levels of rows and columns."""

import torch

from squisher_mergekit.training.lora.equations import final_scale, recorded_means, signs, unpack_signs


def test_the_signs_are_fresh_and_balanced():
    """Signs are 1 or -1, repeat for one seed and step, and differ for another seed or step."""
    drawn = [unpack_signs(signs(4001, *key), 4001, torch.float64) for key in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert torch.equal(drawn[0], drawn[1])
    assert set(drawn[0].tolist()) == {-1.0, 1.0}
    for other in drawn[2:]:
        assert abs(float(drawn[0] @ other)) < 4001**0.5 * 5
    assert abs(float(drawn[0].sum())) < 4001**0.5 * 5


def test_the_factor_survives_the_range_of_float32():
    """Gradients of a scaled loss, and vanishing ones, give the factor."""
    for size in (1e-25, 1.0, 1e25):
        raw = torch.tensor([3.0, -1.0, 2.0]) * size
        assert torch.allclose(final_scale(raw, raw * 1e-3), torch.tensor(1e-3))


def test_rows_and_columns_have_one_mean():
    """The common mean is that of both estimates; a side without signal is flat."""
    row, col = recorded_means(torch.tensor([3.0, 9.0, 6.0]), torch.tensor([1.0, 2.0]))
    assert torch.allclose(row.mean(), col.mean())
    assert torch.allclose(row.mean(), torch.tensor((3.0 + 0.5) / 2, dtype=torch.float64))
    row, col = recorded_means(torch.zeros(3), torch.tensor([1.0, 2.0]))
    assert row.tolist() == [0.25] * 3
    assert recorded_means(torch.zeros(3), torch.zeros(2))[0].tolist() == [0.0] * 3
