"""Run mergekit's own tests with and without the plug-in, and compare the outcomes.

The tests come from the sdist of the installed version on PyPI. The sdist lacks ``tests/common.py``; ``common.py`` in
this folder replaces it. The command exits with 0 if every test has the same outcome in both runs. The plug-in adds
cases to one test, which runs each registered method without Fishers; our methods must refuse them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

SWITCH = "SQUISHER_MERGEKIT_AUTOLOAD"
OUTCOMES = {"failure": "failed", "error": "error", "skipped": "skipped"}
METHODS = ("squisher", "ubgm_squisher")
# The test that runs every registered method, and the message with which our methods must refuse.
EVERY_METHOD = "tests.test_merge_method_regressions::test_state_dict_methods_accept_strided_weights_without_mutation"
REFUSAL = "needs a Fisher for input"


@dataclass(frozen=True)
class Case:
    """Outcome of one test, with its text unless it passed."""

    outcome: str
    text: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Run both suites and compare them."""
    options = parse(arguments)
    work = options.work or Path(tempfile.mkdtemp(prefix="mergekit-suite-"))
    try:
        suite = prepare(work.resolve(), options.sdist or download(work, metadata.version("mergekit")))
        runs = {name: run(suite, name, options.pytest) for name in ("stock", "plug-in")}
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    problems = compare(runs["stock"], runs["plug-in"], METHODS)
    for name, cases in runs.items():
        print(f"{name:<8} {counts(cases)}")
    added = sorted(set(runs["plug-in"]) - set(runs["stock"]))
    print("\n".join(f"added by the plug-in: {name} {runs['plug-in'][name].outcome}" for name in added))
    print("\n".join(f"problem: {problem}" for problem in problems) or "mergekit's tests pass as before")
    if options.json:
        report = {name: dict(Counter(case.outcome for case in cases.values())) for name, cases in runs.items()}
        options.json.write_text(json.dumps({**report, "added": added, "problems": problems}, indent=2) + "\n")
    return 1 if problems else 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="work folder that is kept (default: a temporary folder)")
    parser.add_argument("--sdist", type=Path, help="sdist of mergekit; nothing is downloaded then")
    parser.add_argument("--json", type=Path, help="JSON file for the counts")
    parser.add_argument("pytest", nargs="*", help="further arguments for pytest, after --")
    return parser.parse_args(arguments)


def download(work: Path, version: str) -> Path:
    """Return mergekit's sdist, from the work folder or from PyPI."""
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"mergekit-{version}.tar.gz"
    if not file.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-build-isolation", "--no-binary", "mergekit", f"mergekit=={version}", "--dest", str(work)]
        subprocess.run(command, check=True)
    return file


def prepare(work: Path, sdist: Path) -> Path:
    """Unpack only the tests, so that they use the installed mergekit, and add the missing module."""
    suite = work / "suite"
    shutil.rmtree(suite, ignore_errors=True)
    tests = suite / "tests"
    tests.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        for member in archive.getmembers():
            parts = Path(member.name).parts
            content = archive.extractfile(member) if len(parts) == 3 and parts[1] == "tests" else None
            if content is not None:
                (tests / parts[2]).write_bytes(content.read())
    (tests / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("common.py"), tests / "common.py")
    (suite / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    return suite


def run(suite: Path, name: str, extra: list[str]) -> dict[str, Case]:
    """Run pytest in a fresh interpreter; ``stock`` switches the start-up hook off."""
    print(f"running mergekit's tests ({name}) ...", file=sys.stderr, flush=True)
    report = suite.parent / f"{name}.xml"
    report.unlink(missing_ok=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", SWITCH))}
    if name == "stock":
        environment[SWITCH] = "0"
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report}"]
    log = suite.parent / f"{name}.log"
    with log.open("w") as output:
        subprocess.run([*command, *extra], cwd=suite, env=environment, stdout=output, stderr=output, check=False)
    if not report.exists():
        raise SystemExit(f"pytest wrote no report:\n{log.read_text()[-3000:]}")
    return read_report(report)


def read_report(file: Path) -> dict[str, Case]:
    """Read a JUnit report into a mapping ``module::test -> Case``; a test that failed twice keeps the first text."""
    cases: dict[str, Case] = {}
    for element in ElementTree.parse(file).iter("testcase"):
        name = "::".join(filter(None, (element.get("classname"), element.get("name"))))
        bad = next((child for child in element if child.tag in OUTCOMES), None)
        case = Case("passed") if bad is None else Case(OUTCOMES[bad.tag], f"{bad.get('message')}\n{bad.text}")
        if cases.setdefault(name, case).outcome == "passed":
            cases[name] = case
    return cases


def compare(stock: dict[str, Case], plugged: dict[str, Case], methods: tuple[str, ...]) -> list[str]:
    """Return one line for each difference between the runs other than the refusals of ``methods``."""
    if not any(case.outcome == "passed" for case in stock.values()):
        return ["no test passed without the plug-in, so the comparison says nothing"]
    problems = [f"fails without the plug-in: {name}" for name, case in stock.items() if failed(case)]
    for name, before in stock.items():
        after = plugged.get(name, Case("absent"))
        if after.outcome != before.outcome:
            problems.append(f"{name} is {after.outcome} with the plug-in, {before.outcome} without")
    ran = any(name.startswith(EVERY_METHOD) for name in stock)
    expected = {f"{EVERY_METHOD}[{method}]" for method in methods} if ran else set()
    for name in sorted(expected | (set(plugged) - set(stock))):
        case = plugged.get(name, Case("absent"))
        if name not in expected:
            problems.append(f"{name} is {case.outcome} and exists with the plug-in alone")
        elif not (failed(case) and REFUSAL in case.text):
            problems.append(f"{name} is {case.outcome}, but must be refused with {REFUSAL!r}")
    return problems


def failed(case: Case) -> bool:
    """Return True if a test failed or could not run."""
    return case.outcome in ("failed", "error")


def counts(cases: dict[str, Case]) -> str:
    """Return a line such as ``518 passed, 82 skipped``."""
    return ", ".join(f"{number} {outcome}" for outcome, number in Counter(c.outcome for c in cases.values()).items())


if __name__ == "__main__":
    sys.exit(main())
