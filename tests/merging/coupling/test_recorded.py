"""Recorded factors in merges: through stock mergekit and in memory, equal to dense solves; refusals of other blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.blocks import diagonal_blocks
from squisher_mergekit.fisher.factors.mapping import factors_in_memory
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.merging.coupling.recorded import sides_of
from tests.merging.coupling.reference import factor
from tests.merging.models import EMBEDDING, entry
from tests.merging.reference import Tensors, assert_config_refused, llama, merged, preview_of

WEIGHTS = (1.0, 0.5)
INFO = FactorsInfo(source="recorded", statistic="ema")
DAMPING = {"rows": 0.1, "columns": 0.01, "kron": 0.03}


def _draw(size: int, generator: torch.Generator) -> Tensor:
    """Return a factor of low rank with a different level of each row."""
    gradient = torch.randn(size, 3, generator=generator) * torch.rand(size, 1, generator=generator)
    return gradient @ gradient.T * 1e-9


def _family(root: Path, file_block: int, sides: tuple[str, ...] = ("rows", "columns")) -> tuple[list[Tensors], Any]:
    """Write a base and two models whose Fishers have factors; return the weights, and (Fisher, factors) of each."""
    weights = [llama(root / "m0", 0)]
    known = []
    for i in (1, 2):
        weights.append(llama(root / f"m{i}", i))
        generator = torch.Generator().manual_seed(i)
        fisher = {n: 10 ** (torch.rand(t.shape, generator=generator) * 4 - 9) for n, t in weights[i].items()}
        whole = {
            side: {n: _draw(t.shape[axis], generator) for n, t in weights[i].items() if t.ndim == 2 and n != EMBEDDING}
            for axis, side in enumerate(("rows", "columns"))
            if side in sides
        }
        blocks = {s: {n: diagonal_blocks(f, file_block) for n, f in some.items()} for s, some in whole.items()}
        factors = factors_in_memory(blocks, INFO, {n: t.shape for n, t in fisher.items()})  # type: ignore[arg-type]
        written = Fisher(fisher, FisherConfig(estimator="squisher", statistic="mean"), factors=factors)
        write_fisher(written, root / f"m{i}")
        known.append((written, whole))
    return weights, known


def _config(root: Path, kind: str, block: int, **parameters: Any) -> dict[str, Any]:
    models = [entry(root, i, weight=weight) for i, weight in enumerate(WEIGHTS, start=1)]
    settings = {"structure": kind, "block": block, "steps": 200, **parameters}
    return {
        "merge_method": "squisher",
        "base_model": str(root / "m0"),
        "dtype": "float64",
        "models": models,
        "parameters": settings,
    }


def _cut(given: Tensor | None, free: Tensor, block: int) -> Tensor:
    """Return a factor of mean eigenvalue 1 in blocks: the given one, else the free one."""
    if given is None:
        return free
    size = len(given)
    places = torch.arange(size) // block
    wide = given.double() * (places[:, None] == places)
    return wide * size / wide.trace()


def _dense(kind: str, name: str, weights: list[Tensors], known: Any, block: int) -> Tensor:
    """Merge by one dense solve over all blocks."""
    base = weights[0][name].double()
    thetas = [state[name].double() for state in weights[1:]]
    fishers = [fisher[name].double() for fisher, _ in known]
    over = (
        [whole.get("rows", {}).get(name) for _, whole in known],
        [whole.get("columns", {}).get(name) for _, whole in known],
    )
    if kind == "columns":
        base, thetas, fishers, over = base.T, [t.T for t in thetas], [f.T for f in fishers], over[::-1]
    places = [range(low, min(low + block, len(base))) for low in range(0, len(base), block)]
    if kind == "kron":
        total = sum(w * f.sum() for w, f in zip(WEIGHTS, fishers, strict=True))
        size = base.numel()
        left, right = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        for i, theta in enumerate(thetas):
            step, fisher = theta - base, fishers[i]
            rows = _cut(over[0][i], factor(step, fisher, block), block)
            columns = _cut(over[1][i], factor(step.T, fisher.T, block), block)
            share = WEIGHTS[i] * fisher.sum() / total
            own = share * (torch.kron(rows, columns) + DAMPING[kind] * torch.eye(size, dtype=torch.float64))
            left, right = left + own, right + own @ theta.flatten()
        return torch.linalg.solve(left, right).reshape(base.shape)
    merged_rows = base.clone()
    for rows in places:
        part = slice(rows.start, rows.stop)
        sums = [w * f[part].sum() for w, f in zip(WEIGHTS, fishers, strict=True)]
        eye = torch.eye(len(rows), dtype=torch.float64)
        left, right = torch.zeros_like(eye), torch.zeros_like(base[part])
        for i, theta in enumerate(thetas):
            given = over[0][i]
            free = factor(theta[part] - base[part], fishers[i][part], len(rows))
            own = free if given is None else given[part, part].double() * len(rows) / given[part, part].double().trace()
            own = sums[i] / sum(sums) * (own + DAMPING[kind] * eye)
            left, right = left + own, right + own @ (theta[part] - base[part])
        merged_rows[part] = base[part] + torch.linalg.solve(left, right)
    return merged_rows.T if kind == "columns" else merged_rows


def _assert_merged(found: Tensors, kind: str, weights: list[Tensors], known: Any, block: int) -> None:
    coupled = [name for name in found if found[name].ndim == 2 and name != EMBEDDING]
    assert coupled
    for name in coupled:
        wanted = _dense(kind, name, weights, known, block)
        torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "columns", "kron"])
@pytest.mark.parametrize(("file_block", "block"), [(6, 6), (6, 3), (1000, 5)])
def test_stock_mergekit_takes_recorded_factors(tmp_path: Path, kind: str, file_block: int, block: int) -> None:
    """A merge equals the dense solve with the factors of the files, in their blocks or in parts of them."""
    weights, known = _family(tmp_path, file_block)
    found = merged(_config(tmp_path, kind, block), tmp_path / "out")
    _assert_merged(found, kind, weights, known, block)


def test_a_side_without_a_factor_follows_from_the_task_vector(tmp_path: Path) -> None:
    """`kron` with recorded rows alone takes the columns of d and v."""
    weights, known = _family(tmp_path, 4, sides=("rows",))
    found = merged(_config(tmp_path, "kron", 4), tmp_path / "out")
    _assert_merged(found, "kron", weights, known, 4)


def test_in_memory_as_from_files(tmp_path: Path) -> None:
    """`merge_state_dicts` takes the factors of a Fisher."""
    weights, known = _family(tmp_path, 8)
    config = _config(tmp_path, "rows", 8)
    states = merge_state_dicts(
        {f"m{i}": state for i, state in enumerate(weights)},
        "squisher",
        base="m0",
        parameters={
            "fisher": {"m0": "auto", "m1": known[0][0], "m2": known[1][0]},
            "weight": {"m0": 0.0, "m1": WEIGHTS[0], "m2": WEIGHTS[1]},
            **config["parameters"],
        },
    )
    for name, tensor in merged(config, tmp_path / "out").items():
        torch.testing.assert_close(states[name], tensor.float(), rtol=0, atol=1e-5)


def test_a_factor_of_another_scale_changes_nothing(tmp_path: Path) -> None:
    """Factors count by their shape, not by their scale."""
    _, known = _family(tmp_path, 6)
    fisher, _ = known[0]
    first = merged(_config(tmp_path, "rows", 6), tmp_path / "first")
    factors = fisher.factors
    scaled = {"rows": {name: 1e5 * factors.rows[name] for name in factors.rows}}
    shapes = {name: fisher.info(name).shape for name in fisher}
    for file in ("fisher.safetensors", "fisher_config.json"):
        (tmp_path / "m1" / file).unlink()
    write_fisher(fisher.with_factors(factors_in_memory(scaled, INFO, shapes)), tmp_path / "m1")  # type: ignore[arg-type]
    second = merged(_config(tmp_path, "rows", 6), tmp_path / "second")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-5, atol=1e-6)


def test_rows_of_a_conv1d_take_the_factor_of_its_columns(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out], so that its outputs are the columns of the stored tensor."""
    weights, known = [], []
    name = "transformer.h.0.mlp.c_fc.weight"
    for i in range(3):
        torch.manual_seed(i)
        config = GPT2Config(n_embd=10, n_head=2, n_layer=1, n_inner=13, vocab_size=19, n_positions=11)
        model = GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / f"m{i}")
        weights.append({n: t.detach() for n, t in model.state_dict().items() if n != "lm_head.weight"})
        if i:
            generator = torch.Generator().manual_seed(i)
            fisher = {n: torch.rand(t.shape, generator=generator) * 1e-7 for n, t in weights[i].items()}
            whole = _draw(13, generator)
            factors = factors_in_memory({"columns": {name: diagonal_blocks(whole, 6)}}, INFO, {name: (10, 13)})
            metadata = FisherConfig(estimator="squisher", statistic="mean")
            write_fisher(Fisher(fisher, metadata, factors=factors), tmp_path / f"m{i}")
            known.append(({name: fisher[name].T}, {"rows": {name: whole}}))
    found = merged(_config(tmp_path, "rows", 3), tmp_path / "out")
    turned = [{name: state[name].T} for state in weights]
    wanted = _dense("rows", name, turned, known, 3).T
    torch.testing.assert_close(found[name].double(), wanted, rtol=0, atol=1e-6)


def test_slices_take_the_factors_of_the_models_own_layer(tmp_path: Path) -> None:
    """A sliced layer has the factors of its number in the model, wherever it ends up."""
    weights, known = _family(tmp_path, 4)
    sources = [
        {"model": str(tmp_path / f"m{i}"), "layer_range": [1, 2], "parameters": {"weight": weight}}
        for i, weight in enumerate(WEIGHTS, start=1)
    ]
    config = _config(tmp_path, "columns", 4) | {"slices": [{"sources": sources}]}
    del config["models"]
    found = merged(config, tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    wanted = _dense("columns", "model.layers.1.mlp.up_proj.weight", weights, known, 4)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


def test_the_plan_names_the_matrices(tmp_path: Path) -> None:
    """A note tells how many matrices of which model use factors of the files, and their source."""
    _family(tmp_path, 6)
    notes = preview_of(tmp_path, _config(tmp_path, "rows", 6))["notes"]
    assert sum("use factors of its Fisher (recorded" in note for note in notes) == 2
    assert not any("use factors" in note for note in preview_of(tmp_path, _config(tmp_path, "diagonal", 6))["notes"])


@pytest.mark.parametrize(("file_block", "block"), [(6, 4), (4, 8)])
def test_blocks_that_do_not_divide_are_refused(tmp_path: Path, file_block: int, block: int) -> None:
    """The message names the block that fits."""
    _family(tmp_path, file_block)
    words = ("block must divide the blocks of recorded factors", f"set block: {file_block}")
    assert_config_refused(tmp_path, _config(tmp_path, "rows", block), *words)


@pytest.mark.parametrize(
    ("kind", "transposed", "sides"),
    [
        ("diagonal", False, ()),
        ("columns", False, ("columns",)),
        ("columns", True, ("rows",)),
        ("kron", True, ("rows", "columns")),
    ],
)
def test_sides_are_those_of_the_stored_tensor(kind: str, transposed: bool, sides: tuple[str, ...]) -> None:
    """A matrix kept as [in, out] exchanges rows and columns."""
    assert sides_of(kind, transposed) == sides
