"""`density`: the share of each task vector that enters a merge, chosen by F, against slow float64 references."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from squisher_mergekit.cli.plan import command as plan_command
from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.merging import density, execution
from squisher_mergekit.merging.density import Rows, Trim
from squisher_mergekit.merging.execution import Input, merge_squisher, merge_ubgm
from squisher_mergekit.merging.mergekit.tasks import permute_rows, shared_rows
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.reference import (
    Tensors,
    assert_within,
    draw_fisher,
    give_fisher,
    keep_largest,
    largest,
    llama,
    merge,
    merged,
    squisher_reference,
    store_fisher,
    ubgm_reference,
)
from tests.merging.test_special import _mixtral, _nets, _packed, _raw, _tokenizer

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


def _models(root: Path, count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensors], list[Tensors]]:
    """Write a base `m0`, which has no Fisher, and models that have one."""
    weights = [llama(root / f"m{i}", i, dtype) for i in range(count)]
    return weights, [{}, *(give_fisher(root / f"m{i}", weights[i], i) for i in range(1, count))]


def _config(root: Path, densities: Sequence[Any], method: str = "squisher", **settings: Any) -> dict[str, Any]:
    models = [
        {"model": str(root / f"m{i}"), "parameters": {"density": value}} for i, value in enumerate(densities, start=1)
    ]
    if method == "ubgm_squisher":
        models.insert(0, {"model": str(root / "m0"), "parameters": {"fisher": "none"}})
    return {"merge_method": method, "base_model": str(root / "m0"), "models": models, **settings}


def _assert_squisher(result: Tensor, base: Tensor, thetas: list[Tensor], fishers: list[Tensor], kept: Any) -> None:
    trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, fishers, kept, strict=True)]
    reference = squisher_reference(trimmed, fishers, [1.0] * len(thetas))
    assert_within(result, reference, largest([*thetas, base]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squisher_equals_the_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    """A base beside the models gives the values that are not kept, and is neither summed nor asked for a Fisher."""
    weights, fishers = _models(tmp_path, 4, dtype)
    result = merged(_config(tmp_path, [0.2, 0.5, 1.0]), tmp_path / "out")
    assert set(result) == set(weights[0])
    for name, tensor in result.items():
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        _assert_squisher(tensor, weights[0][name], thetas, own, (0.2, 0.5, 1.0))


def test_ubgm_equals_the_reference(tmp_path: Path) -> None:
    """In gradient matching an entry that is not kept makes no step, while its F still counts; a prior counts too."""
    weights, _ = _models(tmp_path, 3)
    generator = torch.Generator().manual_seed(8)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 3 for n, t in weights[0].items()} for _ in range(3)]
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    config = _config(tmp_path, [0.3, 0.6], "ubgm_squisher", parameters={"prior": 0.5})
    for name, tensor in merged(config, tmp_path / "out").items():
        base, *thetas = (model[name] for model in weights)
        own = [fisher[name] for fisher in fishers[1:]]
        trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, own, (0.3, 0.6), strict=True)]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        none = torch.zeros_like(base)
        assert_within(tensor, ubgm_reference(base, none, trimmed, own, [1.0, 1.0], 0.5), size)


def test_an_entry_that_is_put_back_votes_for_the_base(tmp_path: Path) -> None:
    """By hand: of [1, 5] with F [3, 1] half is kept, and the second entry enters as the base's 9 with weight 1."""
    tensors = [torch.tensor([0.0, 9.0]), torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    fishers = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]
    parameters = {"fisher": fishers, "density": [1.0, 0.5, 0.5]}
    result = merge_tensors(tensors, "squisher", parameters=parameters, base_index=0, name="w")
    assert result.tolist() == [(3 * 1 + 1 * 0) / 4, (1 * 9 + 3 * 1) / 4]


def test_a_listed_base_is_summed_as_it_is(tmp_path: Path) -> None:
    """In squisher a base that is listed enters the sum whole, whatever density says, and its weights are read once."""
    weights, fishers = _models(tmp_path, 3)
    fishers[0] = give_fisher(tmp_path / "m0", weights[0], 0)
    config = _config(tmp_path, [1, 1])
    config["models"] = [{"model": str(tmp_path / f"m{i}")} for i in range(3)]
    config["parameters"] = {"density": 0.25}
    for name, tensor in merged(config, tmp_path / "out").items():
        thetas, own = [w[name] for w in weights], [f[name] for f in fishers]
        _assert_squisher(tensor, weights[0][name], thetas, own, (1.0, 0.25, 0.25))
    plan = _plan(tmp_path, config)
    assert plan["bytes_to_read"]["weights"] == sum(t.nbytes for model in weights for t in model.values())


def test_density_1_is_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With density 1 nothing is chosen, a base of other shapes is not read, and the result is the same to the bit."""
    _models(tmp_path, 3)
    llama(tmp_path / "m0", 7, intermediate_size=19)
    monkeypatch.setattr(density, "largest", lambda *_: pytest.fail("a choice was made"))
    plain = _config(tmp_path, [1.0, 1.0])
    for entry in plain["models"]:
        del entry["parameters"]
    results = [merged(config, tmp_path / f"out{i}") for i, config in enumerate((plain, _config(tmp_path, [1, 1.0])))]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert _plan(tmp_path, _config(tmp_path, [1.0, 1.0])) == _plan(tmp_path, plain)


def test_filters_and_gradients(tmp_path: Path) -> None:
    """Density by filter and by gradient over the layers reaches the tensors it names."""
    weights, fishers = _models(tmp_path, 3)
    by_filter = [{"filter": "mlp", "value": 0.1}, {"filter": "self_attn", "value": [1.0, 0.2]}, {"value": 1.0}]
    result = merged(_config(tmp_path, [[0.9, 0.5, 0.1], by_filter]), tmp_path / "out")
    for name, tensor in result.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        second = 0.1 if "mlp" in name else (1.0, 0.6, 0.2)[layer] if "self_attn" in name else 1.0
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        _assert_squisher(tensor, weights[0][name], thetas, own, ((0.9, 0.5, 0.1)[layer], second))


def test_slices_take_the_bases_layer_of_the_models_own_number(tmp_path: Path) -> None:
    """With offset slices each model's task vector starts at the base's layer that the model's own layer came from."""
    weights, fishers = _models(tmp_path, 3)

    def source(model: int, start: int, stop: int) -> dict[str, Any]:
        return {
            "model": str(tmp_path / f"m{model}"),
            "layer_range": [start, stop],
            "parameters": {"density": 0.3 * model},
        }

    config = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "slices": [{"sources": [source(1, 0, 2), source(2, 1, 3)]}, {"sources": [source(1, 1, 3), source(2, 0, 2)]}],
    }
    result = merged(config, tmp_path / "out")
    for name, tensor in result.items():
        parts = name.split(".")
        names = [name, name]
        if parts[1] == "layers":
            layers = ((0, 1), (1, 2), (1, 0), (2, 1))[int(parts[2])]
            names = [".".join([*parts[:2], str(layer), *parts[3:]]) for layer in layers]
        origins = [weights[0][own] for own in names]
        thetas = [weights[i][own] for i, own in enumerate(names, 1)]
        own = [fishers[i][own] for i, own in enumerate(names, 1)]
        trimmed = [keep_largest(t, o, f, d) for t, o, f, d in zip(thetas, origins, own, (0.3, 0.6), strict=True)]
        assert_within(tensor, squisher_reference(trimmed, own, [1.0, 1.0]), largest([*thetas, *origins]))
    assert len(result) == 3 + 9 * 4


def test_a_tied_bases_embedding_stands_in_for_its_head(tmp_path: Path) -> None:
    """Where the base is tied and the models are not, the head's task vector starts at the base's embedding."""
    weights, fishers = _models(tmp_path, 3)
    weights[0] = llama(tmp_path / "m0", 9, tie_word_embeddings=True)
    assert HEAD not in weights[0]
    # The config of the base is the output's, so the head is written for an untied one alone.
    (tmp_path / "m0" / "config.json").write_text(
        (tmp_path / "m1" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    result = merged(_config(tmp_path, [0.4, 0.4]), tmp_path / "out")
    thetas, own = [w[HEAD] for w in weights[1:]], [f[HEAD] for f in fishers[1:]]
    _assert_squisher(result[HEAD], weights[0][EMBEDDING], thetas, own, (0.4, 0.4))


def test_a_tensor_without_a_fisher_is_merged_whole(tmp_path: Path) -> None:
    """`missing: average` has nothing to choose by: the tensor is the weighted mean of whole models."""
    weights, fishers = _models(tmp_path, 3)
    store_fisher(tmp_path / "m1", {name: tensor for name, tensor in fishers[1].items() if name != NORM})
    config = _config(tmp_path, [0.2, 0.2], parameters={"missing": "average"})
    result = merged(config, tmp_path / "out")
    mean = (weights[1][NORM].double() + weights[2][NORM].double()) / 2
    assert_within(result[NORM], mean, mean.abs())
    thetas, own = [w[HEAD] for w in weights[1:]], [f[HEAD] for f in fishers[1:]]
    _assert_squisher(result[HEAD], weights[0][HEAD], thetas, own, (0.2, 0.2))


def test_the_choice_is_made_before_the_floor(tmp_path: Path) -> None:
    """A floor above almost all of F leaves the order of the choice, and enters the merge as it does without density."""
    weights, _ = _models(tmp_path, 3)
    generator = torch.Generator().manual_seed(4)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 9 for n, t in weights[0].items()} for _ in range(3)]
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    result = merged(_config(tmp_path, [0.5, 0.7], parameters={"floor": 5.0}), tmp_path / "out")
    for name, tensor in result.items():
        base, *thetas = (model[name] for model in weights)
        own = [fisher[name] for fisher in fishers[1:]]
        raised = [f.double().clamp_min(5 * f.double().mean().item()) for f in own]
        assert sum(int((r > f).sum()) for r, f in zip(raised, own, strict=True)) > 0.6 * base.numel()
        trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, own, (0.5, 0.7), strict=True)]
        assert_within(tensor, squisher_reference(trimmed, raised, [1.0, 1.0]), largest([*thetas, base]))


def _assert_row(result: Tensor, method: str, base: Tensor, thetas: list[Tensor], fishers: list[Tensor]) -> None:
    if method == "squisher":
        reference = squisher_reference(thetas, fishers, [1.0, 1.0])
    else:
        reference = ubgm_reference(base, torch.zeros_like(base), thetas, fishers, [1.0, 1.0])
    assert_within(result, reference, 2 * largest([base, *thetas]) + 1)


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
def test_union_of_vocabularies(tmp_path: Path, method: str, pad: int | None) -> None:
    """The choice is among tokens of model and base; what the base lacks stays the model's, what the model lacks not."""
    words = (["red", "green", "blue", "teal"], ["blue", "red", "pink", "grey", "plum"], ["plum", "green", "red"])
    tokens = [["<unk>", *own] for own in words]
    weights, fishers = [], []
    generator = torch.Generator().manual_seed(6)
    for i, own in enumerate(words):
        weights.append(llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1))
        fishers.append({n: torch.rand(t.shape, generator=generator) + 0.01 for n, t in weights[i].items()})
        _tokenizer(tmp_path / f"m{i}", own)
        if i:
            store_fisher(tmp_path / f"m{i}", fishers[i])
    tokenizer: dict[str, Any] = {"source": "union"} | ({"pad_to_multiple_of": pad} if pad else {})
    config = _config(tmp_path, [0.3, 0.6], method, tokenizer=tokenizer)
    run = merge(config, tmp_path / "out")
    assert run.exit_code == 0, run.output + repr(run.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    vocabulary = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_vocab()
    assert set(vocabulary) == {token for own in tokens for token in own}
    seen = set()
    for name in (EMBEDDING, HEAD):
        assert found[name].shape[0] == (10 if pad else len(vocabulary))
        kept = {i: {} for i in (1, 2)}
        for i, share in ((1, 0.3), (2, 0.6)):
            # Rows of model and base, in the order of the result.
            both = sorted(set(tokens[i]) & set(tokens[0]), key=vocabulary.__getitem__)
            own, base, fisher = (
                torch.stack([model[name][tokens[j].index(token)] for token in both])
                for model, j in ((weights[i], i), (weights[0], 0), (fishers[i], i))
            )
            kept[i] = dict(zip(both, keep_largest(own, base, fisher, share), strict=True))
        for token, row in vocabulary.items():
            there = [j for j in range(3) if token in tokens[j]]
            rows = {j: weights[j][name][tokens[j].index(token)].double() for j in there}
            known = [
                fishers[i][name][tokens[i].index(token)] if i in there else torch.zeros_like(found[name][row])
                for i in (1, 2)
            ]
            given = torch.stack(list(rows.values())).mean(0)  # to a model without the token, by mergekit
            base = rows.get(0, given)
            thetas = [kept[i].get(token, base if 0 in there else rows.get(i, given)) for i in (1, 2)]
            seen.add(tuple(there))
            _assert_row(found[name][row], method, base, thetas, known)
    assert seen == {(0, 1, 2), (0, 1), (0, 2), (0,), (1,), (1, 2)}


def test_the_rows_of_a_vocabulary() -> None:
    """Chosen is among the shared rows, by their own number; the base's lacks stay, the model's lacks are put back."""
    rows = shared_rows({0: 0, 1: -1, 2: 1, 3: 2}, {0: 5, 1: 0, 2: 3}, rows=5, axis=0)
    assert [rows.shared.tolist(), rows.unbased.tolist()] == [[0, 2], [3, 4]]
    scores = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [4.0, 0.0, 3.0], [9.0, 9.0, 9.0], [0.0, 0.0, 0.0]])
    mask = Trim(torch.zeros(5, 3), scores, 0.5, rows).kept().int().tolist()
    assert mask == [[0, 1, 0], [0, 0, 0], [1, 0, 1], [1, 1, 1], [1, 1, 1]]
    across = Trim(torch.zeros(3, 5), scores.t(), 0.5, Rows(rows.shared, rows.unbased, axis=1)).kept().int()
    assert across.t().tolist() == mask


@pytest.mark.parametrize("rows", [23, 31])
def test_a_truncated_vocabulary(tmp_path: Path, rows: int) -> None:
    """With --unsafe-truncate-embeddings rows that the base lacks stay the model's, rows beyond the models' are cut."""
    weights, fishers = _models(tmp_path, 3)
    weights[0] = llama(tmp_path / "m0", 9, vocab_size=rows)
    result = merged(_config(tmp_path, [0.4, 0.4]), tmp_path / "out", "--unsafe-truncate-embeddings")
    at = min(rows, 29)
    for name in (EMBEDDING, HEAD):
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        base = weights[0][name][:at]
        assert result[name].shape[0] == 29
        _assert_squisher(result[name][:at], base, [t[:at] for t in thetas], [f[:at] for f in own], (0.4, 0.4))
        if at < 29:
            _assert_squisher(
                result[name][at:], thetas[0][at:], [t[at:] for t in thetas], [f[at:] for f in own], (1.0, 1.0)
            )


@pytest.mark.parametrize("layout", ["checkpoint", "module"])
def test_packed_experts(tmp_path: Path, layout: str) -> None:
    """Mixtral's experts start at the base's, put together as the models' are."""
    weights = [_mixtral(tmp_path / f"m{i}", i) for i in range(3)]
    generator = torch.Generator().manual_seed(1)
    fishers = [{name: draw_fisher(tensor.shape, generator) for name, tensor in w.items()} for w in weights]
    for i in (1, 2):
        stored = fishers[i] if layout == "checkpoint" else _packed(fishers[i])
        store_fisher(tmp_path / f"m{i}", stored, fingerprint(tmp_path / f"m{i}"))
    packed = [_packed(w) for w in weights], [_packed(f) for f in fishers]
    result = merged(_config(tmp_path, [0.3, 0.6]), tmp_path / "out")
    assert any("gate_up_proj" in name for name in result)
    for name, tensor in result.items():
        own, scores = packed if name in packed[0][0] else (weights, fishers)
        thetas = [model[name] for model in own[1:]]
        _assert_squisher(tensor, own[0][name], thetas, [f[name] for f in scores[1:]], (0.3, 0.6))


def test_mergekit_pytorch(tmp_path: Path) -> None:
    """`mergekit-pytorch` takes theta_0 from a base that is not listed, and from nowhere else."""
    weights, fishers = _nets(tmp_path, 3)
    entries: list[dict[str, Any]] = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(3)]
    config = {"merge_method": "squisher", "models": entries[1:], "parameters": {"density": 0.35}}
    refused = _raw(tmp_path, config)
    assert (refused.exit_code, "density below 1 needs base_model:" in refused.output) == (1, True)
    assert not (tmp_path / "out").exists()
    result = _raw(tmp_path, config | {"base_model": entries[0]["model"]})
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in fishers[0]:
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        _assert_squisher(found[name], weights[0][name], thetas, own, (0.35, 0.35))


# ---- in memory


def _in_memory() -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    generator = torch.Generator().manual_seed(0)
    keys, shapes = ("base", "a", "b"), {"encoder.weight": (7, 13), "encoder.bias": (13,)}
    weights = {k: {n: torch.randn(*s, generator=generator) for n, s in shapes.items()} for k in keys}
    return weights, {k: {n: draw_fisher(s, generator) for n, s in shapes.items()} for k in keys}


def test_state_dicts_with_a_base() -> None:
    """`merge_state_dicts` takes theta_0 from its base; at weight 0 the base needs no Fisher and is not summed."""
    weights, fishers = _in_memory()
    shares = {"base": 0.5, "a": 0.2, "b": 0.6}
    summed = merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": shares})
    beside = {"fisher": {**fishers, "base": "auto"}, "density": shares, "weight": {"base": 0.0, "a": 1.0, "b": 1.0}}
    alone = merge_state_dicts(weights, "squisher", base="base", parameters=beside)
    for name, tensor in summed.items():
        base, *thetas = (model[name] for model in weights.values())
        known, *own = (fisher[name] for fisher in fishers.values())
        _assert_squisher(tensor, base, [base, *thetas], [known, *own], (1.0, 0.2, 0.6))
        _assert_squisher(alone[name], base, thetas, own, (0.2, 0.6))


def test_state_dicts_by_gradient_matching() -> None:
    """UBGM in memory trims by the base that it has."""
    weights, fishers = _in_memory()
    parameters = {"fisher": fishers, "density": 0.3}
    result = merge_state_dicts(weights, "ubgm_squisher", base="base", parameters=parameters)
    for name, tensor in result.items():
        base, *thetas = (model[name] for model in weights.values())
        known, *own = (fisher[name] for fisher in fishers.values())
        trimmed = [keep_largest(t, base, f, 0.3) for t, f in zip(thetas, own, strict=True)]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        assert_within(tensor, ubgm_reference(base, known, trimmed, own, [1.0, 1.0]), size)


def test_refusals_in_memory() -> None:
    """In memory a density below 1 without a base, a density of 0 and a NaN in F are refused."""
    weights, fishers = _in_memory()
    with pytest.raises(ConfigError, match=r"density below 1 needs a base.*encoder.*merge_state_dicts\(base="):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "density": [1.0, 0.5, 1.0]})
    with pytest.raises(ConfigError, match="density must be a number > 0 and <= 1"):
        merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": 0.0})
    fishers["a"]["encoder.bias"][3] = float("nan")
    with pytest.raises(ValuesError, match="1 NaN of 13"):
        merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": 0.5})


# ---- refusals and the preview


def _assert_refused(root: Path, config: dict[str, Any], *words: str) -> None:
    result = merge(config, root / "out")
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert (result.exit_code, len(lines), "Traceback" in result.output) == (1, 1, False), result.output
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    assert not (root / "out").exists()


@pytest.mark.parametrize("value", [0, -0.2, 1.5, float("nan"), True, "half", [1.0, 0.0]])
def test_a_wrong_density(tmp_path: Path, value: object) -> None:
    """Density is above 0 and at most 1; who wants none of a model leaves it out."""
    _models(tmp_path, 3)
    _assert_refused(
        tmp_path, _config(tmp_path, [0.5, value]), "models[1].parameters.density", "> 0 and <= 1", "leave the model out"
    )


def _no_base(root: Path, config: dict[str, Any]) -> None:
    del config["base_model"]


def _base_without_norm(root: Path, config: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    file = root / "m0" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != NORM}, file, {"format": "pt"})


def _base_of_another_shape(root: Path, config: dict[str, Any]) -> None:
    llama(root / "m0", 0, intermediate_size=19)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_base, ["density below 1 needs base_model:", "density 0.5 of", "m1", "add it"]),
        (_base_without_norm, ["every tensor", "m0 has no model.norm.weight", "density: 1"]),
        (_base_of_another_shape, ["shaped as in the base_model:", "mlp", "[17, 33]", "[19, 33]", "m0"]),
    ],
    ids=["none", "lacking", "shape"],
)
def test_a_base_that_cannot_serve(tmp_path: Path, spoil: Callable[..., None], words: list[str]) -> None:
    """No base, a base without a tensor, and one of another shape are refused from headers, before anything is there."""
    _models(tmp_path, 3)
    config = _config(tmp_path, [0.5, 1.0])
    spoil(tmp_path, config)
    _assert_refused(tmp_path, config, *words)


def test_a_base_is_needed_only_where_something_is_chosen(tmp_path: Path) -> None:
    """A base that lacks a tensor serves if density is 1 there, and if the models that trim have weight 0."""
    _models(tmp_path, 3)
    _base_without_norm(tmp_path, {})
    shares = [{"filter": "norm", "value": 1.0}, {"value": 0.5}]
    assert merge(_config(tmp_path, [shares, 1.0]), tmp_path / "out").exit_code == 0
    config = _config(tmp_path, [0.5, 1.0])
    config["models"][0]["parameters"]["weight"] = 0.0
    assert merge(config, tmp_path / "out2").exit_code == 0


def test_a_base_of_a_slice_alone_has_no_tokenizer(tmp_path: Path) -> None:
    """A base that only a slice names has no place in mergekit's tokenizer, which is said instead of failing midway."""
    _models(tmp_path, 3)
    for i in range(3):
        _tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    sources = [
        {"model": str(tmp_path / f"m{i}"), "layer_range": [0, 3], "parameters": {"density": 0.5}} for i in (1, 2)
    ]
    config = {
        "merge_method": "squisher",
        "tokenizer": {"source": "union"},
        "slices": [{"base_model": str(tmp_path / "m0"), "sources": sources}],
    }
    _assert_refused(tmp_path, config, "top-level base_model:", "m0")
    del config["tokenizer"]
    assert merge(config, tmp_path / "out").exit_code == 0


def _plan(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    import json

    file = root / "plan.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(plan_command, [str(file), "--json", str(root / "plan.json")])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((root / "plan.json").read_text(encoding="utf-8"))
    return found | {"text": result.output}


def test_the_preview_and_the_log_mention_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Preview and log say the density of each model; bytes and memory count the base's weights and the choice."""
    weights, _ = _models(tmp_path, 3)
    config = _config(tmp_path, [0.2, [{"filter": "mlp", "value": 0.1}, {"value": 0.5}]])
    plan, before = _plan(tmp_path, config), _plan(tmp_path, _config(tmp_path, [1.0, 1.0]))
    assert ("density 0.2)" in plan["text"], "density 0.1 to 0.5)" in plan["text"]) == (True, True)
    assert [model["density"] for model in plan["models"]] == [[0.2, 0.2], [0.1, 0.5]]
    assert "density" not in before["text"]
    read = [sum(t.nbytes for model in part for t in model.values()) for part in (weights, weights[1:])]
    assert [found["bytes_to_read"]["weights"] for found in (plan, before)] == read
    largest_entries = max(tensor.numel() for tensor in weights[0].values())
    grown = {key: plan["memory"][key] - before["memory"][key] for key in plan["memory"]}
    assert grown == {"anonymous": 2 * largest_entries, "mapped": 4 * largest_entries}
    file = tmp_path / "loud.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    from mergekit.scripts.run_yaml import main

    assert CliRunner().invoke(main, [str(file), str(tmp_path / "out"), "--no-copy-tokenizer"]).exit_code == 0
    lines = [record.message for record in caplog.records if "density" in record.message]
    assert ["density 0.2" in lines[0], "density 0.1 to 0.5" in lines[1], len(lines)] == [True, True, 2]


# ---- the graph and the kernel


def test_theta_0_is_loaded_once_and_just_before_its_use(tmp_path: Path) -> None:
    """The models share one load of the base's tensor, which waits with their Fishers for two weights, and no more."""
    from mergekit.architecture import get_architecture_info
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache, LoadTensor
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    from squisher_mergekit.merging.mergekit.commands import read_config
    from squisher_mergekit.merging.mergekit.tasks import GatherFishers

    weights, _ = _models(tmp_path, 3)
    config = read_config(yaml.safe_dump(_config(tmp_path, [0.5, 0.5])))
    options = MergeOptions(quiet=True)
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    executor = Executor(planner.plan_to_disk(str(tmp_path / "out")))
    live, peak, loads = set(), 0, 0
    for at, handle in enumerate(executor.schedule.tasks):
        if isinstance(handle.task(), LoadTensor | GatherFishers):
            live.add(handle)
            loads += isinstance(handle.task(), LoadTensor)
        peak = max(peak, len(live))
        live = {one for one in live if executor.schedule.last_use_index[one] > at}
    assert (peak, loads) == (3, 3 * len(weights[0]))


def test_the_executor_moves_all_that_the_choice_needs() -> None:
    """What the graph hands over is moved whole to the device of the arithmetic, and put together there."""
    from mergekit.graph import Executor

    from squisher_mergekit.merging.read import load_tensor

    loaded = load_tensor(
        {"w": torch.rand(3, 5)}, "w", scaling="raw", normalize="none", floor=0.5, fisher_scale=1.0, density=0.5
    )
    loaded["origin"], loaded["rows"] = torch.rand(3, 5), Rows(torch.arange(2), torch.arange(2, 3), 0)
    moved = Executor([])._move_tensors({"m": loaded}, torch.device("meta"))["m"]
    rows = Rows(*moved["rows"])
    tensors = [moved["tensor"], moved["scores"], moved["origin"], rows.shared, rows.unbased]
    assert ([t.device.type for t in tensors], rows.axis) == (["meta"] * 5, 0)


class _OneDevice(TorchFunctionMode):
    """Fails where an operation mixes devices, as a GPU would and the device `meta` does not."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim]
        assert len({tensor.device for tensor in tensors}) <= 1, function
        return function(*args, **(kwargs or {}))


def test_on_an_accelerator_nothing_is_looked_at_or_moved() -> None:
    """On a device whose values nobody can see theta_0 follows the vocabulary, is chosen by and merged."""
    seen, fisher = torch.empty(3, 4, device="meta"), torch.empty(5, 4, device="meta")
    rows = Rows(torch.arange(2, device="meta"), torch.arange(2, 4, device="meta"), 0)
    with _OneDevice():
        base = permute_rows(seen, {0: 1, 1: -1, 2: 0}, 5, axis=0)
        inputs = [
            Input(torch.empty_like(fisher), fisher, trim=Trim(base, fisher, 0.5, given)) for given in (None, rows)
        ]
        for outcome in (merge_squisher(inputs, torch.bfloat16), merge_ubgm(Input(base, None), inputs, 0.0, torch.half)):
            assert (outcome.values.device.type, outcome.values.shape) == ("meta", (5, 4))


SIZE = 2 * execution.CHUNK + 7919
SHARES = (0.2, 0.5, 1.0)


@functools.cache
def _inputs(size: int, dtype: torch.dtype, levels: int) -> tuple[Tensor, list[Input], list[Tensor]]:
    """Draw models whose F takes few values, so that the cut falls among equals; return their trimmed weights too."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(size, generator=generator).to(dtype)
    inputs, trimmed = [], []
    for share in SHARES:
        theta = torch.randn(size, generator=generator).to(dtype)
        fisher = torch.randint(0, levels, [size], generator=generator) / levels
        trim = None if share == 1 else Trim(base, fisher, share)
        inputs.append(Input(theta, fisher, 0.5 + share, 1.0, ("w", "f"), trim))
        trimmed.append(keep_largest(theta, base, fisher, share))
    return base, inputs, trimmed


@pytest.mark.parametrize("threads", [1, 3])
def test_the_choice_is_of_the_whole_tensor(threads: int) -> None:
    """Over several chunks and a pool the k largest of the whole tensor are kept, the first among equals."""
    base, inputs, trimmed = _inputs(SIZE, torch.bfloat16, levels=11)
    fishers, weights = [item.fisher for item in inputs], [item.weight for item in inputs]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        outcome = merge_squisher(inputs, torch.float32)
        matched = merge_ubgm(Input(base, None), inputs, 0.1, torch.float32)
    finally:
        torch.set_num_threads(before)
    size = largest([base, *(item.theta for item in inputs)])
    assert_within(outcome.values, squisher_reference(trimmed, fishers, weights), size)
    reference = ubgm_reference(base, torch.zeros(SIZE), trimmed, fishers, weights, 0.1)
    assert_within(matched.values, reference, 7 * size)


@pytest.mark.parametrize("ubgm", [False, True])
def test_the_path_of_an_accelerator_agrees(monkeypatch: pytest.MonkeyPatch, ubgm: bool) -> None:
    """The fused pass merges trimmed weights as the chunks do, also where the base is of another dtype."""
    base, inputs, trimmed = _inputs(1009, torch.bfloat16, levels=1 << 20)
    monkeypatch.setattr(execution._Operands, "on_accelerator", property(lambda self: True))
    fishers, weights = [item.fisher for item in inputs], [item.weight for item in inputs]
    size = largest([base, *(item.theta for item in inputs)])
    if ubgm:
        outcome = merge_ubgm(Input(base, None), inputs, 0.1, torch.float32)
        reference = ubgm_reference(base, torch.zeros(1009), trimmed, fishers, weights, 0.1)
        assert_within(outcome.values, reference, 7 * size)
        return
    wide = base.float() + 1e-4
    moved = [
        Input(item.theta, item.fisher, item.weight, 1.0, ("w", "f"), item.trim and Trim(wide, item.fisher, share))
        for item, share in zip(inputs, SHARES, strict=True)
    ]
    trimmed = [keep_largest(i.theta, wide, i.fisher, share) for i, share in zip(inputs, SHARES, strict=True)]
    assert_within(merge_squisher(moved, torch.float32).values, squisher_reference(trimmed, fishers, weights), size)


def test_a_base_in_double_precision_is_kept_so() -> None:
    """If theta_0 is float64 the arithmetic is, so that values that are put back are the base's to the bit."""
    base = torch.tensor([1 / 3, 1 / 7, 1 / 9], dtype=torch.float64)
    fisher = torch.tensor([1.0, 2.0, 3.0])
    one = Input(torch.ones(3), fisher, trim=Trim(base, fisher, 1 / 3))
    assert merge_squisher([one], torch.float64).values.tolist() == [1 / 3, 1 / 7, 1.0]


def test_a_base_of_another_shape_is_refused_where_no_header_tells() -> None:
    """A base whose shape shows only when it is read, as of pickled weights, is refused by name."""
    from squisher_mergekit.merging.mergekit.methods import SQUISHER
    from squisher_mergekit.merging.read import no_fisher

    tensors, fisher = [torch.ones(3), torch.ones(3)], torch.ones(3)
    loaded = [no_fisher("w") | {"tensor": fisher, "density": 0.5, "origin": torch.ones(4)} for _ in tensors]
    with pytest.raises(MismatchError, match=r"w is \[3\] and the base's \[4\]"):
        merge_tensors(tensors, SQUISHER, parameters={"_fisher": loaded}, name="w")
