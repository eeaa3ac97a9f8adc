"""Checks of a Fisher against weights: names and shapes."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.fits import check_headers
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.weights import Weights


@pytest.mark.parametrize("shape", [(8, 3), (4, 3), (8, 4)], ids=["more rows", "fewer rows", "other columns"])
def test_other_shapes_are_refused(shape, tmp_path):
    """A Fisher has the shapes of its weights."""
    save_file({"embed": torch.ones(shape)}, tmp_path / "model.safetensors")
    fisher = Fisher({"embed": torch.ones(5, 3)}, FisherConfig(estimator="empirical", statistic="mean"))
    with pytest.raises(MismatchError, match="must have the weight's shape"):
        check_headers(fisher, Weights(tmp_path))
