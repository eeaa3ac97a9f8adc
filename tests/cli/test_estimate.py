"""``squisher estimate`` on saved models and files of rows."""

import csv
import itertools
import json
import re
from typing import get_args

import pytest
import torch
import transformers
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.estimate import command
from squisher_mergekit.cli.main import main
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.estimators.tasks import DataTask
from tests.small_models import SMALL, word_tokenizer

ROWS = [
    ("the cat sat on the mat", "far", 0), ("a dog ran", "the mat", 2), ("far far far", "a cat", 1),
    ("the dog", "sat", 1), ("a cat ran far on the mat", "a dog", 0),
]  # fmt: skip
MODELS = {
    "classification": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**SMALL, num_labels=3, max_position_embeddings=32)
    ),
    "causal-lm": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=3)),
    "masked-lm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, max_position_embeddings=32)),
    "seq2seq": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=14, d_model=12, d_kv=4, d_ff=19, num_layers=1, num_heads=3, decoder_start_token_id=0
        )
    ),
}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    """Save a small model of a task with its tokenizer."""
    torch.manual_seed(3)
    model = MODELS[request.param]()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    return request.param, model, tmp_path / "model"


def _write(path, names=("text", "target", "label")):
    rows = [dict(zip(names, row, strict=True)) for row in ROWS]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, names)
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def _run(*arguments):
    return CliRunner().invoke(main, ["estimate", *map(str, arguments), "--quiet"])


def _by_hand(task, model):
    """Return ``estimate_fisher`` of the same rows, tokenized one at a time without padding."""
    tokenizer, made = word_tokenizer(), []
    for text, target, label in ROWS:
        batch = dict(tokenizer([text], return_tensors="pt"))
        if task == "classification":
            batch["labels"] = torch.tensor([label])
        else:
            batch["labels"] = (
                tokenizer([target], return_tensors="pt")["input_ids"] if task == "seq2seq" else batch["input_ids"]
            )
        made.append(batch)
    return estimate_fisher(model, made, task=task)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_file_of_rows_gives_the_fisher_of_these_rows(saved, kind, tmp_path):
    """Padded batches of two give the Fisher of single rows, under the names of the saved weights."""
    task, model, folder = saved
    data, out = _write(tmp_path / f"rows.{kind}"), tmp_path / "fisher"
    done = _run(folder, "--task", task, "--data", data, "--batch-size", 2, "-o", out)
    assert done.exit_code == 0, done.output
    fisher = load_fisher(out, model=folder)
    assert (fisher.config.estimator, fisher.config.num_examples, fisher.config.statistic) == ("empirical", 5, "mean")
    assert fisher.config.weights_fingerprint.startswith("fp1:")
    if task == "masked-lm":  # masks are drawn per batch
        assert set(fisher) <= set(load_file(folder / "model.safetensors"))
        return
    expected = _by_hand(task, model)
    assert set(fisher) == set(expected)
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in expected.items():
        # The gradients of key biases vanish by symmetry, so they consist of rounding.
        atol = max(1e-5 * float(tensor.max()), 1e-12 * largest)
        torch.testing.assert_close(fisher[name], tensor, rtol=1e-3, atol=atol)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--data": "nowhere.jsonl"}, "cannot be read"),
        ({"--text-column": "body"}, "must have a column for the text, found text, target, label"),
        ({"MODEL": "no/such"}, "must be a model for classification"),
        ({"--labels": "predicted", "--joint": None}, "grouping batch needs labels true or sampled"),
    ],
)
def test_missing_inputs_are_refused_in_one_line(change, words, tmp_path, monkeypatch):
    """A missing file, column or model and wrong labels exit with 1, one line and no output folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    MODELS["classification"]().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    options = {"--task": "classification", "--data": _write(tmp_path / "rows.jsonl")}
    options |= {"-o": tmp_path / "out"} | change
    model = options.pop("MODEL", tmp_path / "model")
    flat = [part for key, value in options.items() for part in ((key,) if value is None else (key, value))]
    done = _run(model, *flat)
    assert done.exit_code == 1, done.output
    assert words in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_exact_labels_of_tokens_are_refused(tmp_path):
    """Exact labels of tokens raise an error that names sampling as the cure."""
    MODELS["causal-lm"]().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data = _write(tmp_path / "rows.jsonl")
    done = _run(tmp_path / "model", "--task", "causal-lm", "--data", data, "--labels", "exact", "-o", tmp_path / "out")
    assert (done.exit_code, "take labels sampled" in done.output) == (1, True)


def test_a_bar_tells_the_rate_and_the_time_left(saved, tmp_path, monkeypatch):
    """The progress bar shows the examples done and in total, the times and the rate; its clock runs fast here."""
    monkeypatch.setattr("tqdm.std.time", itertools.count(0.0, 3.0).__next__)
    task, _, folder = saved
    data = _write(tmp_path / "rows.jsonl")
    arguments = ["estimate", folder, "--task", task, "--data", data, "--batch-size", "2", "-o", tmp_path / "out"]
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    assert re.search(r"Estimating: +100%.* 5/5 \[[0-9:]+<[0-9:]+, .*(example/s|s/example)", done.stderr)


def test_tasks_are_those_of_python():
    """The values of --task are those of ``estimate_fisher`` without ``auto``."""
    (task,) = [option for option in command.params if option.name == "task"]
    assert set(task.type.choices) == set(get_args(DataTask))


def test_the_old_name_of_classification_still_works(tmp_path):
    """The old name gives the same Fisher and one line with the new name."""
    MODELS["classification"]().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    data = _write(tmp_path / "rows.jsonl")
    old = _run(tmp_path / "model", "--task", "sequence-classification", "--data", data, "-o", tmp_path / "old")
    new = _run(tmp_path / "model", "--task", "classification", "--data", data, "-o", tmp_path / "new")
    assert (old.exit_code, new.exit_code) == (0, 0)
    assert "take --task classification" in old.stderr
    one, other = load_fisher(tmp_path / "old"), load_fisher(tmp_path / "new")
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """Save a small causal language model and a file of rows."""
    folder = tmp_path_factory.mktemp("causal")
    torch.manual_seed(4)
    MODELS["causal-lm"]().save_pretrained(folder / "model")
    word_tokenizer().save_pretrained(folder / "model")
    return folder / "model", _write(folder / "rows.jsonl")


@pytest.mark.parametrize(("dtype", "share"), [("bf16", 0.05), ("fp16", 0.01)])
def test_a_narrow_model_has_sums_in_float32(causal, dtype, share, tmp_path):
    """The Fisher of a narrow model is float32 and near that of float32, but not rounded to the narrow dtype."""
    model, data = causal
    common = [model, "--task", "causal-lm", "--data", data]
    for name, options in {"wide": [], "narrow": ["--dtype", dtype, "--offload"]}.items():
        done = _run(*common, *options, "-o", tmp_path / name)
        assert done.exit_code == 0, done.output
    wide, narrow = load_fisher(tmp_path / "wide"), load_fisher(tmp_path / "narrow")
    assert set(wide) == set(narrow)
    joined = [torch.cat([fisher[name].flatten() for name in wide]) for fisher in (wide, narrow)]
    assert joined[1].dtype == torch.float32
    assert float((joined[1] - joined[0]).norm() / joined[0].norm()) < share
    assert not torch.equal(joined[1], joined[1].bfloat16().float())


def test_the_dtype_of_the_file_has_an_option_of_its_own(causal, tmp_path):
    """--file-dtype bfloat16 writes what --dtype bfloat16 wrote, which still works with one line of warning."""
    model, data = causal
    common = [model, "--task", "causal-lm", "--data", data]
    old = _run(*common, "--dtype", "bfloat16", "-o", tmp_path / "old")
    new = _run(*common, "--file-dtype", "bfloat16", "-o", tmp_path / "new")
    assert (old.exit_code, new.exit_code) == (0, 0), old.output + new.output
    assert "take --file-dtype bfloat16" in old.stderr
    one, other = load_fisher(tmp_path / "old"), load_fisher(tmp_path / "new")
    assert {one[name].dtype for name in one} == {torch.bfloat16}
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "fp16", "--precision", "bf16"], "--dtype is fp16, whose passes are narrow already"),
        (["--dtype", "bf16", "--precision", "bf16"], "--dtype is bf16, whose passes are narrow already"),
    ],
)
def test_two_narrow_dtypes_are_refused_in_one_line(causal, options, words, tmp_path):
    """A narrow model has no further precision."""
    model, data = causal
    done = _run(model, "--task", "causal-lm", "--data", data, *options, "-o", tmp_path / "out")
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1


def test_the_bar_of_a_short_estimate_does_not_appear(tmp_path, monkeypatch):
    """It appears after two seconds, as in the other commands; the clock stands still here."""
    model = MODELS["classification"]()
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    _write(tmp_path / "rows.jsonl")
    monkeypatch.setattr("tqdm.std.time", lambda: 0.0)
    given = [str(tmp_path / "model"), "--task", "classification", "--data", str(tmp_path / "rows.jsonl")]
    found = CliRunner().invoke(command, [*given, "-o", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "Estimating" not in found.output
    assert "Loading weights" not in found.output
