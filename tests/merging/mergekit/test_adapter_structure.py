"""Adapter: ``structure: rows | columns | kron`` by stock mergekit and in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.coupling.reference import REFERENCES
from tests.merging.models import EMBEDDING, entry, word_tokenizer
from tests.merging.reference import (
    Tensors,
    assert_config_refused,
    llama,
    merged,
    preview_of,
    squisher_reference,
    store_fisher,
)

UP = "model.layers.1.mlp.up_proj.weight"
DAMPING = {"rows": 0.1, "columns": 0.01, "kron": 0.03}
WEIGHTS = (1.0, 0.5)


def _family(root: Path, count: int = 3, **changes: Any) -> tuple[list[Tensors], list[Tensors]]:
    """Write a base `m0` and models near it with Fishers of 1e-12 to 1e-4, some 0; return the tensors of both."""
    base = llama(root / "m0", 0, **changes)
    weights, fishers = [base], [Tensors()]
    for i in range(1, count):
        llama(root / f"m{i}", 0, **changes)
        weights.append(_move(root / f"m{i}", i))
        fishers.append(_give(root / f"m{i}", weights[i], i))
    return weights, fishers


def _move(folder: Path, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    file = folder / "model.safetensors"
    tensors = {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    return tensors


def _give(folder: Path, weights: Tensors, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(100 + seed)
    fishers = {}
    for name, tensor in weights.items():
        fishers[name] = 10 ** (torch.rand(tensor.shape, generator=generator) * 8 - 12)
        fishers[name][torch.rand(tensor.shape, generator=generator) < 0.2] = 0
    store_fisher(folder, fishers, fingerprint(folder))
    return fishers


def _config(root: Path, kind: str, **parameters: Any) -> dict[str, Any]:
    settings = {"structure": kind, "block": 7, "steps": 200, **parameters}
    models = [entry(root, i, weight=weight) for i, weight in enumerate(WEIGHTS, start=1)]
    return {
        "merge_method": "squisher",
        "base_model": str(root / "m0"),
        "dtype": "float32",
        "models": models,
        "parameters": settings,
    }


def _wanted(structure: str, name: str, weights: list[Tensors], fishers: list[Tensors] | None):
    base, *thetas = (model[name].double() for model in weights)
    known = None if fishers is None else [model[name].double() for model in fishers[1:]]
    reference = REFERENCES[structure]
    return reference(base, thetas, known, WEIGHTS, 7, DAMPING[structure])


def _assert_near(tensor: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(tensor.double(), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("structure", REFERENCES)
def test_matrices_are_coupled_and_other_tensors_are_not(tmp_path: Path, structure: str) -> None:
    """Matrices equal a dense solve; the embedding and the norms equal Eq. 13."""
    weights, fishers = _family(tmp_path)
    result = merged(_config(tmp_path, structure), tmp_path / "out")
    for name, tensor in result.items():
        if tensor.ndim == 2 and name != EMBEDDING:
            _assert_near(tensor, _wanted(structure, name, weights, fishers))
        else:
            thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
            _assert_near(tensor, squisher_reference(thetas, own, WEIGHTS))


@pytest.mark.parametrize("structure", REFERENCES)
def test_in_memory_as_from_files(tmp_path: Path, structure: str) -> None:
    """`merge_state_dicts` with a base gives the merge of the files."""
    weights, fishers = _family(tmp_path)
    config = _config(tmp_path, structure)
    states = merge_state_dicts(
        {f"m{i}": state for i, state in enumerate(weights)},
        "squisher",
        base="m0",
        parameters={
            "fisher": {f"m{i}": fisher for i, fisher in enumerate(fishers) if i} | {"m0": "auto"},
            "weight": {"m0": 0.0, "m1": WEIGHTS[0], "m2": WEIGHTS[1]},
            **config["parameters"],
        },
    )
    for name, tensor in merged(config, tmp_path / "out").items():
        torch.testing.assert_close(states[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("structure", REFERENCES)
def test_without_any_fisher_the_task_vectors_decide(tmp_path: Path, structure: str) -> None:
    """With `fisher: none` for all, the factors are those of the task vectors, and vectors are averaged."""
    weights, _ = _family(tmp_path)
    config = _config(tmp_path, structure)
    for model in config["models"]:
        model["parameters"]["fisher"] = "none"
    for name, tensor in merged(config, tmp_path / "out").items():
        if tensor.ndim == 2 and name != EMBEDDING:
            _assert_near(tensor, _wanted(structure, name, weights, None))
        else:
            mean = sum(w * state[name].double() for w, state in zip(WEIGHTS, weights[1:], strict=True)) / sum(WEIGHTS)
            _assert_near(tensor, mean)


def test_conv1d_is_turned(tmp_path: Path) -> None:
    """GPT-2 keeps [in, out]: its rows are coupled along the second axis."""
    weights: list[Tensors] = []
    fishers: list[Tensors] = [Tensors()]
    for i in range(3):
        torch.manual_seed(0)
        config = GPT2Config(n_embd=10, n_head=2, n_layer=1, n_inner=13, vocab_size=19, n_positions=11)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / f"m{i}")
        weights.append(_move(tmp_path / f"m{i}", i))
        if i:
            fishers.append(_give(tmp_path / f"m{i}", weights[i], i))
    result = merged(_config(tmp_path, "rows"), tmp_path / "out")
    name = next(name for name in result if name.endswith("h.0.mlp.c_fc.weight"))
    turned = [{name: state[name].T} if name in state else {} for state in weights]
    own = [{name: state[name].T} if name in state else {} for state in fishers]
    _assert_near(result[name], _wanted("rows", name, turned, own).T)


def test_slices_take_the_bases_layer_of_the_models_own_number(tmp_path: Path) -> None:
    """The task vector of a sliced layer starts at the base's layer of the same number."""
    weights, fishers = _family(tmp_path)
    sources = [
        {"model": str(tmp_path / f"m{i}"), "layer_range": [1, 3], "parameters": {"weight": weight}}
        for i, weight in enumerate(WEIGHTS, start=1)
    ]
    config = _config(tmp_path, "rows") | {"slices": [{"sources": sources}]}
    del config["models"]
    result = merged(config, tmp_path / "out")
    for layer in (0, 1):
        tensor = result[f"model.layers.{layer}.mlp.up_proj.weight"]
        name = f"model.layers.{layer + 1}.mlp.up_proj.weight"
        _assert_near(tensor, _wanted("rows", name, weights, fishers))


def test_a_matrix_that_the_base_lacks_is_merged_by_the_diagonal(tmp_path: Path) -> None:
    """Without a start there is no task vector."""
    weights, fishers = _family(tmp_path)
    file = tmp_path / "m0" / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if n != UP}
    save_file(kept, file, {"format": "pt"})
    result = merged(_config(tmp_path, "kron"), tmp_path / "out")
    thetas, own = [w[UP] for w in weights[1:]], [f[UP] for f in fishers[1:]]
    _assert_near(result[UP], squisher_reference(thetas, own, WEIGHTS))


def test_a_plan_counts_the_base(tmp_path: Path) -> None:
    """The base's matrices are read as well."""
    _family(tmp_path)
    plain, coupled = (preview_of(tmp_path, _config(tmp_path, kind)) for kind in ("diagonal", "rows"))
    assert coupled["bytes_to_read"]["weights"] > plain["bytes_to_read"]["weights"]


def test_a_plan_names_each_structure(tmp_path: Path) -> None:
    """With filters, each structure has a line with its own number of tensors; 3 layers have 3 and 4 matrices."""
    _family(tmp_path)
    config = _config(tmp_path, "rows")
    kinds = [{"filter": "mlp", "value": "rows"}, {"filter": "self_attn", "value": "kron"}, {"value": "diagonal"}]
    text = preview_of(tmp_path, config | {"parameters": {**config["parameters"], "structure": kinds}})["text"]
    assert "structure: rows couples 9 tensors and leaves 0 to the diagonal" in text
    assert "structure: kron couples 12 tensors and leaves 0 to the diagonal" in text


def test_a_plan_names_tensors_that_stay_diagonal_with_the_reason(tmp_path: Path) -> None:
    """Vectors, the embedding, and a matrix that the base lacks."""
    _family(tmp_path)
    file = tmp_path / "m0" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != UP}, file, {"format": "pt"})
    preview = preview_of(tmp_path, _config(tmp_path, "columns"))
    assert preview["uncoupled"][UP] == "not in the base"
    assert preview["uncoupled"][EMBEDDING] == "an embedding, whose rows are tokens"
    assert preview["uncoupled"]["model.norm.weight"] == "no matrix"
    assert "structure: columns couples 21 tensors and leaves 9 to the diagonal" in preview["text"]
    assert f"merged by the diagonal, as not in the base: 1 tensor ({UP})" in preview["text"]
    assert preview_of(tmp_path, _config(tmp_path, "diagonal"))["uncoupled"] == {}


def test_a_plan_names_matrices_that_a_new_vocabulary_re_orders(tmp_path: Path) -> None:
    """With `tokenizer: {source: union}` the head stays diagonal; plan and report say why."""
    words = (["red", "green"], ["red", "blue", "pink"], ["pink", "green"])
    for i, own in enumerate(words):
        tensors = llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1)
        _give(tmp_path / f"m{i}", tensors, i)
        word_tokenizer(tmp_path / f"m{i}", own)
    config = _config(tmp_path, "kron") | {"tokenizer": {"source": "union"}}
    preview = preview_of(tmp_path, config)
    assert preview["uncoupled"]["lm_head.weight"] == "re-ordered by tokenizer:"
    assert UP not in preview["uncoupled"]
    assert merged(config, tmp_path / "out")


def test_a_plan_says_that_there_is_no_fisher(tmp_path: Path) -> None:
    """`fisher: none` is no F of 0 here."""
    _family(tmp_path)
    config = _config(tmp_path, "rows")
    for model in config["models"]:
        model["parameters"]["fisher"] = "none"
    assert "structure from the task vectors alone" in preview_of(tmp_path, config)["text"]


def test_a_structure_without_a_base_is_refused(tmp_path: Path) -> None:
    """The task vectors need a start."""
    _family(tmp_path)
    config = _config(tmp_path, "rows")
    del config["base_model"]
    assert_config_refused(tmp_path, config, "structure: rows needs base_model:")


def test_a_density_with_a_structure_is_refused(tmp_path: Path) -> None:
    """The two cannot be combined."""
    _family(tmp_path)
    config = _config(tmp_path, "rows")
    config["models"][0]["parameters"]["density"] = 0.5
    assert_config_refused(tmp_path, config, "must be 1 with structure: rows")


@pytest.mark.parametrize(
    ("key", "value"),
    [("structure", "row"), ("block", 0), ("block", 2.5), ("damping", 0), ("steps", "many"), ("shares", "w")],
)
def test_values_out_of_range_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    """Each parameter names what it accepts."""
    _family(tmp_path)
    assert_config_refused(tmp_path, _config(tmp_path, "kron", **{key: value}), key)


def test_density_without_a_fisher_is_refused(tmp_path: Path) -> None:
    """F chooses the entries that a density keeps: with `fisher: none` the density would change nothing."""
    _family(tmp_path)
    config = _config(tmp_path, "rows")
    config["parameters"] |= {"trimmed": "abstain", "density": 0.2}
    for model in config["models"]:
        model["parameters"]["fisher"] = "none"
    words = ("density of", "must be 1 with fisher: none", "give the model a Fisher")
    assert_config_refused(tmp_path / "x", config, *words)
