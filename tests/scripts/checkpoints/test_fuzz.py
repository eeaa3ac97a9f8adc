"""``scripts.checkpoints.fuzz``: a few hundred damaged checkpoints from a fixed seed."""

import json

import pytest

from tests.scripts.commands import run


@pytest.mark.slow
def test_300_damaged_checkpoints_are_read_right_or_refused(tmp_path):
    """No trial ends in a wrong tensor, a foreign error, a hang, a crash, excessive memory or executed code."""
    report = tmp_path / "report.json"
    done = run("checkpoints.fuzz", "-n", "300", "--seed", "7", "--json", report)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = json.loads(report.read_text())["counts"]
    assert sum(counts.values()) == 300
    assert min(counts["right"], counts["partly"], counts["refused"]) > 0


@pytest.mark.slow
def test_a_reader_that_errs_is_found(tmp_path):
    """A reader that ignores checksums fails in the same trials, because flipped bytes pass."""
    # Trials run in other processes, so a module that Python imports at its start plants the fault.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'squisher_mergekit.optimizers.checkpoints.safe_pickle':\n"
        "            from squisher_mergekit.optimizers.checkpoints import zip_checksums\n"
        "            zip_checksums.ArchiveRecord.check_crc = lambda *_: None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    trials = ["-n", "150", "--only", "plain_ad", "--processes", "1"]
    done = run("checkpoints.fuzz", *trials, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "differs from the truth" in done.stdout
