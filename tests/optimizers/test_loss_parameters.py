"""Parameters of the loss in the optimizer of sentence-transformers: found beside the model's, and left out."""

import json
import logging
import re

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.names import ParameterInfo
from squisher_mergekit.optimizers.loss_parameters import assign_beside_loss

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
    assert set(fisher) == set(truth) and all(torch.equal(fisher[name], v) for name, v in truth.items())
    assert "left out, as of the loss: 2 of the optimizer's parameters" in caplog.text


def test_a_loss_of_the_same_shapes_is_refused():
    """Where the model fits before and after the loss's parameter, its place is not certain."""
    parameters = [ParameterInfo("a", (3, 3)), ParameterInfo("b", (3, 3))]
    with pytest.raises(NamingError, match="in one place only, but fit in several"):
        assign_beside_loss([[(3, 3)] * 3], parameters, "optimizer.pt")
    with pytest.raises(NamingError, match="but do not"):
        assign_beside_loss([[(3, 3), (5,), (3, 3)]], parameters, "optimizer.pt")
