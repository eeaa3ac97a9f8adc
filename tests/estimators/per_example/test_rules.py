"""Arguments without a batch axis whose first axis has the size of the batch, against a float64 loop."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from squisher_mergekit import estimate_fisher
from squisher_mergekit.estimators.per_example.rules import example_of

Pair = namedtuple("Pair", "x y")


class Attention(nn.Module):
    """Attention with a weight of its own, a mask of the tokens and their positions."""

    def __init__(self, width):
        super().__init__()
        self.query = nn.Parameter(torch.randn(width, width))

    def forward(self, x, mask, positions):
        scores = (x @ self.query + positions.sin()[:, None]) @ x.mT
        return scores.masked_fill(~mask, -1e9).softmax(-1) @ x


class Network(nn.Module):
    """Classifier of token ids through that attention, or through torch's own encoder layer."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.layer = Attention(6) if kind == "own" else nn.TransformerEncoderLayer(6, 2, 7, 0.0, batch_first=True)
        self.kind = kind

    def forward(self, ids):
        x, length = self.embed(ids), ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).tril()
        hidden = self.layer(x, mask, torch.arange(length)) if self.kind == "own" else self.layer(x, src_mask=~mask)
        return self.head(hidden[:, -1])


def _loop(model, ids, classes):
    model = copy.deepcopy(model).double().eval()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for row, label in zip(ids, classes, strict=True):
        model.zero_grad()
        functional.cross_entropy(model(row[None]), label[None]).backward()
        for name, parameter in model.named_parameters():
            total[name] += parameter.grad.square()
    return total


@pytest.mark.parametrize("kind", ["own", "torch"])
@pytest.mark.parametrize(("size", "length"), [(5, 5), (3, 9), (2, 7), (4, 7)])
def test_a_mask_of_as_many_tokens_as_examples_is_passed_whole(kind, size, length):
    """A mask ``(T, T)`` has no batch axis also where T is the number of examples, or a multiple of it."""
    torch.manual_seed(1)
    model, ids, classes = Network(kind), torch.randint(11, (size, length)), torch.randint(3, (size,))
    fisher = estimate_fisher(model, [(ids, classes)], statistic="sum")
    for name, expected in _loop(model, ids, classes).items():
        torch.testing.assert_close(fisher[name].double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_an_example_is_cut_from_named_tuples_and_multiples():
    """Named tuples keep their type; a first axis of 2 N has two rows of each example."""
    found, other = example_of((Pair(torch.arange(6).reshape(6, 1), torch.arange(3)), 5.0), 2, 3)
    assert (found.x.flatten().tolist(), found.y.tolist(), other) == ([4, 5], [2], 5.0)
