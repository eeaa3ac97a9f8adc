"""Measured transfer: choice of tasks, parts and scores of texts, and tables of made-up results."""

import json

import pytest
import torch
from torch import nn

from scripts.experiments import report, task2vec, transfer, transfer_report

TOPICS = {"a": "news", "b": "news", "c": "news", "d": "news", "e": "mail", "f": "mail", "g": "mail"}
CLASSES = {"a": 2, "b": 2, "c": 3, "d": 2, "e": 2, "f": 2, "g": 5}


def _cell(seed, target, halves, squisher, fisher):
    """Return a cell of the tasks above; the last three arguments are mappings source -> number(s)."""
    distances = {
        kind: {"cosine": row, "plain cosine": {source: -value for source, value in row.items()}}
        for kind, row in (("squisher", squisher), ("fisher", fisher))
    }
    return {
        "settings": {"seed": seed, "target": target, "tasks": list(TOPICS)},
        "result": {
            "halves": {"no source": [60.0, 60.0], **halves},
            "distances": distances,
            "sizes": {name: 100.0 * (1 + place) for place, name in enumerate(TOPICS)},
            "topics": TOPICS,
            "classes": CLASSES,
        },
    }


def _report():
    """Return three seeds with one target each: the Squisher's order is the measured one, the Fisher's its reverse."""
    cells = []
    for seed, target in enumerate("abd"):
        sources = [name for name in TOPICS if name != target]
        halves = {name: [80.0 - 4 * place, 80.0 - 4 * place] for place, name in enumerate(sources)}
        near = {name: 0.1 + 0.1 * place for place, name in enumerate(sources)}
        far = {name: 0.9 - 0.1 * place for place, name in enumerate(sources)}
        cells.append(_cell(seed, target, halves, near, far))
    return {"cells": cells}


def test_the_tasks_are_many_and_share_no_texts():
    """At least sixteen tasks come from as many sets. A set is used whole or in pairs, and no class occurs twice."""
    assert len(set(transfer.TASKS)) == len(transfer.TASKS) == 19
    used = [task2vec.TASKS[name].data if name in transfer.PAIRS else name for name in transfer.TASKS]
    assert len(set(used)) >= 16
    for name in transfer.TASKS:
        assert name in transfer.PAIRS or used.count(name) == 1
    assert "newsgroups" not in used  # contains the texts of comp, rec, sci and talk
    assert transfer.topic_of("pc-mac") == "newsgroups"


def test_every_task_is_the_target_of_all_others_on_every_seed():
    """Every one of nineteen tasks is the target of all others on each of three seeds."""
    found = [(one["seed"], one["target"]) for one in transfer.EXPERIMENT.full]
    assert sorted(found) == sorted((seed, target) for seed in range(3) for target in transfer.TASKS)
    assert all(one["tasks"] == transfer.TASKS for one in transfer.EXPERIMENT.full)


def test_parts_are_disjoint_and_leave_a_third_of_a_small_set(monkeypatch):
    """Classes of 7, 8 and 9 texts give 2 test texts each, and 5 for training.

    A large set gives the requested numbers.
    """
    small = [(f"{label} {number}", label) for label, count in (("x", 7), ("y", 8), ("z", 9)) for number in range(count)]
    monkeypatch.setattr(transfer, "rows_of", lambda name: small)
    part = transfer.parts("small", 100, 60, 5)
    assert (len(part.train), len(part.test)) == (15, 6)
    assert not set(part.train) & set(part.test)
    part = transfer.parts("large", 10, 4, 5)
    assert (len(part.train), len(part.test)) == (9, 3)


def test_halves_score_every_other_text(monkeypatch):
    """The halves take every other text by length, and each is a percentage."""

    class First(nn.Module):
        def forward(self, label):
            return nn.functional.one_hot(label, 2).float()

    def batch(rows, length):
        return {
            "label": torch.tensor([int(text[-1]) for text, _ in rows]),
            "labels": torch.tensor([y for _, y in rows]),
        }

    monkeypatch.setattr(transfer.encoder, "encode", batch)
    rows = [("0", 0), ("..1", 0), (".1", 1), ("...0", 1), ("....1", 1)]
    assert transfer.halves(First(), rows) == [pytest.approx(200 / 3), 50.0]


def test_qualities_of_a_perfect_and_of_a_reversed_order():
    """Among six sources the Squisher has position 1, the Fisher 6, and the random order the mean 3.5."""
    found = transfer_report.qualities(_report(), "all")
    assert [one.reciprocal_rank for one in found["squisher"]] == [1, 1, 1]
    assert [one.ndcg for one in found["squisher"]] == pytest.approx([1, 1, 1])
    assert [one.best_rank for one in found["fisher"]] == [6, 6, 6]
    assert [one.best_rank for one in found["size"]] == [6, 6, 6]
    assert [one.best_rank for one in found["random"]] == pytest.approx([3.5] * 3)
    assert [one.best_rank for one in found["measured"]] == [1, 1, 1]
    swapped = transfer_report.qualities(_report(), "all", "plain cosine")
    assert [one.best_rank for one in swapped["fisher"]] == [1, 1, 1]


def test_variants_take_sources_of_the_topic_or_of_two_classes():
    """Variants choose sources of the topic or of two classes. Fewer than three sources do not count."""
    first = _report()["cells"][0]
    assert transfer_report.sources_of(first, "topic") == ["b", "c", "d"]
    assert transfer_report.sources_of(first, "two") == ["b", "d", "e", "f"]
    other = {**first, "settings": {**first["settings"], "target": "e"}}
    assert transfer_report.sources_of(other, "topic") == []
    assert len(transfer_report.sources_of(other, "all")) == 6


def test_the_measured_row_orders_by_the_other_half():
    """The order by one half of the texts is scored on the other half."""
    halves = {name: [70.0 + place, 80.0 - place] for place, name in enumerate("bcdefg")}
    row = dict.fromkeys("bcdefg", 0.5)
    found = transfer_report.qualities({"cells": [_cell(0, "a", halves, row, row)]}, "all")
    assert found["measured"][0].best_rank == 6


def test_tables_and_notes_are_made_from_the_numbers():
    """The notes claim the paper's order only if both Fishers are above size and random."""
    everything, topic, two = transfer_report.tables(_report())
    rows = dict(everything.rows)
    assert rows["Squisher"] == ["1.000 ± 0.000", "1.000 ± 0.000", "1.0 ± 0.0"]
    assert rows["Fisher"][2] == "6.0 ± 0.0"
    assert "3 targets, each with 6 sources" in everything.title
    assert "3 targets, each with 3 sources" in topic.title
    assert "3 targets, each with 4 sources" in two.title
    notes = " ".join(everything.notes)
    assert (
        "does not come out in the means (Fisher is not above size of the data; Fisher is not above random order)"
        in notes
    )
    assert "above both are the Squisher on 3 and the Fisher on 0 of 3 seeds" in notes
    assert "20.0 points above" in notes
    assert "+10.0" in notes
    assert "rank correlation of -1.00 ± 0.00" in notes
    assert "best source 3, nearest by Squisher 3, nearest by Fisher 0" in notes
    assert "cosine 1.000 / " in notes
    both = _report()
    for cell in both["cells"]:
        cell["result"]["distances"]["fisher"] = cell["result"]["distances"]["squisher"]
    assert (
        "MRR: the paper's order, both above size and random, comes out in the means;"
        in transfer_report.tables(both)[0].notes[0]
    )


def test_distances_are_means_over_measured_pairs():
    """Distances are means over the measurements of a pair: 0.1 and 0.1 for a and b, 0.3 and 0.1 for a and d."""
    names, matrix = transfer_report.distances(_report())
    assert names == ["a", "b", "d"]
    assert torch.equal(matrix, matrix.T)
    assert matrix[0].tolist() == pytest.approx([0, 0.1, (0.3 + 0.1) / 2])


def test_the_pictures_are_small_pngs():
    """The pictures are small PNGs: pairs with orders, and a matrix of distances."""
    pytest.importorskip("matplotlib")
    found = transfer.pictures(_report())
    assert set(found) == {"transfer.png", "transfer_distances.png"}
    assert all(data.startswith(b"\x89PNG") and len(data) < 120_000 for data in found.values())


def test_the_kept_results_hold_every_pair():
    """Each target has a score and a distance for every other task, and a score without a source."""
    found = report.found("transfer")
    assert found is not None
    assert found["tier"] == "full"
    assert [cell["settings"] for cell in found["cells"]] == json.loads(json.dumps(list(transfer.EXPERIMENT.full)))
    for cell in found["cells"]:
        others = set(transfer.TASKS) - {cell["settings"]["target"]}
        assert set(cell["result"]["halves"]) == others | {"no source"}
        for kind in transfer_report.KINDS:
            assert all(set(row) == others for row in cell["result"]["distances"][kind].values())


@pytest.mark.slow
def test_a_cell_repeats_to_the_digit(tmp_path):
    """The quick tier repeats its digits in another folder, and its sources differ."""
    torch.set_num_threads(1)
    settings = {**transfer.EXPERIMENT.quick[0], "tasks": transfer.TASKS[:3]}
    first, second = (transfer.cell(settings, tmp_path / name) for name in ("first", "second"))
    assert first == second
    assert set(first["distances"]["squisher"]["cosine"]) == set(transfer.TASKS[1:3])
    for kind in transfer_report.KINDS:
        assert len(set(first["distances"][kind]["cosine"].values())) == 2
        assert all(0 < value < 1 for value in first["distances"][kind]["cosine"].values())
