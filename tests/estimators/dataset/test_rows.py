"""Rows of files and datasets, and their columns."""

import gzip
import json
import logging

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.estimators.dataset.rows import columns_of, read_rows

ROWS = [{"text": "a cat", "label": 1}, {"text": "the, dog", "label": 0}, {"text": "a mat", "label": 2}]
FORMS = {
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "json": json.dumps(ROWS, indent=1),
    "csv": 'text,label\na cat,1\n"the, dog",0\na mat,2\n',
    "tsv": "text\tlabel\na cat\t1\nthe, dog\t0\na mat\t2\n",
}


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("form", FORMS)
def test_files_give_their_rows_compressed_or_not(form, ending, tmp_path):
    """Every format gives the same rows in order, with whole numbers as integers."""
    path = tmp_path / f"rows.{form}{ending}"
    data = FORMS[form].encode()
    path.write_bytes(gzip.compress(data) if ending else data)
    assert list(read_rows(str(path))) == ROWS


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (2, 2), (3, 3), (5, 3)])
def test_no_more_rows_than_the_limit_are_given(limit, count, tmp_path):
    """The first rows are read, up to the limit."""
    (tmp_path / "rows.jsonl").write_text(FORMS["jsonl"])
    assert list(read_rows(str(tmp_path / "rows.jsonl"), limit=limit)) == ROWS[:count]


def test_parquet_keeps_lists(tmp_path):
    """Words, their classes and conversations are lists in parquet files."""
    rows = [{"tokens": ["a", "cat"], "tags": [0, 3], "messages": [{"role": "user", "content": "a"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(read_rows(str(tmp_path / "rows.parquet"))) == rows


def test_a_line_of_a_text_file_is_a_row(tmp_path):
    """A row of a text file has no line break."""
    (tmp_path / "rows.txt").write_text("a cat\nthe dog\n")
    assert list(read_rows(str(tmp_path / "rows.txt"))) == [{"text": "a cat"}, {"text": "the dog"}]


def test_a_missing_value_is_none(tmp_path):
    """An empty cell and a missing key of jsonl are None."""
    (tmp_path / "rows.csv").write_text("text,label\na cat,1\n,2\n")
    (tmp_path / "rows.jsonl").write_text('{"text": "a cat", "label": 1}\n{"label": 2}\n')
    for name in ("rows.csv", "rows.jsonl"):
        assert list(read_rows(str(tmp_path / name)))[1] == {"text": None, "label": 2}


@pytest.mark.parametrize(
    ("data", "name", "configuration"), [("org/set", "org/set", None), ("org/set:sst2", "org/set", "sst2")]
)
def test_a_name_without_a_file_is_a_dataset_on_the_hub(data, name, configuration, monkeypatch):
    """Name, configuration and split reach datasets, which streams the rows."""

    def load(*arguments, **options):
        assert (arguments, options) == ((name, configuration), {"split": "test", "streaming": True})
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_rows(data, "test", 2)) == ROWS[:2]


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("rows.xml", ConfigError, "must end in one of .jsonl, .json, .csv, .tsv, .parquet, .txt, .gz may follow"),
        ("rows.gz", ConfigError, "must end in one of"),
        ("rows.parquet.gz", ConfigError, "compresses itself"),
        ("rows.jsonl", NotFoundError, "cannot be read"),
        ("rows.jsonl.gz", NotFoundError, "cannot be read"),
    ],
)
def test_files_with_invalid_content_are_refused(name, error, words, tmp_path):
    """An unknown suffix or invalid content raises an error of one line with the file name."""
    (tmp_path / name).write_text("<rows/>\n")
    with pytest.raises(error, match=words) as caught:
        list(read_rows(str(tmp_path / name)))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_file_has_no_rows(tmp_path):
    """An empty file is refused as such."""
    (tmp_path / "data.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"must have rows, but .*data\.jsonl is empty"):
        list(read_rows(str(tmp_path / "data.jsonl")))


def test_invalid_content_is_told_once(tmp_path, caplog):
    """The log of datasets does not repeat the reason of the refusal, and has its level again afterwards."""
    level = datasets.logging.get_verbosity()
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"tex": \n')
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)
    with pytest.raises(NotFoundError, match="JSON parse error"):
        list(read_rows(str(tmp_path / "data.jsonl")))
    logger.removeHandler(caplog.handler)
    assert caplog.records == []
    assert datasets.logging.get_verbosity() == level


def test_a_file_that_is_not_there_is_refused(tmp_path, monkeypatch):
    """A missing file is looked up on the Hub, which raises an error offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFoundError, match=r"nowhere\.jsonl cannot be read"):
        list(read_rows(str(tmp_path / "nowhere.jsonl")))


@pytest.mark.parametrize(
    ("task", "row", "given", "found"),
    [
        ("classification", "label text", {}, {"text": "text", "label": "label"}),
        (
            "classification", "hypothesis label premise", {},
            {"text": "premise", "pair": "hypothesis", "label": "label"},
        ),
        (
            "classification", "a b c", {"text": "a", "pair": "b", "label": "c"},
            {"text": "a", "pair": "b", "label": "c"},
        ),
        ("regression", "sentence1 sentence2 label", {}, {"text": "sentence1", "pair": "sentence2", "label": "label"}),
        ("token-classification", "tokens ner_tags id", {}, {"text": "tokens", "label": "ner_tags"}),
        ("token-classification", "words labels", {}, {"text": "words", "label": "labels"}),
        ("token-classification", "tokens tags pos", {"label": "pos"}, {"text": "tokens", "label": "pos"}),
        ("seq2seq", "document summary", {}, {"text": "document", "target": "summary"}),
        ("masked-lm", "text label", {}, {"text": "text"}),
        ("causal-lm", "text prompt completion messages", {}, {"text": "text"}),
        ("causal-lm", "messages prompt completion", {}, {"text": "prompt", "target": "completion"}),
        ("causal-lm", "messages document", {}, {"messages": "messages"}),
        (
            "causal-lm", "question answer", {"text": "question", "target": "answer"},
            {"text": "question", "target": "answer"},
        ),
        ("causal-lm", "prompt reply", {"target": "reply"}, {"text": "prompt", "target": "reply"}),
        ("causal-lm", "prompt completion", {"text": "prompt"}, {"text": "prompt"}),
    ],
)  # fmt: skip
def test_columns_are_found_by_their_usual_names_or_taken_as_given(task, row, given, found):
    """The columns of the user come first, then the usual names of the task. Other columns are ignored."""
    assert columns_of(dict.fromkeys(row.split(), "a"), task, given) == found


def test_a_column_of_lists_that_is_named_as_the_text_is_a_conversation():
    """A column of lists with the name of the text column is a conversation."""
    row = {"conversation": [{"role": "user", "content": "a"}]}
    assert columns_of(row, "causal-lm", {"text": "conversation"}) == {"messages": "conversation"}


@pytest.mark.parametrize(
    ("task", "row", "given", "words"),
    [
        ("causal-lm", "question answer", {}, "a column for the text, found question, answer; name it by --text-column"),
        ("causal-lm", "prompt", {}, "a column for the text, found prompt; "),
        ("causal-lm", "text", {"target": "answer"}, "a column for the target, found text; name it by --target-column"),
        ("masked-lm", "text", {"text": "body"}, "a column for the text, found text; "),
        ("classification", "text", {}, "a column for the label, found text; name it by --label-column"),
        ("classification", "text label", {"pair": "b"}, "a column for the pair, found text, label; "),
        ("token-classification", "tokens label", {}, "a column for the label, found tokens, label; "),
        ("seq2seq", "text", {}, "a column for the target, found text; "),
    ],
)
def test_columns_that_are_missing_are_refused(task, row, given, words):
    """The error names the missing column, the columns of the row and the option."""
    with pytest.raises(ConfigError, match=words):
        columns_of(dict.fromkeys(row.split(), "a"), task, given)
