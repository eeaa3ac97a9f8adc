"""Experiment on LoRA adapters of a generative model, on a Llama of random weights."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from scripts.experiments import language, lora_language, lora_report, structure_language, texts
from scripts.experiments.encoder import LOG
from squisher_mergekit import load_fisher

PROMPTS = [(1, 5, 9, 3), (2, 4), (7, 7, 7, 8, 6)]
ADAPTER = {"r": 2, "lora_alpha": 6, "lr": 1e-2}
RECIPE = language.Recipe("x", 0, steps=9, train=3, batch=2)


@pytest.fixture
def parts():
    """Return the two parts of a Llama of three layers, the last two of which are trained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(
        num_hidden_layers=3, vocab_size=31, tie_word_embeddings=True, attn_implementation="eager", **sizes
    )
    return language.divide(transformers.LlamaForCausalLM(config).eval(), 2)


def test_the_layers_end_as_they_began(parts, tmp_path):
    """Each task trains its own adapter of the last layers, which have no adapter afterwards."""
    bottom, top = parts
    start = language.layers_of(top)
    base = lora_language.saved_base(top, 2, tmp_path)
    given = language.states(bottom, PROMPTS, [3, 8, 20])
    one, two = (lora_language.fine_tune(RECIPE, ADAPTER, n, top, base, given, tmp_path) for n in (0, 1))
    after = language.layers_of(top)
    assert set(after) == set(start)
    assert all(torch.equal(after[name], start[name]) for name in start)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    drawn = [name for name in first if "lora_A" in name]
    assert len(drawn) == 2 * 7
    assert not any(torch.allclose(first[name], second[name], atol=0.1) for name in drawn)
    losses = json.loads((one / LOG).read_text())["losses"]
    assert len(losses) == 9
    assert min(losses[-3:]) < losses[0]


def test_the_fisher_is_that_of_the_merged_weights(parts, tmp_path):
    """The lifted Fisher has each weight that the adapter changes, under its name in the last layers."""
    bottom, top = parts
    base = lora_language.saved_base(top, 2, tmp_path)
    folder = lora_language.fine_tune(
        RECIPE, ADAPTER, 0, top, base, language.states(bottom, PROMPTS, [3, 8, 20]), tmp_path
    )
    fisher = load_fisher(folder / lora_language.LIFTED)
    assert set(fisher) == {name for name in language.layers_of(top) if "proj" in name}
    assert all(fisher[name].mean() > 0 for name in fisher)


def test_a_cell_merges_w0_plus_s_b_a(parts, tmp_path, monkeypatch):
    """The single model and the average of a cell have the weights ``W0 + s B A``; every row has a loss."""
    rows = [("", n % 2) for n in range(4)]
    monkeypatch.setattr(language, "split", lambda work, layers: parts)
    monkeypatch.setattr(texts, "parts", lambda *_: texts.Parts(["a", "b"], rows, rows, rows))
    monkeypatch.setattr(language, "prompts_of", lambda recipe, rows, work: ([*PROMPTS, (4, 4)], [3, 8, 3, 8]))
    monkeypatch.setattr(language, "answers", lambda task, work: [3, 8])
    monkeypatch.setattr(language, "general", lambda *_: PROMPTS)
    seen = []
    load = language.load
    monkeypatch.setattr(language, "load", lambda top, weights: (seen.append(weights), load(top, weights)))
    start = language.layers_of(parts[1])
    settings = {**lora_language.EXPERIMENT.quick[0], "tasks": ("x", "y"), "train": 4, "adapter": ADAPTER}
    result = lora_language.cell(settings, tmp_path)
    rows_of = set(lora_report.ROWS) - {"dare_ties", "apart", "apart-fisher", "recorded", "computed"}
    assert set(result["test"]) == set(result[structure_language.LOSS]) == rows_of
    pairs = load_file(next(tmp_path.glob("models/smollm2-lora-x-*")) / "adapter_model.safetensors")
    for name, weight in seen[0].items():
        a, b = (pairs[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(weight, start[name] + 3 * b @ a)


def _report():
    """Return two of three planned cells whose rows are 50 for both tasks, with a loss of 3; lifted is 4 above."""
    rows = [
        row for row in lora_report.ROWS if row not in ("dare_ties", "apart", "apart-fisher", "recorded", "computed")
    ]
    cells = []
    for shift, one in enumerate(lora_language.EXPERIMENT.full[:2]):
        test = {row: {"bbc": 50.0 + shift, "spam": 50.0} for row in rows}
        test["lifted"] = {"bbc": 54.0 + shift, "spam": 54.0}
        losses = dict.fromkeys(rows, 3.0) | {structure_language.BEFORE: 2.5}
        result = {"test": test, "loss": losses, "chosen": {"ties": {"density": 0.1, "lambda": 1.0}}}
        cells.append({"settings": one, "result": result, "timings": {"training": 7.0}})
    return {"cells": cells, "planned": 3}


def test_tables_have_accuracies_differences_and_losses():
    """Rows are those of the cells; the loss is compared with that before the fine-tuning."""
    means, average, _, _, losses = lora_language.tables(_report())
    assert dict(means.rows)["plain average (`linear`)"] == ["50.2 ± 0.4"]
    assert "over 2 seeds of 3 planned, 70 held-out texts a task" in means.title
    assert dict(average.rows)["`squisher`, lifted F"] == ["+4.0 ± 0.0"]
    assert dict(losses.rows)["plain average (`linear`)"] == ["3.000 ± 0.000", "0.500 ± 0.000"]
    assert "`dare_ties`, tuned" not in dict(losses.rows)


def test_the_picture_is_a_small_png():
    """The picture has one panel and stays small."""
    pytest.importorskip("matplotlib")
    ((name, data),) = lora_language.pictures(_report()).items()
    assert name == "lora_language.png"
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
