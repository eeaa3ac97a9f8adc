"""Tables, findings and pictures of the experiments that merge LoRA adapters."""

from collections.abc import Callable, Mapping, Sequence

from scripts.experiments import structure_report
from scripts.experiments.structure_language import BEFORE, LABEL
from scripts.experiments.structure_report import Cell, less, means
from scripts.experiments.tables import Table, difference, mean_sd

OURS = ("lifted", "lifted-options", "out-r", "out-2r", "out-4r")
ROWS = {
    BEFORE: LABEL,
    "single": "single models, each on its own task",
    "linear": "plain average (`linear`)",
    "task_arithmetic": "`task_arithmetic`, tuned",
    "ties": "`ties`, tuned",
    "dare_ties": "`dare_ties`, tuned",
    "apart": "A and B averaged apart",
    "apart-fisher": "A and B merged apart by their own Fishers",
    "one": "one number per model, the mean of the lifted F",
    "lifted": "`squisher`, lifted F",
    "lifted-options": "`squisher`, lifted F, options tuned",
    "recorded": "`squisher`, F of W recorded in training",
    "computed": "`squisher`, F of W estimated from texts",
    "control": "`squisher`, each model with another's lifted F",
    "out-r": "`squisher`, lifted F, as an adapter of rank r",
    "out-2r": "the same, rank 2r",
    "out-4r": "the same, rank 4r",
}
PAIRS = (
    ("lifted", "linear"),
    ("control", "linear"),
    ("lifted", "ties"),
    ("lifted-options", "ties"),
    ("lifted-options", "lifted"),
    ("lifted", "one"),
    ("lifted", "apart-fisher"),
    ("lifted", "recorded"),
    ("lifted", "computed"),
    ("out-r", "lifted"),
    ("out-2r", "lifted"),
    ("out-4r", "lifted"),
)
NAMES = {
    "linear": "the plain average",
    "ties": "tuned `ties`",
    "one": "one number per model",
    "apart-fisher": "A and B apart by their Fishers",
    "lifted": "lifted F",
    "lifted-options": "lifted F with options",
    "recorded": "recorded F",
    "computed": "estimated F",
    "control": "another's F",
    "out-r": "adapter of rank r",
    "out-2r": "of rank 2r",
    "out-4r": "of rank 4r",
}
Groups = Mapping[str, Sequence[Cell]]


def tables(title: str, groups: Groups, notes: Sequence[str]) -> list[Table]:
    """Return tables with a column for each group: means, differences to the average and to lifted F, worst tasks.

    Args:
        title: Title of the first table.
        groups: Short name of a group -> its cells.
        notes: Notes below the last table.
    """
    first = next(iter(groups.values()))[0]["result"]["test"]
    rows = [row for row in ROWS if row in first]

    def table(
        head: str, text: Callable[[Sequence[Cell], str], str], leave: Sequence[str], below: Sequence[str]
    ) -> Table:
        lines = [(ROWS[row], [text(cells, row) for cells in groups.values()]) for row in rows if row not in leave]
        return Table(head, list(groups), lines, below)

    def below(other: str) -> Callable[[Sequence[Cell], str], str]:
        return lambda cells, row: difference(less(cells, row, other))

    paired = "points, paired by seed, with 95 % t intervals"
    return [
        table(title, lambda cells, row: mean_sd(means(cells, row)), (), findings(groups)),
        table(f"**Less the plain average**, {paired}", below("linear"), ("linear",), ()),
        table(f"**Less the merge by lifted F**, {paired}", below("lifted"), ("lifted",), ()),
        table(
            "**Worst task of a seed**, in %", worst, (), [*choices(groups), *filter(None, [training(groups)]), *notes]
        ),
    ]


def worst(cells: Sequence[Cell], row: str) -> str:
    """Return the mean over seeds of a row's worst task as text."""
    return mean_sd([min(one["result"]["test"][row].values()) for one in cells])


def findings(groups: Groups) -> list[str]:
    """Return the paired differences of all groups: over all cells, seed by seed, and how often each is above 0."""
    cells = [one for group in groups.values() for one in group]
    test = cells[0]["result"]["test"]
    lines = []
    for one, other in PAIRS:
        if one in test and other in test:
            gaps = less(cells, one, other)
            by_seed = per_seed(cells, one, other)
            lines.append(
                f"{NAMES[one]} less {NAMES[other]} {difference(by_seed)} (above 0 in {sum(gap > 0 for gap in gaps)} of "
                f"{len(gaps)} cells)"
            )
    seeds = structure_report.number(sorted({one["settings"]["seed"] for one in cells}))
    text = "; ".join(lines)
    return [
        f"Differences of the mean over all cells of a seed, with 95 % t intervals over {seeds}: {text}.",
        verdict(cells),
    ]


def per_seed(cells: Sequence[Cell], row: str, other: str) -> list[float]:
    """Return the points of a row above another, as the mean over the cells of each seed."""
    by_seed: dict[int, list[float]] = {}
    for one, gap in zip(cells, less(cells, row, other), strict=True):
        by_seed.setdefault(one["settings"]["seed"], []).append(gap)
    return [sum(gaps) / len(gaps) for _, gaps in sorted(by_seed.items())]


def verdict(cells: Sequence[Cell]) -> str:
    """Return a sentence on lifted F against the average, with the control."""
    gain, control = (per_seed(cells, row, "linear") for row in ("lifted", "control"))
    above = sum(gap > 0 for gap in gain)
    under = sum(gap < 0 for gap in control)
    return (
        f"The merge by lifted F is above the plain average on {above} of {len(gain)} seeds; the control, with the F of "
        f"another model, is below it on {under} of {len(control)}."
    )


def choices(groups: Groups) -> list[str]:
    """Return the choices of each group as text."""
    return [f"{name}. {structure_report.chosen(cells, ROWS)}" for name, cells in groups.items()]


def training(groups: Groups) -> str:
    """Return the CPU time of fine-tuning the models of a cell."""
    return structure_report.training([one for cells in groups.values() for one in cells])


def picture(groups: Groups) -> bytes:
    """Return the picture of mean accuracies, one panel for each group."""
    first = next(iter(groups.values()))[0]["result"]["test"]
    rows = [row for row in ROWS if row in first]
    return structure_report.picture(groups, rows, ROWS, width=4 + 2.4 * len(groups), filled=OURS)
