"""Metadata of a run in training."""

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.optimizers.live import TrainingInfo


def test_unknown_facts_add_nothing_to_the_metadata():
    """A run that knows nothing leaves the fields of the metadata as they are, and adds no others."""
    config = FisherConfig(estimator="squisher", statistic="ema", datum="token")
    noted = TrainingInfo().note(config)
    assert set(vars(noted)) == set(FisherConfig.model_fields)
    assert TrainingInfo(datum="example", max_grad_norm=0.5, clipped_share=0.25).note(config).model_dump() == (
        noted.model_copy(update={"clipped_share": 0.25}).model_dump()
        | {"optimizer": {**noted.optimizer.model_dump(), "max_grad_norm": 0.5}}
    )
