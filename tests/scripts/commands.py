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


def plant(folder, module, *statements):
    """Run statements in each process just before it imports a module; its PYTHONPATH must be ``folder``.

    Trials of the fuzzers run in other processes, so a module that Python imports at its start plants a fault in them.
    """
    lines = "".join(f"            {statement}\n" for statement in statements)
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        f"{lines}"
        "sys.meta_path.insert(0, Finder())\n"
    )
