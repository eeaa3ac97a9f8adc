"""``squisher mask`` as a command: output, files and refusals."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from squisher_mergekit.applications import scores
from squisher_mergekit.applications.fish_mask.files import reset_files, select_files
from squisher_mergekit.applications.masks import read_mask
from squisher_mergekit.cli.mask import command
from tests.applications.fish_mask.fish import Pair, same


def _run(*arguments):
    return CliRunner().invoke(command, list(map(str, arguments)))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Return a classifier, its base without a head, and a Fisher."""
    return Pair(tmp_path_factory.mktemp("pair"), "bert")


def test_from_a_fisher_to_a_patch_and_back(tmp_path, pair):
    """The commands select, reset, apply and remove restore base and reset model to the bit."""
    mask, out = tmp_path / "mask.safetensors", tmp_path / "out"
    chosen = ["--fisher", pair.fisher, "--score", "reset", "--base", pair.base, "--keep", "0.2", "--quiet"]
    steps = (
        ("select", pair.tuned, *chosen, "-o", mask),
        ("reset", pair.tuned, "--base", pair.base, "--mask", mask, "-o", out, "--quiet"),
        ("apply", pair.base, "--difference", out, "-o", tmp_path / "again", "--strict", "--quiet"),
        ("remove", out, "--difference", out / "difference.safetensors", "-o", tmp_path / "base", "--strict", "--quiet"),
        ("reset", pair.tuned, *chosen, "-o", tmp_path / "at_once"),
    )
    for step in steps:
        result = _run(*step)
        assert result.exit_code == 0, result.output
    assert same(tmp_path / "again", out)
    assert same(tmp_path / "base", pair.base)
    assert same(tmp_path / "at_once", out)


def test_the_report_counts_the_kept_weights(tmp_path, pair):
    """The report has counts, head, exclusions and the distribution of kept weights. The JSON has every tensor."""
    out, report = tmp_path / "mask.safetensors", tmp_path / "report.json"
    result = _run(
        "select", pair.tuned, "--fisher", pair.fisher, "--keep", "0.2", "--exclude", "embeddings", "-o", out,
        "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    found, mask = json.loads(report.read_text()), read_mask(out)
    assert found["kept"] == mask.kept == int(0.2 * found["entries"])
    assert f"kept      {mask.kept:,} of {found['entries']:,} weights (" in result.output
    assert "head      classifier.bias, classifier.weight\n" in result.output
    assert "excluded  bert.embeddings.LayerNorm.bias, " in result.output
    most = max((name for name in mask if "classifier" not in name), key=lambda name: int(mask[name].sum()))
    assert f"{int(mask[most].sum()):>12,}  {most}" in result.output
    assert found["layers"] == {name: int(mask[name].sum()) for name in mask}
    assert (found["score"], found["scope"], found["seed"]) == ("fisher", "global", 0)


def test_the_options_are_those_of_python(tmp_path, pair):
    """The command writes the mask and the difference of the Python calls."""
    options = ("--keep", "0.3", "--score", "random", "--scope", "layer", "--seed", "7", "--head", "pooler")
    assert _run("select", pair.tuned, *options, "-o", tmp_path / "a").exit_code == 0
    select_files(pair.tuned, None, tmp_path / "b", 0.3, score="random", scope="layer", seed=7, head=("pooler",))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert _run("select", pair.tuned, *options[:6], "--no-head", "-o", tmp_path / "c").exit_code == 0
    assert not read_mask(tmp_path / "c")["classifier.weight"].all()
    line = _run(
        "reset", pair.tuned, "--base", pair.base, "--keep", "0.3", "--score", "movement", "-o", tmp_path / "d",
        "--difference-only", "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert line.exit_code == 0, line.output
    reset_files(pair.tuned, pair.base, tmp_path / "e", keep=0.3, score="movement", difference_only=True)
    for name in ("difference.safetensors", "mask.safetensors"):
        assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "e" / name).read_bytes()
    report = json.loads((tmp_path / "report.json").read_text())
    size = (tmp_path / "d" / "difference.safetensors").stat().st_size
    assert report["difference_bytes"] == size
    assert f"difference {size / 1000:.3g} kB, {size / report['model_bytes']:.2%} of the model's" in line.output


def test_a_refusal_is_one_line(tmp_path, pair):
    """A refusal exits with 1 and one line, without leftovers."""
    other = Pair(tmp_path / "other", "llama")
    mask, out = tmp_path / "mask.safetensors", tmp_path / "out"
    assert _run("select", pair.tuned, "--score", "random", "--keep", "0.2", "-o", mask).exit_code == 0
    reset_files(pair.tuned, pair.base, tmp_path / "reset", mask=mask)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(mask.read_bytes()[:-1])
    known = set(tmp_path.iterdir())
    for line, message in (
        (("select", pair.tuned, "--keep", "0.2", "-o", out), "score fisher needs a Fisher"),
        (("select", pair.tuned, "--keep", "50", "--score", "random", "-o", out), "keep must be in (0, 1], found 50.0"),
        (
            ("select", pair.tuned, "--keep", "0.002", "--score", "random", "-o", out),
            "keep must leave room for the head",
        ),
        (
            ("select", pair.tuned, "--keep", "0.00002", "--score", "random", "--no-head", "-o", out),
            "keep must be a share of one entry at least",
        ),
        (("select", pair.tuned, "--keep", "0.2", "--fisher", other.fisher, "-o", out), "Fisher"),
        (("select", tmp_path / "none", "--keep", "0.2", "--score", "random", "-o", out), "MODEL must be"),
        (("reset", other.tuned, "--base", other.base, "--mask", mask, "-o", out), "a mask must be of these weights"),
        (("reset", pair.tuned, "--base", other.base, "--mask", mask, "-o", out), "a weight off the mask takes its"),
        (("reset", pair.tuned, "--base", pair.base, "--mask", broken, "-o", out), "must be a whole safetensors file"),
        (("reset", pair.tuned, "--base", pair.base, "-o", out), "either a mask or a share to keep must be given"),
        (("apply", other.base, "--difference", tmp_path / "reset", "-o", out), "must be in the base model of"),
        (("apply", pair.base, "--difference", broken, "-o", out), "must be a whole safetensors file"),
        (("remove", other.base, "--difference", tmp_path / "reset", "-o", out), "must be in the tuned model of"),
        (("remove", pair.tuned, "--difference", mask, "-o", out), "must be a difference of version 1"),
    ):
        result = _run(*line, "--quiet")
        assert result.exit_code == 1, (line, result.output)
        assert result.output.startswith("Error: ")
        assert message in result.output
        assert result.output.count("\n") == 1
        assert set(tmp_path.iterdir()) == known, line


def test_wrong_usage():
    """Wrong usage exits with 2."""
    for line in (
        ("select", "model", "-o", "x"),
        ("select", "m", "--keep", "0.1", "--head", "a", "--no-head", "-o", "x"),
    ):
        assert _run(*line).exit_code == 2


def test_help_teaches_without_importing():
    """Each subcommand shows an example, and the help does not import torch."""
    for verb in ((), ("select",), ("reset",), ("apply",), ("remove",)):
        result = _run(*verb, "--help")
        assert result.exit_code == 0
        assert "squisher mask " in result.output.partition("Example:")[2]
    code = "import sys, squisher_mergekit.cli.mask; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("option", ["-o", "--json"])
def test_two_runs_into_one_file_do_not_both_succeed(tmp_path, pair, option, monkeypatch):
    """A run whose output another run wrote since its start is refused, and the other's file stays."""
    file, other = tmp_path / "a", tmp_path / "b"
    outputs = {"-o": other, "--json": other} | {option: file}
    draw = scores.random_score

    def meanwhile(*arguments):
        file.write_text("theirs", encoding="utf-8")
        return draw(*arguments)

    monkeypatch.setattr(scores, "random_score", meanwhile)
    options = [item for given in outputs.items() for item in given]
    result = _run("select", pair.tuned, "--score", "random", "--keep", "0.3", "--quiet", *options)
    assert result.exit_code == 1, result.output
    assert "must have one writer" in result.output
    assert file.read_text(encoding="utf-8") == "theirs"
