"""Command group ``squisher``: help without imports, exit codes, and the list of commands."""

import os
import resource
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from squisher_mergekit import __version__
from squisher_mergekit.cli.main import VERBS, main

PROGRAM = Path(sysconfig.get_path("scripts")) / "squisher"
HELP_SECONDS = 0.3


def _cpu_seconds(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_answers_within_0_3_seconds():
    """``squisher --help`` takes less than 0.3 s of CPU time, the best of three runs."""
    assert min(_cpu_seconds([PROGRAM, "--help"]) for _ in range(3)) < HELP_SECONDS


def test_help_imports_no_verb_and_nothing_heavy():
    """The help imports neither torch nor mergekit nor any command."""
    code = (
        "import sys; from squisher_mergekit.cli.main import VERBS, main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "verbs = {f'squisher_mergekit.cli.{module}' for module, _ in VERBS.values()}\n"
        "print('imported:', sorted({'torch', 'mergekit', 'transformers', 'pydantic', *verbs} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"


def test_help_lists_every_verb_with_its_line():
    """The help lists every command with its description."""
    result = CliRunner().invoke(main, ["--help"], terminal_width=200)
    assert result.exit_code == 0
    words = [line.split(maxsplit=1) for line in result.output.splitlines() if line.strip()]
    assert [[verb, line] for verb, (_, line) in VERBS.items()] == words[-len(VERBS) :]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_exists_and_answers_help(verb):
    """Every command can be imported, has its listed name, and prints help."""
    module, _ = VERBS[verb]
    assert find_spec(f"squisher_mergekit.cli.{module}") is not None
    result = CliRunner().invoke(main, [verb, "--help"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: squisher {verb} ")
    assert "\\b" not in result.output
    assert "\n  Example:\n" in result.output or "Example" not in result.output


def _commands(command=main, path=()):
    """Yield the path of every command of the program."""
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from _commands(command.get_command(context, name), (*path, name))


@pytest.mark.parametrize("path", list(_commands()), ids=" ".join)
def test_every_command_shows_an_example_and_answers_the_short_option(path):
    """``-h`` prints the help of ``--help``, with an example that names the command."""
    short, long = (CliRunner().invoke(main, [*path, option]) for option in ("-h", "--help"))
    assert short.exit_code == 0, short.output
    assert short.output == long.output
    assert f"squisher {' '.join(path)}".strip() in short.output.partition("Example:\n")[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell):
    """The completion command of the help prints a script for each shell."""
    script = _completed({"_SQUISHER_COMPLETE": f"{shell}_source"})
    assert "_SQUISHER_COMPLETE" in script


def test_completion_knows_commands_and_options_without_importing_commands():
    """Names of commands come from their table, and options from the command itself."""
    assert _complete("squisher pu") == ["plain,push", "plain,pull"]
    assert "plain,--compress" in _complete("squisher extract --c")
    code = (
        "import sys, click\nfrom squisher_mergekit.cli.main import VERBS, main\n"
        "items = main.shell_complete(click.Context(main), '')\n"
        "verbs = {f'squisher_mergekit.cli.{module}' for module, _ in VERBS.values()}\n"
        "print(len(items), verbs & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{len(VERBS)} set()\n"


def _completed(variables):
    return subprocess.run([PROGRAM], env=os.environ | variables, capture_output=True, text=True, check=True).stdout


def _complete(line):
    words = {"_SQUISHER_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    return _completed(words).splitlines()


def test_version():
    """``--version`` prints the version of the package."""
    assert CliRunner().invoke(main, ["--version"]).output == f"squisher, version {__version__}\n"


@pytest.mark.parametrize("given", ["inspect|", "extract|run|-o|", "extract|run|--out=", "inspect|run|--json|"])
def test_an_empty_argument_is_a_usage_error(given, tmp_path, monkeypatch):
    """A shell variable that is not set does not stand for the working directory."""
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(main, given.split("|"))
    assert found.exit_code == 2
    assert "no argument may be empty, found one" in found.output
    assert not list(tmp_path.iterdir())


def test_unknown_verb_is_a_usage_error():
    """An unknown command exits with 2 and its name."""
    done = subprocess.run([PROGRAM, "extrat"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "extrat" in done.stderr


def test_module_form_needs_no_console_script():
    """The command ``python -m`` runs the group like the console script."""
    code = "from squisher_mergekit.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout
