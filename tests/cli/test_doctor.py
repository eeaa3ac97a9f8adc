"""``squisher doctor``: the report of a working environment, and one line for each problem."""

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from squisher_mergekit.cli import doctor
from squisher_mergekit.cli.main import main

GOOD = {
    "started": True,
    "methods": {"squisher": None, "ubgm_squisher": None},
    "devices": ["cpu"],
    "errors": [],
}
UNKNOWN = {
    "squisher": "Unimplemented merge method squisher",
    "ubgm_squisher": "Unimplemented merge method ubgm_squisher",
}


@pytest.fixture
def probe(monkeypatch):
    """Return a function that sets the answer of the fresh interpreter."""

    def answer(**changes):
        monkeypatch.delenv(doctor.SWITCH, raising=False)
        monkeypatch.setattr(doctor, "probe", lambda: GOOD | changes)

    answer()
    return answer


def _run(*arguments):
    return CliRunner().invoke(main, ["doctor", *arguments])


def _problems(result):
    return [line for line in result.stdout.splitlines() if line.startswith("problem: ")]


def test_a_sound_environment_is_reported_in_full(tmp_path):
    """In a working environment the command exits with 0 and reports versions, hook, methods and disk."""
    report = tmp_path / "report.json"
    environment = {key: value for key, value in os.environ.items() if key != doctor.SWITCH}
    code = "from squisher_mergekit.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--json", report],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a merge can run here" in done.stdout
    found = json.loads(report.read_text())
    assert found["methods"] == {"squisher": True, "ubgm_squisher": True}
    assert found["hook_started"] is True
    assert [name.rpartition("/")[2] for name in found["hook_files"]] == list(doctor.HOOK_FILES)
    assert set(found["versions"]) == {*doctor.PACKAGES, "python"}
    assert None not in found["versions"].values()
    assert found["devices"][0] == "cpu"
    assert found["free_disk_bytes"] > 0
    assert found["problems"] == []


def test_the_switch_is_named(tmp_path):
    """With the hook switched off, the command exits with 1 and names the variable and both cures."""
    environment = os.environ | {doctor.SWITCH: "0"}
    code = "from squisher_mergekit.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--quiet"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    [line] = done.stdout.splitlines()
    assert f"{doctor.SWITCH} is 0" in line
    assert "unset it" in line
    assert "squisher-mergekit-yaml" in line


def test_a_missing_hook_file_is_named(probe, monkeypatch):
    """A missing start-up file is reported with the command that installs it again."""
    probe(started=False, methods=UNKNOWN)
    monkeypatch.setattr(doctor, "hook_files", list)
    result = _run("--quiet")
    assert result.exit_code == 1
    [line] = _problems(result)
    assert "squisher_mergekit.pth is in no site-packages folder" in line
    assert "--force-reinstall" in line


def test_a_hook_file_that_cannot_import_the_package_is_named(probe):
    """A start-up file that failed to import the package is reported."""
    probe(started=False, methods=UNKNOWN)
    [line] = _problems(_run("--quiet"))
    assert "squisher_mergekit.pth could not import the package" in line


def test_the_answer_of_mergekit_is_reported(probe):
    """A refusal by mergekit after the hook ran is reported in mergekit's words."""
    probe(methods={"squisher": None, "ubgm_squisher": "the methods need mergekit >=0.1.5,<0.2"})
    assert _problems(_run("--quiet")) == [
        "problem: mergekit-yaml does not know ubgm_squisher: the methods need mergekit >=0.1.5,<0.2"
    ]


def test_an_error_is_reported_once(probe):
    """One failure in several modules of mergekit gives one line."""
    probe(errors=["boom", "boom"])
    assert len(_problems(_run("--quiet"))) == 1


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (None, "mergekit must be installed, but this Python has none"),
        ("0.1.4", "mergekit must be <0.2,>=0.1.5, found 0.1.4"),
    ],
)
def test_a_wrong_mergekit_is_named(found, words):
    """A missing mergekit, or one out of range, gives one line with the command that cures it."""
    versions = {"squisher-mergekit": "0.1.0", "mergekit": found}
    [problem] = doctor.version_problems(versions, "<0.2,>=0.1.5")
    assert words in problem
    assert problem.endswith('pip install "mergekit<0.2,>=0.1.5"')


def test_the_supported_range_is_the_one_installed_for():
    """The supported range comes from the installed metadata, and the plug-in checks the same range."""
    from packaging.specifiers import SpecifierSet

    from squisher_mergekit.merging.mergekit.supported import SUPPORTED

    assert SpecifierSet(doctor.supported_mergekit()) == SpecifierSet(SUPPORTED)


def test_little_disk_is_a_problem(probe, monkeypatch):
    """A folder with less than 100 MB free is reported with its free space."""
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5_000_000}))
    result = _run("--quiet")
    assert result.exit_code == 1
    assert "has 5 MB free" in _problems(result)[0]


def test_a_probe_that_dies_is_a_problem_and_no_traceback(monkeypatch):
    """An interpreter without an answer gives one line and no traceback."""
    monkeypatch.setattr(doctor, "PROBE", "raise SystemExit(3)")
    result = _run("--quiet")
    assert result.exit_code == 1
    assert "gave no answer" in _problems(result)[0]
    assert isinstance(result.exception, SystemExit)


def test_a_report_that_cannot_be_written_is_one_line(probe, tmp_path):
    """``--json`` below a file exits with 1 and one line, without leftovers."""
    (tmp_path / "file").write_text("unchanged")
    result = _run("--quiet", "--json", str(tmp_path / "file" / "report.json"))
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1
    assert [path.read_text() for path in tmp_path.iterdir()] == ["unchanged"]


def test_a_report_makes_its_folder(probe, tmp_path):
    """``--json`` creates a missing folder and leaves no temporary file."""
    assert _run("--quiet", "--json", str(tmp_path / "new" / "report.json")).exit_code == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]
    assert json.loads((tmp_path / "new" / "report.json").read_text())["problems"] == []
