"""``scripts.checkpoints.kill``: the judge, and one kill of each verb in each state of its output."""

import pytest

from scripts.checkpoints.kill import FAILURES, judge
from scripts.checkpoints.kill_verbs import Verb
from tests.scripts.commands import run


def _verb(**settings):
    return Verb(lambda out: None, **settings)


@pytest.mark.parametrize(
    ("verb", "now", "before", "whole", "wanted"),
    [
        (_verb(), {}, {}, {"a": "1", "b": "2"}, None),
        (_verb(), {"a": "1", "b": "2"}, {}, {"a": "1", "b": "2"}, None),
        (_verb(), {"a": "1"}, {}, {"a": "1", "b": "2"}, FAILURES[0]),
        (_verb(separate=True), {"a": "1"}, {}, {"a": "1", "b": "2"}, None),
        (_verb(separate=True), {"a": "half"}, {}, {"a": "1", "b": "2"}, FAILURES[0]),
        (_verb(entry=("a",)), {"b": "2"}, {}, {"a": "1", "b": "2"}, None),
        (_verb(entry=("a",)), {"a": "1"}, {}, {"a": "1", "b": "2"}, FAILURES[0]),
        (_verb(), {}, {"old": "0"}, {"old": "0", "a": "1"}, FAILURES[1]),
        (_verb(replaces=True), {"": "half"}, {"": "0"}, {"": "1"}, FAILURES[0]),
    ],
)
def test_a_kill_is_judged(verb, now, before, whole, wanted):
    """A part and a loss are found; an older output, a whole one, and whole files of their own pass."""
    assert judge(verb, now, before, whole) == wanted


@pytest.mark.slow
def test_one_kill_of_each_case_loses_nothing():
    """Each verb is killed once for each state of its output."""
    done = run("checkpoints.kill", "--trials", "35", "--seed", "5")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "35 cases" in done.stdout
