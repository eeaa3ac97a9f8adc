"""``scripts.benchmarks.states``: the optimizer states that the benchmark of ``extract`` reads."""

import json

import pytest

from scripts.benchmarks import extract, states
from squisher_mergekit.optimizers import load


@pytest.mark.parametrize("layout", extract.LAYOUTS)
def test_every_state_of_the_benchmark_can_be_read(layout, tmp_path):
    """A small state of each layout is extracted under the names of its model, without a negative or infinite entry."""
    recipe = {**extract.SIZES["tiny"], "dtype": "bfloat16", "shards": 1}
    states.make_state(tmp_path / "state", layout, recipe)
    model = str(tmp_path / "state") if layout in states.OF_TRAINERS else None
    fisher = load.load_fisher(str(tmp_path / "state"), model)
    kind = json.loads((tmp_path / "state" / "config.json").read_text())["model_type"]
    embedding = {"llama": "model.embed_tokens.weight", "gpt_neox": "gpt_neox.embed_in.weight"}[kind]
    assert fisher[embedding].shape == (recipe["vocab"], recipe["hidden"])
    assert all(bool(((fisher[name] >= 0) & fisher[name].isfinite()).all()) for name in fisher)
