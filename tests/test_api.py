"""Public API: eight names at the root, the rest from its room; a type checker rejects other names."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import squisher_mergekit

ROOT = Path(__file__).parents[1]
NAMES = [
    "Fisher",
    "FisherConfig",
    "SquisherCallback",
    "SquisherError",
    "estimate_fisher",
    "extract",
    "load_fisher",
    "save_squisher",
]
MOVED = {
    "EWCCallback": "squisher_mergekit.training",
    "EWCPenalty": "squisher_mergekit.applications.ewc",
    "FisherAverage": "squisher_mergekit.training:FisherAverageCallback",
    "GradientSquares": "squisher_mergekit.training",
    "MaskCallback": "squisher_mergekit.training",
    "MaskedTraining": "squisher_mergekit.training",
    "prune": "squisher_mergekit.applications.pruning",
    "prune_files": "squisher_mergekit.applications.pruning",
}
MYPY_CONFIG = """
[mypy]
follow_imports = skip
ignore_missing_imports = True
[mypy-squisher_mergekit]
follow_imports = normal
"""


def test_the_root_exports_eight_names():
    """``__all__`` lists the eight public names, and each is an object with a docstring."""
    assert sorted(squisher_mergekit.__all__) == NAMES
    assert set(NAMES) <= set(dir(squisher_mergekit))
    for name in NAMES:
        assert getattr(squisher_mergekit, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    """``hasattr`` and a misspelt import behave as for any module."""
    assert not hasattr(squisher_mergekit, "nothing")
    with pytest.raises(ImportError, match="nothing"):
        importlib.import_module("squisher_mergekit.nothing")


@pytest.mark.parametrize("name", MOVED)
def test_a_moved_name_works_and_names_its_new_import(name):
    """An old name of the root is the object of its new module.

    The warning at the line of the caller has the new import.
    """
    module, _, new_name = MOVED[name].partition(":")
    new_name = new_name or name
    with pytest.warns(DeprecationWarning, match=f"use: from {module} import {new_name}") as caught:
        found = getattr(squisher_mergekit, name)
    assert found is getattr(importlib.import_module(module), new_name)
    assert [warning.filename for warning in caught] == [__file__]


def test_importing_the_package_takes_milliseconds():
    """``import squisher_mergekit`` takes less than 50 ms, the best of five, and imports neither torch nor click."""
    code = (
        "import time; begin = time.perf_counter()\n"
        "import squisher_mergekit; seconds = time.perf_counter() - begin\n"
        "import sys; print(seconds, *{'torch', 'click', 'mergekit', 'pydantic', 'typing'} & set(sys.modules))"
    )
    answers = [
        subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    printed = [answer.stdout.split() for answer in answers]
    assert min(float(seconds) for seconds, *_ in printed) < 0.05
    assert all(loaded == [] for _, *loaded in printed)


@pytest.mark.parametrize(
    ("name", "said"), [("nothing", 'Module has no attribute "nothing"'), ("prune", "no attribute"), ("Fisher", None)]
)
def test_a_type_checker_rejects_other_names(tmp_path, name, said):
    """Mypy rejects a name that the root does not export, and accepts one that it does."""
    (tmp_path / "user.py").write_text(f"import squisher_mergekit\nprint(squisher_mergekit.{name})\n")
    (tmp_path / "mypy.ini").write_text(MYPY_CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--cache-dir", "cache", "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == (0 if said is None else 1), done.stdout + done.stderr
    if said is not None:
        assert said in done.stdout
        assert "user.py:2" in done.stdout
