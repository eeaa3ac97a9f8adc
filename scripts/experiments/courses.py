"""Courses of tasks of digits and emoji, which a network learns one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scripts.experiments import continual, convolutions, digits

EACH, HELD = 800, 200  # training and test digits of a permuted task


@dataclass(frozen=True)
class Column:
    """Data set with a scenario; with ``permuted``, tasks differ in the order of the pixels, not in classes."""

    label: str
    set: str
    scenario: continual.Scenario = "domain"
    permuted: bool = False


COLUMNS = {
    "task": Column("split (task-incremental)", "digits", "task"),
    "domain": Column("split (domain-incremental)", "digits", "domain"),
    "class": Column("split (class-incremental)", "digits", "class"),
    "permuted": Column("permuted", "digits", permuted=True),
    "colour task": Column("colour (task-incremental)", "emoji", "task"),
    "colour domain": Column("colour (domain-incremental)", "emoji", "domain"),
    "colour class": Column("colour (class-incremental)", "emoji", "class"),
}
TASKS = {"digits": 5, "emoji": 8}
STEPS = {"digits": 60, "emoji": 40}  # steps of each task


@dataclass
class Task:
    """Images and labels of a context for training and testing, with the mask of its outputs."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Course:
    """Tasks in order, with the outputs that compete when task j is tested after task i."""

    tasks: Sequence[Task]
    tested: Sequence[Sequence[Tensor]]  # indices: [i][j]


def course_of(column: str, seed: int, work: Path) -> Course:
    """Return the course of a column and a seed; the folder ``work`` keeps features of emoji."""
    what = COLUMNS[column]
    data = digits.load(seed) if what.set == "digits" else convolutions.load(seed, work)
    return permuted(data, TASKS[what.set], seed) if what.permuted else split(data, TASKS[what.set], what.scenario, seed)


def permuted(data: digits.Sets, count: int, seed: int) -> Course:
    """Return a course of tasks with all classes, disjoint images, and one order of the pixels each."""
    every = torch.ones(digits.CLASSES, dtype=torch.bool)
    orders = continual.permutations(data.train.shape[1], count, seed)
    sizes = ((data.train, EACH), (data.train_labels, EACH), (data.test, HELD), (data.test_labels, HELD))
    parts = zip(*(whole.split(size) for whole, size in sizes), strict=True)
    tasks = [
        Task(train[:, order], labels, test[:, order], held, every)
        for order, (train, labels, test, held) in zip(orders, parts, strict=True)
    ]
    return Course(tasks, [[every] * count] * count)


def split(data: digits.Sets, count: int, scenario: continual.Scenario, seed: int) -> Course:
    """Return a course of tasks with disjoint classes."""
    classes = int(data.train_labels.max()) + 1
    contexts = continual.split_classes(classes, count, seed)
    tasks = []
    for number, own in enumerate(contexts):
        rows, held = (continual.rows_of(labels, own) for labels in (data.train_labels, data.test_labels))
        right, wanted = (
            continual.targets(labels[places], contexts, number, scenario)
            for labels, places in ((data.train_labels, rows), (data.test_labels, held))
        )
        mask = continual.active(classes, contexts, number, scenario)
        tasks.append(Task(data.train[rows], right, data.test[held], wanted, mask))
    tested = [
        [continual.active(classes, contexts, number, scenario, seen=seen) for number in range(count)]
        for seen in range(count)
    ]
    return Course(tasks, tested)
