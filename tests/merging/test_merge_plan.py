"""Plan of a whole merge: missing tensors, and the preview."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from squisher_mergekit.merging.merge_plan import MergePlan, preview_text
from squisher_mergekit.merging.reports.text import report_text
from squisher_mergekit.merging.run import Run
from tests.merging.models import base_and_models, density_config
from tests.merging.reference import assert_refused, give_fisher, llama, merge, preview_of


def test_a_tensor_missing(tmp_path: Path, pair: dict[str, Any]) -> None:
    """A tensor without a Fisher is refused by name, with the coverage and the cure."""
    weights = llama(tmp_path / "m0", 0)
    give_fisher(tmp_path / "m0", {n: t for n, t in weights.items() if n != "model.norm.weight"}, 0)
    assert_refused(
        merge(pair, tmp_path / "out"), tmp_path / "out", "covers 29 of 30", "model.norm.weight", "missing: average"
    )


def test_the_preview_and_the_log_mention_the_density(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Preview and log have the density of each model. Bytes and memory include the base's weights and the choice."""
    weights, _ = base_and_models(tmp_path, 3)
    config = density_config(tmp_path, [0.2, [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]])
    plan, before = preview_of(tmp_path, config), preview_of(tmp_path, density_config(tmp_path, [1.0, 1.0]))
    assert ("density 0.2)" in plan["text"], "density 0.1 to 0.5)" in plan["text"]) == (True, True)
    assert [model["density"] for model in plan["models"]] == [[0.2, 0.2], [0.1, 0.5]]
    assert "density" not in before["text"]
    read = [sum(t.nbytes for model in part for t in model.values()) for part in (weights, weights[1:])]
    assert [found["bytes_to_read"]["weights"] for found in (plan, before)] == read
    largest_entries = max(tensor.numel() for tensor in weights[0].values())
    grown = {key: plan["memory"][key] - before["memory"][key] for key in plan["memory"]}
    assert grown == {"anonymous": 2 * largest_entries, "mapped": 4 * largest_entries}
    file = tmp_path / "loud.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    from mergekit.scripts.run_yaml import main

    assert CliRunner().invoke(main, [str(file), str(tmp_path / "out"), "--no-copy-tokenizer"]).exit_code == 0
    lines = [record.message for record in caplog.records if "density" in record.message]
    assert ["density 0.2" in lines[0], "density 0.1 to 0.5" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize(("method", "words"), [("squisher", "plain mean"), ("ubgm_squisher", "base value")])
def test_preview_and_report_use_the_same_words(method: str, words: str) -> None:
    """Entries without information have one name, before the merge and after it."""
    with Run(method) as run:
        run.begin(MergePlan(method))
        sentence = f"no signal in any model (mostly unseen tokens): {words}"
        assert sentence in preview_text(run.preview or {})
        assert sentence in report_text(run.report())
