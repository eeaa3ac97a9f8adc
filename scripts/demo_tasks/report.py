"""Result of the demo as a table for the terminal."""

import math

from scripts.demo_tasks.run import Result


def as_text(result: Result) -> str:
    """Return accuracies, costs and warnings as text."""
    return "\n".join([*_accuracies(result), "", *_costs(result), *_warnings(result)])


def _accuracies(result: Result) -> list[str]:
    tasks = list(next(iter(result.accuracy.values())))
    width = max(len(row) for row in result.accuracy) + 2
    error = math.sqrt(0.25 / result.n_test) * 100
    lines = [
        f"Accuracy in % on {result.n_test} held-out texts of each set, classes balanced (seed {result.seed};"
        f" one standard error of a cell is at most {error:.1f})",
        " " * width + "".join(f"{task:>12}" for task in tasks) + f"{'mean':>8}",
    ]
    for row, found in result.accuracy.items():
        cells = "".join(f"{100 * found[task]:>12.1f}" for task in tasks)
        lines.append(f"{row:<{width}}{cells}{100 * result.mean(row):>8.1f}")
    return [*lines, result.scoring]


def _costs(result: Result) -> list[str]:
    width = max(len(step.name) for step in result.steps) + 2
    lines = [f"{'step':<{width}}{'seconds':>9}{'CPU s':>8}{'MB read: weights':>18}{'optimizer.pt':>14}"]
    for step in result.steps:
        cpu = "" if step.cpu is None else f"{step.cpu:.1f}"
        read = f"{step.weights / 1e6:>18.0f}{step.accumulators / 1e6:>14.0f}" if step.weights else ""
        lines.append(f"{step.name:<{width}}{step.seconds:>9.1f}{cpu:>8}{read}".rstrip())
    lines.append(f"{'all':<{width}}{result.seconds:>9.1f}   (two processes side by side)")
    lines.append("MB read: sizes of the files that a merge opens; half of an optimizer.pt is first moments, unused.")
    clipped = ", ".join(f"{name} {100 * one['clipped']:.0f} %" for name, one in result.fine_tuning.items())
    lines.append(f"Steps whose gradient was clipped: {clipped}")
    return lines


def _warnings(result: Result) -> list[str]:
    lines = []
    for merge, messages in result.messages.items():
        found = [message for message in messages if "was made at other weights" in message]
        if found:
            lines += ["", f"{merge}: the merge warned {len(found)} times, as it should; the first:", f"  {found[0]}"]
    return lines
