"""The group ``squisher``: its help is a static table, so that no verb is imported before it is used."""

from __future__ import annotations

from importlib import import_module

import click

from squisher_mergekit import __version__

# verb -> (module in this folder that holds it as `command`, its line in the group's help)
VERBS = {
    "extract": ("extract", "Read the optimizer state of a checkpoint into a Fisher."),
    "inspect": ("inspect", "Show what a Fisher holds: config, coverage, a table of its tensors."),
    "estimate": ("estimate", "Estimate a Fisher from data, where there is no optimizer state."),
    "compare": ("compare", "Show how two Fishers agree: rank correlation, scale, zeros."),
    "push": ("push", "Publish a Fisher on the Hugging Face Hub."),
    "pull": ("pull", "Fetch a Fisher from the Hugging Face Hub."),
    "plan": ("plan", "Check a merge strictly and show what it would do, without doing it."),
    "merge": ("merge", "Check a merge, run it with mergekit, and report on it."),
    "prune": ("prune", "Make the weights 0 that matter least, by their Fisher."),
    "mask": ("mask", "FISH masks: choose the weights that matter most, take the others back."),
    "task2vec": ("task2vec", "Tasks as vectors: embed Fishers, compare tasks, rank sources for a target."),
    "doctor": ("doctor", "Say whether a merge can run here, and what would stop it."),
}

HELP = """Fisher-weighted model merging for mergekit.

Adam keeps a running mean of the squared gradient of every parameter: the Squisher, an estimate of the diagonal Fisher
information. A merge that weighs each entry by it keeps what each model has learned there. After the installation
mergekit-yaml itself knows the methods squisher and ubgm_squisher. The verbs below make Fishers from checkpoints, look
at them, and check merges before they run.

\b
Example:
  squisher extract runs/math/checkpoint-500 -o fishers/math
  squisher inspect fishers/math
  squisher plan merge.yml
  mergekit-yaml merge.yml merged
"""


class LazyGroup(click.Group):
    """A group whose commands are named by ``VERBS`` and imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order of their table."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb, or return None where there is none of this name."""
        if cmd_name not in VERBS:
            return None
        module, _ = VERBS[cmd_name]
        command: click.Command = import_module(f"squisher_mergekit.cli.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the table of verbs without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(verb, line) for verb, (_, line) in VERBS.items()])


@click.command("squisher", cls=LazyGroup, help=HELP)
@click.version_option(__version__, prog_name="squisher")
def main() -> None:
    """Run one verb."""
