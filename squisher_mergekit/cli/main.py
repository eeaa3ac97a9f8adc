"""The group ``squisher``, whose help is a static table, so that it imports no command."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from squisher_mergekit import __version__
from squisher_mergekit.cli.options import ARGUMENTS, HELP_OPTIONS

# Name of a command -> (module in this folder that defines it as `command`, line in the help of the group).
VERBS = {
    "extract": ("extract", "Convert the optimizer state of a checkpoint to a Fisher."),
    "inspect": ("inspect", "Show metadata, coverage and a table of the tensors of a Fisher."),
    "estimate": ("estimate", "Estimate a Fisher from data, without optimizer state."),
    "compare": ("compare", "Compare two Fishers: rank correlation, scale, zeros."),
    "push": ("push", "Publish a Fisher on the Hugging Face Hub."),
    "pull": ("pull", "Download a Fisher from the Hugging Face Hub."),
    "new": ("new", "Draft the configuration of a merge, with what was found."),
    "plan": ("plan", "Check a merge strictly and preview it."),
    "merge": ("merge", "Check a merge, run it with mergekit, and print a report."),
    "sweep": ("sweep", "Merge a grid of parameters, score each merge, keep the best."),
    "prune": ("prune", "Set the least important weights to 0, by their Fisher."),
    "mask": ("mask", "FISH masks: keep the most important weights, reset the others."),
    "task2vec": ("task2vec", "Embed tasks as vectors, compare them, rank sources for a target."),
    "doctor": ("doctor", "Check whether a merge can run in this environment."),
}

HELP = """Fisher-weighted model merging for mergekit.

Adam keeps a running mean of the squared gradient of every parameter: the Squisher, an estimate of the diagonal Fisher
information. A merge that weighs each entry by its Fisher keeps more of each model's training. The installation adds the
merge methods squisher and ubgm_squisher to mergekit-yaml. The commands below make Fishers, inspect them, and check
merges before they run.

\b
Example:
  squisher extract runs/math/checkpoint-500 -o fishers/math
  squisher inspect fishers/math
  squisher plan merge.yml
  mergekit-yaml merge.yml merged

\b
Shell completion, for bash (in ~/.bashrc; zsh_source and fish_source for other shells):
  eval "$(_SQUISHER_COMPLETE=bash_source squisher)"

\b
Exit codes: 0 done; 1 refused, with one line that names requirement, place and cure; 2 usage.
"""


class LazyGroup(click.Group):
    """Group with the commands in ``VERBS``, which imports a command on its first use."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; a signal that ends it removes its temporary files."""
        from squisher_mergekit.tensors.temporary import ENDINGS, cleaned_up_at_signals

        with cleaned_up_at_signals(ENDINGS):
            return super().main(*args, **kwargs)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; an empty one, of a shell variable that is not set, would name the working directory.

        Raises:
            UsageError: An argument or the value of an option is empty.
        """
        ctx.meta[ARGUMENTS] = tuple(args)
        for place, argument in enumerate(args):
            if not argument or (argument.startswith("--") and argument.find("=") == len(argument) - 1):
                before = f" after {args[place - 1]}" if not argument and place else f": {argument}" if argument else ""
                raise click.UsageError(
                    f"no argument may be empty, found one{before}; is a shell variable not set?", ctx
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error of the operating system about a path becomes one line.

        Raises:
            RefusedError: A path cannot be read.
        """
        from squisher_mergekit.errors import RefusedError

        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.filename is None:  # such as the end of the pipe that reads the output, which click knows
                raise
            raise RefusedError(
                f"every path must be one that can be read, but {error.filename!s:.200}: {error.strerror}; give another "
                "path, or allow its use"
            ) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command, or return None for an unknown name."""
        if cmd_name not in VERBS:
            return None
        module, _ = VERBS[cmd_name]
        command: click.Command = import_module(f"squisher_mergekit.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of commands without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command or an option without importing any command."""
        commands = [CompletionItem(verb, help=line) for verb, (_, line) in VERBS.items() if verb.startswith(incomplete)]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]


@click.command("squisher", cls=LazyGroup, help=HELP, context_settings=HELP_OPTIONS)
@click.version_option(__version__, prog_name="squisher")
def main() -> None:
    """Run one command."""
