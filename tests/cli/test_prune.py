"""``squisher prune`` as a command: model, table, report and refusals."""

import json
import shutil

import pytest
import torch
import transformers
from click.testing import CliRunner

from squisher_mergekit.applications.masks import read_mask
from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.models.weights import open_weights
from tests.applications.pruning.pruned import stored


@pytest.fixture
def run(tmp_path):
    """Return a model with its Fisher on disk, and a function that prunes it into ``out``."""
    _, fisher = stored(tmp_path / "model", "bert")
    write_fisher(fisher, tmp_path / "fisher")

    def call(*arguments, out="out"):
        fixed = [tmp_path / "model", "-o", tmp_path / out, "--quiet"]
        return CliRunner().invoke(main, ["prune", *(str(argument) for argument in (*fixed, *arguments))])

    return call


def test_a_pruned_model_loads_and_the_table_adds_up(run, tmp_path):
    """from_pretrained loads the pruned model. Table and report agree with the files for each layer."""
    result = run("--fisher", tmp_path / "fisher", "--sparsity", "0.75", "--json", tmp_path / "made" / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "made" / "report.json").read_text())
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    lines = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    mask = read_mask(tmp_path / "out")
    for name, row in report["layers"].items():
        zeros = model.get_parameter(name) == 0
        assert torch.equal(zeros, ~mask[name])
        assert lines[name] == [
            name,
            "x".join(map(str, row["shape"])),
            f"{row['kept']:,}",
            f"{zeros.float().mean():.2%}",
        ]
    assert report["recipe"]["sparsity"] == 0.75
    assert report["kept"] == sum(row["kept"] for row in report["layers"].values())
    assert report["chosen_from"] - report["kept"] == round(0.75 * report["chosen_from"])
    assert f"of the whole model, {report['entries']:,} entries, {report['sparsity_of_model']:.2%}" in result.output
    assert "left alone: " in result.output
    assert "(embedding)" in result.output


def test_options_reach_the_recipe(run, tmp_path):
    """The notes of the mask have pattern, ignored names and score."""
    done = run("--score", "magnitude", "--pattern", "2:4", "--ignore", "pooler", "--ignore", r"layer\.0")
    assert done.exit_code == 0, done.output
    mask = read_mask(tmp_path / "out")
    assert mask.metadata["pattern"] == [2, 4]
    assert mask.metadata["ignore"] == ["pooler", r"layer\.0"]
    assert mask["bert.pooler.dense.weight"].all()
    held = mask["bert.encoder.layer.1.output.dense.weight"].reshape(12, 3, 4).sum(2)
    assert torch.equal(held, torch.full((12, 3), 2))
    options = ("--scope", "layer", "--min-keep", 0.1, "--normalize", "layer", "--seed", 7, "--scaling", "raw")
    done = run("--score", "random", "--sparsity", 0.5, "--no-default-ignore", *options, out="other")
    assert done.exit_code == 0, done.output
    about = read_mask(tmp_path / "other").metadata
    wanted = {
        "scope": "layer",
        "min_keep": 0.1,
        "normalize": "layer",
        "seed": 7,
        "scaling": "raw",
        "default_ignore": False,
    }
    assert {key: about[key] for key in wanted} == wanted
    assert not mask_all_kept(tmp_path / "other", "bert.embeddings.word_embeddings.weight")


def mask_all_kept(folder, name):
    """Return True if a tensor is kept whole."""
    return bool(read_mask(folder)[name].all())


def test_a_layer_without_weights_is_pointed_out(run):
    """A line names a layer without any kept weight."""
    result = run("--score", "random", "--sparsity", "0.995", "--min-keep", "0")
    assert result.exit_code == 0, result.output
    assert "layers have no weight left" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--sparsity", "1"), "sparsity must be in [0, 1), found 1.0"),
        (("--sparsity", "0.5"), "score fisher needs a Fisher; give --fisher"),
        (("--sparsity", "0.5", "--score", "random", "--ignore", "nothing"), "'nothing' matches none"),
        (("--sparsity", "0.5", "--score", "random", "--ignore", "."), "all 41 tensors are ignored"),
        (("--sparsity", "0.95", "--score", "random", "--min-keep", "0.1"), "lower min_keep"),
        (("--pattern", "2:5", "--score", "random"), "has 12; ignore it"),
        (("--sparsity", "0.5", "--fisher", "nowhere"), "nowhere"),
    ],
)
def test_a_refusal_is_one_line(run, tmp_path, arguments, message):
    """A refusal exits with 1 and leaves neither model nor report."""
    result = run(*arguments, "--json", tmp_path / "no.json")
    assert result.exit_code == 1
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fisher", "model"]


def test_the_old_name_of_min_keep_still_works(run, tmp_path):
    """``--least`` prunes like ``--min-keep`` and names the new option."""
    options = ("--sparsity", "0.5", "--score", "random", "--json")
    assert run(*options, tmp_path / "new.json", "--min-keep", "0.3").exit_code == 0
    shutil.rmtree(tmp_path / "out")
    result = run(*options, tmp_path / "old.json", "--least", "0.3")
    assert result.exit_code == 0, result.output
    assert "--least is deprecated; use --min-keep" in result.stderr
    assert (tmp_path / "new.json").read_text() == (tmp_path / "old.json").read_text()


@pytest.mark.parametrize("arguments", [(), ("--sparsity", "0.5", "--pattern", "2:4"), ("--pattern", "half")])
def test_wrong_use_exits_with_two(run, arguments):
    """Neither sparsity nor pattern, both of them, and an invalid pattern exit with 2."""
    assert run(*arguments).exit_code == 2


def test_strict_refuses_a_fisher_of_other_weights(run, tmp_path):
    """--strict refuses a Fisher with another fingerprint. Without --strict the model is pruned."""
    file = open_weights(tmp_path / "model").files[0]
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)
    result = run("--fisher", tmp_path / "fisher", "--sparsity", "0.5", "--strict")
    assert result.exit_code == 1
    assert "was made at other weights" in result.output
    assert run("--fisher", tmp_path / "fisher", "--sparsity", "0.5").exit_code == 0
