"""Adapter: theta_0 for ``density`` below 1."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.merging.models import EMBEDDING, HEAD, base_and_models, density_config, nets, word_tokenizer
from tests.merging.reference import (
    assert_config_refused,
    assert_trimmed,
    assert_within,
    keep_largest,
    largest,
    llama,
    merge,
    merge_raw,
    merged,
    squisher_reference,
)


def test_filters_and_gradients(tmp_path: Path) -> None:
    """Filters and gradients of the density reach the tensors that they name."""
    weights, fishers = base_and_models(tmp_path, 3)
    by_filter = [{"filter": "mlp", "value": 0.1}, {"filter": "self_attn", "value": [1.0, 0.2]}, {"value": 1.0}]
    result = merged(density_config(tmp_path, [[0.9, 0.5, 0.1], by_filter]), tmp_path / "out")
    for name, tensor in result.items():
        layer = int(name.split(".")[2]) if ".layers." in name else 0
        second = 0.1 if "mlp" in name else (1.0, 0.6, 0.2)[layer] if "self_attn" in name else 1.0
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        assert_trimmed(tensor, weights[0][name], thetas, own, ((0.9, 0.5, 0.1)[layer], second))


def test_slices_take_the_bases_layer_of_the_models_own_number(tmp_path: Path) -> None:
    """The task vector of a sliced layer starts at the layer of the base with the model's own layer number."""
    weights, fishers = base_and_models(tmp_path, 3)

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
    """The embedding of a tied base replaces its head as the start of the task vector."""
    weights, fishers = base_and_models(tmp_path, 3)
    weights[0] = llama(tmp_path / "m0", 9, tie_word_embeddings=True)
    assert HEAD not in weights[0]
    # The base's config becomes that of the output, so the head is written for an untied base only.
    (tmp_path / "m0" / "config.json").write_text(
        (tmp_path / "m1" / "config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    result = merged(density_config(tmp_path, [0.4, 0.4]), tmp_path / "out")
    thetas, own = [w[HEAD] for w in weights[1:]], [f[HEAD] for f in fishers[1:]]
    assert_trimmed(result[HEAD], weights[0][EMBEDDING], thetas, own, (0.4, 0.4))


def test_mergekit_pytorch(tmp_path: Path) -> None:
    """`mergekit-pytorch` takes theta_0 from an unlisted base only."""
    weights, fishers = nets(tmp_path, 3)
    entries: list[dict[str, Any]] = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(3)]
    config = {"merge_method": "squisher", "models": entries[1:], "parameters": {"density": 0.35}}
    refused = merge_raw(tmp_path, config)
    assert (refused.exit_code, "density below 1 needs base_model:" in refused.output) == (1, True)
    assert not (tmp_path / "out").exists()
    result = merge_raw(tmp_path, config | {"base_model": entries[0]["model"]})
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name in fishers[0]:
        thetas, own = [w[name] for w in weights[1:]], [f[name] for f in fishers[1:]]
        assert_trimmed(found[name], weights[0][name], thetas, own, (0.35, 0.35))


def test_a_base_of_a_slice_alone_has_no_tokenizer(tmp_path: Path) -> None:
    """A base that only a slice names is missing in mergekit's tokenizer. The merge is refused at its start."""
    base_and_models(tmp_path, 3)
    for i in range(3):
        word_tokenizer(tmp_path / f"m{i}", [f"word{j}" for j in range(28)])
    sources = [
        {"model": str(tmp_path / f"m{i}"), "layer_range": [0, 3], "parameters": {"density": 0.5}} for i in (1, 2)
    ]
    config = {
        "merge_method": "squisher",
        "tokenizer": {"source": "union"},
        "slices": [{"base_model": str(tmp_path / "m0"), "sources": sources}],
    }
    assert_config_refused(tmp_path, config, "top-level base_model:", "m0")
    del config["tokenizer"]
    assert merge(config, tmp_path / "out").exit_code == 0
