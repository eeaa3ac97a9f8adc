"""Merges with ``density`` below 1, against float64 references on the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from squisher_mergekit.merging import density
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.models import (
    EMBEDDING,
    HEAD,
    NORM,
    base_and_models,
    density_config,
    mixtral,
    packed_experts,
    word_tokenizer,
)
from tests.merging.reference import (
    assert_row,
    assert_trimmed,
    assert_within,
    draw_fisher,
    give_fisher,
    keep_largest,
    largest,
    llama,
    merge,
    merged,
    planned,
    preview_of,
    squisher_reference,
    store_fisher,
    ubgm_reference,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squisher_equals_the_reference(tmp_path: Path, dtype: torch.dtype) -> None:
    """An unlisted base gives the dropped values. It is not summed and needs no Fisher."""
    weights, fishers = base_and_models(tmp_path, 4, dtype)
    result = merged(density_config(tmp_path, [0.2, 0.5, 1.0]), tmp_path / "out")
    assert set(result) == set(weights[0])
    for name, tensor in result.items():
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        assert_trimmed(tensor, weights[0][name], thetas, own, (0.2, 0.5, 1.0))


def test_ubgm_equals_the_reference(tmp_path: Path) -> None:
    """A dropped entry of gradient matching makes no step, while its F and the prior still count."""
    weights, _ = base_and_models(tmp_path, 3)
    generator = torch.Generator().manual_seed(8)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 3 for n, t in weights[0].items()} for _ in range(3)]
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    config = density_config(tmp_path, [0.3, 0.6], "ubgm_squisher", parameters={"prior": 0.5})
    for name, tensor in merged(config, tmp_path / "out").items():
        base, *thetas = (model[name] for model in weights)
        own = [fisher[name] for fisher in fishers[1:]]
        trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, own, (0.3, 0.6), strict=True)]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        none = torch.zeros_like(base)
        assert_within(tensor, ubgm_reference(base, none, trimmed, own, [1.0, 1.0], 0.5), size)


def test_a_listed_base_is_summed_whole(tmp_path: Path) -> None:
    """A listed base of squisher enters the sum whole for any density, and its weights are read once."""
    weights, fishers = base_and_models(tmp_path, 3)
    fishers[0] = give_fisher(tmp_path / "m0", weights[0], 0)
    config = density_config(tmp_path, [1, 1])
    config["models"] = [{"model": str(tmp_path / f"m{i}")} for i in range(3)]
    config["parameters"] = {"density": 0.25}
    for name, tensor in merged(config, tmp_path / "out").items():
        thetas, own = [w[name] for w in weights], [f[name] for f in fishers]
        assert_trimmed(tensor, weights[0][name], thetas, own, (1.0, 0.25, 0.25))
    plan = preview_of(tmp_path, config)
    assert plan["bytes_to_read"]["weights"] == sum(t.nbytes for model in weights for t in model.values())


@pytest.mark.parametrize("scope", ["tensor", "model"])
@pytest.mark.parametrize("settings", [{"fisher_scale": 9.0}, {"weight": 3.0}, {"normalize": "mean"}])
def test_scales_do_not_change_the_choice(tmp_path: Path, settings: dict[str, Any], scope: str) -> None:
    """The same entries are kept whatever factor the Fisher of a model enters with; one model alone shows them."""
    base_and_models(tmp_path, 2)
    plain, scaled = (
        merged(density_config(tmp_path, [0.3], parameters={"density_scope": scope, **more}), tmp_path / out)
        for out, more in (("plain", {"normalize": "none"}), ("scaled", {"normalize": "none", **settings}))
    )
    base = load_file(tmp_path / "m0" / "model.safetensors")
    assert all(torch.equal(tensor, scaled[name]) for name, tensor in plain.items())
    share = sum(int((plain[name] != base[name]).sum()) for name in base) / sum(t.numel() for t in base.values())
    assert 0.2 < share < 0.4


def test_density_1_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With density 1 nothing is dropped, a base of other shapes is not read, and the result is the same to the bit."""
    base_and_models(tmp_path, 3)
    llama(tmp_path / "m0", 7, intermediate_size=19)
    monkeypatch.setattr(density, "largest", lambda *_: pytest.fail("a choice was made"))
    plain = density_config(tmp_path, [1.0, 1.0])
    for entry in plain["models"]:
        del entry["parameters"]
    results = [
        merged(config, tmp_path / f"out{i}") for i, config in enumerate((plain, density_config(tmp_path, [1, 1.0])))
    ]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert preview_of(tmp_path, density_config(tmp_path, [1.0, 1.0])) == preview_of(tmp_path, plain)


def test_a_tensor_without_a_fisher_is_merged_whole(tmp_path: Path) -> None:
    """`missing: average` gives the weighted mean of whole models, because there is no F for the choice."""
    weights, fishers = base_and_models(tmp_path, 3)
    store_fisher(tmp_path / "m1", {name: tensor for name, tensor in fishers[1].items() if name != NORM})
    config = density_config(tmp_path, [0.2, 0.2], parameters={"missing": "average"})
    result = merged(config, tmp_path / "out")
    mean = (weights[1][NORM].double() + weights[2][NORM].double()) / 2
    assert_within(result[NORM], mean, mean.abs())
    thetas, own = [w[HEAD] for w in weights[1:]], [f[HEAD] for f in fishers[1:]]
    assert_trimmed(result[HEAD], weights[0][HEAD], thetas, own, (0.2, 0.2))


def test_the_choice_is_made_before_the_floor(tmp_path: Path) -> None:
    """A floor above almost all of F keeps the order of the choice, and enters the merge as without density."""
    weights, _ = base_and_models(tmp_path, 3)
    generator = torch.Generator().manual_seed(4)
    fishers = [{n: torch.rand(t.shape, generator=generator) ** 9 for n, t in weights[0].items()} for _ in range(3)]
    for i in (1, 2):
        store_fisher(tmp_path / f"m{i}", fishers[i])
    result = merged(density_config(tmp_path, [0.5, 0.7], parameters={"floor": 5.0}), tmp_path / "out")
    for name, tensor in result.items():
        base, *thetas = (model[name] for model in weights)
        own = [fisher[name] for fisher in fishers[1:]]
        raised = [f.double().clamp_min(5 * f.double().mean().item()) for f in own]
        assert sum(int((r > f).sum()) for r, f in zip(raised, own, strict=True)) > 0.6 * base.numel()
        trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, own, (0.5, 0.7), strict=True)]
        assert_within(tensor, squisher_reference(trimmed, raised, [1.0, 1.0]), largest([*thetas, base]))


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
def test_union_of_vocabularies(tmp_path: Path, method: str, pad: int | None) -> None:
    """The choice is among tokens of model and base.

    Rows that the base lacks stay the model's. Rows that the model lacks are dropped.
    """
    words = (["red", "green", "blue", "teal"], ["blue", "red", "pink", "grey", "plum"], ["plum", "green", "red"])
    tokens = [["<unk>", *own] for own in words]
    weights, fishers = [], []
    generator = torch.Generator().manual_seed(6)
    for i, own in enumerate(words):
        weights.append(llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1))
        fishers.append({n: torch.rand(t.shape, generator=generator) + 0.01 for n, t in weights[i].items()})
        word_tokenizer(tmp_path / f"m{i}", own)
        if i:
            store_fisher(tmp_path / f"m{i}", fishers[i])
    tokenizer: dict[str, Any] = {"source": "union"} | ({"pad_to_multiple_of": pad} if pad else {})
    config = density_config(tmp_path, [0.3, 0.6], method, tokenizer=tokenizer)
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
            given = torch.stack(list(rows.values())).mean(0)  # mergekit gives it to a model without the token
            base = rows.get(0, given)
            thetas = [kept[i].get(token, base if 0 in there else rows.get(i, given)) for i in (1, 2)]
            seen.add(tuple(there))
            assert_row(found[name][row], method, base, thetas, known)
    assert seen == {(0, 1, 2), (0, 1), (0, 2), (0,), (1,), (1, 2)}


@pytest.mark.parametrize("rows", [23, 31])
def test_a_truncated_vocabulary(tmp_path: Path, rows: int) -> None:
    """With --unsafe-truncate-embeddings, rows that the base lacks stay the model's.

    Rows beyond those of the models are cut.
    """
    weights, fishers = base_and_models(tmp_path, 3)
    weights[0] = llama(tmp_path / "m0", 9, vocab_size=rows)
    result = merged(density_config(tmp_path, [0.4, 0.4]), tmp_path / "out", "--unsafe-truncate-embeddings")
    at = min(rows, 29)
    for name in (EMBEDDING, HEAD):
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        base = weights[0][name][:at]
        assert result[name].shape[0] == 29
        assert_trimmed(result[name][:at], base, [t[:at] for t in thetas], [f[:at] for f in own], (0.4, 0.4))
        if at < 29:
            assert_trimmed(
                result[name][at:], thetas[0][at:], [t[at:] for t in thetas], [f[at:] for f in own], (1.0, 1.0)
            )


@pytest.mark.parametrize("layout", ["checkpoint", "module"])
def test_packed_experts(tmp_path: Path, layout: str) -> None:
    """The task vectors of Mixtral's experts start at the packed experts of the base."""
    weights = [mixtral(tmp_path / f"m{i}", i) for i in range(3)]
    generator = torch.Generator().manual_seed(1)
    fishers = [{name: draw_fisher(tensor.shape, generator) for name, tensor in w.items()} for w in weights]
    for i in (1, 2):
        stored = fishers[i] if layout == "checkpoint" else packed_experts(fishers[i])
        store_fisher(tmp_path / f"m{i}", stored, fingerprint(tmp_path / f"m{i}"))
    packed = [packed_experts(w) for w in weights], [packed_experts(f) for f in fishers]
    result = merged(density_config(tmp_path, [0.3, 0.6]), tmp_path / "out")
    assert any("gate_up_proj" in name for name in result)
    for name, tensor in result.items():
        own, scores = packed if name in packed[0][0] else (weights, fishers)
        thetas = [model[name] for model in own[1:]]
        assert_trimmed(tensor, own[0][name], thetas, [f[name] for f in scores[1:]], (0.3, 0.6))


def test_theta_0_is_loaded_once_and_just_before_its_use(tmp_path: Path) -> None:
    """The models share one load of the base's tensor, which happens just before its use."""
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoadTensor

    weights, _ = base_and_models(tmp_path, 3)
    executor = Executor(planned(density_config(tmp_path, [0.5, 0.5]), tmp_path / "out"))
    live, peak, loads = set(), 0, 0
    for at, handle in enumerate(executor.schedule.tasks):
        if isinstance(handle.task(), LoadTensor):
            live.add(handle)
            loads += 1
        peak = max(peak, len(live))
        live = {one for one in live if executor.schedule.last_use_index[one] > at}
    assert (peak, loads) == (3, 3 * len(weights[0]))
