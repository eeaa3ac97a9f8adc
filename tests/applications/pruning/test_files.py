"""Pruning of models on disk: comparison with pruning in memory, and the written files."""

import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit.applications.masks import read_mask
from squisher_mergekit.applications.pruning.files import prune_files
from squisher_mergekit.applications.pruning.modules import choose_weights
from squisher_mergekit.errors import ConfigError, MismatchError, NotFoundError, UnsupportedStateError, ValuesError
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.applications.pruning.pruned import fisher_of, stored

CASES = [
    ("bert", torch.float32, {}),
    ("qwen2", torch.float32, {"default_ignore": False}),  # tied embeddings
    ("mixtral", torch.float32, {"scope": "layer"}),  # experts, packed in memory
    ("llama", torch.bfloat16, {"score": "random", "seed": 5}),
    ("mixtral", torch.bfloat16, {"pattern": (2, 4)}),
    ("gpt2", torch.float32, {"pattern": (1, 3)}),  # Conv1D keeps [in, out]
    ("t5", torch.float32, {"normalize": "layer", "min_keep": 0.2}),
]


@pytest.mark.parametrize(("name", "dtype", "options"), CASES)
def test_files_and_memory_give_equal_masks(tmp_path, name, dtype, options):
    """Masks on disk and in memory are equal bit for bit. The written shards have the pruned weights of the model."""
    model, fisher = stored(tmp_path / "model", name, dtype)
    options = {} | options if "pattern" in options else {"sparsity": 0.7} | options
    report = prune_files(tmp_path / "model", fisher, tmp_path / "out", **options)
    live = choose_weights(model, fisher, **options)
    before, after = open_weights(tmp_path / "model"), open_weights(tmp_path / "out")
    assert len(after.files) > 1
    assert [file.name for file in before.files] == [file.name for file in after.files]
    assert set(report.mask) == set(live.mask) == set(before.infos) == set(after.infos)
    assert (report.layers, report.ignored, report.entries) == (live.layers, live.ignored, live.entries)
    for key, mask in report.mask.items():
        assert torch.equal(mask, live.mask[key])
        assert torch.equal(after.read(key), torch.where(mask, before.read(key), 0))
    loaded = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
    held = report.mask.by_parameter(loaded)
    for (key, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, torch.where(held[key], theirs, 0))


def test_the_count_is_exact_and_reported_by_layer(tmp_path):
    """Kept entries add up to the sparsity, to the entry. The report counts the whole model as well."""
    _, fisher = stored(tmp_path / "model", "bert")
    report = prune_files(tmp_path / "model", fisher, tmp_path / "out", 0.9)
    entries = sum(layer.entries for layer in report.layers)
    assert sum(layer.kept for layer in report.layers) == entries - round(0.9 * entries)
    assert {layer.name: layer.kept for layer in report.layers} == {
        layer.name: int(report.mask[layer.name].sum()) for layer in report.layers
    }
    weights = load_all(tmp_path / "out")
    zeros = sum(int((weights[layer.name] == 0).sum()) for layer in report.layers)
    assert report.sparsity_of_model == zeros / sum(tensor.numel() for tensor in weights.values())
    assert set(report.ignored.values()) == {"bias", "norm", "embedding", "output"}
    assert report.as_dict()["layers"][report.layers[0].name]["entries"] == report.layers[0].entries


def load_all(folder):
    """Return all tensors of a model."""
    return {name: tensor for file in open_weights(folder).files for name, tensor in load_file(file).items()}


def test_the_mask_records_its_recipe(tmp_path):
    """The notes of the mask hold the recipe and the fingerprint of the dense weights. The tokenizer is copied."""
    _, fisher = stored(tmp_path / "model", "llama")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    prune_files(tmp_path / "model", fisher, tmp_path / "out", 0.25, scope="layer")
    about = read_mask(tmp_path / "out").metadata
    assert about["weights_fingerprint"] == fingerprint(tmp_path / "model")
    assert (about["made_by"], about["sparsity"], about["scope"], about["score"]) == ("prune", 0.25, "layer", "fisher")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_a_model_without_a_class_is_pruned_by_names(tmp_path):
    """Without a config, the names give the roles. A Fisher on disk is taken by its path."""
    folder = tmp_path / "model"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (5, 8, 3, 3), "fc.weight": (7, 4), "fc.bias": (7,), "embed.weight": (11, 4)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    write_fisher(fisher_of(folder), tmp_path / "fisher")
    report = prune_files(folder, str(tmp_path / "fisher"), tmp_path / "out", pattern=(2, 4))
    assert [layer.name for layer in report.layers] == ["conv.weight", "fc.weight"]
    assert report.sparsity == 0.5
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal((pruned["conv.weight"] != 0).reshape(5, 2, 4, 9).sum(2), torch.full((5, 2, 9), 2))
    assert torch.equal(pruned["embed.weight"], tensors["embed.weight"])


def test_other_weights_are_a_warning_or_with_strict_an_error(tmp_path, caplog):
    """A Fisher of other weights gives one warning, or an error with strict."""
    _, fisher = stored(tmp_path / "model", "bert")
    other = Fisher(
        MemoryStore({name: fisher[name] for name in fisher}),
        fisher.config.model_copy(update={"weights_fingerprint": fisher.config.weights_fingerprint[:-3] + "000"}),
    )
    with pytest.raises(MismatchError, match=r"was made at other weights.*leave out --strict"):
        prune_files(tmp_path / "model", other, tmp_path / "out", 0.5, strict=True)
    assert not (tmp_path / "out").exists()
    with caplog.at_level(logging.WARNING):
        report = prune_files(tmp_path / "model", other, tmp_path / "out", 0.5)
    assert "same names, shapes and dtypes, but other values" in caplog.text
    assert "other values" in report.differs
    assert prune_files(tmp_path / "model", fisher, tmp_path / "exact", 0.5, strict=True).differs is None


def _changed(fisher, name, tensor):
    tensors = {key: fisher[key] for key in fisher} | {name: tensor}
    return Fisher(MemoryStore({key: value for key, value in tensors.items() if value is not None}), fisher.config)


def test_a_refused_pruning_leaves_no_files(tmp_path):
    """A refused pruning leaves no files.

    An incomplete, foreign, damaged or missing Fisher is refused, and so is a taken folder.
    """
    _, fisher = stored(tmp_path / "model", "bert")
    name = "bert.encoder.layer.1.output.dense.weight"
    damaged = fisher[name].clone()
    damaged[2, 3] = float("nan")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "a").touch()
    refused = [
        (_changed(fisher, name, None), "out", {}, MismatchError, f"lacks {name}"),
        (
            _changed(fisher, name, torch.ones(3, 5)),
            "out",
            {},
            MismatchError,
            r"must have the weight's shape \[12, 12\]",
        ),
        (_changed(fisher, "other", torch.ones(3)), "out", {}, MismatchError, "other in memory is not in"),
        (_changed(fisher, name, damaged), "out", {}, ValuesError, "1 NaN of 144"),
        (_changed(fisher, name, -fisher[name]), "out", {}, ValuesError, "negative"),
        (fisher, "taken", {}, ConfigError, "must be new or empty"),
        (None, "out", {}, ConfigError, "score fisher needs a Fisher"),
        (fisher, "out", {"score": "taylor_squared"}, ConfigError, "mean gradient, which no file holds"),
    ]
    for given, out, options, kind, message in refused:
        with pytest.raises(kind, match=message) as error:
            prune_files(tmp_path / "model", given, tmp_path / out, 0.5, **options)
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "taken"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NotFoundError, match="save_pretrained"):
        prune_files(empty, fisher, tmp_path / "out", 0.5)


def test_quantized_weights_are_refused(tmp_path):
    """8-bit weights are refused, because they depend on separate scales."""
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(4, 4).to(torch.float8_e4m3fn)}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UnsupportedStateError, match="before it is quantized"):
        prune_files(tmp_path / "model", None, tmp_path / "out", 0.5, score="magnitude")
    assert not (tmp_path / "out").exists()


def test_a_layer_can_be_left_out_of_a_fisher_if_it_is_ignored(tmp_path):
    """An ignored layer needs no Fisher."""
    _, fisher = stored(tmp_path / "model", "bert")
    partial = _changed(fisher, "bert.encoder.layer.1.output.dense.weight", None)
    report = prune_files(tmp_path / "model", partial, tmp_path / "out", 0.5, ignore=(r"layer\.1\.output",))
    assert report.ignored["bert.encoder.layer.1.output.dense.weight"] == r"matches layer\.1\.output"
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.architectures == ["BertForSequenceClassification"]


def test_packed_integers_are_refused(tmp_path):
    """Weights of 8-bit integers are not left alone in silence."""
    (tmp_path / "model").mkdir()
    tensors = {"up.weight": torch.ones(4, 4, dtype=torch.int8), "down.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    with pytest.raises(UnsupportedStateError, match=r"up.weight of .* is stored as int8"):
        prune_files(tmp_path / "model", None, tmp_path / "out", 0.5, score="magnitude")
