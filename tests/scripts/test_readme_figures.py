"""Measured numbers in README.md files: they stand only in blocks that are made from JSON files."""

import re

import pytest

from scripts import ROOT
from scripts.experiments import report
from tests.readmes import READMES, named, without_code

README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = "two|three|four|five|six|seven|eight|nine|ten|twenty|hundred|thousand|million"
UNITS = "CPU-[a-z]+|seconds?|s|ms|minutes?|hours?|[kMGT]i?B|bytes?|percent|points?|times|(?:plain[ ])?passes"
FIGURE = re.compile(
    rf"""
    (?<![\w.])(?:
        \d[\d,]*(?:\.\d+)?[ -]?(?:(?:{UNITS})\b|%|±)  # with a unit
      | (?:{WORDS})[ -](?:{UNITS})\b                  # the same in words
      | \d+(?:\.\d+)?e[-+]?\d+                        # a power of ten
      | \d+\.\d+                                      # any fraction
      | \d\d+[ ]to[ ]\d+                              # a range
    )""",
    re.VERBOSE,
)
# Reason -> phrases whose numbers may be typed. Each phrase is in at least one README.md. A reason that names a test
# says that this test checks the number.
ALLOWED = {
    "version": [
        "mergekit `>=0.1.5,<0.2`",
        "(0.50.2 was used, on the CPU)",
        "Apache-2.0",
        "Python 3.10 or later",
        "(4.1.0 was used)",
        "DeepSpeed 0.3 and later",
        "(diffusers 0.17 and later)",
        "Llama 3.1 8B",
    ],
    "limit of scripts.benchmarks.gpu_check": ["GPU benchmarks in at most six minutes"],
    "size of a benchmark": ["two random models of 1.1e9 parameters, which take 16 GB"],
    "section of the paper": ["section 3.5)"],
    "default of an option": [
        "| `weight` | per model | `1.0` |",
        "| `fisher_scale` | per model | `1.0` |",
        "| `density` | per model | `1.0` |",
        "| `power` | global | `1.0` |",
        "| `lambda` | global, `squisher` | `1.0` |",
        "| `floor` | global | `0.0` |",
        "| `prior` | global, `ubgm_squisher` | `0.0` |",
        "| `--alpha` | 0.15 |",
        "`0.1` (rows), `0.01` (columns), `0.03` (kron)",
    ],
    "value in an example": [
        "`SquisherCallback(beta=0.999)`",
        "| `power: 0.5` | `power: 0.5`; no epsilon",
    ],
    "condition of a warning": ["`beta2` above 0.95 freeze"],
    "figure of the paper": [
        "in the paper as well the methods are 0.1 points apart",
        "the paper's Table 6: BERT-large on GLUE at 0.5 %",
    ],
    "setting of an experiment": ["25 to 90 % of them, five seeds"],
    "tolerance of scripts.checkpoints.check": ["(Adafactor to 1e-6)"],
    "tests/fisher/test_compact.py::test_the_bound_holds_for_any_float32": ["a relative error below 4 % and 40 %"],
    "tests/fisher/test_compact.py::test_sizes": ["A dense Fisher takes 26 % and 13 % of float32"],
    "tests/estimators/test_estimate_architectures.py::test_given_labels_per_example": [
        "to 1e-5 of each tensor's largest entry"
    ],
}


def prose(text):
    """Return a README without its generated blocks and its code, as one line."""
    return " ".join(without_code(report.BLOCK.sub("", text)).split())


PROSE = {named(file): prose(file.read_text(encoding="utf-8")) for file in READMES}


def figures(text):
    """Return the numbers that no phrase allows, each with the words around it."""
    phrases = [phrase for allowed in ALLOWED.values() for phrase in allowed]
    spans = [found.span() for phrase in phrases for found in re.finditer(re.escape(phrase), text)]
    return [
        text[max(found.start() - 30, 0) : found.end() + 30]
        for found in FIGURE.finditer(text)
        if not any(begin <= found.start() and found.end() <= end for begin, end in spans)
    ]


@pytest.mark.parametrize("name", PROSE)
def test_no_figure_is_typed(name):
    """Every number with a unit, power of ten or fraction outside of the blocks is on the list."""
    assert figures(PROSE[name]) == []


@pytest.mark.parametrize("phrase", [phrase for allowed in ALLOWED.values() for phrase in allowed])
def test_the_list_has_no_unused_phrase(phrase):
    """Each phrase of the list is in a README.md and has a number."""
    assert any(phrase in text for text in PROSE.values())
    assert FIGURE.search(phrase)


@pytest.mark.parametrize("reason", [reason for reason in ALLOWED if reason.startswith("tests/")])
def test_the_named_tests_exist(reason):
    """The file and the test that a reason names exist."""
    file, _, name = reason.partition("::")
    assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "typed",
    [
        "it took 23 CPU-seconds and 0.64 GB",
        "33 kB for the network",
        "8.5 % to the CPU time",
        "the first batch takes 3 to 5 plain passes",
        "0.6 CPU-s",
        "a good 5 minutes",
        "79.4",
        "passed 1e9 within a few tasks",
        "| `squisher` | 78.2 |",
        "12 ± 3",
        "ten times dearer",
        "single models reach 87 to 92 on seeds 0, 3, 4 and 5",
        "two points better",
        "1,200 MB",
        "45% of the entries",
    ],
)
def test_a_typed_figure_is_found(typed):
    """A typed number is found with any unit, in prose or in a table."""
    assert figures(prose(f"{README}\n{typed}\n"))


@pytest.mark.parametrize(
    "hidden", ["    it took 9 s\n", "```text\nit took 9 s\n```\n", "<!-- BEGIN x -->9 s<!-- END x -->\n"]
)
def test_code_and_blocks_are_left_out(hidden):
    """A number in code or in a generated block does not count as typed."""
    assert figures(prose(f"{README}\n\n{hidden}")) == []


def test_blocks_of_the_readme_are_generated():
    """Each block has one place, in the file that report.py fills, and its results."""
    found = {file: report.BLOCK.findall(file.read_text(encoding="utf-8")) for file in READMES}
    assert sorted(found.pop(report.EVIDENCE)) == sorted(report.EXPERIMENTS)
    assert sorted(found.pop(report.COMMANDS)) == sorted([*report.BENCHMARKS, report.GPU])
    assert set(found.pop(report.README)) <= {report.GAIN, report.SETUP}
    assert not any(found.values())
    assert all(report.found(name) for name in report.EXPERIMENTS + report.BENCHMARKS)
