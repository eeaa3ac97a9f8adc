"""``scripts.benchmarks.read_ahead`` and the sizes of ``scripts.benchmarks.merge``."""

from types import SimpleNamespace

import pytest

from scripts.benchmarks import merge, read_ahead


def test_the_table_has_a_row_for_each_budget():
    """Minima and medians of each state stand in one table; reading has a time alone."""
    run = {"wall_s": 2.0, "cpu_s": 1.0, "anonymous_gb": 0.5, "rss_gb": 1.0}
    samples = {"reading": [{"wall_s": 3.0}], "cold, 0 MB": [run, run | {"wall_s": 4.0}], "cold, 64 MB": [run]}
    report = {"parameters": 3e8, "bytes": 36e8, "cores": 2, "load_average": [0.1, 2.0], "samples": samples}
    rows = read_ahead.table(report)
    assert [row.split()[0] for row in rows[1:4]] == ["reading", "cold,", "cold,"]
    assert "2.00 /  3.00" in rows[2]
    assert "3.60 GB read" in rows[-1]


@pytest.mark.parametrize(
    ("arguments", "budgets"), [([], ["0", "256"]), (["--budgets", "32", "512"], ["0", "32", "512"])]
)
def test_a_run_without_read_ahead_is_always_compared(arguments, budgets):
    """The budgets begin with 0; further options are those of the benchmark of merges."""
    options = read_ahead.parse([*arguments, "--repeat", "5", "--size", "1b"])
    assert (options.budgets, options.repeat, options.hidden, options.fisher_dtype) == (budgets, 5, 2048, "log8")


@pytest.mark.parametrize(("size", "free", "fits"), [("7b", 45e9, False), ("7b", 60e9, True), ("3b", 20e9, False)])
def test_a_disk_without_room_is_refused_in_one_line(size, free, fits, tmp_path, monkeypatch):
    """Two models of 7 billion, their log8 Fishers and a result need about 54 GB."""
    monkeypatch.setattr(merge.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    options = merge.parse(["--size", size])
    if fits:
        merge.check_disk(tmp_path, options)
        return
    with pytest.raises(SystemExit, match=r"must have \d+ GB of disk, but .* give a smaller --size") as refused:
        merge.check_disk(tmp_path, options)
    assert "\n" not in str(refused.value)
