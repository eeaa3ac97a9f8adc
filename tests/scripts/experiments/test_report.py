"""What the README says of the experiments is what their results say."""

import pytest

from scripts.experiments import report
from tests.scripts.commands import run


def test_the_readme_says_what_the_results_say(capsys):
    """Every table of an experiment is made from its JSON file, to the digit."""
    assert report.main(["--check"]) == 0, "run python -m scripts.experiments.report"
    assert "the README says what the results say" in capsys.readouterr().out


def test_every_result_is_of_a_full_run():
    """What a quick run found is not shown."""
    found = {name: report.found(name) for name in report.EXPERIMENTS}
    shown = {name: one for name, one in found.items() if one is not None}
    assert shown
    assert {one["tier"] for one in shown.values()} == {"full"}
    assert all(one["experiment"] == name for name, one in shown.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cost"])
def test_a_quick_run_works(name, tmp_path):
    """As a user starts it: the script ends well and writes its file."""
    out = tmp_path / "out.json"
    done = run(f"experiments.{name}", "--quick", "--out", out, "--work", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"tier": "quick"' in out.read_text()
