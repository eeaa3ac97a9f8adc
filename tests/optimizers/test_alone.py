"""Every checkpoint is read, or refused, without the libraries that wrote it."""

import json

import pytest
from safetensors.torch import load_file

from tests.environments import make
from tests.optimizers.states import STATES

LIBRARIES = (
    *("deepspeed", "bitsandbytes", "torchao", "lightning", "lightning_fabric", "pytorch_lightning", "torchmetrics"),
    *("galore_torch", "apollo_torch", "schedulefree", "optimi", "pytorch_optimizer", "ivon"),
)
# Runs the command line for each case, and prints its exit code and output as JSON, a line a case.
SCRIPT = """
import importlib.util, json, sys
from pathlib import Path
from click.testing import CliRunner
from squisher_mergekit.cli.main import main
there = [name for name in json.loads(sys.argv[3]) if importlib.util.find_spec(name)]
assert not there, there
for case in sorted(Path(sys.argv[1]).iterdir()):
    base = next(([ "--base", str(case / name)] for name in ("base", "base_config") if (case / name).is_dir()), [])
    out = Path(sys.argv[2]) / case.name
    done = CliRunner().invoke(main, ["extract", str(case), "-o", str(out), "--quiet", *base])
    foreign = None if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
    print(json.dumps([case.name, done.exit_code, done.output, foreign]), flush=True)
"""


@pytest.mark.slow
def test_every_fixture_is_read_or_refused_without_the_library_that_wrote_it(tmp_path):
    """With torch, transformers and safetensors alone values are the truth's bits; refusals are a line, and no more."""
    environment = make(tmp_path / "environment")
    environment.see_dependencies(hide=LIBRARIES)
    environment.pip("install", "--no-deps", "--no-build-isolation", str(STATES.parents[2]))
    out = tmp_path / "out"
    done = environment.run("-c", SCRIPT, str(STATES), str(out), json.dumps(LIBRARIES), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    results = {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}
    assert set(results) == {case.name for case in STATES.iterdir()}
    for name, (code, output, foreign) in results.items():
        expect = json.loads((STATES / name / "case.json").read_text())["expect"]
        assert foreign is None, (name, foreign)
        if expect.startswith("refuse"):
            assert code == 1, (name, output)
            assert [line for line in output.splitlines() if line.startswith("Error: ")], (name, output)
            assert not (out / name).exists()
            continue
        assert code == 0, (name, output)
        found = load_file(out / name / "fisher.safetensors")
        truth = STATES / name / "expected.safetensors"
        for key, tensor in load_file(truth).items() if truth.exists() else ():
            exact = 0.0 if "adafactor" not in name else 1e-6
            assert ((found[key] - tensor.float()).abs() <= exact * tensor.float().abs()).all(), (name, key)
    assert not [*STATES.rglob("SQUISHER_MARKER"), *environment.root.rglob("SQUISHER_MARKER"), *out.rglob("*MARKER*")]
