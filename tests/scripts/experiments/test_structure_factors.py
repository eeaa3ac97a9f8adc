"""Merges by given factors: they are the package's where nothing is changed, and data give the moments of a loop."""

import pytest
import torch
from torch import nn

from scripts.experiments import structure_factors as factors
from scripts.experiments import structure_merges as merges
from squisher_mergekit.merging.coupling.equations import row_factor
from tests.scripts.experiments.structure_models import few_models


@pytest.mark.parametrize("structure", merges.STRUCTURES)
def test_unchanged_factors_give_the_packages_merge(structure):
    """With the factors left as they are, the merge is that of the merge method."""
    models = few_models(3, out=256, width=128)
    found = factors.by_factors(models, structure, lambda model, tensor, factor: factor)
    wanted = merges.structured(models, structure)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6)


def test_a_rotation_keeps_eigenvalues_and_changes_the_merge():
    """A rotated factor has the same eigenvalues, other entries, and gives another merge."""
    factor = row_factor(torch.randn(2, 6, 9), torch.rand(2, 6, 9))
    turned = factors.rotation(3)("a", "w", factor)
    torch.testing.assert_close(torch.linalg.eigvalsh(turned), torch.linalg.eigvalsh(factor), rtol=1e-3, atol=1e-4)
    assert (turned - factor).abs().max() > 0.1
    models = few_models(3, out=128, width=128)
    found = factors.by_factors(models, "rows", factors.rotation(3))
    assert not torch.allclose(found[factors.matrices(models)[0]], merges.structured(models, "rows")["x.encoder.a"])


class Net(nn.Module):
    """Two linear layers over tokens, with the loss of a text's mean over its real tokens."""

    def __init__(self):
        super().__init__()
        self.x = nn.ModuleDict({"encoder": nn.ModuleDict({"a": nn.Linear(5, 4), "b": nn.Linear(4, 3)})})
        self.head = nn.Linear(3, 2)

    def forward(self, inputs, attention_mask, labels):
        hidden = self.x["encoder"]["b"](torch.tanh(self.x["encoder"]["a"](inputs)))
        mask = attention_mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * mask).sum(1) / mask.sum(1))
        return type("Output", (), {"loss": nn.functional.cross_entropy(logits, labels)})


def _batches():
    torch.manual_seed(5)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
    return [
        {"inputs": torch.randn(3, 4, 5), "attention_mask": mask, "labels": torch.tensor([0, 1, 1])},
        {"inputs": torch.randn(2, 4, 5), "attention_mask": mask[:2], "labels": torch.tensor([1, 0])},
    ]


def test_moments_are_those_of_single_texts():
    """Moments sum over real tokens of single texts, each with the gradient of its own loss."""
    torch.manual_seed(1)
    net, inputs, gradients = Net(), torch.zeros(5, 5), torch.zeros(3, 3)
    found = factors.moments(net, _batches())
    assert set(found) == {"x.encoder.a.weight", "x.encoder.b.weight"}
    for batch in _batches():
        for row in range(len(batch["labels"])):
            one = {name: tensor[row : row + 1] for name, tensor in batch.items()}
            seen = []
            hook = net.x["encoder"]["b"].register_full_backward_hook(
                lambda _, __, grad, seen=seen: seen.append(grad[0])
            )
            net(**one).loss.backward()
            hook.remove()
            inputs += sum(torch.outer(x, x) for x in one["inputs"][0, one["attention_mask"][0].bool()])
            gradients += sum(torch.outer(g, g) for g in seen[0][0])
    torch.testing.assert_close(found["x.encoder.a.weight"][0], inputs)
    torch.testing.assert_close(found["x.encoder.b.weight"][1], gradients)


def _moments(models):
    return {
        model: {name: (_spd(origin.shape[1], n), _spd(origin.shape[0], n + 7)) for name, origin in models.base.items()}
        for n, model in enumerate(models.weights)
    }


def _spd(size, seed):
    rows = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed))
    return rows.mT @ rows


def test_regmean_minimises_the_change_of_outputs():
    """RegMean without a scale of off-diagonals has no gradient of ``sum |X_i (W - W_i)^T|^2``."""
    models = few_models(3, out=6, width=5, vectors=False)
    found = _moments(models)
    weight = factors.regmean(models, found, off_diagonal=1.0)["x.encoder.a"]
    slope = sum((weight - w["x.encoder.a"]) @ found[model]["x.encoder.a"][0] for model, w in models.weights.items())
    assert slope.abs().max() < 1e-3
    assert not torch.allclose(factors.regmean(models, found)["x.encoder.a"], weight)


def test_kfac_of_equal_moments_is_the_average():
    """Equal factors give the plain average, whatever they are; different ones do not."""
    models = few_models(2, out=6, width=5, vectors=False)
    found = _moments(models)
    average = merges.linear(models)["x.encoder.a"]
    same = dict.fromkeys(models.weights, next(iter(found.values())))
    torch.testing.assert_close(factors.kfac(models, same)["x.encoder.a"], average, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(factors.kfac(models, found)["x.encoder.a"], average, atol=1e-2)
