"""Tables and pictures of ``questions``, from its report only, without imports of training code."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.experiments import drawing
from scripts.experiments.tables import Table, mean_sd

Report = Mapping[str, Any]
Found = Mapping[str, Any]
FORMS = {
    "float32": "float32, as written",
    "bfloat16": "bfloat16",
    "log8": "`log8`",
    "log4": "`log4`",
    "rank1": "`rank1`",
}
DATA = {
    "squisher": "Squisher",
    "own_true": "Fisher on the task's own texts, true labels",
    "own_drawn": "Fisher on the task's own texts, labels drawn from the model",
    "next_drawn": "Fisher on the next task's texts, labels drawn",
    "elsewhere_drawn": "Fisher on movie reviews, labels drawn",
}
BITS8 = {"float32": "float32 average of the same gradients", "8bit": "the optimizer's own state, 8 bits"}
AVERAGE, SWAPPED = "plain average (`linear`)", "control: each model with another's"
STYLES = (("o", "-", "0.0"), ("s", "--", "0.35"), ("^", ":", "0.55"))


def tables(report: Report) -> list[Table]:
    """Return a table for each question."""
    return [_steps(report), _forms(report), _bits8(report), _data(report)]


def results(report: Report, question: str) -> list[Found]:
    """Return the results of each seed, in the order of the seeds."""
    cells = [cell for cell in report["cells"] if cell["settings"]["question"] == question]
    return [cell["result"] for cell in sorted(cells, key=lambda cell: cell["settings"]["seed"])]


def values(found: Sequence[Found], key: str, **which: Any) -> list[float]:
    """Return a number of one row for each seed.

    Example:
        >>> values([{"rows": [{"form": "log8", "accuracy": 3.0}, {"form": "log4", "accuracy": 2.0}]}],
        ...        "accuracy", form="log4")
        [2.0]
    """
    return [row[key] for one in found for row in one["rows"] if all(row[name] == want for name, want in which.items())]


def of(found: Sequence[Found], key: str) -> list[float]:
    """Return a number outside of the rows for each seed."""
    return [one[key] for one in found]


def gain(one: Sequence[float], other: Sequence[float], digits: int = 1) -> str:
    """Return the difference seed by seed with its sign, without a sign where the mean is rounded to 0.

    Example:
        >>> gain([3.0, 4.0], [1.0, 4.0])
        '+1.0 ± 1.4'
    """
    text = mean_sd([a - b for a, b in zip(one, other, strict=True)], digits)
    mean = text.partition(" ")[0]
    return text.removeprefix("-") if float(mean) == 0 else text if mean.startswith("-") else f"+{text}"


def _about(report: Report, question: str) -> str:
    settings = next(cell["settings"] for cell in report["cells"] if cell["settings"]["question"] == question)
    count = len(results(report, question))
    return (
        f"mean accuracy over {len(settings['tasks'])} tasks in % ({settings['test']} held-out texts each, heads that "
        f"start equal), mean ± standard deviation over {count} seeds"
    )


def _axes_of(found: Sequence[Found]) -> tuple[list[float], list[int]]:
    """Return the decays and the steps."""
    rows = found[0]["rows"]
    return sorted({row["beta2"] for row in rows}), sorted({row["step"] for row in rows})


def _steps(report: Report) -> Table:
    found = results(report, "steps")
    betas, steps = _axes_of(found)
    rows = []
    for key, label, digits in (("accuracy", "accuracy of the merge", 1), ("rank", "rank correlation", 3)):
        for beta2 in betas:
            cells = [mean_sd(values(found, key, beta2=beta2, step=step), digits) for step in steps]
            rows.append((f"{label}, β2 = {beta2}", cells))
    return Table(
        "**After how many steps is a Squisher good?** Weights of the last step, Squisher after so many: "
        f"{_about(report, 'steps')}; rank correlation with a computed Fisher at the last weights "
        "(every eleventh entry, table of words apart)",
        [f"{step} steps" for step in steps],
        rows,
        _notes_on_steps(found, betas, steps),
    )


def _notes_on_steps(found: Sequence[Found], betas: Sequence[float], steps: Sequence[int]) -> list[str]:
    average, fisher = of(found, "average"), of(found, "fisher")
    last = values(found, "accuracy", beta2=betas[-1], step=steps[-1])
    early = values(found, "accuracy", beta2=betas[-1], step=steps[0])
    spread = [
        max(values([one], "accuracy", step=steps[-1])) - min(values([one], "accuracy", step=steps[-1])) for one in found
    ]
    best = max(sum(values(found, "rank", beta2=b, step=s)) / len(found) for b in betas for s in steps)
    ceiling = sum(of(found, "ceiling")) / len(found)
    notes = [
        f"For comparison: plain average {mean_sd(average)}, computed Fisher {mean_sd(fisher)}; the rank correlation of "
        f"a second computed Fisher with the first, on as many other texts, is {mean_sd(of(found, 'ceiling'), 3)}, the "
        f"best of a Squisher's {best:.3f}, {'above' if best > ceiling else 'below'} it.",
        f"Seed by seed, β2 = {betas[-1]}: after {steps[0]} steps {gain(early, average)} points over the plain "
        f"average, after {steps[-1]} steps {gain(last, average)}, and {gain(last, fisher)} to the computed Fisher. "
        f"After {steps[-1]} steps the decays differ by {mean_sd(spread)} points within a seed. The average with "
        f"β2 = {betas[-1]} is Adam's own second moment {_exactly(max(of(found, 'unlike_adams')))}.",
    ]
    return notes + _order(last, fisher, average)


def _exactly(apart: float) -> str:
    return f"to within {apart:.0e} of its largest entry" if apart else "to the bit"


def _order(squisher: Sequence[float], fisher: Sequence[float], average: Sequence[float]) -> list[str]:
    """Return a note if the paper's order (both above the plain average) fails on a seed."""
    below = [
        name
        for name, one in (("Squisher", squisher), ("computed Fisher", fisher))
        if any(a <= b for a, b in zip(one, average, strict=True))
    ]
    if not below:
        return []
    return [
        f"The paper has Fisher and Squisher above the plain average; here the {' and the '.join(below)} "
        f"{'are' if len(below) > 1 else 'is'} not above it on every seed. The likely cause: after so few steps the "
        "models are near each other, so that averaging loses little."
    ]


def _forms(report: Report) -> Table:
    found = results(report, "forms")
    plain = values(found, "accuracy", form="float32")
    rows = []
    for form, label in FORMS.items():
        share = [
            100 * size / one["model_bytes"] for one, size in zip(found, values(found, "bytes", form=form), strict=True)
        ]
        accuracy = values(found, "accuracy", form=form)
        rows.append((label, [f"{sum(share) / len(share):.1f} %", mean_sd(accuracy), gain(accuracy, plain)]))
    for key, label in (("average", AVERAGE), ("swapped", SWAPPED + " Squisher")):
        rows.append((label, ["", mean_sd(of(found, key)), gain(of(found, key), plain)]))
    lost = {form: [a - b for a, b in zip(plain, values(found, "accuracy", form=form), strict=True)] for form in FORMS}
    worst = max(lost, key=lambda form: sum(lost[form]))
    total = [a - b for a, b in zip(plain, of(found, "average"), strict=True)]
    most, whole = sum(lost[worst]) / len(found), sum(total) / len(found)
    note = (
        f"The form that loses most is {FORMS[worst]}: {most:.1f} of the {whole:.1f} points that the Squisher gains."
        if most > 0
        else f"No form loses anything of the {whole:.1f} points that the Squisher gains."
    )
    return Table(
        f"**What do fewer bits cost?** Squishers written, read and merged: {_about(report, 'forms')}",
        ["size relative to float32 weights", "accuracy", "less float32, seed by seed"],
        rows,
        [f"{note} Words that were not seen make zeros, which the `log` forms keep for little."],
    )


def _bits8(report: Report) -> Table:
    found = results(report, "8bit")
    average = of(found, "average")
    rows = [(AVERAGE, [mean_sd(average), ""])]
    for kind, label in BITS8.items():
        accuracy = [one["accuracy"][kind] for one in found]
        rows.append((label, [mean_sd(accuracy), gain(accuracy, average)]))
    pairs = [(one["accuracy"]["8bit"], one["accuracy"]["float32"]) for one in found]
    change = gain([a for a, _ in pairs], [b for _, b in pairs])
    return Table(
        "**What does an 8-bit optimizer cost?** Runs by AdamW8bit of bitsandbytes "
        f"{found[0]['version']}: {_about(report, '8bit')}",
        ["accuracy", "less the plain average, seed by seed"],
        rows,
        [
            f"8 bits less float32, seed by seed: {change} points; rank correlation of the two "
            f"{mean_sd(of(found, 'rank'), 3)}. Of the entries that are 0 in float32 (table of words apart) "
            f"{mean_sd(of(found, 'raised'))} % are not 0 in 8 bits. These are runs of their own, on the CPU; kernels "
            "for other devices were not tried."
        ],
    )


def _data(report: Report) -> Table:
    found, forms = results(report, "data"), results(report, "forms")
    average, own = of(forms, "average"), values(found, "accuracy", kind="own_true")
    rows = []
    for kind, label in DATA.items():
        accuracy = values(found, "accuracy", kind=kind)
        agrees = "" if kind == "own_true" else mean_sd(values(found, "rank", kind=kind), 3)
        rows.append((label, [mean_sd(accuracy), gain(accuracy, average), agrees]))
    for one, label in ((average, AVERAGE), (of(found, "swapped"), SWAPPED + " Fisher")):
        rows.append((label, [mean_sd(one), gain(one, average), ""]))
    drawn = values(found, "accuracy", kind="own_drawn")
    other = [
        f"{gain(values(found, 'accuracy', kind=kind), drawn)} ({where})"
        for kind, where in (("next_drawn", "the next task's"), ("elsewhere_drawn", "movie reviews"))
    ]
    texts = report["cells"][0]["settings"]["fisher_texts"]
    squisher = values(found, "accuracy", kind="squisher")
    return Table(
        f"**What does an estimate from other data cost?** Computed Fishers are of {texts} texts: "
        f"{_about(report, 'data')}",
        ["accuracy", "less the plain average, seed by seed", "rank correlation with the own texts' Fisher"],
        rows,
        [
            f"Other texts less own texts, both with drawn labels, seed by seed: {' and '.join(other)} points. Drawn "
            f"labels less true ones: {gain(drawn, own)}. Squisher less Fisher: {gain(squisher, own)}. Ceiling of the "
            f"rank correlation (a Fisher on {texts} other training texts): {mean_sd(of(found, 'ceiling'), 3)}.",
            *_order(squisher, own, average),
        ],
    )


def pictures(report: Report) -> dict[str, bytes]:
    """Return the picture of quality against steps: merged accuracy, and rank correlation with a computed Fisher."""
    found = results(report, "steps")
    figure = drawing.new(9, 4.4)
    left, right = figure.subplots(1, 2)
    _curves(left, found, "accuracy")
    _line(left, of(found, "fisher"), "-.", "computed Fisher")
    _line(left, of(found, "average"), (0, (1, 1)), "plain average")
    left.set_ylabel("accuracy of the merge, mean of tasks (%)")
    _curves(right, found, "rank")
    _line(right, of(found, "ceiling"), "-.", "a second computed Fisher")
    right.set_ylabel("rank correlation with a computed Fisher")
    for axes in (left, right):
        axes.set_xlabel("optimizer steps behind the Squisher (bars: all seeds)", fontsize=9)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
        axes.grid(color="0.9")
    return {"quality_against_steps.png": drawing.png(figure)}


def _curves(axes: Any, found: Sequence[Found], key: str) -> None:
    betas, steps = _axes_of(found)
    for number, (beta2, (mark, line, shade)) in enumerate(zip(betas, STYLES, strict=False)):
        columns = [values(found, key, beta2=beta2, step=step) for step in steps]
        means = [sum(one) / len(one) for one in columns]
        low = [mean - min(one) for mean, one in zip(means, columns, strict=True)]
        high = [max(one) - mean for mean, one in zip(means, columns, strict=True)]
        axes.errorbar(
            [step * 1.05 ** (number - 1) for step in steps],  # offset, so that the markers do not overlap
            means,
            [low, high],
            marker=mark,
            linestyle=line,
            color=shade,
            capsize=2,
            elinewidth=0.8,
            label=f"Squisher, β2 = {beta2}",
        )
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.minorticks_off()


def _line(axes: Any, found: Sequence[float], style: Any, label: str) -> None:
    axes.axhline(sum(found) / len(found), linestyle=style, color="0.2", linewidth=1, label=label)
