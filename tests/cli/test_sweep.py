"""``squisher sweep`` as a command: real merges, a real evaluation command."""

import csv
import json
import sys

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from squisher_mergekit.cli.main import main
from squisher_mergekit.merging.sources import FisherSources
from tests.merging.models import base_and_models

# A number that differs between merges, without the seconds that torch takes to start.
SCORE = (
    f"""{sys.executable} -c "import sys; print('size', sum(open(sys.argv[1] + '/model.safetensors', 'rb').read()))" """
)


def _sweep(root, *arguments, command=SCORE, quiet=True):
    if not (root / "merge.yml").exists():
        base_and_models(root, 3)
        document = {
            "merge_method": "squisher",
            "base_model": str(root / "m0"),
            "models": [{"model": str(root / f"m{i}")} for i in (1, 2)],
            "parameters": {"structure": "rows", "block": 6},
        }
        (root / "merge.yml").write_text(yaml.safe_dump(document))
    given = [str(root / "merge.yml"), "--eval", f"{command} {{model}}", "-o", str(root / "out"), "--no-copy-tokenizer"]
    return CliRunner().invoke(main, ["sweep", *given, *(["--quiet"] if quiet else []), *arguments])


def test_each_point_is_a_line_and_each_warning_comes_once(tmp_path, caplog):
    """The merges of a sweep are quiet; a user sees points, scores, and what to know about the configuration."""
    (tmp_path / "run").mkdir()
    base_and_models(tmp_path / "run", 3)
    for i in (1, 2):  # the folder of a run, whose last checkpoint is taken with a line
        (tmp_path / f"run{i}").mkdir()
        (tmp_path / "run" / f"m{i}").rename(tmp_path / f"run{i}" / "checkpoint-3")
    models = [{"model": str(tmp_path / f"run{i}")} for i in (1, 2)]
    document = {"merge_method": "squisher", "base_model": str(tmp_path / "run" / "m0"), "models": models}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document))
    done = _sweep(tmp_path, "--grid", "lambda=1,2", quiet=False)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["lambda=1:", "score"], ["lambda=2:", "score"], ["best", "of"]]
    told = [record.getMessage() for record in caplog.records if "is the folder of a run" in record.getMessage()]
    assert len(told) == 2
    assert not [record for record in caplog.records if "effective weight" in record.getMessage()]


def test_the_table_and_the_best_model(tmp_path, monkeypatch):
    """Each point has a line, the best model is that of its own merge, and each Fisher is opened once."""
    opened = []
    read = FisherSources.open

    def count(self, value, model, *rest):
        before = len(self._opened)
        found = read(self, value, model, *rest)
        opened.extend([model.label] * (len(self._opened) - before))
        return found

    monkeypatch.setattr(FisherSources, "open", count)
    done = _sweep(tmp_path, "--grid", "damping=0.01,1", "shares=fisher,uniform")
    assert done.exit_code == 0, done.output
    assert sorted(opened) == [str(tmp_path / "m1"), str(tmp_path / "m2")]
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").read_text().splitlines()))
    assert [(row["damping"], row["shares"]) for row in rows] == [
        ("0.01", "fisher"), ("0.01", "uniform"), ("1", "fisher"), ("1", "uniform"),
    ]  # fmt: skip
    best = max(rows, key=lambda row: float(row["score"]))
    assert f"best of 4: damping={best['damping']}, shares={best['shares']}" in done.output
    assert sum((tmp_path / "out" / "best" / "model.safetensors").read_bytes()) == float(best["score"])
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    kept = yaml.safe_load((tmp_path / "out" / "best" / "mergekit_config.yml").read_text())
    assert str(kept["parameters"]["damping"]) == best["damping"]
    again = _sweep(tmp_path, "--grid", "damping=0.01,1", "shares=fisher,uniform")
    assert again.output.splitlines()[-1] == done.output.splitlines()[-1]


def test_a_failing_command_keeps_the_finished_points(tmp_path):
    """The error is one line, and the table has the points before it."""
    command = f"{SCORE} {{model}} && test ! -e {tmp_path}/stop && touch {tmp_path}/stop && echo 3 #"
    done = _sweep(tmp_path, "--grid", "damping=0.01,1", command=command)
    assert done.exit_code == 1
    assert "the command of --eval must succeed" in done.stderr.splitlines()[-1]
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["scores"] == {"damping=0.01": 3.0}
    assert not (tmp_path / "out" / ".merging").exists()


def test_mistakes_are_refused_before_the_first_merge(tmp_path):
    """A wrong parameter, value, form or command leaves no folder."""
    for arguments, message in (
        (["--grid", "dampin=1"], "did you mean damping"),
        (["--grid", "damping=0.1,x"], "--grid.damping"),
        (["--grid", "damping"], "NAME=VALUE"),
        (["--grid", "damping=0.1", "--eval", "echo 3"], "{model}"),
    ):
        done = _sweep(tmp_path, *arguments)
        assert done.exit_code == 1
        assert message in done.stderr
        assert not (tmp_path / "out").exists()


def test_a_later_point_that_the_plan_refuses(tmp_path):
    """It is named before the first merge, which may take hours, and nothing is written."""
    done = _sweep(tmp_path, "--grid", "structure=diagonal,rows", "density=0.5")
    assert done.exit_code == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Error: the point structure=rows, density=0.5: density of")
    assert not (tmp_path / "out").exists()


def test_a_changed_fisher_is_no_part_of_the_same_sweep(tmp_path):
    """Scores of merges by another Fisher are not taken for those of this one."""
    assert _sweep(tmp_path, "--grid", "damping=1").exit_code == 0
    file = tmp_path / "m1" / "fisher.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(file).items()}, file)
    done = _sweep(tmp_path, "--grid", "damping=1")
    assert (done.exit_code, "one of their files has changed" in done.stderr) == (1, True)


@pytest.mark.parametrize("parameters", [3, [1], "damping"])
def test_parameters_that_are_no_mapping_are_refused(tmp_path, parameters):
    """A damaged configuration is refused in one line before the points of the grid are added."""
    document = {"merge_method": "squisher", "models": [{"model": "a"}, {"model": "b"}], "parameters": parameters}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(document))
    done = _sweep(tmp_path, "--grid", "damping=0.1")
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert "parameters" in done.stderr
    assert not (tmp_path / "out").exists()
