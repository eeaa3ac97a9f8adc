"""Options that several commands share, each written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# Every command has these, not only the group: click keeps the help option of a command's first context.
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


class OutputFile(click.Path):
    """Path of a file to write, by one process; with ``-``, standard output, other text goes to standard error."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse one that cannot be written, before any work."""
        from squisher_mergekit.tensors.atomic import is_standard_output, one_writer, text_on_standard_error
        from squisher_mergekit.tensors.writable import check_file

        path = Path(str(super().convert(value, param, ctx)))
        if ctx is not None and not ctx.resilient_parsing:
            check_file(path)
            _refuse_twice(path, ctx)
            ctx.with_resource(text_on_standard_error() if is_standard_output(path) else one_writer(path))
        return path


class OutputFolderPath(click.Path):
    """Path of a folder to write.

    Args:
        file_ending: End of the names that stand for a file; empty if there are none.
    """

    def __init__(self, file_ending: str = "") -> None:
        super().__init__(path_type=Path)
        self.file_ending = file_ending

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; refuse one that cannot be written, before any work."""
        from squisher_mergekit.tensors.writable import check_file, check_folder

        path = Path(str(super().convert(value, param, ctx)))
        if ctx is not None and not ctx.resilient_parsing:
            is_file = self.file_ending and path.suffix == self.file_ending and not path.is_dir()
            (check_file if is_file else check_folder)(path)
        return path


def _refuse_twice(path: Path, ctx: click.Context) -> None:
    """Refuse a file to write that another argument names as well, as an input or as an output.

    Raises:
        OutputError: The command line has the path twice.
    """
    import os

    from squisher_mergekit.errors import OutputError
    from squisher_mergekit.tensors.atomic import is_standard_output, is_stream

    if is_stream(path) and not is_standard_output(path):
        return
    words = [part for word in ctx.meta.get(ARGUMENTS, ()) for part in {word, word.partition("=")[2]} if part]
    if [os.path.realpath(word) for word in words].count(os.path.realpath(path)) > 1:
        raise OutputError(
            f"each output must have a name of its own, but the command names {path} twice; choose another"
        )


FILE = OutputFile(path_type=Path)
FOLDER = OutputFolderPath()
PATH = click.Path(path_type=Path)
ARGUMENTS = f"{__name__}.arguments"  # key of the words of the command line in the context
COUNT = click.IntRange(min=1)


def combined(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    """Return one decorator that adds several options, in the order of the help text."""

    def decorate(function: Command) -> Command:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def choice_option(name: str, values: list[str], text: str, default: str | None = None) -> Callable[[Command], Command]:
    """Return an option with a fixed set of values, which shows its default."""
    return click.option(name, type=click.Choice(values), default=default, show_default=True, help=text)


def out_option(text: str = "Folder to create.", kind: click.Path = FOLDER) -> Callable[[Command], Command]:
    """Return the option for the output."""
    return click.option("-o", "--out", type=kind, required=True, help=text)


def plot_option(text: str) -> Callable[[Command], Command]:
    """Return the option for a picture."""
    return click.option("--plot", type=FILE, help=f"{text} This needs matplotlib.")


def scaling_option(text: str, default: str | None = "debiased") -> Callable[[Command], Command]:
    """Return the option for the scale of F."""
    return choice_option("--scaling", ["raw", "debiased", "per_example"], text, default)


def seed_option(text: str) -> Callable[[Command], Command]:
    """Return the option for the seed of random numbers."""
    return click.option("--seed", type=int, default=0, show_default=True, help=text)


model_option = click.option(
    "--model", type=PATH, help="Folder of the weights, or of their config.json, if the source lacks them."
)
models_option = click.option(
    "--model",
    type=PATH,
    multiple=True,
    help="Folder of the weights, for Fishers from optimizer state; give it once for all, or once for each.",
)
naming_options = combined(
    model_option,
    click.option(
        "--base",
        type=PATH,
        help="Folder of the model before training: for a LoRA (config.json is enough), or to find frozen layers.",
    ),
    click.option("--names", type=PATH, help="Text file of names; line i names the optimizer's parameter i."),
)
dtype_option = choice_option("--dtype", ["float32", "bfloat16"], "Dtype of the file.", "float32")
strict_option = click.option(
    "--strict", is_flag=True, help="Refuse a Fisher that was made at other weights, instead of a warning."
)
allow_missing_option = click.option(
    "--allow-missing-weights",
    "allow_missing",
    is_flag=True,
    help="Write a model without tensors that the merge would lose, with a warning, instead of refusing.",
)
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress bar.")
json_option = click.option(
    "--json", "json_file", type=FILE, help="Also write the report to this file, or to - (stdout)."
)
report_option = click.option(
    "--report", "report_file", type=FILE, help="Also write the report as one HTML file for the browser."
)
report_options = combined(quiet_option, json_option)
