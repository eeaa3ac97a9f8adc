"""``scripts.checkpoints.check``: its verdicts on right, wrong and refused checkpoints."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import STATES
from tests.scripts.commands import run

pytestmark = pytest.mark.slow  # every case imports torch and transformers again


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run the check over real checkpoints, some with a changed reference; return its lines by case, and the process."""
    folder = tmp_path_factory.mktemp("states")
    for new, old in {"right": "fsdp1_full", "other": "fsdp1_full", "read": "fsdp1_full", "nan": "bad_nan"}.items():
        shutil.copytree(STATES / old, folder / new)
    truth = load_file(folder / "other" / "expected.safetensors")
    truth["model.norm.weight"][3] *= 1 + 2.0**-23
    save_file(truth, folder / "other" / "expected.safetensors")
    for name, change in {"other": {"beta2": 0.98}, "read": {"expect": "refuse:it is wrong"}}.items():
        case = json.loads((folder / name / "case.json").read_text())
        (folder / name / "case.json").write_text(json.dumps(case | change))
    done = run("checkpoints.check", folder)
    return {line.split()[0]: line for line in done.stdout.splitlines()}, done


def test_right_fishers_and_wanted_refusals_pass(outcomes):
    """A right Fisher is ok. A NaN is refused on extraction, and the line says refused as wanted, with the message."""
    lines, _ = outcomes
    assert lines["right"].endswith("ok, 11 tensors")
    assert "refused as wanted: ValuesError: a Fisher must be finite" in lines["nan"]


def test_wrong_results_are_reported_and_fail(outcomes):
    """One unit in the last place, another beta2, and an accepted bad checkpoint are WRONG, and the command fails."""
    lines, done = outcomes
    assert "WRONG: model.norm.weight differs in 1 of 16 entries; beta2 is 0.97, not 0.98" in lines["other"]
    assert "WRONG: read, but should be refused: it is wrong" in lines["read"]
    assert done.stdout.splitlines()[-1] == "4 cases, 2 WRONG"
    assert done.returncode == 1


def test_a_folder_without_cases_is_a_usage_error(tmp_path):
    """A folder without cases is a usage error that names the maker."""
    done = run("checkpoints.check", tmp_path)
    assert done.returncode == 2
    assert "scripts.checkpoints.make" in done.stderr
