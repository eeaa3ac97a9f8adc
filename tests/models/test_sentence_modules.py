"""Modules after the transformer in a model of sentence-transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.models.sentence_modules import module_parameters
from tests.other_trainers import adam, assert_moments


def _write(folder, dense):
    """Write a checkpoint of a Trainer: BERT, pooling, and linear layers of the given widths."""
    torch.manual_seed(1)
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                                     vocab_size=11, max_position_embeddings=8)  # fmt: skip
    model = transformers.BertModel(config)
    model.save_pretrained(folder)
    own = {name: torch.rand(p.shape) for name, p in model.named_parameters()}
    modules = [{"idx": 0, "name": "0", "path": ""}, {"idx": 1, "name": "1", "path": "1_Pooling"}]
    for k, width in enumerate(dense, 2):
        layers = {"linear.weight": torch.rand(width, 16), "linear.bias": torch.rand(width)}
        (folder / f"{k}_Dense").mkdir()
        save_file(layers, folder / f"{k}_Dense" / "model.safetensors")
        modules.append({"idx": k, "name": str(k), "path": f"{k}_Dense"})
        own |= {f"{k}.{name}": torch.rand(tensor.shape) for name, tensor in layers.items()}
    (folder / "modules.json").write_text(json.dumps(modules))
    plain = [name for name in own if "bias" in name or "LayerNorm" in name]
    groups = [[name for name in own if name not in plain], plain]
    torch.save(adam(own, numbered=True, groups=groups), folder / "optimizer.pt")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 30}))
    return {name: tensor for name, tensor in own.items() if not name[0].isdigit()}


@pytest.mark.parametrize("dense", [(), (16,), (8, 16)])
def test_the_transformer_is_read_beside_further_modules(dense, tmp_path):
    """Linear layers of the transformer's width would fit in many other places."""
    expected = _write(tmp_path / "checkpoint-30", dense)
    assert_moments(load_fisher(tmp_path / "checkpoint-30"), expected)


@pytest.mark.parametrize("content", ["{}", '[{"path": "../x"}]', '[{"path": 3}]', "[3]"])
def test_a_damaged_list_of_modules_is_refused(content, tmp_path):
    """Paths outside of the folder are never opened."""
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CorruptFileError, match=r"modules\.json must"):
        module_parameters(tmp_path)
