"""``scripts.check_gpu`` and the benchmark of the kernel, at tiny sizes in Triton's interpreter."""

import json
import sys
import time
import types

import pytest
import torch

from scripts.benchmarks import gpu_check, gpu_feed, gpu_kernel, gpu_merge
from squisher_mergekit.merging import execution, fused


@pytest.fixture
def interpreted(monkeypatch):
    """Run the fused kernel on CPU tensors."""
    pytest.importorskip("triton", reason="the kernel is written in Triton")
    monkeypatch.setattr(execution.Operands, "on_accelerator", property(lambda self: True))
    monkeypatch.setattr(fused, "BLOCK", 2048)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("interpreted")
def test_each_method_is_timed_relative_to_a_copy(tmp_path, capsys):
    """Every method and number of models has a time, and the ratio to a copy of the same bytes."""
    report = tmp_path / "report.json"
    arguments = ["--device", "cpu", "--shape", "7", "13", "--counts", "1", "3", "--rounds", "2", "--json", str(report)]
    assert gpu_kernel.main(arguments) == 0
    measured = json.loads(report.read_text())["measured"]
    assert [(one["method"], one["count"]) for one in measured] == [(m, n) for m in gpu_kernel.METHODS for n in (1, 3)]
    assert all(one["kernel"] and one["ratio"]["call"] > 0 for one in measured)
    assert [round(one["gigabytes"] * 1e9) for one in measured] == [91 * (6 * n + 2) for n in (1, 3, 2, 4, 2, 4)]
    assert len(capsys.readouterr().out.splitlines()) == 7


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("interpreted")
def test_other_divisions_are_timed_and_restored():
    """A sweep times each division of the work and then restores that of the package."""
    chosen = fused.grid
    found = list(gpu_kernel.sweep([gpu_kernel.Setting("squisher", 2, (3, 5), "cpu")], rounds=1))
    assert [one["grid"] for one in found] == [grid._asdict() for grid in gpu_kernel.GRIDS]
    assert fused.grid is chosen


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.usefixtures("interpreted")
def test_first_calls_are_printed_by_method_and_number(capsys):
    """``--first`` prints the seconds of each first call as JSON and nothing else."""
    arguments = ["--device", "cpu", "--shape", "7", "--counts", "2", "--methods", "ubgm prior", "--first"]
    assert gpu_kernel.main(arguments) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["ubgm prior 2"]


def test_merges_of_one_process_are_timed_by_way(tmp_path):
    """Each way has its least time and its rate; the switch of the pinned buffers is undone."""
    sizes = ["--hidden", "36", "--layers", "1", "--intermediate", "47", "--vocab", "61", "--shards", "1"]
    report, least = tmp_path / "report.json", gpu_merge.transfer.LEAST
    arguments = ["--device", "cpu", *sizes, "--repeat", "1", "--log8", "--work", str(tmp_path), "--json", str(report)]
    assert gpu_merge.main(arguments) == 0
    found = json.loads(report.read_text())["measured"]
    assert [one["way"] for one in found] == [*gpu_merge.WAYS, *gpu_merge.LOG8]
    assert all(0 < one["least_s"] == one["median_s"] and one["gb_per_s"] > 0 for one in found)
    assert least == gpu_merge.transfer.LEAST


def test_all_ways_of_loading_give_the_same_bytes(tmp_path):
    """All ways of loading give the bytes of the file, by single tensors or by threads with buffers."""
    report = tmp_path / "report.json"
    assert gpu_feed.main(["--device", "cpu", "--megabytes", "9", "--rounds", "1", "--json", str(report)]) == 0
    found = json.loads(report.read_text())["measured"]
    assert [(one["way"], one["threads"]) for one in found][:3] == [("to", 1), ("mapped", 1), ("mapped", 4)]
    assert all(one["same"] and one["gb_per_s"] > 0 for one in found)


def test_the_listed_packages_are_pinned(capsys):
    """``--wheels`` prints one pinned requirement per line, mergekit first."""
    assert gpu_check.main(["--wheels"]) == 0
    lines = capsys.readouterr().out.split()
    assert lines[0].startswith("mergekit==0.1.")
    assert [line.split("==")[0] for line in lines] == list(gpu_check.PACKAGES)


def test_a_step_that_hangs_or_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    """The report has exit code and output of every step.

    A step that exceeds its limit has no code, and the others run.
    """
    commands = {"fails": "print('told'); raise SystemExit(3)", "hangs": "import time; time.sleep(60)", "works": "1"}
    fakes = [gpu_check.Step(name, 2, [sys.executable, "-S", "-c", code]) for name, code in commands.items()]
    monkeypatch.setattr(gpu_check, "steps", lambda work, small: fakes)
    assert gpu_check.main(["--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "check_gpu.json").read_text())
    assert {name: step["code"] for name, step in found["steps"].items()} == {"fails": 3, "hangs": None, "works": 0}
    assert found["steps"]["fails"]["output"] == "told\n"
    assert found["machine"]["torch"]
    assert gpu_check.main(["--out", str(tmp_path), "--only", "works"]) == 0
    assert list(json.loads((tmp_path / "check_gpu.json").read_text())["steps"]) == ["works"]


def test_all_steps_fit_the_limit(tmp_path):
    """The steps have models of 1.1e9 parameters and a GPU, the most important ones first, and fit the time limit."""
    steps = gpu_check.steps(tmp_path)
    assert [step.name for step in steps][:2] == ["tests", "kernel"]
    assert all("cuda" in " ".join(step.command) for step in steps)


def test_a_step_is_stopped_with_its_processes(tmp_path):
    """A process that a step started does not go on beside the next steps."""
    late = f"import time, pathlib; time.sleep(3); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {late!r}]); time.sleep(60)"
    found = gpu_check.run(gpu_check.Step("starts", 1, [sys.executable, "-S", "-c", start]), left=9)
    time.sleep(4)
    assert found["code"] is None
    assert not (tmp_path / "late").exists()


def test_without_time_left_a_step_is_left_out(tmp_path):
    """All steps together end at the limit of the script."""
    found = gpu_check.run(gpu_check.Step("late", 9, [sys.executable, "-S", "-c", "raise SystemExit(3)"]), left=0)
    assert found == {"code": None, "seconds": 0.0, "output": "left out: no time left"}


def test_a_report_that_was_cut_short_is_left_out(tmp_path):
    """A step that was stopped while it wrote its report does not end the script."""
    report = tmp_path / "report.json"
    report.write_text('{"measured": [')
    found = gpu_check.run(gpu_check.Step("cut", 9, [sys.executable, "-S", "-c", "1"], report), left=9)
    assert found["code"] == 0
    assert "report" not in found


def test_a_machine_without_nvidia_smi_has_no_driver(monkeypatch):
    """The steps run all the same."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "planted")
    monkeypatch.setenv("PATH", "")
    found = gpu_check.machine()
    assert found["card"] == "planted"
    assert "driver" not in found


def test_an_installation_passes_all_options_on(tmp_path, monkeypatch):
    """The interpreter of the new environment gets steps, folders, and the time that is left."""
    commands = []
    monkeypatch.setattr(gpu_check, "install", lambda wheels, folder: "python")
    monkeypatch.setattr(
        gpu_check.subprocess,
        "run",
        lambda command, **_: commands.append(command) or types.SimpleNamespace(returncode=7),
    )
    given = ["--out", str(tmp_path / "out"), "--work", str(tmp_path), "--seconds", "50", "--only", "kernel", "feed"]
    assert gpu_check.main([*given, "--install", str(tmp_path)]) == 7
    parsed = gpu_check.parse(commands[0][3:])
    assert (parsed.out, parsed.work, parsed.only) == (tmp_path / "out", tmp_path, ["kernel", "feed"])
    assert 40 < parsed.seconds < 50
