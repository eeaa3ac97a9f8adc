"""Process of ``squisher estimate`` in a group, as torchrun or accelerate starts it."""

import json

from squisher_mergekit.cli.main import main as command


def main(kind, folder, rank, world):
    """Run the command whose arguments are the JSON text ``kind``."""
    command(json.loads(kind), standalone_mode=False)
