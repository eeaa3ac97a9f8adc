"""``scripts.checkpoints.fuzz_inputs``: damaged inputs from a fixed seed."""

import json

import pytest

from tests.scripts.commands import plant, run


@pytest.mark.slow
def test_300_damaged_inputs_are_read_right_or_refused(tmp_path):
    """No trial ends in a wrong tensor, a foreign error, a NaN model, a hang, excessive memory or executed code."""
    report = tmp_path / "report.json"
    done = run("checkpoints.fuzz_inputs", "-n", "300", "--seed", "7", "--json", report)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    counts = json.loads(report.read_text())["counts"]
    assert sum(counts.values()) == 300
    assert min(counts["right"], counts["refused"]) > 0


@pytest.mark.slow
def test_a_reader_that_errs_is_found(tmp_path):
    """Without digests, damaged Fishers pass as right ones, and the fuzzer says so."""
    plant(
        tmp_path,
        "squisher_mergekit.fisher.files",
        "from squisher_mergekit.tensors import safetensors",
        "safetensors._check_digest = lambda *_: None",
    )
    trials = ["-n", "150", "--only", "fisher", "--processes", "1"]
    done = run("checkpoints.fuzz_inputs", *trials, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1, done.stdout[-2000:]
    assert "differs" in done.stdout
