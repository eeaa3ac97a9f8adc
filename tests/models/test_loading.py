"""Keys of a model, and the tensors on disk that fill them."""

from typing import Any

import pytest
import torch
import transformers

from squisher_mergekit.models.loading import LoadableModel, loadable

SMALL = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}


def _loadable(name: str, **changes: Any) -> LoadableModel:
    cls = getattr(transformers, name)
    found = loadable(cls.config_class(**(SMALL | changes), architectures=[name]))
    assert found is not None
    return found


def test_tied_tensors_are_needed_once() -> None:
    """The head of a tied model needs no tensor; that of an untied one does."""
    tied, untied = (
        _loadable("Qwen2ForCausalLM", num_key_value_heads=1, tie_word_embeddings=tie) for tie in (True, False)
    )
    assert untied.needed().keys() - tied.needed().keys() == {"lm_head.weight"}
    assert tied.first_of_tied("lm_head.weight") == "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "on_disk", "key"),
    [
        ("DeiTForImageClassification", "deit.encoder.layer.1.output.dense.bias", "deit.layers.1.mlp.fc2.bias"),
        ("BertForMaskedLM", "bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
    ],
)
def test_names_on_disk_fill_the_keys_in_memory(name: str, on_disk: str, key: str) -> None:
    """Renamed layers and the names of older versions fill the keys that ``from_pretrained`` fills."""
    model = _loadable(name)
    assert model.fills([on_disk])[on_disk].keys == (key,)


def test_experts_fill_one_key() -> None:
    """The weights of single experts are converted to the packed tensor; a foreign name fills nothing."""
    model = _loadable("OlmoeForCausalLM", num_key_value_heads=2, num_experts=3, num_experts_per_tok=1)
    names = [f"model.layers.0.mlp.experts.{i}.up_proj.weight" for i in range(3)]
    found = model.fills([*names, "v_head.weight"])
    assert {found[name].keys for name in names} == {("model.layers.0.mlp.experts.gate_up_proj",)}
    assert [found[names[0]].converted, found["v_head.weight"].keys] == [True, ()]


def test_computed_buffers_are_ignored() -> None:
    """Rotary frequencies and position ids of older versions are left out as loading leaves them out."""
    model = _loadable("BertForMaskedLM")
    assert model.is_ignored("bert.embeddings.position_ids")
    assert not model.is_ignored("v_head.summary.bias")


@pytest.mark.parametrize("name", ["ApertusForCausalLM", "GPTNeoXForCausalLM"])
def test_a_dtype_by_name_is_taken(name: str) -> None:
    """Mergekit writes ``dtype:`` as a string into the config, which constructors of layers do not take."""
    config = getattr(transformers, name).config_class(**SMALL, architectures=[name])
    config.dtype = "float32"
    assert loadable(config) is not None


def test_a_class_that_cannot_be_built() -> None:
    """An architecture that transformers does not have gives None, and runs no code."""
    assert loadable(transformers.LlamaConfig(**SMALL, architectures=["NobodysForCausalLM"])) is None


def test_buffers_are_told_from_parameters() -> None:
    """Statistics of batch norms are buffers, their weights are not."""
    config = transformers.ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1])
    config.architectures = ["ResNetForImageClassification"]
    model = loadable(config)
    assert model is not None
    names = [name for name in model.shapes if name.startswith("resnet.embedder")]
    buffers = {name for name, found in model.fills(names).items() if model.is_buffer(found)}
    kinds = {torch.Size(model.shapes[name]).numel() for name in buffers}
    assert ({name.rsplit(".", 1)[1] for name in buffers}, kinds) == (
        {"running_mean", "running_var", "num_batches_tracked"},
        {1, 4},
    )
