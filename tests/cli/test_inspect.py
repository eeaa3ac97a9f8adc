"""``squisher inspect`` as a command: table, report, picture."""

import builtins
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit.cli.main import main

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


def _run(verb, *arguments):
    return CliRunner().invoke(main, [verb, *map(str, arguments)])


@pytest.fixture
def portable(tmp_path):
    """Return a portable Fisher of a tied Llama in shards."""
    assert _run("extract", STATES / "trainer_sharded_index", "-o", tmp_path / "fisher", "--quiet").exit_code == 0
    return tmp_path / "fisher"


def test_table_has_a_line_for_each_tensor(portable):
    """The table has shape, extremes, median and zeros of each tensor at the debiased scale, and a total."""
    result = _run("inspect", portable, "--quiet")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    for name, tensor in load_file(portable / "fisher.safetensors").items():
        shape = "x".join(map(str, tensor.shape))
        raw = [tensor.min().item(), tensor.median().item(), tensor.max().item()]
        values = [value / (1 - 0.99**5) for value in raw]  # 5 steps at beta2 0.99
        zeros = (tensor == 0).float().mean().item()
        assert lines[name] == [name, shape, *(f"{value:.2e}" for value in values), f"{zeros:.2%}"]
    assert "entries at the debiased scale:" in result.output
    assert result.output.splitlines()[-1].startswith("over all ")
    assert "tied to model.embed_tokens.weight" in result.output


def test_optimizer_state_and_its_fisher_give_the_same_table(portable, tmp_path):
    """A checkpoint and its portable Fisher give the same table."""
    assert _run("inspect", portable, "--quiet", "--json", tmp_path / "a.json").exit_code == 0
    assert _run("inspect", STATES / "trainer_sharded_index", "--quiet", "--json", tmp_path / "b.json").exit_code == 0
    a, b = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert a["tensors"] == b["tensors"]
    assert a["over_all"]["entries"] == b["over_all"]["entries"] == sum(
        tensor.numel() for tensor in load_file(portable / "fisher.safetensors").values()
    )  # fmt: skip
    assert a["config"]["weights_fingerprint"] == b["config"]["weights_fingerprint"] is not None


def test_without_steps_the_table_is_raw_and_says_so(portable, tmp_path):
    """Without steps in the metadata, the table is raw and says so."""
    file = portable / "fisher_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"steps": None, "mean": None, "norm": None}))
    result = _run("inspect", portable, "--quiet", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "entries at the raw scale:" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scaling"] == "raw"
    for name, tensor in load_file(portable / "fisher.safetensors").items():
        assert report["tensors"][name]["maximum"] == tensor.max().item()


def test_plot_is_a_png(portable, tmp_path):
    """--plot writes a PNG, also if all entries of a kind are 0."""
    result = _run("inspect", portable, "--quiet", "--plot", tmp_path / "made" / "f.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "f.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_plot_without_matplotlib_names_the_extra(portable, tmp_path, monkeypatch):
    """Without matplotlib, --plot is refused with the extra to install, before any tensor is read."""
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.delitem(sys.modules, "squisher_mergekit.cli.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    result = _run("inspect", portable, "--plot", tmp_path / "f.png")
    assert result.exit_code == 1
    assert 'pip install "squisher-mergekit[plots]"' in result.output
    assert not (tmp_path / "f.png").exists()


def test_bad_entries_are_refused():
    """NaN, infinite and negative entries are refused."""
    result = _run("inspect", STATES / "bad_nan", "--quiet")
    assert result.exit_code == 1
    assert "1 NaN" in result.output


def test_an_empty_folder_is_one_line(tmp_path):
    """A folder without a Fisher or optimizer state is refused in one line with the expected files."""
    result = _run("inspect", tmp_path, "--quiet")
    assert result.exit_code == 1
    assert str(tmp_path) in result.output
    assert "optimizer.pt" in result.output


@pytest.mark.parametrize("state", ["trainer_sharded_index", "ds_zero2", "dcp_nested"])
def test_headers_of_a_state_are_shown_without_the_entries(state, tmp_path):
    """Format, steps, optimizer, coverage and shapes of a checkpoint; no table of entries."""
    result = _run("inspect", STATES / state, "--headers", "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    for word in ("source", "optimizer", "steps", "coverage", "entries", "shape"):
        assert word in result.output
    assert "median" not in result.output
    report = json.loads((tmp_path / "a.json").read_text())
    expected = load_file(STATES / state / "expected.safetensors")
    assert {name: row["shape"] for name, row in report["tensors"].items()} == {
        n: list(t.shape) for n, t in expected.items()
    }


def test_headers_and_a_plot_exclude_each_other(portable, tmp_path):
    """A histogram needs the entries."""
    result = _run("inspect", portable, "--headers", "--plot", tmp_path / "a.png")
    assert result.exit_code == 2
    assert "leaves unread" in result.output
