#!/usr/bin/env python3
"""EWC (Tables 2 and 8 of the paper): one network learns five tasks, one after another, under a penalty.

The paper learns split MNIST, permuted MNIST and split CIFAR-100, with 2,000 to 5,000 steps a task. Here there are
5,000 digits, and ``STEPS`` of 64 images a task; the network is the paper's for MNIST (784-400-400-10), and so is Adam
at 1e-3. There is no counterpart of split CIFAR-100: a colour set, and convolutions pre-trained for it, are left out.

Four columns, five tasks each, of 800 digits to learn from and 200 to test on:

* split digits, two classes a task, drawn by the seed: task-, domain- and class-incremental;
* permuted digits: all ten classes, and an order of the pixels for each task; its ten outputs serve all tasks
  (domain-incremental; to know the task would change nothing).

Two of them, split task-incremental and permuted, have the ablation of Table 2 too. The Squisher is an average of the
squared gradient of the task alone (``GradientSquares``), times the 64 images of a step. Its variants: times the 800 of
a task (the paper's N); times nothing; an average over 20 steps (beta 0.95 in place of 0.999; Adam keeps its own); the
joint Fisher in its place; Adam begun anew with each task; Adam's own second moment, which takes in the penalty's
gradient and never begins anew. They are held against the exact Fisher of the task's 800 digits. Not run: the last two
together, and Adam begun anew without a penalty, so what that alone does to learning is not told apart.

Settled on seed 10, all but the last move of the grids before a reported seed was looked at:

* Lambda: four powers of ten for each method, the best mean accuracy at the end on seed 10; of equal ones the smallest.
  Where the four lie was placed, by column (``START``), by a sweep with the Squisher over 1e1, 1e3, 1e5 and 1e7 on that
  seed, and moved by a method's own unit (``shift``), which was not searched for.
  In a first full run the best of seven grids was at an end on seed 10, the L2 penalty's among them: those seven were
  moved that way by a power of ten, once (``MOVED``). The reported seeds had been run by then; the move is by seed 10.
* Seeds 0, 1 and 2 are reported. A seed draws which digits are tested, classes or permutations, order, and network;
  all seeds draw from the same 5,000 digits.

    scripts/experiments/forgetting.py --full
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import digits, ewc
from experiments.forgetting_report import (
    ABLATED,
    BATCH,
    COLUMNS,
    EACH,
    HELD,
    MAIN,
    METHODS,
    MOVED,
    RATE,
    START,
    STEPS,
    TASKS,
    pictures,
    tables,
)
from experiments.runner import Experiment, Result, Settings, main
from squisher_mergekit import GradientSquares, estimate_fisher
from squisher_mergekit.applications.ewc import EWCPenalty, continual, identity
from squisher_mergekit.training.ewc import live_squisher


def lambdas(column: str, method: str) -> tuple[float, ...]:
    """Return what lambda is chosen from."""
    if METHODS[method].source == "none":
        return (0.0,)
    first = START[column] + METHODS[method].shift + MOVED.get((column, method), 0)
    return tuple(10.0 ** (first + step) for step in range(4))


@dataclass(frozen=True)
class Course:
    """Tasks, each with the outputs that compete while it is learnt, and the outputs that do when it is tested later."""

    tasks: Sequence[ewc.Task]
    tested: Sequence[Sequence[Tensor]]  # after task i, task j: [i][j]


def course_of(column: str, seed: int) -> Course:
    """Return the tasks of a column and a seed."""
    data = digits.load(seed)
    if column == "permuted":
        every = torch.ones(digits.CLASSES, dtype=torch.bool)
        orders = continual.permutations(digits.SIDE**2, TASKS, seed)
        parts = zip(*(whole.split(size) for whole, size in _sizes(data)), strict=True)
        tasks = [
            ewc.Task(train[:, order], labels, test[:, order], held, every)
            for order, (train, labels, test, held) in zip(orders, parts, strict=True)
        ]
        return Course(tasks, [[every] * TASKS] * TASKS)
    scenario: Any = column
    contexts = continual.split_classes(digits.CLASSES, TASKS, seed)
    tasks = []
    for number, classes in enumerate(contexts):
        rows, held = (continual.rows_of(labels, classes) for labels in (data.train_labels, data.test_labels))
        right, wanted = (
            continual.targets(labels[places], contexts, number, scenario)
            for labels, places in ((data.train_labels, rows), (data.test_labels, held))
        )
        mask = continual.active(digits.CLASSES, contexts, number, scenario)
        tasks.append(ewc.Task(data.train[rows], right, data.test[held], wanted, mask))
    tested = [
        [continual.active(digits.CLASSES, contexts, number, scenario, seen=seen) for number in range(TASKS)]
        for seen in range(TASKS)
    ]
    return Course(tasks, tested)


def _sizes(data: digits.Sets) -> list[tuple[Tensor, int]]:
    return [(data.train, EACH), (data.train_labels, EACH), (data.test, HELD), (data.test_labels, HELD)]


def joint(model: nn.Module, task: ewc.Task) -> Mapping[str, Tensor]:
    """Return the joint empirical Fisher over the task's training images, in batches as they are in training."""
    columns = task.mask.nonzero().squeeze(1)
    places = (task.labels[:, None] == columns).long().argmax(1)
    batches = zip(task.train.split(BATCH), places.split(BATCH), strict=True)
    return estimate_fisher(
        model, batches, "true", "batch", forward=lambda net, images: net(images)[:, columns], verify=False
    )


def learn(name: str, lam: float, course: Course, seed: int, steps: int = STEPS) -> ewc.Found:
    """Learn all tasks by a method, and test on those seen after each."""
    method, tasks = METHODS[name], course.tasks
    model, penalty = ewc.network(seed), EWCPenalty(lam, scale=method.scale)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    found = ewc.Found(torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
    for number, task in enumerate(tasks):
        squares = GradientSquares(model, method.beta)
        if method.reset and number:
            optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        for _ in range(steps):
            rows = torch.randint(len(task.labels), (BATCH,), generator=order)
            optimizer.zero_grad()
            cross_entropy(continual.masked(model(task.train[rows]), task.mask), task.labels[rows]).backward()
            if method.source == "average":
                squares.update()
            penalty.add_gradient(model)
            optimizer.step()
        found.ratios.append(penalty.ratio() or 0.0)
        with torch.no_grad():
            for seen, past in enumerate(tasks[: number + 1]):
                logits, mask = model(past.test), course.tested[number][seen]
                found.matrix[number, seen] = continual.accuracy(logits, past.test_labels, mask)
        if number + 1 < len(tasks) and method.source != "none":
            fisher = _importance(method.source, model, task, squares, optimizer)
            penalty.add(model, fisher, len(task.labels), examples_per_step=BATCH)
    return found


def _importance(
    source: str, model: nn.Module, task: ewc.Task, squares: GradientSquares, optimizer: torch.optim.Optimizer
) -> Mapping[str, Tensor]:
    """Return what weighs each parameter, of the task just learnt."""
    if source == "identity":
        return identity(model)
    if source == "average":
        return squares.fisher()
    if source == "optimizer":
        return live_squisher(model, optimizer)
    return joint(model, task) if source == "joint" else ewc.exact(model, task)


def cell(settings: Settings, work: Path) -> Result:
    """Choose lambda for a column and a method, and run the reported seeds."""
    column, method, steps = settings["column"], settings["method"], settings["steps"]
    swept = {0.0: 0.0}
    if method != "none":
        seed = settings["validation"]
        course = course_of(column, seed)
        swept = {lam: _end(learn(method, lam, course, seed, steps)) for lam in settings["lambdas"]}
    best = max(swept, key=lambda lam: (swept[lam], -lam))
    runs = [learn(method, best, course_of(column, seed), seed, steps) for seed in settings["seeds"]]
    return {
        "swept": {str(lam): value for lam, value in swept.items()},
        "lambda": best,
        "so_far": [(100 * continual.average_so_far(run.matrix)).tolist() for run in runs],
        "forgetting": [100 * continual.forgetting(run.matrix) for run in runs],
        "ratio": [max(run.ratios) for run in runs],
    }


def _end(found: ewc.Found) -> float:
    return 100 * found.matrix[-1].mean().item()


def _settings(column: str, method: str, steps: int, seeds: Sequence[int]) -> Settings:
    return {
        "column": column,
        "method": method,
        "lambdas": lambdas(column, method),
        "steps": steps,
        "validation": 10,
        "seeds": tuple(seeds),
    }


EXPERIMENT = Experiment(
    "forgetting",
    "EWC: five tasks one after another, under a penalty by Fisher or Squisher.",
    cell,
    full=[_settings(column, method, STEPS, range(3)) for column in COLUMNS for method in MAIN]
    + [_settings(column, method, STEPS, range(3)) for column in ABLATED for method in METHODS if method not in MAIN],
    quick=[_settings("task", method, 5, (0,)) for method in METHODS],
)


__all__ = ["EXPERIMENT", "main", "pictures", "tables"]

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
