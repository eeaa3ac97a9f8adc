"""Runner of the experiments."""

import dataclasses
import json

import pytest

from scripts.experiments import device, runner


def _experiment(calls, fails=()):
    def cell(settings, work):
        calls.append(settings["seed"])
        if settings["seed"] in fails:
            raise RuntimeError("killed")
        return {"square": settings["seed"] ** 2}

    return runner.Experiment("squares", "Squares.", cell, full=[{"seed": s} for s in range(5)], quick=[{"seed": 7}])


def test_a_stopped_run_resumes(tmp_path):
    """A stopped run does not repeat finished cells, and gives the report of an uninterrupted run."""
    calls = []
    with pytest.raises(RuntimeError, match="killed"):
        runner.run(_experiment(calls, fails=[3]), "full", tmp_path, quiet=True)
    report = runner.run(_experiment(calls), "full", tmp_path, quiet=True)
    assert calls == [0, 1, 2, 3, 3, 4]
    again = runner.run(_experiment(calls), "full", tmp_path / "other", quiet=True)
    strip = [(cell["settings"], cell["result"]) for cell in report["cells"]]
    assert strip == [(cell["settings"], cell["result"]) for cell in again["cells"]]
    assert strip[4] == ({"seed": 4}, {"square": 16})


def test_seconds_stand_beside_the_result(tmp_path, capsys):
    """Seconds of a result do not count in a check, which compares digits, and are in the report."""
    times = iter(range(9))

    def cell(settings, work):
        return {"one": 1, runner.TIMINGS: {"merge": next(times)}}

    experiment = runner.Experiment("timed", "Timed.", cell, full=[{"seed": 0}], quick=[])
    out = tmp_path / "timed.json"
    command = ["--full", "--work", str(tmp_path / "work"), "--out", str(out)]
    runner.main(experiment, command)
    (found,) = json.loads(out.read_text())["cells"]
    assert (found["result"], found["timings"]) == ({"one": 1}, {"merge": 0})
    assert runner.main(experiment, [*command, "--check"]) == 0


def test_an_experiment_for_the_cpu_refuses_a_gpu(tmp_path, capsys):
    """Without ``gpu``, ``--device`` is refused before any cell runs."""
    calls = []
    with pytest.raises(SystemExit):
        runner.main(_experiment(calls), ["--quick", "--device", "cuda", "--work", str(tmp_path)])
    assert "--device must be cpu for squares, found cuda" in capsys.readouterr().err
    assert calls == []


def test_a_run_on_a_gpu_names_the_card_and_has_no_cpu_times(tmp_path, monkeypatch):
    """The versions name the card, so a CPU takes over no cell or model from a GPU; seconds of the host are left out."""
    monkeypatch.setattr(device, "card", lambda: "Card 1")

    def cell(settings, work):
        assert work == tmp_path / "Card-1"
        return {"one": 1, runner.TIMINGS: {"merge": 2.0}}

    experiment = runner.Experiment("timed", "Timed.", cell, full=[{"seed": 0}], quick=[])
    report = runner.run(experiment, "full", tmp_path, quiet=True)
    assert report["versions"]["device"] == "Card 1"
    assert runner.TIMINGS not in report["cells"][0]
    assert report["cells"][0]["result"] == {"one": 1}
    kept = tmp_path / "timed.json"
    runner.write_json(kept, report)
    monkeypatch.undo()
    assert runner.run(experiment, "full", tmp_path / "cpu", (), quiet=True, published=kept)["cells"] == []


def test_finished_cells_are_written_without_a_run(tmp_path, capsys):
    """With --finished no cell runs, and the report has the finished ones with the number that is planned."""
    calls, out = [], tmp_path / "squares.json"
    with pytest.raises(RuntimeError, match="killed"):
        runner.run(_experiment(calls, fails=[2]), "full", tmp_path / "work", quiet=True)
    command = ["--full", "--finished", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert runner.main(_experiment(calls), command) == 0
    assert calls == [0, 1, 2]
    report = json.loads(out.read_text())
    assert [cell["settings"]["seed"] for cell in report["cells"]] == [0, 1]
    assert report["planned"] == 5
    capsys.readouterr()
    with pytest.raises(SystemExit):
        runner.main(_experiment(calls), [*command[:2], "--work", str(tmp_path / "empty"), "--out", str(out) + ".new"])
    assert "needs a finished cell of squares" in capsys.readouterr().err


def test_chosen_cells_run_and_are_checked_alone(tmp_path, capsys):
    """With --cells only these run, the report has all that are finished, and a check repeats only these."""
    calls, out = [], tmp_path / "squares.json"
    command = ["--full", "--work", str(tmp_path / "work"), "--out", str(out), "--cells"]
    assert runner.main(_experiment(calls), [*command, "3"]) == 0
    assert runner.main(_experiment(calls), [*command, "1", "3"]) == 0
    assert calls == [3, 1]
    assert [cell["settings"]["seed"] for cell in json.loads(out.read_text())["cells"]] == [1, 3]
    report = json.loads(out.read_text())
    report["cells"][0]["result"]["square"] += 1
    out.write_text(json.dumps(report))
    assert runner.main(_experiment(calls), [*command, "3", "--check"]) == 0
    assert "1 of 1 cells" in capsys.readouterr().out
    assert runner.main(_experiment(calls), [*command, "1", "--check"]) == 1
    assert calls == [3, 1, 3, 1]
    with pytest.raises(SystemExit):
        runner.main(_experiment(calls), [*command, "5"])
    assert "--cells must be between 0 and 4, found 5" in capsys.readouterr().err


def test_a_run_goes_on_with_the_cells_that_were_published(tmp_path, monkeypatch):
    """Where no cell is kept, those of the file that is written count, unless they are of another revision."""
    calls, out = [], tmp_path / "squares.json"
    with pytest.raises(RuntimeError, match="killed"):
        runner.run(_experiment(calls, fails=[2]), "full", tmp_path / "first", quiet=True)
    command = ["--full", "--out", str(out), "--work"]
    runner.main(_experiment(calls), [*command, str(tmp_path / "first"), "--finished"])
    runner.main(_experiment(calls), [*command, str(tmp_path / "second")])
    assert calls == [0, 1, 2, 2, 3, 4]
    assert [cell["result"]["square"] for cell in json.loads(out.read_text())["cells"]] == [0, 1, 4, 9, 16]
    runner.main(_experiment(calls), [*command, str(tmp_path / "third")])
    assert len(calls) == 6
    runner.main(_experiment(calls), [*command, str(tmp_path / "third"), "--fresh"])
    assert len(calls) == 11
    runner.main(dataclasses.replace(_experiment(calls), revision=2), [*command, str(tmp_path / "fourth")])
    assert len(calls) == 16


def test_another_revision_or_version_reuses_nothing(tmp_path, monkeypatch):
    """A result of another revision or of another torch is not reused."""
    calls = []
    experiment = _experiment(calls)
    runner.run(experiment, "quick", tmp_path, quiet=True)
    runner.run(experiment, "quick", tmp_path, quiet=True)
    assert calls == [7]
    runner.run(dataclasses.replace(experiment, revision=2), "quick", tmp_path, quiet=True)
    monkeypatch.setattr(runner, "versions", lambda: {"torch": "0"})
    runner.run(experiment, "quick", tmp_path, quiet=True)
    runner.run(experiment, "quick", tmp_path, fresh=True, quiet=True)
    assert calls == [7] * 4


def test_the_command_writes_one_file(tmp_path, capsys):
    """The file has versions, tier, settings and CPU time, and the command prints its path."""
    out = tmp_path / "squares.json"
    assert runner.main(_experiment([]), ["--quick", "--work", str(tmp_path / "work"), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["tier"] == "quick"
    assert {"python", "torch", "transformers", "mergekit", "squisher-mergekit"} == report["versions"].keys()
    assert report["cells"][0]["result"] == {"square": 49}
    assert report["cpu_seconds"] >= 0
    assert str(out) in capsys.readouterr().out


def test_a_check_runs_all_again_and_compares_digits(tmp_path, capsys):
    """A check returns 0 without writing if all cells repeat their digits. Otherwise it returns 1 and names the cell."""
    out, calls = tmp_path / "squares.json", []
    runner.main(_experiment(calls), ["--full", "--work", str(tmp_path / "work"), "--out", str(out)])
    written = out.read_bytes()
    command = ["--full", "--check", "--work", str(tmp_path / "work"), "--out", str(out)]
    assert runner.main(_experiment(calls), command) == 0
    assert calls == [*range(5), *range(5)]
    assert "5 of 5 cells" in capsys.readouterr().out
    report = json.loads(written)
    report["cells"][3]["result"]["square"] += 1e-12
    out.write_text(json.dumps(report))
    assert runner.main(_experiment(calls), command) == 1
    assert json.loads(out.read_text()) == report
    assert 'not found again: {"seed": 3}' in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"cells"}
    capsys.readouterr()
    with pytest.raises(SystemExit):
        runner.main(dataclasses.replace(_experiment(calls), repeats=False), command)
    assert "seconds, which do not repeat" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        runner.main(_experiment(calls), [*command, "--out", str(tmp_path / "none.json")])
    assert "none.json, which is not there" in capsys.readouterr().err


def test_a_cached_folder_is_complete(tmp_path):
    """A folder whose making failed is absent and made again. An existing folder is reused."""
    folder, made = tmp_path / "models" / "a", []

    def make(place):
        (place / "weights").write_text("x")
        made.append(place)
        if len(made) == 1:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        runner.cached(folder, make)
    assert list((tmp_path / "models").iterdir()) == []
    for _ in range(2):
        assert (runner.cached(folder, make) / "weights").read_text() == "x"
    assert len(made) == 2


def test_two_processes_may_make_the_same_folder(tmp_path):
    """The first of two simultaneous folders is kept whole, and the other leaves no files.

    Other failures stay errors.
    """
    folder = tmp_path / "models" / "a"

    def first(place):
        (place / "weights").write_text("first")

    def second(place):
        (place / "weights").write_text("second")
        runner.cached(folder, first)

    assert runner.cached(folder, second) == folder
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("weights", "first")]
    assert list((tmp_path / "models").iterdir()) == [folder]
    with pytest.raises(OSError, match="b"):
        runner.cached(tmp_path / "b", lambda place: (tmp_path / "b").write_text("a file"))
