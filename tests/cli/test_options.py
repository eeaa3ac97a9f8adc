"""Every output of every command is looked at before any work."""

import click
import pytest
from click.testing import CliRunner

from squisher_mergekit.cli.main import main
from squisher_mergekit.cli.options import OutputFile, OutputFolderPath

NAMES = {"out", "plot", "json_file", "report_file", "csv"}


def _commands(command=main, path=()):
    """Yield path and command of every command that is no group."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from _commands(command.get_command(context, name), (*path, name))
    else:
        yield path, command


OUTPUTS = [
    (path, option) for path, command in _commands() for option in command.params if option.name in NAMES
]  # fmt: skip


@pytest.mark.parametrize(("path", "option"), OUTPUTS, ids=[" ".join((*p, o.name)) for p, o in OUTPUTS])
def test_every_output_is_checked_before_the_work(path, option, tmp_path):
    """A place below a file is refused by the option itself, before the command reads its inputs."""
    assert isinstance(option.type, OutputFile | OutputFolderPath)
    (tmp_path / "file").touch()
    inputs = [str(tmp_path / "file")] * 2 if path == ("merge",) else []
    given = [inputs[0], str(tmp_path / "file" / "out")] if option.name == "out" and inputs else inputs
    if isinstance(option, click.Option):
        given = [*given, option.opts[-1], str(tmp_path / "file" / "out")]
        if path == ("merge",):
            given[1] = str(tmp_path / "merged")
    found = CliRunner().invoke(main, [*path, *given])
    assert found.exit_code == 1, found.output
    assert "file/out: Not a directory; choose another" in found.output
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_output_in_the_place_of_an_input(tmp_path):
    """A report does not replace the configuration that it is about."""
    (tmp_path / "merge.yml").write_text("models: []")
    for option in ("--json", "--report"):
        given = ["plan", str(tmp_path / "merge.yml"), option, str(tmp_path / "x" / ".." / "merge.yml")]
        found = CliRunner().invoke(main, given)
        assert "each output must have a name of its own" in found.output
    assert (tmp_path / "merge.yml").read_text() == "models: []"


def test_two_outputs_of_one_name(tmp_path):
    """The second would replace the first; a device may be given twice."""
    both = ["--json", str(tmp_path / "x"), "--plot", str(tmp_path / "x")]
    found = CliRunner().invoke(main, ["inspect", str(tmp_path / "nowhere"), *both])
    assert "each output must have a name of its own" in found.output
    found = CliRunner().invoke(main, ["inspect", "nowhere", "--json", "/dev/null", "--plot", "/dev/null"])
    assert "a Fisher must be a file, a folder or a Hub id" in found.output
