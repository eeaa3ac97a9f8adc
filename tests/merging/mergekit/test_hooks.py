"""Registration of the methods with mergekit for any order of imports."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor

from tests.merging.reference import (
    assert_refused,
    assert_within,
    give_fisher,
    largest,
    llama,
    merge,
    squisher_reference,
)

ORDERS = [
    "import squisher_mergekit.merging.mergekit.methods as own, mergekit.merge_methods as stock",
    "import mergekit.merge_methods as stock, squisher_mergekit.merging.mergekit.methods as own",
    "import mergekit.plan, squisher_mergekit.merging.mergekit.methods as own, mergekit.merge_methods as stock",
]


@pytest.mark.parametrize("imports", ORDERS)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    """Both methods are registered once, and are the objects of this package."""
    names = {"squisher": "SQUISHER", "ubgm_squisher": "UBGM_SQUISHER"}
    checks = "; ".join(f"assert stock.get({name!r}) is own.{own}" for name, own in names.items())
    code = f"{imports}; {checks}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "not active" in done.stderr) == (0, False), done.stderr


def test_a_base_counts_as_listed_module_by_module(tmp_path: Path) -> None:
    """A base listed in one module takes part in that module alone."""
    from mergekit import merge_methods
    from mergekit.config import MergeConfiguration
    from mergekit.plan import MergePlanner

    for i in range(3):
        llama(tmp_path / f"m{i}", seed=i)
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(3)]
    modules = {"text": {"models": models[:2]}, "vision": {"models": models[1:]}}
    config = {"merge_method": "squisher", "base_model": models[0]["model"], "modules": modules}
    layers = SimpleNamespace(architecture=SimpleNamespace(num_layers=lambda _: 3))
    planner = SimpleNamespace(
        _method=merge_methods.get("squisher"),
        config=MergeConfiguration.model_validate(config),
        arch_info=SimpleNamespace(modules=dict.fromkeys(modules, layers)),
        options=SimpleNamespace(trust_remote_code=False),
    )
    MergePlanner.normalize_config(planner)
    sources = {
        name: {Path(source.model.model.path).name for piece in module.slices for source in piece.sources}
        for name, module in planner.config.modules.items()
    }
    assert sources == {"text": {"m0", "m1"}, "vision": {"m1", "m2"}}


def test_stock_methods_ignore_unknown_keys(tmp_path: Path, pair: dict[str, Any]) -> None:
    """Other methods still ignore unknown keys."""
    pair["merge_method"] = "linear"
    pair["parameters"]["wieght"] = 3
    assert merge(pair, tmp_path / "out").exit_code == 0


def test_mergekit_multi(tmp_path: Path) -> None:
    """`mergekit-multi` runs several of our merges in one process, the second on the result of the first."""
    from mergekit.scripts.multimerge import main

    weights = [llama(tmp_path / f"m{i}", i) for i in range(3)]
    fishers = [give_fisher(tmp_path / f"m{i}", w, i) for i, w in enumerate(weights)]
    first = {
        "name": "first",
        "merge_method": "squisher",
        "models": [{"model": str(tmp_path / f"m{i}")} for i in (0, 1)],
    }
    second = {
        "merge_method": "squisher",
        "models": [
            {"model": "first", "parameters": {"fisher": str(tmp_path / "m0")}},
            {"model": str(tmp_path / "m2")},
        ],
    }
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]), encoding="utf-8")
    arguments = [str(file), "-I", str(tmp_path / "steps"), "--out-path", str(tmp_path / "out"), "--no-copy-tokenizer"]
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    between = load_file(tmp_path / "steps" / "first" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        thetas: list[Tensor] = [between[name], weights[2][name]]
        reference = squisher_reference(thetas, [fishers[0][name], fishers[2][name]], [1.0, 1.0])
        assert_within(tensor, reference, largest(thetas))


def _evil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cposix\nmkdir\n(S'ran'\ntR.")


def _cut_pickle(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    os.truncate(folder / "pytorch_model.bin", 3000)


def _fifo_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors.index.json")


def _nested_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 60_000)


@pytest.mark.parametrize("damage", [_evil_pickle, _cut_pickle, _fifo_index, _nested_config])
def test_a_damaged_model_is_refused_by_stock_commands(tmp_path: Path, damage: Any, monkeypatch: Any) -> None:
    """mergekit-yaml refuses a model that it cannot read in one line, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        give_fisher(tmp_path / name, llama(tmp_path / name, seed), seed)
    damage(tmp_path / "b")
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    config = {"merge_method": "squisher", "dtype": "float32", "models": models}
    assert_refused(merge(config, tmp_path / "out"), tmp_path / "out", str(tmp_path / "b"))
    assert not (tmp_path / "ran").exists()
