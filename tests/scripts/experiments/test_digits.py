"""Digits of ``scripts/experiments``: the split on made-up rows, and the loader on the real archive."""

import pytest
import torch

from scripts.experiments import digits


def _rows(*counts):
    labels = torch.cat([torch.full((count,), number) for number, count in enumerate(counts)])
    return torch.arange(float(len(labels))).unsqueeze(1), labels


def test_split_is_balanced_and_disjoint():
    """Each class gives the same number of test rows. Every row is in one part, with its label."""
    pixels, labels = _rows(7, 11, 13)
    found = digits.split(pixels, labels, test=9, seed=3)
    assert found.test_labels.bincount().tolist() == [3, 3, 3]
    assert found.train_labels.bincount().tolist() == [4, 8, 10]
    rows = torch.cat([found.train, found.test]).squeeze(1).long()
    assert rows.sort().values.tolist() == list(range(31))
    assert torch.equal(labels[rows], torch.cat([found.train_labels, found.test_labels]))


def test_split_depends_on_the_seed():
    """The same seed gives the same sets in the same order. Another seed gives others."""
    first, same, other = (digits.split(*_rows(17, 19), test=6, seed=seed).train for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("test", [0, 7, 14])
def test_split_refuses_unbalanced_sizes(test):
    """An empty test set, unequal numbers and a class without training rows raise an error."""
    with pytest.raises(ValueError, match=f"found {test}"):
        digits.split(*_rows(7, 11), test, seed=0)


@pytest.mark.slow
def test_the_archive_holds_five_thousand_digits():
    """The archive has 500 images of each class, all different, from black to white."""
    found = digits.load(seed=0)
    assert found.train.shape == (4000, 784)
    assert found.test_labels.bincount().tolist() == [100] * 10
    assert len(torch.cat([found.train, found.test]).unique(dim=0)) == 5000
    assert (found.train.min().item(), found.train.max().item()) == (0.0, 1.0)
