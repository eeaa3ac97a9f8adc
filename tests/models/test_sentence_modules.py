"""Modules after the transformer in a model of sentence-transformers, and parameters of its loss."""

import json
import logging
import re

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertModel

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, NamingError
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.models.sentence_modules import assign_beside_loss, module_parameters
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


_NO_DECAY = re.compile(r"bias|layernorm|_norm(?:$|\.)")


class _Classifier(nn.Module):
    """Loss with a classifier, registered after the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(33, 3)


class _Temperature(nn.Module):
    """Loss with parameters of its own, which come before those of the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.scale, self.bias = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.zeros(1))


def _saved(loss, model, folder):
    named = list(loss.named_parameters())
    groups = [[p for n, p in named if bool(_NO_DECAY.search(n.lower())) is kind] for kind in (False, True)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], lr=1e-3)
    for name, parameter in named:
        parameter.grad = None if "pooler" in name else torch.randn_like(parameter)
    optimizer.step()
    model.save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": ""}]))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return {n: optimizer.state[p]["exp_avg_sq"] for n, p in model.named_parameters() if p in optimizer.state}


@pytest.mark.parametrize("loss", [_Classifier, _Temperature])
def test_the_parameters_of_a_loss_are_left_out(loss, tmp_path, caplog):
    """A classifier follows the model, a temperature precedes it; the model's second moments keep their names."""
    sizes = {"hidden_size": 11, "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 17}
    model = BertModel(BertConfig(vocab_size=29, max_position_embeddings=13, **sizes))
    folder = tmp_path / "checkpoint-1"
    truth = _saved(loss(nn.ModuleDict({"0": model})), model, folder)
    with caplog.at_level(logging.WARNING):
        fisher = load_fisher(folder)
    assert set(fisher) == set(truth)
    assert all(torch.equal(fisher[name], moment) for name, moment in truth.items())
    assert "left out, as of the loss: 2 of the optimizer's parameters" in caplog.text


def test_a_loss_of_the_same_shapes_is_refused():
    """Where the model fits before and after the loss's parameter, its place is not certain."""
    parameters = [ParameterInfo("a", (3, 3)), ParameterInfo("b", (3, 3))]
    with pytest.raises(NamingError, match="in one place only, but fit in several"):
        assign_beside_loss([[(3, 3)] * 3], parameters, "optimizer.pt")
    with pytest.raises(NamingError, match="but do not"):
        assign_beside_loss([[(3, 3), (5,), (3, 3)]], parameters, "optimizer.pt")


@pytest.mark.parametrize(
    "layers",
    [
        {"encoder": lambda: nn.LSTM(5, 5, num_layers=11, bidirectional=True, proj_size=3)},
        {"encoder": lambda: nn.GRU(5, 5, num_layers=2)},
        {"convs": lambda: nn.ModuleList(nn.Conv1d(3, 3, 1) for _ in range(11))},
        {"norm": lambda: nn.LayerNorm(7)},
    ],
)
def test_a_module_has_the_order_of_its_class(layers, tmp_path):
    """Layer 2 precedes layer 10; a recurrent layer has its weights and biases, which can be of one shape, by layer."""
    module = nn.ModuleDict({name: make() for name, make in layers.items()})
    (tmp_path / "1_Own").mkdir()
    save_file(dict(module.state_dict()), tmp_path / "1_Own" / "model.safetensors")
    (tmp_path / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Own"}]))
    found = [parameter.name.removeprefix("1_Own/") for parameter in module_parameters(tmp_path)]
    assert found == [name for name, _ in module.named_parameters()]
