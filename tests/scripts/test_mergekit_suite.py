"""``scripts/mergekit_suite``: the comparison on made-up reports, and, as an option, mergekit's own tests."""

import tarfile

import pytest

import scripts.mergekit_suite.__main__ as suite
from tests.scripts.commands import run

PASSED = suite.Case("passed")
REFUSED = suite.Case("failed", f"ConfigError: squisher in memory {suite.REFUSAL} 0")
OURS = {f"{suite.EVERY_METHOD}[{method}]": REFUSED for method in suite.METHODS}
STOCK = {
    f"{suite.EVERY_METHOD}[linear]": PASSED,
    "tests.test_io::test_read": PASSED,
    "tests.test_x::y": suite.Case("skipped"),
}


def _compare(stock, plugged):
    return suite.compare(stock, plugged, suite.METHODS)


def test_same_outcomes_and_our_two_refusals_are_no_problem():
    """Equal outcomes and the refusals of both methods give no problem."""
    assert _compare(STOCK, STOCK | OURS) == []


@pytest.mark.parametrize("outcome", ["failed", "error", "skipped"])
def test_a_stock_test_that_changes_is_a_problem(outcome):
    """A test that passed without the plug-in and fails with it is reported by name."""
    changed = STOCK | OURS | {"tests.test_io::test_read": suite.Case(outcome)}
    assert _compare(STOCK, changed) == [f"tests.test_io::test_read is {outcome} with the plug-in, passed without"]


def test_a_test_that_vanishes_is_a_problem():
    """A test that exists only without the plug-in is reported by name."""
    gone = {name: case for name, case in (STOCK | OURS).items() if name != "tests.test_io::test_read"}
    assert _compare(STOCK, gone) == ["tests.test_io::test_read is absent with the plug-in, passed without"]


def test_any_other_addition_is_a_problem():
    """A test that exists only with the plug-in, other than the two refusals, is reported by name, passing or not."""
    problems = _compare(STOCK, STOCK | OURS | {"tests.test_io::new": PASSED})
    assert problems == ["tests.test_io::new is passed and exists with the plug-in alone"]


@pytest.mark.parametrize("case", [PASSED, suite.Case("failed", "ZeroDivisionError"), None])
def test_our_methods_must_be_refused_for_the_right_reason(case):
    """A method that runs without Fishers, fails otherwise, or is missing is reported."""
    name = f"{suite.EVERY_METHOD}[squisher]"
    plugged = STOCK | OURS | {name: case}
    if case is None:
        del plugged[name]
    assert [problem.split(" ")[0] for problem in _compare(STOCK, plugged)] == [name]


def test_failures_without_the_plugin_and_empty_runs_are_problems():
    """A suite that fails or runs no test without the plug-in is reported."""
    broken = STOCK | {"tests.test_io::test_read": suite.Case("failed")}
    assert _compare(broken, broken | OURS) == ["fails without the plug-in: tests.test_io::test_read"]
    assert len(_compare({}, {})) == 1


def test_the_report_of_pytest_is_read(tmp_path):
    """Outcomes, texts and parametrised names come from the JUnit file of pytest."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', [1, 2])\n"
        "def test_n(n): assert n == 1, 'too large'\n"
        "@pytest.mark.skip(reason='no')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken(): raise OSError('gone')\n"
        "def test_error(broken): pass\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    cases = suite.run(folder, "made-up", ["-p", "no:xdist"])
    assert {name: case.outcome for name, case in cases.items()} == {
        "test_it::test_n[1]": "passed",
        "test_it::test_n[2]": "failed",
        "test_it::test_skipped": "skipped",
        "test_it::test_error": "error",
    }
    assert "too large" in cases["test_it::test_n[2]"].text


def test_only_the_tests_are_unpacked(tmp_path):
    """Only the tests are unpacked, so they use the installed mergekit. The missing module is added."""
    source = tmp_path / "mergekit-9"
    for name in ("mergekit/__init__.py", "tests/test_a.py", "pyproject.toml"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("x = 1\n")
    with tarfile.open(tmp_path / "mergekit-9.tar.gz", "w:gz") as archive:
        archive.add(source, "mergekit-9")
    found = suite.prepare(tmp_path / "work", tmp_path / "mergekit-9.tar.gz")
    files = sorted(file.relative_to(found).as_posix() for file in found.rglob("*") if file.is_file())
    assert files == ["pytest.ini", "tests/__init__.py", "tests/common.py", "tests/test_a.py"]


@pytest.mark.mergekit_suite
def test_mergekits_own_tests_pass_as_before():
    """The tests of mergekit have the same outcomes with and without the plug-in."""
    done = run("mergekit_suite")
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "mergekit's tests pass as before" in done.stdout
