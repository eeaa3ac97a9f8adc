"""Tables of the benchmarks."""

import importlib.util
import json
import sys

import pytest

from scripts.benchmarks import tables as benchmarks
from scripts.benchmarks.applications import CASES
from scripts.benchmarks.fisher_models import build, task_of, terms
from scripts.benchmarks.report import write_report
from scripts.experiments import report, runner
from tests.scripts.commands import run


def _row(kind, method, ratio, **more):
    row = {"kind": kind, "method": method, "ratio": ratio, "error": 3e-7, "found": "error 3.0e-07", "problem": ""}
    return row | {"checking": (4.0, 1.5) if method == "ours" else ()} | more


def _timed(model, *rows):
    return {"model": model, "parameters": 480_000, "examples": 7, "rounds": 5, "rows": list(rows)}


# ---- a table each


def test_the_time_table_has_all_measurements():
    """Our rows come first, for each kind.

    Other methods have the true labels only. Errors, missing tensors and refusals are shown.
    """
    bad = {"error": 5.0, "found": "wrong: 2 of 9, error 5.0e+00, missing 3 of 9"}
    (table,) = benchmarks.fisher_time(
        [
            _timed(
                "mlp",
                _row("empirical", "ours", 1.254, error=2e-6),
                _row("empirical", "vmap(grad), chunks of 4", 2.508),
                _row("empirical", "A", 1.1, **bad),
                _row("empirical", "B", None, problem="Exception: no"),
                _row("empirical", "C", None, problem="ModuleNotFoundError: not installed, see --help"),
                _row("sampled", "ours", 1.3, checking=(9.0, 9.0)),
                _row("exact", "ours", 3.0, checking=(9.0, 9.0)),
                _row("exact", "A", 4.0),
            ),
            _timed(
                "llama",
                _row("empirical", "ours", 1.5, checking=(3.0, 2.0)),
                _row("sampled", "ours", 1.6),
                _row("empirical", "vmap(grad), chunks of 7", 1.2),
            ),
        ]
    )
    assert table.rows == [
        ("**ours, true labels**", ["1.25", "1.50"]),
        ("**ours, sampled**", ["1.30", "1.60"]),
        ("**ours, exact**", ["3.00", ""]),
        ("`vmap(grad)`", ["2.51", "1.20"]),
        ("A", ["1.10, 2 of 9 tensors wrong, 3 of 9 tensors missing", ""]),
        ("B", ["refuses", ""]),
        ("C", ["not installed", ""]),
    ]
    reading, others, checks = table.notes
    assert "at most 2.0e-06" in reading
    assert "Medians of 5 rounds" in reading
    assert "2.0 times ours (MLP: vmap(grad)), 0.8 times ours (Llama: vmap(grad))" in others
    assert "the first batch takes 3.0 to 4.0 plain passes, the second, fourth, eighth and so on 1.5 to 2.0" in checks


def test_a_fishers_memory_is_that_of_the_leanest_chunk():
    """A method has the row of its leanest chunk, with the larger of a first call and later ones in MB."""
    rows = [
        {"kind": "", "method": "plain", "bytes": 76_000_000},
        {"kind": "empirical", "method": "ours", "bytes": 130_400_000},
        {"kind": "empirical", "method": "Z, chunks of 4", "bytes": 300_000_000},
        {"kind": "empirical", "method": "Z, chunks of 16", "bytes": 900_000_000},
        {"kind": "empirical", "method": "Y", "problem": "no"},
        {"kind": "sampled", "method": "ours", "bytes": 131_000_000},
        {"kind": "sampled", "method": "Y", "bytes": 1},
    ]
    (table,) = benchmarks.fisher_memory([{"model": "llama-large", "copy": 206_000_000, "rows": rows}])
    assert table.rows == [
        ("plain pass", ["76"]),
        ("**ours, true labels**", ["130"]),
        ("**ours, sampled**", ["131"]),
        ("**ours, exact**", [""]),
        ("Z", ["300"]),
        ("Y", ["refuses"]),
    ]
    assert "one copy of the weights takes 206 MB" in table.notes[0]


@pytest.mark.parametrize(
    ("peak", "said"), [(0.74, "all commands stay below it"), (0.84, "**not all commands stay below it**")]
)
def test_commands_have_time_memory_and_output(peak, said):
    """A row has time, memory and output files.

    Files of the whole model are not listed, and the bound is that of the report.
    """
    files = {"difference.safetensors": 12_000_000, "mask.safetensors": 370_000, "model-00001-of-00002.safetensors": 9}
    cases = {"mask reset": {"cpu_s": 14.26, "anonymous_gb": peak, "files": files}}
    found = {"parameters": 297_000_000, "dtype": "bfloat16", "weights_bytes": 600_000_000, "limit_gb": 0.831}
    (table,) = benchmarks.applications([found | {"cases": cases}])
    written = "difference 12.0 MB (2.0 % of the weights), mask 370 kB (0.1 % of the weights)"
    assert table.rows == [("`mask reset --keep 0.005`", ["14.3", f"{peak}", written])]
    assert f"here 0.83 GB; the highest peak is {peak} GB: {said}." in table.notes[0]


def test_merges_are_compared_with_linear_by_their_minimum():
    """A row has the minimum of its rounds, and a density is in its label."""
    samples = {
        "linear": [
            {"wall_s": 9.0, "cpu_s": 8.0, "anonymous_gb": 0.5},
            {"wall_s": 8.5, "cpu_s": 10.0, "anonymous_gb": 0.4},
        ],
        "squisher trim": [
            {"wall_s": 25.0, "cpu_s": 20.0, "anonymous_gb": 0.9},
            {"wall_s": 30.0, "cpu_s": 12.0, "anonymous_gb": 1.0},
        ],
    }
    recipe = {"dtype": "bfloat16", "fisher_dtype": "float32"}
    (table,) = benchmarks.merges([{"samples": samples, "density": 0.2, "parameters": 297_000_000, "recipe": recipe}])
    assert table.rows == [
        ("`linear`", ["8.5", "8.0", "1.00", "0.40"]),
        ("`squisher`, density 0.2", ["25.0", "12.0", "1.50", "0.90"]),
    ]
    assert "the minimum of 2 rounds" in table.notes[0]
    one = {"samples": {"linear": samples["linear"][:1]}, "density": None, "parameters": 7e9, "recipe": recipe}
    (table,) = benchmarks.merges([one])
    assert table.rows == [("`linear`", ["9.0", "8.0", "1.00", "0.50"])]
    assert "one round" in table.notes[0]
    assert "ubgm" not in table.notes[0]


def test_structures_are_compared_with_squisher_and_computed_for_larger_models():
    """Times are relative to the plain merge of the run; only merges without a report have a memory of their own."""
    cost = {"flop": 9.5e13, "two_cores_s": 1546.0, "h100_s": 3.17}
    first, second = benchmarks.structures(
        [
            {
                "recipe": {"dtype": "bfloat16", "fisher_dtype": "float32"},
                "parameters": 297e6,
                "largest": [31, 17],
                "block": 128,
                "steps": 10,
                "samples": {
                    name: [{"cpu_s": seconds, "anonymous_gb": 1.0}, {"cpu_s": 99.0, "anonymous_gb": 2.0}]
                    for name, seconds in (("squisher", 8.0), ("kron", 52.0), ("kron, report", 60.0))
                },
                "matrices": {"kron": 0.71},
                "rates": {"kron": 31e9},
                "h100": 30e12,
                "large_models": 3,
                "large": {"Llama-2 7B": {"kron": cost}},
            }
        ]
    )
    assert first.rows == [
        ("`squisher`", ["8.0", "1.00", "1.00", ""]),
        ("`kron`, `mergekit-yaml`", ["52.0", "6.50", "1.00", "0.7"]),
        ("`kron`, `squisher merge`, with the report", ["60.0", "7.50", "1.00", ""]),
    ]
    assert second.rows == [("Llama-2 7B, `kron`", ["9.5e+13", "26 min", "3.2 s"])]
    assert "31 (`kron`) GFLOP/s" in second.notes[0]


def test_an_average_adds_a_share():
    """The table has one row for each length of run."""
    runs = [{"steps": 40, "rounds": 3, "plain_s": 10.0, "added": {"0.05": 0.114}}]
    (table,) = benchmarks.averages(runs)
    assert table.rows == [("40 steps", ["10.0", "11.4 %"])]
    assert table.columns[1] == "added by `FisherAverageCallback(share=0.05)`"


# ---- the text of the tables


@pytest.mark.parametrize("name", list(benchmarks.MODELS))
def test_labels_of_models_are_right(name):
    """A model's label has its number of classes and tokens, as the benchmark makes them."""
    model, batch = build(name, "cpu")
    title = benchmarks.MODELS[name]
    if task_of(batch) == "classification":
        logits, _ = terms(model, batch)
        assert f"{logits.shape[1]} classes" in title
    if not isinstance(batch, tuple):
        assert f"{batch['input_ids'].shape[1]} tokens" in title


@pytest.mark.parametrize("name", report.BENCHMARKS)
def test_a_table_names_the_command_that_made_it(name):
    """The recorded command writes exactly the file that the README's table shows."""
    found = report.found(name)
    assert found["command"].startswith(f"python -m scripts.benchmarks.{found['bench']} ")
    assert importlib.util.find_spec(f"scripts.benchmarks.{found['bench']}") is not None
    assert found["command"].endswith(f"--json scripts/experiments/results/{name}.json")
    assert ("--memory" in found["command"]) == name.endswith("_memory")


def test_all_commands_are_shown():
    """The table has every command of the benchmark under its right name."""
    cases = report.found("bench_applications")["measured"][0]["cases"]
    assert list(cases) == list(CASES) == list(benchmarks.COMMANDS)
    for name, arguments in CASES.items():
        title = benchmarks.COMMANDS[name].strip("`").partition("`")[0]
        assert set(title.split()) <= set(arguments), name


def test_a_report_records_command_and_versions(tmp_path, monkeypatch):
    """A report has the command, the versions, and those of other packages if they are installed."""
    monkeypatch.setattr(sys, "argv", ["/some/where/scripts/benchmarks/x.py", "--only", "squisher trim"])
    write_report(tmp_path / "x.json", [{"a": 1}], {"tqdm", "not_there"})
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["command"] == "python -m scripts.benchmarks.x --only 'squisher trim'"
    assert found["measured"] == [{"a": 1}]
    assert found["versions"].keys() == runner.versions().keys() | {"tqdm"}
    made = benchmarks.made_by(found | {"cpu_seconds": 150.0, "load_average": 1.5, "cores": 2})
    command = "`python -m scripts.benchmarks.x --only 'squisher trim'`"
    assert made.startswith(f"{command}: 2 CPU-minutes on a machine with 2 cores, at a load average of 1.5")


TINY_MODELS = ["--hidden=36", "--layers=2", "--intermediate=47", "--vocab=61", "--repeat=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small", "said"),
    [
        ("fisher", ["--models", "mlp", "--repeat", "1"], "| **ours, exact** |"),
        ("applications", ["--size", "tiny", "--cases", "prune", "mask reset, a half"], "| `mask reset --keep 0.5` |"),
        ("structure", [*TINY_MODELS, "--kinds", "rows"], "| `rows`, `mergekit-yaml` |"),
        ("average", ["--steps", "2", "--repeat", "1", "--shares", "0.5"], "| 2 steps |"),
    ],
)
def test_the_output_of_a_benchmark_can_be_shown(name, small, said, tmp_path):
    """The output file of a command can be shown as a block."""
    file = tmp_path / "out.json"
    done = run(f"benchmarks.{name}", *small, "--json", file)
    assert done.returncode == 0, done.stderr[-2000:]
    shown = report.block(f"bench_{name}", json.loads(file.read_text()))
    assert said in shown
    assert f"`python -m scripts.benchmarks.{name} {small[0]} {small[1]}" in shown
