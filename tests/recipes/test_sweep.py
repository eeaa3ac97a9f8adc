"""Sweeps: what is kept, how they resume, and how a command gives a score."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from squisher_mergekit.errors import ConfigError, CorruptFileError, OutputError, RefusedError
from squisher_mergekit.recipes import sweep as module
from squisher_mergekit.recipes.grid import points
from squisher_mergekit.recipes.sweep import Sweep, command_score, identity, inputs_of, score_of

POINTS = list(points({"a": (1, 2, 3)}))


def _merge(point, folder):
    folder.mkdir()
    (folder / "a").write_text(str(point["a"]))


def _scores(*values):
    given = dict(zip("123", values, strict=False))
    return lambda model: given[(model / "a").read_text()]


def test_the_best_model_alone_is_kept(tmp_path):
    """The folder has the table, the state and the model with the highest score; of equal ones the first."""
    found = Sweep(tmp_path / "out", POINTS, "x")
    found.run(_merge, _scores(5.0, 7.0, 7.0))
    assert found.best == "a=2"
    assert (tmp_path / "out" / "best" / "a").read_text() == "2"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["best", "sweep.csv", "sweep.json"]
    assert (tmp_path / "out" / "sweep.csv").read_text() == "a,score\n1,5.0\n2,7.0\n3,7.0\n"


def test_an_interrupt_between_two_renames_keeps_the_best_model(tmp_path, monkeypatch):
    """The earlier best model comes back where the new one cannot be moved into its place."""
    found = Sweep(tmp_path / "out", POINTS[:1], "x")
    found.run(_merge, _scores(5.0, 7.0, 6.0))
    whole = Path.rename

    def interrupted(self, target):
        if Path(target).name == "best" and self.name == "best" and (self / "a").read_text() == "2":
            raise KeyboardInterrupt
        return whole(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    again = Sweep(tmp_path / "out", POINTS, "x")
    again.resume()
    with pytest.raises(KeyboardInterrupt):
        again.run(_merge, _scores(5.0, 7.0, 6.0))
    assert (tmp_path / "out" / "best" / "a").read_text() == "1"


def test_a_process_killed_between_two_renames_loses_nothing(tmp_path):
    """The next run finds the best model beside the work of the dead process."""
    found = Sweep(tmp_path / "out", POINTS[:2], "x")
    found.run(_merge, _scores(5.0, 7.0, 6.0))
    work = tmp_path / "out" / module._WORK
    work.mkdir()
    (tmp_path / "out" / "best").rename(work / module._REPLACED)
    again = Sweep(tmp_path / "out", POINTS, "x")
    again.resume()
    again.run(_merge, _scores(5.0, 7.0, 6.0))
    assert again.scores == {"a=1": 5.0, "a=2": 7.0, "a=3": 6.0}
    assert (tmp_path / "out" / "best" / "a").read_text() == "2"


def test_the_lowest_score_can_be_the_best_and_all_be_kept(tmp_path):
    """With a loss the lowest wins; with keep_all each model has a folder with the name of its point."""
    found = Sweep(tmp_path / "out", POINTS, "x", higher=False, keep_all=True)
    found.run(_merge, _scores(5.0, 4.0, 9.0))
    assert found.place(found.best).name == "a=2"
    assert sorted(folder.name for folder in (tmp_path / "out" / "models").iterdir()) == ["a=1", "a=2", "a=3"]


def test_an_interrupted_sweep_continues(tmp_path):
    """Finished points are not merged again, and the best of an earlier run stays the best."""
    first = Sweep(tmp_path / "out", POINTS, "x")
    with pytest.raises(RefusedError):
        first.run(_merge, _failing_at("2", _scores(9.0)))
    assert not (tmp_path / "out" / ".merging").exists()
    again, merged = Sweep(tmp_path / "out", POINTS, "x"), []

    def merge(point, folder):
        merged.append(point["a"])
        _merge(point, folder)

    again.resume()
    again.run(merge, _scores(0.0, 5.0, 7.0))
    assert merged == [2, 3]
    assert (again.best, (tmp_path / "out" / "best" / "a").read_text()) == ("a=1", "1")


def test_two_sweeps_in_one_folder_are_refused(tmp_path):
    """A second sweep that starts while the first is at work fails in one line, and the first ends as if alone."""
    first, second, refused = Sweep(tmp_path / "out", POINTS, "x"), Sweep(tmp_path / "out", POINTS, "x"), []

    def merge(point, folder):
        if not refused:
            with pytest.raises(OutputError, match="one process at a time") as found:
                second.run(_merge, _scores(0.0, 0.0, 0.0))
            refused.append(found)
        _merge(point, folder)

    first.run(merge, _scores(1.0, 3.0, 2.0))
    assert len(refused) == 1
    assert (first.best, second.scores) == ("a=2", {})
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["best", "sweep.csv", "sweep.json"]


def _failing_at(name, score):
    def scored(model):
        if (model / "a").read_text() == name:
            raise RefusedError("the command failed; repeat it")
        return score(model)

    return scored


def test_a_sweep_that_was_killed_at_its_first_point_starts_again(tmp_path):
    """Its half of a model is removed."""
    (tmp_path / "out" / ".merging" / "best").mkdir(parents=True)
    found = Sweep(tmp_path / "out", POINTS, "x")
    found.resume()
    found.run(_merge, _scores(1.0, 3.0, 2.0))
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["best", "sweep.csv", "sweep.json"]


def test_another_folder_is_refused(tmp_path):
    """A folder of another sweep, or with other files, is not touched."""
    Sweep(tmp_path / "out", POINTS, "x").run(_merge, _scores(1.0, 2.0, 3.0))
    with pytest.raises(ConfigError, match="must belong to this sweep"):
        Sweep(tmp_path / "out", POINTS, "y").resume()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(ConfigError, match="other files"):
        Sweep(tmp_path / "mine", POINTS, "x").resume()


@pytest.mark.parametrize("text", ["{", "[]", '{"identity": "x"}', '{"identity": "x", "scores": {"a=1": "y"}}'])
def test_a_damaged_state_is_refused(tmp_path, text):
    """A state that is no JSON of a sweep is refused in one line."""
    (tmp_path / module.STATE).write_text(text)
    with pytest.raises(CorruptFileError, match="state of a sweep"):
        Sweep(tmp_path, POINTS, "x").resume()


def test_a_lost_model_is_noticed(tmp_path):
    """If the best model is gone, the sweep does not go on as if it were there."""
    Sweep(tmp_path / "out", POINTS, "x").run(_merge, _scores(1.0, 2.0, 3.0))
    (tmp_path / "out" / "best" / "a").unlink()
    (tmp_path / "out" / "best").rmdir()
    with pytest.raises(ConfigError, match="best model so far"):
        Sweep(tmp_path / "out", POINTS, "x").resume()


def test_a_changed_model_or_fisher_is_noticed(tmp_path):
    """Scores of other weights or another optimizer state do not count on; a log that grew changes nothing."""
    model = tmp_path / "model"
    model.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "config.json", "log.txt"):
        (model / name).write_text("a")
    before = inputs_of([model])
    Sweep(tmp_path / "out", POINTS, "x", inputs=before).run(_merge, _scores(1.0, 2.0, 3.0))
    (model / "log.txt").write_text("ab")
    Sweep(tmp_path / "out", POINTS, "x", inputs=inputs_of([model])).resume()
    for name in ("model.safetensors", "optimizer.pt", "config.json"):
        (model / name).write_text("ab")
        with pytest.raises(ConfigError, match="one of their files has changed"):
            Sweep(tmp_path / "out", POINTS, "x", inputs=inputs_of([model])).resume()
        before, changed = inputs_of([model]), before
        assert before != changed


def test_the_identity_has_all_that_changes_a_score():
    """Another configuration, grid, command or direction is another sweep."""
    given = ({"a": 1}, {"b": (1,)}, "run {model}", True)
    others = [({"a": 2}, *given[1:]), (given[0], {"b": (2,)}, *given[2:]), (*given[:2], "x", True), (*given[:3], False)]
    assert len({identity(*given), *(identity(*other) for other in others)}) == 5


@pytest.mark.parametrize(
    ("output", "score"),
    [
        ("loss: 2.5e-3\n", 0.0025),
        ("1 2\n-3", -3.0),
        ("none", None),
        ("", None),
        ("acc .5%", 0.5),
        ("1e999", None),
        ("0.5 (macro f1)", 0.5),
        ("0.5 in runs/sweep/point-a6", 0.5),
        ("0.5 after 12.3s", 0.5),
        ("epoch 3: nan", None),
        ("epoch 3: -inf", None),
        ("3 infinite texts", 3.0),
        ("a=0.25;", 0.25),
        ("Score: 83.", 83.0),
        ("0.5, torch 2.1.0", 0.5),
        ("perplexity 1,234.5", None),
        ("accuracy 81,5", None),
        ("1,234", None),
        ("12,0.83", 0.83),
        ("mnli,83", 83.0),
        ("(0.83, 200)", 200.0),
    ],
)
def test_the_score_is_the_last_number(output, score):
    """Signs, exponents and units are read, and no digits within a word; without a finite number there is no score.

    Digits joined by a comma are no number, as nobody knows whose comma it is.
    """
    assert score_of(output) == score


def test_a_command_gets_the_folder(tmp_path):
    """The folder stands in the place of {model}, also with spaces in its name."""
    model = tmp_path / "my model"
    model.mkdir()
    (model / "n").write_text("17.5")
    assert (
        command_score(f"{sys.executable} -c 'import sys; print(open(sys.argv[1] + \"/n\").read())' {{model}}", model)
        == 17.5
    )


@pytest.mark.parametrize(("command", "message"), [("exit 3", "code 3"), ("echo no score", "last number")])
def test_a_command_that_gives_no_score_is_refused(tmp_path, command, message):
    """A failed command, and one that prints no number, are refused in one line."""
    with pytest.raises(RefusedError, match=message) as found:
        command_score(command, tmp_path)
    assert "\n" not in str(found.value)


def test_the_state_is_plain_json(tmp_path):
    """The state names the best point and the score of each."""
    Sweep(tmp_path / "out", POINTS, "x").run(_merge, _scores(1.0, 3.0, 2.0))
    state = json.loads((tmp_path / "out" / module.STATE).read_text())
    assert state == {"identity": "x", "inputs": "", "best": "a=2", "scores": {"a=1": 1.0, "a=2": 3.0, "a=3": 2.0}}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_a_signal_ends_leaves_nothing(tmp_path, number):
    """Neither a part of a model remains, nor the folder, if no point was finished."""
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from squisher_mergekit.recipes.sweep import Sweep\n"
        "from squisher_mergekit.tensors.temporary import ENDINGS, cleaned_up_at_signals\n"
        "def merge(point, folder):\n"
        "    folder.mkdir()\n"
        "    os.kill(os.getpid(), int(sys.argv[2]))\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "with cleaned_up_at_signals(ENDINGS):\n"
        "    Sweep(Path(sys.argv[1]) / 'out', [{'a': 1}], 'identity').run(merge, lambda model: 1.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(int(number))], check=False)
    assert done.returncode == -number
    assert not list(tmp_path.iterdir())


def test_each_point_has_a_folder_of_its_own(tmp_path):
    """Paths that differ in a slash alone do not share a folder, and labels longer than a file's name have one."""
    values = ("runs/a", "runs_a", "runs/b", "x" * 300 + "1", "x" * 300 + "2")
    found = Sweep(tmp_path / "out", list(points({"fisher": values})), "x", keep_all=True)

    def merge(point, folder):
        folder.mkdir()
        (folder / "fisher").write_text(point["fisher"])

    found.run(merge, lambda model: 1.0)
    assert {name: (found.place(name) / "fisher").read_text() for name in found.scores} == {
        f"fisher={value}": value for value in values
    }
    assert found.place("fisher=runs/b").name == "fisher=runs_b"
