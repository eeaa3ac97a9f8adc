"""``squisher new`` as a command."""

import yaml
from click.testing import CliRunner

from squisher_mergekit.cli.main import main
from tests.merging.models import base_and_models


def test_the_draft_is_printed_and_planned(tmp_path):
    """Standard output is the YAML alone, and `squisher plan` accepts it."""
    base_and_models(tmp_path, 3)
    models = [str(tmp_path / f"m{i}") for i in (1, 2)]
    done = CliRunner().invoke(main, ["new", *models, "--base", str(tmp_path / "m0"), "--structure", "columns"])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(done.stdout)["parameters"]["structure"] == "columns"
    given = [*models, "--base", str(tmp_path / "m0"), "--structure", "columns", "-o", str(tmp_path / "merge.yml")]
    assert CliRunner().invoke(main, ["new", *given]).stdout == ""
    assert (tmp_path / "merge.yml").read_text() == done.stdout
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "merge.yml")])
    assert planned.exit_code == 0, planned.output


def test_a_refusal_is_one_line(tmp_path):
    """A model without a Fisher is refused, and nothing is printed on standard output."""
    base_and_models(tmp_path, 2)
    done = CliRunner().invoke(main, ["new", str(tmp_path / "m0"), str(tmp_path / "m1")])
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no Fisher for" in done.stderr


def test_an_edited_file_stays(tmp_path):
    """The draft replaces no other content, unless asked to; the same draft is no other content."""
    base_and_models(tmp_path, 3)
    file = tmp_path / "merge.yml"
    given = ["new", *(str(tmp_path / f"m{i}") for i in (1, 2)), "-o", str(file)]
    assert [CliRunner().invoke(main, given).exit_code for _ in range(2)] == [0, 0]
    draft = file.read_text()
    file.write_text(draft.replace("weight: 1.0", "weight: 2.0"))
    refused = CliRunner().invoke(main, given)
    assert refused.exit_code == 1
    assert "merge.yml has other content; choose another file, or give --overwrite" in refused.stderr
    assert "weight: 2.0" in file.read_text()
    assert CliRunner().invoke(main, [*given, "--overwrite"]).exit_code == 0
    assert file.read_text() == draft
