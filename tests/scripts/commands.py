"""Commands of scripts/, run like those of a user."""

import os
import subprocess
import sys

from scripts import ROOT


def run(name, *arguments, **variables):
    """Run ``python -m scripts.NAME`` in the root of the repository; return the finished process with its output."""
    command = [sys.executable, "-m", f"scripts.{name}", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
