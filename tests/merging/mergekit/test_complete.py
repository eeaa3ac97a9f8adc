"""Merges write the whole model, or are refused before anything is written."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from squisher_mergekit.cli.main import main as squisher
from tests.merging.models import entry, models_with_fishers
from tests.merging.reference import (
    Tensors,
    assert_refused,
    assert_squisher,
    assert_within,
    draw_fisher,
    give_fisher,
    largest,
    llama,
    merge,
    merged,
    preview_of,
    squisher_reference,
    store_fisher,
)

FILE = "model.safetensors"


def _config(root: Path, **settings: Any) -> dict[str, Any]:
    return {"merge_method": "squisher", "models": [entry(root, 0), entry(root, 1)], **settings}


def _change(root: Path, change: Any, models: tuple[int, ...] = (0, 1)) -> list[Tensors]:
    """Change the tensors in the files of models; return the new tensors of all."""
    for i in models:
        file = root / f"m{i}" / FILE
        tensors = change(load_file(file))
        save_file(tensors, file, {"format": "pt"})
        give_fisher(root / f"m{i}", tensors, i)
    return [load_file(root / f"m{i}" / FILE) for i in (0, 1)]


def _pair(root: Path, make: Any) -> list[Tensors]:
    """Write two models of a class with Fishers of all tensors of real numbers."""
    for i in range(2):
        torch.manual_seed(i)
        make().save_pretrained(root / f"m{i}")
    return _change(root, lambda tensors: tensors)


def _experts() -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=4,
        intermediate_size=12, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config)


def test_a_tensor_that_the_class_needs_and_no_model_has(tmp_path: Path) -> None:
    """An untied head that no file has would be drawn at random: refused, with the class and the key."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    result = merge(_config(tmp_path), tmp_path / "out")
    assert_refused(
        result, tmp_path / "out", "LlamaForCausalLM would draw 1 at random", "lm_head.weight", "no model has"
    )


def test_a_required_tensor_that_no_model_has_is_no_fault_of_the_fisher(tmp_path: Path) -> None:
    """A norm that mergekit asks for is in no file: the refusal says so, and names no Fisher."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "model.norm.weight"})
    result = merge(_config(tmp_path), tmp_path / "out")
    assert_refused(result, tmp_path / "out", "mergekit asks for 1 that no model has (model.norm.weight)")
    assert "Fisher" not in result.output


def test_a_required_tensor_that_one_model_lacks(tmp_path: Path) -> None:
    """The refusal names the tensor and the model without it."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n}, (1,))
    result = merge(_config(tmp_path), tmp_path / "out")
    assert_refused(result, tmp_path / "out", "every model must have", "model.layers.1.mlp.up_proj.weight", "m1 has not")


def test_experts_that_mergekit_does_not_find(tmp_path: Path) -> None:
    """A whole expert that is missing in one model is refused, not left out of the result."""
    _pair(tmp_path, _experts)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "experts.2" not in n}, (1,))
    assert_refused(merge(_config(tmp_path), tmp_path / "out"), tmp_path / "out", "mlp.experts.2")


def test_a_head_that_the_class_does_not_have(tmp_path: Path) -> None:
    """A tensor of all files that is no part of the class is merged by its Fisher, under its name."""
    models_with_fishers(tmp_path, 2)
    weights = _change(tmp_path, lambda tensors: tensors | {"v_head.summary.weight": tensors["lm_head.weight"][:1] * 2})
    assert set(merged(_config(tmp_path), tmp_path / "out")) == set(weights[0])


@pytest.mark.parametrize("place", ["flag", "yaml"])
def test_experts_may_go_on(tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture) -> None:
    """With leave from the command line or the YAML, the rest is merged; plan and report count over the whole model."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    settings = {"parameters": {"allow_missing": True}} if place == "yaml" else {}
    file, report = tmp_path / "merge.yml", tmp_path / "report.json"
    file.write_text(yaml.safe_dump(_config(tmp_path, **settings)), encoding="utf-8")
    flags = ["--allow-missing-weights"] if place == "flag" else []
    command = ["merge", str(file), str(tmp_path / "out"), "--json", str(report), "--no-copy-tokenizer", *flags]
    with caplog.at_level(logging.WARNING):
        result = CliRunner().invoke(squisher, command)
    assert result.exit_code == 0, result.output
    assert "written without them, as allowed" in caplog.text
    found = json.loads(report.read_text(encoding="utf-8"))
    sizes = [len(load_file(tmp_path / "out" / FILE)), found["tensors"], found["whole"]["tensors"]]
    assert (sizes, found["lost"]) == ([29, 29, 30], ["lm_head.weight"])
    assert all(model["covered"] < model["entries"] for model in found["plan"]["models"])
    assert "29 of 30 tensors" in result.output


def test_the_plan_is_refused_as_the_merge_is(tmp_path: Path) -> None:
    """``squisher plan`` refuses in the same line."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"})
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump(_config(tmp_path)), encoding="utf-8")
    result = CliRunner().invoke(squisher, ["plan", str(file)])
    assert (result.exit_code, "would draw 1 at random" in result.output) == (1, True)


@pytest.mark.parametrize("lost", [False, True])
def test_files_of_an_unknown_class(tmp_path: Path, lost: bool) -> None:
    """Where no class can be built, the files alone decide."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    for i in range(2):
        file = tmp_path / f"m{i}" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": ["NobodysForCausalLM"]}))
    if not lost:
        assert_squisher(merged(_config(tmp_path), tmp_path / "out"), weights, fishers, (1.0, 1.0))
        return
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up" not in n}, (1,))
    preview = preview_of(tmp_path, _config(tmp_path))
    assert "1 tensors are copied" in preview["text"]


def test_buffers_need_no_fisher(tmp_path: Path) -> None:
    """Statistics of batch norms are the weighted mean, counts are copied, and the plan says so."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    weights = []
    for i in range(2):
        torch.manual_seed(i)
        model = transformers.ResNetForImageClassification(config)
        buffers = {
            name: tensor.normal_() if tensor.is_floating_point() else tensor.fill_(7)
            for name, tensor in model.named_buffers()
        }
        model.save_pretrained(tmp_path / f"m{i}")
        weights.append(load_file(tmp_path / f"m{i}" / FILE))
        generator = torch.Generator().manual_seed(i)
        fisher = {n: draw_fisher(t.shape, generator, 0) for n, t in weights[i].items() if n not in buffers}
        store_fisher(tmp_path / f"m{i}", fisher)
    settings = _config(tmp_path, dtype="float32")
    settings["models"] = [entry(tmp_path, 0, weight=3.0), entry(tmp_path, 1)]
    result = merged(settings, tmp_path / "out")
    for name in buffers:
        if "num_batches" in name:
            assert (result[name].dtype, int(result[name])) == (torch.int64, 7)
            continue
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [torch.ones_like(t) for t in thetas], (3.0, 1.0))
        assert_within(result[name], reference, largest(thetas))
    text = preview_of(tmp_path, settings)["text"]
    assert "buffers can have no Fisher and are the weighted mean" in text


def test_a_second_copy_of_a_tied_tensor(tmp_path: Path) -> None:
    """A tied head that one of the files holds as well is not copied from that model alone."""

    def make() -> Any:
        config = transformers.OPTConfig(
            vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, ffn_dim=12, word_embed_proj_dim=8
        )
        return transformers.OPTForCausalLM(config)

    _pair(tmp_path, make)
    embedding = "model.decoder.embed_tokens.weight"
    _change(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()}, (0,))
    result = merged(_config(tmp_path), tmp_path / "out")
    assert "lm_head.weight" not in result or torch.equal(result["lm_head.weight"], result[embedding])


def test_slices_may_leave_out_layers(tmp_path: Path) -> None:
    """Layers outside the slices are left out on purpose."""
    models_with_fishers(tmp_path, 2)
    sources = [{"model": str(tmp_path / f"m{i}"), "layer_range": [0, 2]} for i in range(2)]
    result = merged({"merge_method": "squisher", "slices": [{"sources": sources}]}, tmp_path / "out")
    assert not any("layers.2." in name for name in result)


def test_a_base_may_have_further_heads(tmp_path: Path) -> None:
    """A tensor that the base of gradient matching alone has is no part of the result."""
    for i in range(3):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    file = tmp_path / "m0" / FILE
    save_file(load_file(file) | {"classifier.weight": torch.ones(2, 33)}, file, {"format": "pt"})
    store_fisher(tmp_path / "m0", {n: torch.ones_like(t) for n, t in load_file(file).items()})
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, 1), entry(tmp_path, 2)],
    }
    assert "classifier.weight" not in merged(config, tmp_path / "out")


def _tied_and_not(root: Path, name: str, **settings: Any) -> None:
    """Write a model with tied embeddings and one without, each with a Fisher."""
    cls = getattr(transformers, name)
    for i, tied in enumerate((True, False)):
        torch.manual_seed(i)
        config = cls.config_class(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, **settings)
        config.tie_word_embeddings = tied
        cls(config).save_pretrained(root / f"m{i}")
    _change(root, lambda tensors: tensors)


@pytest.mark.parametrize("name", ["OPTForCausalLM", "SmolLM3ForCausalLM"])
def test_the_head_of_an_untied_model_is_not_lost(tmp_path: Path, name: str) -> None:
    """The config that ties leaves no place for it: refused; with the other model's config it is merged."""
    changes = {"ffn_dim": 12, "word_embed_proj_dim": 8} if name[:3] == "OPT" else {"num_key_value_heads": 1}
    _tied_and_not(tmp_path, name, intermediate_size=12, pad_token_id=0, **changes)
    result = merge(_config(tmp_path, base_model=str(tmp_path / "m0")), tmp_path / "out")
    assert_refused(result, tmp_path / "out", str(tmp_path / "m1"), "lm_head.weight")
    assert "lm_head.weight" in merged(_config(tmp_path, base_model=str(tmp_path / "m1")), tmp_path / "out")


def test_the_config_of_a_merge_with_an_untied_head_does_not_tie(tmp_path: Path) -> None:
    """Where mergekit writes the head, loaders must not replace it by the embedding."""
    for i, tied in enumerate((True, False)):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i, tie_word_embeddings=tied), i)
    result = merged(_config(tmp_path, base_model=str(tmp_path / "m0")), tmp_path / "out")
    assert not torch.equal(result["lm_head.weight"], result["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


@pytest.mark.parametrize("model", [0, 1])
def test_an_embedding_does_not_stand_for_a_head_that_is_not_tied(tmp_path: Path, model: int) -> None:
    """Mergekit reads a missing head from the embedding, also where the model's own config does not tie them."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}, (model,))
    result = merge(_config(tmp_path), tmp_path / "out")
    assert_refused(result, tmp_path / "out", "must have the tensor lm_head.weight", f"m{model} has not")


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_prefix_of_a_wrapper_is_the_cure(tmp_path: Path, prefix: str) -> None:
    """A model saved inside its wrapper has other names for all tensors."""
    models_with_fishers(tmp_path, 2)
    _change(tmp_path, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    assert_refused(merge(_config(tmp_path), tmp_path / "out"), tmp_path / "out", f"wrapper whose prefix is {prefix}")


@pytest.mark.parametrize("name", ["text_decoder", "defualt"])
def test_a_module_that_the_architecture_does_not_have(tmp_path: Path, name: str) -> None:
    """The refusal lists the modules."""
    models_with_fishers(tmp_path, 2)
    config = _config(tmp_path)
    config["modules"] = {name: {"models": config.pop("models")}}
    assert_refused(merge(config, tmp_path / "out"), tmp_path / "out", f"modules.{name} must be", "which has default")


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    """A tensor that is not in the shard of the index is refused while planning."""
    models_with_fishers(tmp_path, 2)
    folder = tmp_path / "m1"
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    shards = {f"model-0000{k + 1}-of-00002.safetensors": dict(list(tensors.items())[k::2]) for k in range(2)}
    for file, part in shards.items():
        save_file(part, folder / file, {"format": "pt"})
    places = {name: file for file, part in shards.items() for name in part}
    places["lm_head.weight"] = next(file for file in shards if file != places["lm_head.weight"])
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert_refused(merge(_config(tmp_path), tmp_path / "out"), tmp_path / "out", "has no lm_head.weight", "index of")


def test_a_config_of_dequantised_weights_asks_for_no_quantisation(tmp_path: Path) -> None:
    """A left-over ``quantization_config`` would quantise the result when it is loaded."""
    models_with_fishers(tmp_path, 2)
    file = tmp_path / "m0" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    merged(_config(tmp_path, base_model=str(tmp_path / "m0")), tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
