"""Files of reports and pictures: complete, in new folders, and refused in one line."""

import json

import pytest

from squisher_mergekit.cli.output import config_lines, write_picture, write_report
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig


def test_a_report_makes_its_folders(tmp_path):
    """A report creates its folder and is the only file there. Without a path, nothing is written."""
    write_report(tmp_path / "new" / "folder" / "report.json", {"a": [1, 2]})
    write_report(None, {"a": 1})
    assert json.loads((tmp_path / "new" / "folder" / "report.json").read_text()) == {"a": [1, 2]}
    assert len(list(tmp_path.rglob("*"))) == 3


@pytest.mark.parametrize("write", [lambda file: write_report(file, {}), lambda file: write_picture(file, b"png")])
def test_a_file_that_cannot_be_written_is_refused(tmp_path, write):
    """A folder at the path of the file is refused in one line, without a temporary file."""
    (tmp_path / "taken" / "inner").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"cannot be written to .*taken: .*; choose another file"):
        write(tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["inner", "taken"]


def test_names_and_values_are_aligned():
    """The values of the metadata share a column, and long lists of names are cut."""
    without = {f"layer.{number}": "frozen" for number in range(25)}
    config = FisherConfig(
        estimator="squisher", statistic="ema", steps=5, examples_per_step=64, coverage={"with": 3, "without": without}
    )
    lines = list(config_lines(config, "3 tensors"))
    values = {"squisher ema of the model", "5", "64", "3 tensors", "3 tensors with a Fisher, 25 without"}
    starts = {line.index(value) for line in lines for value in values if line.endswith(f"  {value}")}
    assert len(starts) == 1
    assert lines[-1] == "    and 5 more, listed under coverage in the metadata"
