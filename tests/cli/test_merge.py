"""``squisher merge`` as a command: the report of a structure, its picture."""

import json
import re

import pytest
import yaml
from click.testing import CliRunner

from squisher_mergekit.cli.main import main
from tests.merging.models import EMBEDDING, base_and_models


def _merge(root, kind, *flags):
    """Merge two models by a structure; return the result of the command."""
    base_and_models(root, 3)
    config = {
        "merge_method": "squisher",
        "base_model": str(root / "m0"),
        "models": [{"model": str(root / f"m{i}")} for i in (1, 2)],
        "parameters": {"structure": kind, "block": 6},
    }
    file = root / "merge.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = ["merge", str(file), str(root / "out"), "--no-copy-tokenizer", *flags]
    return CliRunner().invoke(main, command)


@pytest.mark.parametrize("kind", ["columns", "kron"])
def test_the_report_has_the_structure_by_layer_and_tensor(tmp_path, kind):
    """JSON has all, the terminal a summary; the embedding stands under its reason."""
    result = _merge(tmp_path, kind, "--json", str(tmp_path / "report.json"))
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    found = report["structure"]
    assert list(found["layers"]) == ["lm_head", *(f"model.layers.{i}" for i in range(3))]
    assert len(found["tensors"]) == 22
    assert EMBEDDING not in found["tensors"]
    assert report["uncoupled"][EMBEDDING] == "an embedding, whose rows are tokens"
    for one in (found, *found["layers"].values(), *found["tensors"].values()):
        assert sum(one["share"].values()) == pytest.approx(1)
        assert one["conflict"] > 0
    assert "merged step of 22 coupled matrices: A " in result.output
    assert "merged by the diagonal, as no matrix: 7 tensors" in result.output


def test_a_picture_of_the_structure(tmp_path):
    """--plot writes a PNG, also under --quiet, where nothing is printed."""
    result = _merge(tmp_path, "rows", "--quiet", "--plot", str(tmp_path / "steps.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert "merged step" not in result.output


def test_a_picture_of_a_diagonal_merge_and_a_page(tmp_path):
    """--plot draws the shares by layer and kind, --report writes the page with every tensor, --json has them too."""
    files = [str(tmp_path / name) for name in ("shares.png", "report.html", "report.json")]
    result = _merge(tmp_path, "diagonal", "--plot", files[0], "--report", files[1], "--json", files[2])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "shares.png").read_bytes().startswith(b"\x89PNG")
    tensors = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["by_tensor"]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(tensors) == 30
    assert all(name in text for name in tensors)
    for found in tensors.values():
        assert sum(found["effective_weight"].values()) == pytest.approx(1)
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "*Fishers for Free?" in card
    assert "Base model: m0." in card
    assert "![Share of each model in the merge, by layer and kind of matrix](shares.png)" in card
    assert (tmp_path / "out" / "shares.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_the_plan(tmp_path):
    """`squisher plan --report` writes the page before the merge."""
    _merge(tmp_path, "rows")
    result = CliRunner().invoke(main, ["plan", str(tmp_path / "merge.yml"), "--report", str(tmp_path / "plan.html")])
    assert result.exit_code == 0, result.output
    assert "structure: rows couples 22 tensors" in (tmp_path / "plan.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("broken", "said"),
    [(False, "m0 has no tokenizer, so the merged model has none"), (True, "the tokenizer of .*m0 cannot be copied")],
)
def test_a_model_without_a_tokenizer(tmp_path, caplog, broken, said):
    """The merge goes on with one line, where mergekit logs a traceback."""
    base_and_models(tmp_path, 3)
    if broken:
        (tmp_path / "m0" / "tokenizer_config.json").write_text("{")
    models = [{"model": str(tmp_path / f"m{i}")} for i in (1, 2)]
    config = {"merge_method": "squisher", "base_model": str(tmp_path / "m0"), "models": models}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(main, ["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    records = [record for record in caplog.records if "tokenizer" in record.getMessage()]
    assert len(records) == 1
    assert re.search(said, records[0].getMessage())
    assert not any(record.exc_info for record in caplog.records)
    assert not list((tmp_path / "out").glob("tokenizer*"))


@pytest.mark.parametrize("size", ["5GB", "x", "-1", "1.5b"])
def test_a_size_that_mergekit_cannot_read(tmp_path, size):
    """It is a usage error in one line, not a traceback, with the form that is read."""
    (tmp_path / "merge.yml").write_text("merge_method: squisher")
    done = CliRunner().invoke(
        main, ["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out"), f"--out-shard-size={size}"]
    )
    assert done.exit_code == 2
    line = done.stderr.splitlines()[-1]
    assert f"found {size!r}; write 5b for 5 GB" in line
