"""Scratch environments: separate interpreters, with or without the packages of this one."""

import os
import site
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

OURS = "squisher_mergekit"
SWITCH = "SQUISHER_MERGEKIT_AUTOLOAD"


@dataclass(frozen=True)
class Environment:
    """Virtual environment without pip."""

    root: Path

    @property
    def python(self) -> Path:
        """Path of its interpreter."""
        return self.root / "bin" / "python"

    @property
    def packages(self) -> Path:
        """Path of its site-packages folder."""
        return self.root / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"

    def run(self, *arguments, path=None, **variables):
        """Run its interpreter outside of the checkout, with only the given variables."""
        return run(self.python, *arguments, cwd=self.root, path=path, **variables)

    def pip(self, *arguments):
        """Run this interpreter's pip for the environment, without a network."""
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def see_dependencies(self, hide=()):
        """Make this environment's packages importable there, except this package, start-up files and hidden ones."""
        seen = self.root / "dependencies"
        seen.mkdir()
        for folder in (*site.getsitepackages(), site.getusersitepackages()):
            for entry in Path(folder).iterdir() if Path(folder).is_dir() else ():
                hidden = OURS in entry.name or entry.suffix in (".pth", ".start")
                hidden = hidden or entry.name.partition("-")[0].partition(".")[0] in hide
                if not hidden and not (seen / entry.name).exists():
                    (seen / entry.name).symlink_to(entry)
        (self.packages / "dependencies.pth").write_text(f"{seen}\n")


def make(root: Path) -> Environment:
    """Create an empty environment."""
    venv.create(root, with_pip=False, symlinks=True)
    return Environment(root)


def run(python, *arguments, cwd, path=None, **variables):
    """Run an interpreter with a clean environment and return its output."""
    environment = {
        key: value for key, value in os.environ.items() if key not in (SWITCH, "PYTHONPATH", "PYTHONWARNINGS")
    }
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [python, *arguments], capture_output=True, text=True, check=False, cwd=cwd, env=environment | variables
    )
