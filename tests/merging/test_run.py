"""Ownership of the Fishers of a merge by its run, and their release."""

import gc
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from squisher_mergekit.cli.merge import command as merge_command
from squisher_mergekit.cli.plan import command as plan_command
from squisher_mergekit.errors import RefusedError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.merge_plan import MergePlan
from squisher_mergekit.merging.run import LOG, Run
from squisher_mergekit.models import weights
from tests.merging.reference import Tensors, give_fisher, llama, merge_raw, planned, preview_of, store_fisher


def _held(root: Path) -> tuple[int, int]:
    """Return the numbers of Fishers in memory and of mapped Fisher files of a folder."""
    gc.collect()
    fishers = [thing for thing in gc.get_objects() if issubclass(type(thing), Fisher)]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return sum(str(root) in fisher.location for fisher in fishers), sum(f"{root}/" in m and "fisher" in m for m in maps)


def _models(root: Path, method: str = "squisher") -> tuple[dict[str, Any], list[Tensors]]:
    fishers = [give_fisher(root / f"m{i}", llama(root / f"m{i}", i), i) for i in range(2)]
    config: dict[str, Any] = {"merge_method": method, "models": [{"model": str(root / f"m{i}")} for i in range(2)]}
    return config | ({"base_model": str(root / "m0")} if method == "ubgm_squisher" else {}), fishers


def _run_merge(config: dict[str, Any], out: Path, **options: Any) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    given = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False, **options)
    run_merge(MergeConfiguration.model_validate(config), str(out), given)


@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
def test_four_merges_in_one_process_hold_nothing_afterwards(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of four merges by mergekit's `run_merge`, no Fisher is in memory and no Fisher file is mapped."""
    config, _ = _models(tmp_path, method)
    inside, record = [], Run.record

    def watched(self: Run, *arguments: Any) -> None:
        inside.append(_held(tmp_path) if not inside else inside[0])
        record(self, *arguments)

    monkeypatch.setattr(Run, "record", watched)
    held = []
    for i in range(4):
        _run_merge(config, tmp_path / f"out{i}")
        held.append(_held(tmp_path))
    # Both models' Fishers are open during a merge, so the count can find them; their tensors are copied, not mapped.
    assert (inside[0][0] >= 2, inside[0][1]) == (True, 0)
    assert held == [(0, 0)] * 4


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _spoil_nan(root: Path, fishers: list[Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    fishers[1]["model.norm.weight"][7] = float("nan")
    store_fisher(root / "m1", fishers[1])


def _spoil_names(root: Path, fishers: list[Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    del fishers[1]["model.norm.weight"]
    store_fisher(root / "m1", fishers[1])


def _spoil_interrupt(root: Path, fishers: list[Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "record", _interrupt)


def _spoil_executor(root: Path, fishers: list[Tensors], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit.merge.Executor", _interrupt)


@pytest.mark.parametrize("spoil", [_spoil_nan, _spoil_names, _spoil_interrupt, _spoil_executor])
def test_a_failed_merge_holds_nothing_afterwards(
    tmp_path: Path, spoil: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merge that is refused, interrupted, or stopped before its first task releases its Fishers as well."""
    config, fishers = _models(tmp_path)
    spoil(tmp_path, fishers, monkeypatch)
    with pytest.raises((RefusedError, KeyboardInterrupt)):
        _run_merge(config, tmp_path / "out")
    assert (_held(tmp_path), (tmp_path / "out").exists()) == ((0, 0), False)


def test_plans_and_raw_merges_hold_nothing_afterwards(tmp_path: Path) -> None:
    """`squisher plan`, refused or not, and `mergekit-pytorch` release their Fishers."""
    config, _ = _models(tmp_path)
    preview_of(tmp_path, config)
    assert _held(tmp_path) == (0, 0)
    file = tmp_path / "wrong.yml"
    config["parameters"] = {"scaling": "per_example"}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert CliRunner().invoke(plan_command, [str(file)]).exit_code == 1
    assert _held(tmp_path) == (0, 0)
    entries = [{"model": str(tmp_path / f"m{i}" / "model.safetensors")} for i in range(2)]
    assert merge_raw(tmp_path, {"merge_method": "squisher", "models": entries}).exit_code == 0
    assert _held(tmp_path) == (0, 0)


def test_a_plan_that_never_runs_holds_nothing_afterwards(tmp_path: Path) -> None:
    """Tasks that never run release their Fishers, although mergekit caches by planner."""
    config, _ = _models(tmp_path)
    tasks = planned(config, tmp_path / "out")
    assert _held(tmp_path)[0] == 2
    del tasks
    assert _held(tmp_path) == (0, 0)


@pytest.mark.parametrize("level", [logging.NOTSET, logging.DEBUG, logging.WARNING])
def test_a_log_line_leaves_the_level_of_the_logger(level: int, caplog: pytest.LogCaptureFixture) -> None:
    """A run logs under stock commands, whose root logger has the level warning.

    A level of the package's logger counts.
    """
    before = LOG.level
    LOG.setLevel(level)
    try:
        Run("squisher").log("a line")
        Run("squisher", quiet=True).log("no line")
        assert LOG.level == level
    finally:
        LOG.setLevel(before)
    assert [record.message for record in caplog.records] == ([] if level == logging.WARNING else ["a line"])


def test_a_strict_run_turns_warnings_into_refusals(tmp_path: Path) -> None:
    """`squisher plan --strict` refuses the Fisher of other weights, and names the option."""
    config, _ = _models(tmp_path)
    config["models"][1]["parameters"] = {"fisher": str(tmp_path / "m0")}
    file = tmp_path / "plan.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert CliRunner().invoke(plan_command, [str(file)]).exit_code == 0
    refused = CliRunner().invoke(plan_command, [str(file), "--strict"])
    assert (refused.exit_code, "merge without --strict" in refused.output) == (1, True)


def test_a_closed_run_keeps_its_preview() -> None:
    """A closed run keeps its preview for the report."""
    with Run("squisher") as run:
        run.begin(MergePlan("squisher"))
    assert (run.plan, run.preview and run.preview["tensors"]) == (None, 0)


def test_headers_and_fingerprints_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan reads the header of each model's weights once, for shapes, names and the fingerprint."""
    config, _ = _models(tmp_path, "ubgm_squisher")
    read, fingerprints = [], []
    stock_header, stock_fingerprint = weights.read_header, weights.fingerprint_of
    monkeypatch.setattr(weights, "read_header", lambda file: (read.append(file), stock_header(file))[1])
    monkeypatch.setattr(
        weights, "fingerprint_of", lambda h, **more: (fingerprints.append(h), stock_fingerprint(h, **more))[1]
    )
    planned(config, tmp_path / "out")
    assert sorted(read) == [tmp_path / f"m{i}" / "model.safetensors" for i in range(2)]
    assert len(fingerprints) == 2


def test_the_report_counts_tensors_without_a_fisher(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The share of the entries in tensors that ``missing: average`` merges is no share of entries without a signal."""
    config, fishers = _models(tmp_path)
    name = "model.norm.weight"
    store_fisher(tmp_path / "m1", {key: value for key, value in fishers[1].items() if key != name})
    file, report = tmp_path / "merge.yml", tmp_path / "report.json"
    file.write_text(yaml.safe_dump(config | {"parameters": {"missing": "average"}}))
    with caplog.at_level(logging.INFO, "squisher_mergekit"):
        result = CliRunner().invoke(
            merge_command, [str(file), str(tmp_path / "out"), "--no-copy-tokenizer", "--json", str(report)]
        )
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert found["without_fisher"] == pytest.approx(fishers[0][name].numel() / found["entries"], abs=1e-12)
    text = f"{found['without_fisher']:.2%} in tensors without a Fisher: weighted mean"
    assert any(text in record.message for record in caplog.records)
