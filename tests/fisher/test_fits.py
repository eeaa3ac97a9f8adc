"""Checks of a Fisher against weights: names, shapes, embeddings that were resized after training."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import FisherConfig, OptimizerInfo
from squisher_mergekit.fisher.fits import check_headers, with_new_rows
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.weights import Weights

SUM = FisherConfig(
    estimator="squisher", statistic="sum", steps=4, optimizer=OptimizerInfo(initial_accumulator_value=0.5)
)
MEAN = FisherConfig(estimator="empirical", statistic="mean")


def _weights(folder, **shapes):
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return Weights(folder)


@pytest.mark.parametrize("config", [MEAN, SUM], ids=["mean", "Adagrad's sum"])
def test_new_rows_of_embeddings_and_head_count_as_unseen(config, tmp_path, caplog):
    """F is 0 in the rows that were added after training, also where the accumulators start above 0."""
    fisher = Fisher({"embed": torch.full((5, 3), 2.0), "bias": torch.full((5,), 2.0), "norm": torch.ones(3)}, config)
    weights = _weights(tmp_path, embed=(8, 3), bias=(8,), norm=(3,))
    enlarged = with_new_rows(fisher, weights)
    check_headers(enlarged, weights)
    for name in ("embed", "bias"):
        assert torch.equal(enlarged[name][:5], fisher[name])
        assert not enlarged.scaled(name)[5:].any()
    assert torch.equal(enlarged["norm"], fisher["norm"])
    assert "resized from 5 to 8 rows" in caplog.text


@pytest.mark.parametrize("shape", [(4, 3), (8, 4)], ids=["fewer rows", "other columns"])
def test_other_differences_of_shape_stay_refused(shape, tmp_path):
    """Only new rows have a meaning."""
    fisher = Fisher({"embed": torch.ones(5, 3)}, MEAN)
    weights = _weights(tmp_path, embed=shape)
    assert with_new_rows(fisher, weights) is fisher
    with pytest.raises(MismatchError, match="must have the weight's shape"):
        check_headers(fisher, weights)
