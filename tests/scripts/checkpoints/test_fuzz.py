"""``scripts.checkpoints.fuzz``: a few hundred damaged checkpoints from a fixed seed."""

import json

import pytest

from tests.scripts.commands import plant, run


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
    plant(
        tmp_path,
        "squisher_mergekit.optimizers.checkpoints.safe_pickle",
        "from squisher_mergekit.optimizers.checkpoints import zip_checksums",
        "zip_checksums.ArchiveRecord.check_crc = lambda *_: None",
    )
    trials = ["-n", "150", "--only", "plain_ad", "--processes", "1"]
    done = run("checkpoints.fuzz", *trials, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "differs from the truth" in done.stdout
