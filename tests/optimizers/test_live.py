"""Metadata of a run in training."""

import pytest
import torch

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.optimizers.live import TrainingInfo, squisher_of, states_of
from squisher_mergekit.tensors.sharded import OnRankZero


def test_unknown_facts_add_nothing_to_the_metadata():
    """A run that knows nothing leaves the fields of the metadata as they are, and adds no others."""
    config = FisherConfig(estimator="squisher", statistic="ema", datum="token")
    noted = TrainingInfo().note(config)
    assert set(vars(noted)) == set(FisherConfig.model_fields)
    assert TrainingInfo(datum="example", max_grad_norm=0.5, clipped_share=0.25).note(config).model_dump() == (
        noted.model_copy(update={"clipped_share": 0.25}).model_dump()
        | {"optimizer": {**noted.optimizer.model_dump(), "max_grad_norm": 0.5}}
    )


def test_a_second_moment_of_a_whole_tensor_is_refused():
    """One number for a tensor, as NovoGrad keeps it, is no diagonal: the shapes differ."""
    model = torch.nn.Linear(3, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for parameter in model.parameters():
        optimizer.state[parameter]["exp_avg_sq"] = torch.tensor(0.25)
    with pytest.raises(MismatchError, match="weight"):
        squisher_of(model, [optimizer], states_of(model, [optimizer], OnRankZero()), None, TrainingInfo())
