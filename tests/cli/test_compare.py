"""``squisher compare`` as a command: table, report, picture."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from squisher_mergekit.cli.compare import lines
from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.compare import compare
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"
CHECKPOINT = STATES / "trainer_sharded_index"


def _run(*arguments):
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def _write(folder, tensors, **config):
    write_fisher(Fisher(MemoryStore(tensors), FisherConfig(estimator="empirical", statistic="mean", **config)), folder)
    return folder


@pytest.fixture
def pair(tmp_path):
    """Return two Fishers of one architecture, each with one extra tensor."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(31, 17, generator=generator) ** 4 for _ in range(2))
    b[:3] = 0
    return (
        _write(tmp_path / "a", {"layers.0.w": a, "layers.1.w": a / 2, "head": a[0].clone()}),
        _write(tmp_path / "b", {"layers.0.w": b, "layers.1.w": a, "tail": a[0].clone()}),
    )


def test_a_checkpoint_agrees_with_the_fisher_made_of_it(tmp_path):
    """Optimizer state and its portable Fisher have the same order and scale in every tensor."""
    made = CliRunner().invoke(main, ["extract", str(CHECKPOINT), "-o", str(tmp_path / "f"), "--quiet"])
    assert made.exit_code == 0, made.output
    result = _run(CHECKPOINT, tmp_path / "f", "--quiet", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["scaling"] == "debiased"
    assert report["only_a"] == report["only_b"] == []
    rows = [*report["tensors"].values(), report["over_all"]]
    assert len(rows) > 10
    assert all(row["spearman"] == row["ratio"] == row["factor"] == 1 for row in rows)
    assert all(row["log_correlation"] == pytest.approx(1, abs=1e-12) for row in rows)


def test_table_has_a_line_for_each_common_tensor(pair, tmp_path):
    """The table has a line for each tensor, a total, and the names of one side only. The report agrees."""
    result = _run(*pair, "--quiet", "--json", tmp_path / "made" / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert lines["layers.1.w"] == ["layers.1.w", "31x17", "1.0000", "1.0000", "0.5", "0.00%", "0.00%"]
    row = report["tensors"]["layers.0.w"]
    cells = [f"{row['spearman']:.4f}", f"{row['log_correlation']:.4f}", f"{row['ratio']:.3g}"]
    assert lines["layers.0.w"] == ["layers.0.w", "31x17", *cells, "0.00%", f"{3 / 31:.2%}"]
    assert "over all " in result.output
    assert "only in A: 1 tensors\n  head" in result.output
    assert "only in B: 1 tensors\n  tail" in result.output
    assert report["zeros"] == {"a alone": 0, "b alone": 51, "both": 0}


def test_a_sample_is_stated():
    """The table states the sample size of the overall rank correlation."""
    fisher = Fisher(MemoryStore({"w": torch.rand(1009)}), FisherConfig())
    text = "\n".join(lines(compare(fisher, fisher, sample=101)))
    assert "a sample: 101 of 1,009 entries" in text
    assert "sample" not in "\n".join(lines(compare(fisher, fisher)))


def test_scaling_is_a_choice(tmp_path):
    """Raw compares stored entries. per_example is refused without the number of examples per step."""
    made = CliRunner().invoke(main, ["extract", str(CHECKPOINT), "-o", str(tmp_path / "f"), "--quiet"])
    assert made.exit_code == 0, made.output
    assert "at the raw scale" in _run(CHECKPOINT, tmp_path / "f", "--scaling", "raw").output
    result = _run(CHECKPOINT, tmp_path / "f", "--scaling", "per_example", "--json", tmp_path / "no.json")
    assert result.exit_code == 1
    assert "examples_per_step" in result.output
    assert not (tmp_path / "no.json").exists()


def test_plot_is_a_png(pair, tmp_path):
    """--plot writes a PNG, also if no entry is positive in both Fishers."""
    result = _run(*pair, "--quiet", "--plot", tmp_path / "made" / "f.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "f.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    zero = _write(tmp_path / "zero", {"layers.0.w": torch.zeros(31, 17)})
    result = _run(zero, zero, "--quiet", "--plot", tmp_path / "zero.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "zero.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_models_are_given_once_or_for_each(tmp_path):
    """--model serves both sides, or A and B in turn. A third --model is a usage error."""
    state = STATES / "plain_adam" / "optimizer.pt"
    model = ("--model", STATES / "plain_adam")
    for models in (model, model * 2):
        result = _run(state, state, *models, "--quiet")
        assert result.exit_code == 0, result.output
    assert _run(state, state, *(model * 3)).exit_code == 2
    result = _run(state, state, *model, "--model", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert "nowhere" in result.output


def test_a_mismatch_is_one_line(pair, tmp_path):
    """Different shapes and different names exit with 1 and one line, without a report."""
    other = _write(tmp_path / "c", {"layers.0.w": torch.ones(17, 31)})
    result = _run(pair[0], other, "--json", tmp_path / "no.json")
    assert result.exit_code == 1
    assert "layers.0.w is [31, 17]" in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "no.json").exists()
