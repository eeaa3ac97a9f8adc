"""Sweep of merges over architectures of transformers."""

from collections import Counter

import pytest

from scripts.checkpoints.architectures import KINDS
from scripts.checkpoints.sweep import sweep


@pytest.mark.slow
def test_no_merge_loses_a_weight():
    """At least 40 architectures load whole after a merge and equal Eq. 13; none is half written."""
    outcomes = list(sweep())
    assert [outcome for outcome in outcomes if outcome.verdict == "WRONG"] == []
    assert len(outcomes) == sum(map(len, KINDS.values())) >= 40
    assert Counter(outcome.verdict for outcome in outcomes)["whole"] >= 40


@pytest.mark.parametrize("name", ["Dinov2ForImageClassification", "SiglipModel", "ResNetForImageClassification"])
def test_a_model_that_mergekit_would_lose_is_whole(name):
    """Layers with another name on disk than in memory, two towers, and a class without token embeddings are merged."""
    outcome = next(sweep([name]))
    assert outcome.verdict == "whole", outcome
