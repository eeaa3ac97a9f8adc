"""``scripts/bench_fisher``: the small net, once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_fisher"


@pytest.mark.slow
def test_all_methods_agree_with_the_loop_in_float64(tmp_path):
    """Every method runs on the small net, and is within 1e-5 of single examples in float64."""
    report = tmp_path / "report.json"
    command = [sys.executable, SCRIPT, "--models", "mlp", "--repeat", "1", "--json", report]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    [found] = json.loads(report.read_text())
    assert set(found["ratios"]) >= {"plain", "empirical", "sampled", "exact", "vmap(grad), chunks of 8"}
    assert found["failed"] == {}
    assert max(found["errors"].values()) < 1e-5
