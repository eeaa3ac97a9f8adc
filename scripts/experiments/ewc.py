"""EWC on split digits: five tasks of two classes each, learnt one after another by one small network.

    PYTHONPATH=scripts python -m experiments.ewc --plot accuracy.png --json ewc.json

Task-incremental: the task is known when a digit is tested, so that two outputs compete. The network is that of the
paper, 784-400-400-10; Adam with a learning rate of 1e-3, 64 digits a step, 150 steps a task, 800 digits of each task
for training and 200 for testing. Lambda is chosen on seeds 10 and 11 (the best mean accuracy over the five tasks at
the end, of powers of ten; of equal ones the smallest). What is reported is of seeds 0, 1 and 2, which nothing was
chosen on.

Stated before those were run: at the end the mean accuracy with the Fisher and with the Squisher is each at least
``OVER_NONE`` above no penalty, and at least ``OVER_L2`` above the L2 penalty.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments import digits
from squisher_mergekit import GradientSquares, estimate_fisher
from squisher_mergekit.applications.ewc import continual
from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity
from squisher_mergekit.training.ewc import live_squisher

OVER_NONE, OVER_L2 = 0.015, 0.01
CHOSEN_ON, REPORTED = (10, 11), (0, 1, 2)
GRID = {
    "none": (0.0,),
    "l2": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2),
    "fisher": (1e2, 1e3, 1e4, 1e5, 1e6),
    "squisher": (1e1, 1e2, 1e3, 1e4, 1e5),
}
CHOSEN = {"none": 0.0, "l2": 1e-4, "fisher": 1e4, "squisher": 1e4}  # by main(); what the test takes
RUNAWAY = 1e5  # lambda at which the optimizer's own second moments run away
TASKS, BATCH, STEPS, RATE = 5, 64, 150, 1e-3


@dataclass
class Task:
    """Images and labels of a context for training and testing, and the mask of its outputs."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor
    mask: Tensor


@dataclass
class Found:
    """``matrix[i, j]``: accuracy on task j after task i. ``ratios``: penalty by task gradient, squared, by task."""

    matrix: Tensor
    ratios: list[float] = field(default_factory=list)


def tasks_of(seed: int) -> list[Task]:
    """Return the tasks of a seed, which draws the split and which classes go together."""
    data = digits.load(seed)
    contexts = continual.split_classes(digits.CLASSES, TASKS, seed)
    tasks = []
    for number, classes in enumerate(contexts):
        rows, held = (continual.rows_of(labels, classes) for labels in (data.train_labels, data.test_labels))
        mask = continual.active(digits.CLASSES, contexts, number, "task")
        tasks.append(Task(data.train[rows], data.train_labels[rows], data.test[held], data.test_labels[held], mask))
    return tasks


def network(seed: int) -> nn.Sequential:
    """Return the network of the paper: 784-400-400-10."""
    torch.manual_seed(seed)
    sizes = (digits.SIDE**2, 400, 400, digits.CLASSES)
    return nn.Sequential(
        nn.Linear(*sizes[:2]), nn.ReLU(), nn.Linear(*sizes[1:3]), nn.ReLU(), nn.Linear(*sizes[2:]),
    )  # fmt: skip


def exact(model: nn.Module, task: Task) -> Mapping[str, Tensor]:
    """Return the exact Fisher over the task's training images and its two outputs."""
    columns = task.mask.nonzero().squeeze(1)
    places = (task.labels[:, None] == columns).long().argmax(1)
    batches = zip(task.train.split(200), places.split(200), strict=True)
    return estimate_fisher(model, batches, "exact", forward=lambda net, x: net(x)[:, columns], verify=False)


def learn(method: str, lam: float, tasks: Sequence[Task], seed: int, steps: int = STEPS) -> Found:
    """Learn all tasks, and test on those seen after each.

    Args:
        method: ``none``, ``l2``, ``fisher`` (exact), ``squisher`` (a separate average of the task's gradient) or
            ``own`` (the optimizer's second moment, which takes in the penalty's gradient).
        lam: Lambda.
        tasks: In the order to learn them.
        seed: Of the network and the order of the images.
        steps: Of each task.
    """
    model, penalty = network(seed), EWCPenalty(0.0 if method == "none" else lam)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    order = torch.Generator().manual_seed(seed)
    found = Found(torch.zeros(len(tasks), len(tasks), dtype=torch.float64))
    for number, task in enumerate(tasks):
        squares = GradientSquares(model)
        for _ in range(steps):
            rows = torch.randint(len(task.labels), (BATCH,), generator=order)
            optimizer.zero_grad()
            cross_entropy(continual.masked(model(task.train[rows]), task.mask), task.labels[rows]).backward()
            if method == "squisher":
                squares.update()
            penalty.add_gradient(model)
            optimizer.step()
        found.ratios.append(penalty.ratio() or 0.0)
        for seen, past in enumerate(tasks[: number + 1]):
            with torch.no_grad():
                found.matrix[number, seen] = continual.accuracy(model(past.test), past.test_labels, past.mask)
        if method == "fisher":
            penalty.add(model, exact(model, task))
        elif method == "squisher":
            penalty.add(model, squares.fisher(), examples_per_step=BATCH)
        elif method == "own":
            penalty.add(model, live_squisher(model, optimizer), examples_per_step=BATCH)
        elif method == "l2":
            penalty.add(model, identity(model))
    return found


def choose(tasks: Mapping[int, Sequence[Task]], quiet: bool = False) -> dict[str, dict[float, float]]:
    """Return method -> lambda -> mean accuracy at the end, over seeds."""
    todo = [(method, lam) for method, grid in GRID.items() for lam in grid]
    found: dict[str, dict[float, float]] = {method: {} for method in GRID}
    for method, lam in tqdm(todo, desc="choosing lambda", delay=2, disable=quiet):
        ends = [learn(method, lam, tasks[seed], seed).matrix[-1].mean().item() for seed in tasks]
        found[method][lam] = statistics.mean(ends)
    return found


def plot(curves: Mapping[str, Sequence[Sequence[float]]], file: Path) -> None:
    """Draw the mean accuracy on the tasks seen against their number: a line a method, a bar from least to most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    styles = {
        "none": ("black", ":", "x"),
        "l2": ("0.55", "-.", "^"),
        "fisher": ("0.3", "--", "s"),
        "squisher": ("C3", "-", "o"),
    }
    labels = {"none": "no penalty", "l2": "L2 (identity)", "fisher": "exact Fisher", "squisher": "Squisher"}
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for shift, (method, runs) in enumerate(curves.items()):
        color, line, marker = styles[method]
        columns = [[100 * value for value in column] for column in zip(*runs, strict=True)]
        middle = [statistics.mean(column) for column in columns]
        reach = [
            [m - min(c) for m, c in zip(middle, columns, strict=True)],
            [max(c) - m for m, c in zip(middle, columns, strict=True)],
        ]
        places = [number + 1 + 0.05 * (shift - 1.5) for number in range(len(middle))]
        axes.errorbar(
            places, middle, reach, color=color, linestyle=line, marker=marker, capsize=2, label=labels[method]
        )
    axes.set(xlabel="tasks learnt", ylabel="accuracy, mean over the tasks learnt (%)", xticks=range(1, TASKS + 1))
    axes.set_title(
        f"Split digits, task-incremental: mean, least and most of {len(REPORTED)} seeds", fontsize="medium", loc="left"
    )
    axes.grid(linewidth=0.3)
    axes.legend(loc="lower left")
    figure.savefig(file, format="png", dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """Choose lambda, run all methods on the other seeds, print, and draw."""
    parser = argparse.ArgumentParser(description="EWC on split digits, with its baselines.")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG to write: accuracy over tasks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    chosen_on = choose({seed: tasks_of(seed) for seed in CHOSEN_ON}, options.quiet)
    best = {method: max(found, key=lambda lam: (found[lam], -lam)) for method, found in chosen_on.items()}
    report: dict[str, object] = {"chosen_on": chosen_on, "lambda": best}
    print("lambda: mean accuracy at the end over seeds", *CHOSEN_ON)
    for method, found in chosen_on.items():
        print(f"  {method:9}", *(f"{lam:g}: {100 * value:.2f}" for lam, value in found.items()))
    curves: dict[str, list[list[float]]] = {method: [] for method in best}
    print(f"seeds {REPORTED}: accuracy at the end, backward transfer, forgetting (points)")
    for method, lam in best.items():
        runs = [learn(method, lam, tasks_of(seed), seed).matrix for seed in REPORTED]
        curves[method] = [continual.average_so_far(matrix).tolist() for matrix in runs]
        ends = [curve[-1] for curve in curves[method]]
        figures = [
            statistics.mean(map(measure, runs)) for measure in (continual.backward_transfer, continual.forgetting)
        ]
        print(f"  {method:9} lambda {lam:<7g} {_points(statistics.mean(ends), *figures)}  each {_points(*ends)}")
    print(f"squared gradients, penalty by task, last steps of each task, lambda {RUNAWAY:g}, seed {REPORTED[0]}")
    for method in ("squisher", "own"):
        ratios = learn(method, RUNAWAY, tasks_of(REPORTED[0]), REPORTED[0])
        report[f"ratios {method}"] = ratios.ratios
        print(
            f"  {method:9}",
            *(f"{ratio:.1e}" for ratio in ratios.ratios),
            f"accuracy {_points(ratios.matrix[-1].mean().item())}",
        )
    report["curves"] = curves
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf8")
    if options.plot:
        plot(curves, options.plot)
    return 0


def _points(*shares: float) -> str:
    return " ".join(f"{100 * share:6.2f}" for share in shares)


if __name__ == "__main__":
    sys.exit(main())
