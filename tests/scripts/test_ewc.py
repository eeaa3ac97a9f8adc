"""EWC on real digits: the order that ``scripts/experiments/ewc.py`` states beforehand, and a penalty that runs away."""

import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from experiments import ewc  # noqa: E402

pytestmark = pytest.mark.slow


def test_fisher_and_squisher_forget_less_than_their_baselines():
    """Over seeds that lambda was not chosen on, both are ahead of no penalty and of L2 by the margins stated before."""
    seeds = ewc.REPORTED[:2]
    assert not set(seeds) & set(ewc.CHOSEN_ON)
    tasks = {seed: ewc.tasks_of(seed) for seed in seeds}
    end = {
        method: sum(ewc.learn(method, lam, tasks[seed], seed).matrix[-1].mean().item() for seed in seeds) / len(seeds)
        for method, lam in ewc.CHOSEN.items()
    }
    for method in ("fisher", "squisher"):
        assert end[method] > end["none"] + ewc.OVER_NONE, end
        assert end[method] > end["l2"] + ewc.OVER_L2, end


def test_the_optimizers_own_second_moments_run_away(caplog):
    """At a large lambda their ratio of squared gradients explodes, with a warning; a separate average's is bounded."""
    tasks = ewc.tasks_of(ewc.REPORTED[0])
    own = ewc.learn("own", ewc.RUNAWAY, tasks, ewc.REPORTED[0])
    said = caplog.text.count("EWC runs away")
    separate = ewc.learn("squisher", ewc.RUNAWAY, tasks, ewc.REPORTED[0])
    assert said > 0
    assert max(own.ratios) > 1e8
    assert max(separate.ratios) < 1e4
    assert caplog.text.count("EWC runs away") == said
    assert all(math.isfinite(ratio) for ratio in separate.ratios)
    assert own.matrix[-1].mean() > 0.9  # almost without a trace in accuracy
