"""Generated blocks of the README files, compared with the results."""

import statistics

import pytest

from scripts.experiments import gain, merge_methods, method_report, report, tables
from tests.scripts.commands import run


def test_the_readme_agrees_with_the_results(capsys):
    """Every table of an experiment equals the one made from its JSON file."""
    assert report.main(["--check"]) == 0, "run python -m scripts.experiments.report"
    assert "all blocks match the results" in capsys.readouterr().out


def test_a_block_that_differs_is_reported_and_rewritten(tmp_path, monkeypatch, capsys):
    """--check names a changed block and writes nothing. Without it the block is rewritten."""
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- BEGIN gain -->\nold\n<!-- END gain -->\nafter\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(report, "EXPERIMENTS", ())
    monkeypatch.setattr(report, "blocks", lambda: {file: {"gain": gain.block(report.found(gain.SOURCE))}})
    assert report.main(["--check"]) == 1
    assert "differing from the results: README.md" in capsys.readouterr().out
    assert "\nold\n" in file.read_text()
    assert report.main([]) == 0
    assert report.main(["--check"]) == 0
    assert file.read_text().startswith("before\n<!-- BEGIN gain -->\n|  | ")
    assert file.read_text().endswith("\n<!-- END gain -->\nafter\n")


def test_a_block_without_a_place_is_an_error():
    """The error has both marks to add."""
    with pytest.raises(ValueError, match="<!-- BEGIN cost --> and <!-- END cost -->"):
        report.written("no marks", {"cost": "text"})


def test_the_gain_is_that_of_the_results():
    """The table of the top README.md has the means of ``merge_methods`` over tasks and seeds, for both starts."""
    found = report.found("merge_methods")
    text = gain.block(found)
    for heads in gain.SETTINGS:
        kept = [one["result"]["test"] for one in found["cells"] if one["settings"].get("heads") == heads]
        kron, ties = ([statistics.mean(one[row].values()) for one in kept] for row in ("kron", "ties"))
        assert f"| {tables.mean_sd(kron)} |" in text
        assert tables.difference([one - other for one, other in zip(kron, ties, strict=True)]) in text
        assert f"{statistics.mean(min(one['kron'].values()) for one in kept):.1f} against " in text
    assert [line.split(" |")[0].strip("| ") for line in text.splitlines()[2:11]] == list(gain.ROWS.values())


def test_the_first_page_recommends_what_the_protocol_allows():
    """The recipe is recommended if, and only if, the primary comparison of ``merge_methods`` holds on all its seeds."""
    recommended = "take `structure: kron`" in report.README.read_text(encoding="utf-8")
    assert recommended == method_report.holds(report.found("merge_methods"), len(merge_methods.SEEDS))


def test_every_result_is_of_a_full_run():
    """No block shows the result of a quick run."""
    found = {name: report.found(name) for name in report.EXPERIMENTS}
    shown = {name: one for name, one in found.items() if one is not None}
    assert shown
    assert {one["tier"] for one in shown.values()} == {"full"}
    assert all(one["experiment"] == name for name, one in shown.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cost"])
def test_a_quick_run_works(name, tmp_path):
    """The quick run, started as a command, exits with 0 and writes its file."""
    out = tmp_path / "out.json"
    done = run(f"experiments.{name}", "--quick", "--out", out, "--work", tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"tier": "quick"' in out.read_text()
