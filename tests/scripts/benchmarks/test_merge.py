"""``scripts.benchmarks.merge``: tiny models through the real commands, and its table."""

import json

import pytest
from safetensors import safe_open

from scripts.experiments import report
from tests.scripts.commands import run

SMALL = ["--hidden", "36", "--layers", "2", "--intermediate", "47", "--vocab", "61", "--shards", "3", "--repeat", "1"]


def _bench(*arguments):
    return run("benchmarks.merge", *SMALL, *arguments)


@pytest.mark.slow
def test_all_commands_run_and_are_compared(tmp_path):
    """Every command runs on tiny models, at a density as well, and the models stay for the next run."""
    work, file = tmp_path / "work", tmp_path / "report.json"
    done = _bench("--work", str(work), "--json", str(file), "--threads", "1", "--density", "0.2")
    assert done.returncode == 0, done.stderr
    measured = json.loads(file.read_text())
    [found] = measured["measured"]
    assert set(found["samples"]) >= {"read+write", "linear", "squisher", "ubgm_squisher", "squisher trim", "ties trim"}
    for name, [sample] in found["samples"].items():
        assert sample["cpu_s"] > 0
        assert sample["anonymous_gb"] <= sample["rss_gb"]
        # A copy of a few kilobytes can end before its memory is measured.
        assert sample["anonymous_gb"] > 0 or name == "read+write"
    assert "squisher: CPU" in done.stdout
    assert "density: CPU " in done.stdout
    assert "| `ties`, density 0.2 |" in report.block("bench_merge", measured)
    config = json.loads((work / "ties_trim.yml").read_text())
    assert config["base_model"] == str(work / "base")
    assert [entry["parameters"]["density"] for entry in config["models"]] == [0.2, 0.2]
    assert sorted(entry.name for entry in work.iterdir() if entry.is_dir()) == ["a", "b", "base"]
    names = _names(work / "a", "model")
    assert names == _names(work / "a", "fisher")
    assert sum(size for _, size in names) == found["parameters"]
    stamp = (work / "a" / "config.json").stat().st_mtime_ns
    again = _bench("--work", str(work), "--only", "read+write")
    assert again.returncode == 0, again.stderr
    assert (work / "a" / "config.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_a_command_that_fails_stops_the_run(tmp_path):
    """A failed merge prints its output and exits with a non-zero code."""
    done = _bench("--work", str(tmp_path), "--only", "linear", "--options=--no-such-option")
    assert done.returncode != 0
    assert "--no-such-option" in done.stderr
    assert "linear  " not in done.stdout


def _names(folder, base):
    found = set()
    for file in folder.glob(f"{base}*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {(name, tensors.get_tensor(name).numel()) for name in tensors.keys()}  # noqa: SIM118
    return found
