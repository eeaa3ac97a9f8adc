"""The methods reach mergekit's registry whichever of the two is imported first."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.merging.reference import llama

ORDERS = [
    "import squisher_mergekit.merging.mergekit.methods as own, mergekit.merge_methods as stock",
    "import mergekit.merge_methods as stock, squisher_mergekit.merging.mergekit.methods as own",
    "import mergekit.plan, squisher_mergekit.merging.mergekit.methods as own, mergekit.merge_methods as stock",
]


@pytest.mark.parametrize("imports", ORDERS)
def test_the_order_of_imports_does_not_matter(imports: str) -> None:
    """Both methods are registered once, and are this package's own objects."""
    names = {"squisher": "SQUISHER", "ubgm_squisher": "UBGM_SQUISHER"}
    checks = "; ".join(f"assert stock.get({name!r}) is own.{own}" for name, own in names.items())
    code = f"{imports}; {checks}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, "not active" in done.stderr) == (0, False), done.stderr


def test_a_base_counts_as_listed_module_by_module(tmp_path: Path) -> None:
    """A base that one module lists takes part in that module alone; another keeps to the models it lists."""
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
