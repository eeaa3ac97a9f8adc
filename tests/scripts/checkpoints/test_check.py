"""``scripts.checkpoints.check``: what it says of checkpoints that are read right, read wrong, and refused."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import STATES
from tests.scripts.commands import run

pytestmark = pytest.mark.slow  # each case imports torch and transformers anew


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Run it over real checkpoints, the truth of some tampered with; return its lines by case, and the process."""
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


def test_what_is_read_or_refused_as_wanted_is_said_so(outcomes):
    """A right Fisher is ok; the refusal of a NaN, found on extraction, is as wanted, with the message."""
    lines, _ = outcomes
    assert lines["right"].endswith("ok, 11 tensors")
    assert "refused as wanted: ValuesError: a Fisher must be finite" in lines["nan"]


def test_what_is_wrong_is_said_and_fails(outcomes):
    """One unit in the last place of one entry, another beta2, and reading what must be refused each are WRONG."""
    lines, done = outcomes
    assert "WRONG: model.norm.weight differs in 1 of 16 entries; beta2 is 0.97, not 0.98" in lines["other"]
    assert "WRONG: read, but should be refused: it is wrong" in lines["read"]
    assert done.stdout.splitlines()[-1] == "4 cases, 2 WRONG"
    assert done.returncode == 1


def test_a_folder_without_cases_is_a_usage_error(tmp_path):
    """Nothing to check is no success; the message names the maker."""
    done = run("checkpoints.check", tmp_path)
    assert done.returncode == 2
    assert "scripts.checkpoints.make" in done.stderr
