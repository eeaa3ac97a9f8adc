"""Tables and primary comparison of ``merge_methods``, from made-up cells."""

import pytest

from scripts.experiments import (
    merge_methods,
    merge_methods_counts,
    merge_methods_language,
    merge_methods_wider,
    method_report,
    structure_language,
    structure_report,
)
from scripts.experiments.method_rows import ROWS, methods

TASKS = ("bbc", "spam")


def _cell(settings, gap):
    """Return a cell in which kron is some points above the field, which is ``sce``; ``ram`` is best on test texts."""
    seed = settings["seed"]
    level = dict.fromkeys(ROWS, 60.0) | {"single": 90.0, "sce": 70.0 + seed, "ram": 80.0, "kron": 70.0 + seed + gap}
    table = methods(len(TASKS), seed)
    result = {
        "test": {row: {"bbc": value - 2, "spam": value + 2} for row, value in level.items()},
        "validation": dict.fromkeys(table, 50.0) | {"sce": 75.0, "kron": 99.0},
        "chosen": {row: dict(method.settings[0]) for row, method in table.items()},
        "searched": {},
    }
    return {
        "settings": settings,
        "result": result,
        "timings": {"merge": dict.fromkeys(table, 1.5), "training": 5.0},
    }


def _report(gaps, cells=None):
    """Return a report; the gaps of the two starts of the heads vary by 0.1 points with the seed."""
    planned = merge_methods.EXPERIMENT.full
    made = []
    for one in planned[:cells]:
        made.append(_cell(one, gaps.get(one.get("heads"), 0.0) + 0.1 * (one["seed"] % 2)))
    return {"cells": made, "planned": len(planned)}


def test_the_cells_are_three_a_seed():
    """Both starts of the heads and the domains have five seeds, and nine settings a method."""
    planned = merge_methods.EXPERIMENT.full
    assert [sum(one["seed"] == seed for one in planned) for seed in range(46, 51)] == [3] * 5
    assert {one["budget"] for one in planned} == {9}


def test_the_field_is_chosen_on_validation_texts():
    """The best method on the test texts is not the field, and neither is one of ours."""
    report = _report({})
    assert {method_report.field(one) for one in report["cells"]} == {"sce"}
    assert method_report.less_field(report["cells"][:1], "ram") == [80.0 - 70.0 - 46]


@pytest.mark.parametrize(
    ("gaps", "cells", "verdict"),
    [
        ({"apart": 2.0, "equal": 1.0}, None, "`structure: kron` with a base is recommended"),
        ({"apart": 2.0, "equal": -0.05}, None, "no recipe is recommended"),
        ({"apart": -2.0, "equal": 3.0}, None, "no recipe is recommended"),
        ({"apart": 2.0, "equal": 1.0}, 9, "Seeds are missing"),
    ],
)
def test_a_recommendation_needs_both_intervals_above_0(gaps, cells, verdict):
    """One start below 0, an interval with 0 inside, or a missing seed allows no recommendation."""
    report = _report(gaps, cells)
    text = method_report.tables(report, merge_methods.EXPERIMENT)[0].notes[0]
    assert verdict in text
    assert method_report.holds(report, 5) == ("is recommended for" in text)


def test_a_table_has_a_row_for_each_method():
    """Means, the worst task, the largest loss, and differences to the field, ties and Eq. 13."""
    found = merge_methods.tables(_report({"apart": 2.0, "equal": 1.0}, 14))[::2]
    assert [len(table.rows) for table in found] == [len(ROWS)] * 3
    rows = dict(found[0].rows)
    assert rows["`ties`"][:3] == ["60.0 ± 0.0", "58.0 ± 0.0", "30.0 ± 0.0"]
    assert rows["`ties`"][4:] == ["", "+0.0 ± 0.0", "1.5"]
    assert rows["`structure: kron`"][3].startswith("+2.0")
    assert "4 seeds of 5 planned" in found[2].title
    assert "400 products" in found[2].title
    assert "1 cell is missing" in found[2].notes[-1]
    assert merge_methods.pictures(_report({}))["merge_methods.png"].startswith(b"\x89PNG")


def test_chosen_settings_stand_below_each_table_to_be_opened():
    """A row for each method with a choice: values seed by seed, and how often a number is at an end of its list."""
    report = _report({"apart": 2.0, "equal": 1.0}, 4)
    report["cells"][0]["result"]["chosen"]["ties"] = {"density": 0.2, "lambda": 1.0}
    apart = merge_methods.tables(report)[1]
    rows = dict(apart.rows)
    assert rows["`ties`"][0].startswith("density 0.2, 0.1; lambda 1, 1")
    assert rows["`ties`"][1].startswith("density 1 of 2")
    assert rows["`multislerp`"][0].startswith("origin base, base; lambda ")
    assert "`linear`, the plain average" not in rows
    text = apart.markdown()
    assert text.startswith("<details><summary>Settings that the validation texts chose: each classifier drawn")
    assert text.endswith("</details>")


def test_the_generative_model_has_tables_of_accuracy_and_of_loss():
    """Accuracies have no primary comparison, and losses stand in a table with the model before its fine-tuning."""
    planned = merge_methods_language.EXPERIMENT.full
    cells = [_cell(one, 2.0) for one in planned[:2]]
    for one in cells:
        test = dict(one["result"]["test"], base={"bbc": 40.0, "spam": 50.0})
        losses = {row: 3.0 + (row == "kron") for row in test}
        one["result"] |= {"test": test, structure_language.LOSS: losses}
    report = {"cells": cells, "planned": len(planned)}
    accuracies, choices, losses = merge_methods_language.tables(report)
    assert choices.summary
    assert "generative model.**" in accuracies.title
    assert "over 2 seeds of 3 planned, 100 held-out texts" in accuracies.title
    assert [label for label, _ in accuracies.rows] == list(ROWS.values())
    assert not any("Primary comparison" in note for note in accuracies.notes)
    assert dict(losses.rows)["`structure: kron`"] == ["4.000 ± 0.000", "1.000 ± 0.000"]
    assert dict(losses.rows)[structure_language.LABEL] == ["3.000 ± 0.000", "0.000 ± 0.000"]


def test_counts_stand_beside_the_merge_of_six(monkeypatch):
    """A column for each count, with three settings a method; six models are those of the same seeds."""
    planned = merge_methods_counts.EXPERIMENT.full
    assert [len(one["tasks"]) for one in planned] == [2, 3, 4] * 10
    assert {one["budget"] for one in planned} == {3}
    assert {one["seed"] for one in planned} == {46, 47, 48, 49, 50}
    six = _report({"apart": 5.0, "equal": 5.0})
    monkeypatch.setattr(structure_report, "results", lambda name: six)
    report = {"cells": [_cell(one, float(len(one["tasks"]))) for one in planned[:4]], "planned": len(planned)}
    apart, equal = merge_methods_counts.tables(report)
    assert apart.columns == ["2 models, 1 seed", "3 models, 1 seed", "4 models, 1 seed", "6 models, 5 seeds"]
    assert equal.columns == ["2 models, 1 seed", "6 models, 5 seeds"]
    assert dict(apart.rows)["`structure: kron`"] == ["118.0", "119.0", "120.0", "123.0 ± 1.6"]
    assert apart.notes[1].startswith("3 models: the field is `sce`. Points above it: `structure: rows` -56.0,")
    assert "`structure: kron` +3.0," in apart.notes[1]
    assert "26 cells are missing" in equal.notes[-1]
    assert merge_methods_counts.pictures(report)["merge_methods_counts.png"].startswith(b"\x89PNG")


def test_wider_lists_contain_those_of_nine_settings():
    """Every setting of ``merge_methods`` is searched again, and numbers reach beyond both ends."""
    nine = methods(6, 46)
    for row, method in merge_methods_wider.wider(6, 46).items():
        assert all(one in method.settings for one in nine[row].settings)
        for option in nine[row].settings[-1]:
            before, after = ({one[option] for one in table.settings} for table in (nine[row], method))
            assert min(after) < min(before)
            assert max(after) > max(before) or (row, option) == ("sce", "select_topk")  # 1 keeps all


def test_wider_lists_stand_beside_kron_of_nine_settings(monkeypatch):
    """The gain of the wider lists, and the lead of kron over each row and over the best by the validation texts."""
    planned = merge_methods_wider.EXPERIMENT.full
    monkeypatch.setattr(structure_report, "results", lambda name: _report({"apart": 5.0, "equal": 5.0}))
    cells = [_cell(one, 0.0) for one in planned[:3]]
    for one in cells:
        one["result"]["test"]["ties"] = {"bbc": 64.03, "spam": 66.03}
        one["result"]["test"]["sce"] = dict.fromkeys(TASKS, 70.02 + one["settings"]["seed"])
    apart, settings, equal, _ = merge_methods_wider.tables({"cells": cells, "planned": len(planned)})
    assert dict(apart.rows)["`ties`"] == ["49", "65.0 ± 0.0", "64.0 ± 0.0", "+5.0 ± 0.0", "+56.5 ± 7.0"]
    assert dict(apart.rows)["`sce`"][3:] == ["+0.0 ± 0.0", "+5.0 ± 0.6"]
    assert "(`sce`; `sce`): +5.0 ± 0.6 points, above 0 in 2 of 2. Seeds on which it is above a row: " in apart.notes[0]
    assert "`ties` 2, `sce` 2, OTA-merge 2." in apart.notes[0]
    assert settings.summary.endswith("drawn by its own seed")
    assert "over 1 seed of 5 planned" in equal.title
    assert "7 cells are missing" in equal.notes[-1]


def test_cells_from_a_gpu_have_no_column_of_cpu_time():
    """Cells without CPU times make the same table less one column, and no note on the time of fine-tuning."""
    whole = _report({})
    bare = {
        **whole,
        "cells": [{key: value for key, value in one.items() if key != "timings"} for one in whole["cells"]],
    }
    before, after = (method_report.tables(report, merge_methods.EXPERIMENT)[0] for report in (whole, bare))
    assert after.columns == before.columns[:-1]
    assert [cells for _, cells in after.rows] == [cells[:-1] for _, cells in before.rows]
    assert after.notes == [note for note in before.notes if "CPU-s" not in note]
