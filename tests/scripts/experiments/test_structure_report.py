"""Tables, findings and picture of the experiments on structures, from made-up cells."""

import pytest

from scripts.experiments import structure, structure_report
from scripts.experiments.structure_merges import ROWS

BASE = {"single": 90.0, "linear": 60.0, "task_arithmetic": 62.0, "ties": 70.0, "ota": 71.0, "masked": 72.0}
BASE |= {"diagonal": 69.0, "rows": 71.0, "columns": 80.0, "kron": 82.0}
BASE |= {"rows-tuned": 73.0, "columns-tuned": 80.0, "kron-tuned": 84.0}


def _report(seeds=2, planned=4, **shift):
    """Return cells of some seeds; the second task of a row is 2 points higher for each seed."""
    cells = []
    for seed in range(seeds):
        for heads in ("apart", "equal"):
            test = {
                row: {"bbc": value - 4 + shift.get(row, 0) * (-1) ** seed, "spam": value + 4 + 2 * seed}
                for row, value in BASE.items()
            }
            chosen = {"ties": {"density": 0.05 * (seed + 1), "lambda": 1.0}}
            result = {"test": test, "chosen": chosen, "searched": {}}
            timings = {"merge": {row: 1.0 + seed for row in BASE if row != "single"}, "training": 5.0}
            cells.append(
                {"settings": {"seed": seed, "heads": heads, "test": 200}, "result": result, "timings": timings}
            )
    return {"cells": cells, "planned": planned}


def test_a_table_has_means_worst_tasks_and_paired_differences():
    """Means over tasks and seeds, the worst task of a seed, t intervals of the differences, and the cost."""
    apart, equal = structure.tables(_report())
    rows = dict(apart.rows)
    assert rows["`ties`, tuned"] == ["70.5 ± 0.7", "66.0 ± 0.0", "", "+1.0 ± 0.0", "1.5"]
    assert rows["`structure: kron`"] == ["82.5 ± 0.7", "78.0 ± 0.0", "+12.0 ± 0.0", "+13.0 ± 0.0", "1.5"]
    assert rows[ROWS["single"]][2:] == ["", "", ""]
    assert list(rows) == list(ROWS.values())
    assert equal.rows == apart.rows
    assert "`ties` density 0.05, lambda 1; density 0.1, lambda 1" in apart.notes[1]
    assert apart.notes[2].endswith("may be outside: `ties` density 1 of 2.")
    assert apart.notes[3] == "Fine-tuning the models of a seed takes 5 CPU-s, once for all experiments that use them."
    assert len(apart.notes) == 4


@pytest.mark.parametrize(
    ("shift", "verdict"), [(0.0, "is so far above"), (-30.0, "is on some seeds above, on some not above,")]
)
def test_findings_say_what_the_seeds_allow(shift, verdict):
    """A structure is compared with the best other merge; seeds that disagree decide nothing."""
    text = " ".join(structure_report.findings(structure_report.cells_of(_report(kron=shift), heads="apart")))
    assert f"`kron` with its defaults {verdict} the masked diagonal, the best without a structure" in text
    assert "`rows` with its defaults is so far below the masked diagonal" in text
    assert "-1.0 ± 0.0 points, above 0 in 0 of 2" in text
    assert "tuning adds +2.0 ± 0.0" in text


def test_three_seeds_make_a_finding():
    """With three seeds that agree, a structure is above or below without reserve."""
    cells = structure_report.cells_of(_report(seeds=3), heads="apart")
    text = " ".join(structure_report.findings(cells))
    assert "`kron` with its defaults is above the masked diagonal" in text
    assert "`rows` with its defaults is below the masked diagonal" in text


def test_missing_seeds_are_stated():
    """The title has the number of seeds, and of the planned ones while some are missing; a note has the command."""
    few = structure.tables(_report(seeds=1, planned=10))[0]
    assert (
        few.notes[-1] == "Unfinished: 8 cells are missing, which `python -m scripts.experiments.structure --full` runs."
    )
    assert "over 2 seeds, 200 held-out" in structure.tables(_report())[0].title
    assert "over 1 seed of 5 planned, 200 held-out" in few.title


def test_a_single_seed_has_no_interval():
    """The difference of a single seed stands alone, as does its mean."""
    rows = dict(structure.tables(_report(seeds=1))[0].rows)
    assert rows["`structure: kron`"] == ["82.0", "78.0", "+12.0", "+13.0", "1.0"]


def test_the_picture_is_a_small_png():
    """The picture is one small PNG for the README."""
    pytest.importorskip("matplotlib")
    ((name, data),) = structure.pictures(_report()).items()
    assert name == "structure.png"
    assert data.startswith(b"\x89PNG")
    assert len(data) < 120_000
