"""Frozen convolutions that turn the emoji of the tasks into features.

The layers are the paper's for split CIFAR-100: five of 3 x 3, with 16 to 256 channels, the last four with stride 2,
which make 1,024 features of 32 x 32 pixels. The paper trains them on CIFAR-10. Here they classify the subcategories
that are in no task: People & Body, and those with too few emoji to be a class.
"""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm import tqdm

from scripts.experiments import digits, emojis, runner

CHANNELS = (3, 16, 32, 64, 128, 256)
FEATURES = CHANNELS[-1] * 4
APART = "People & Body"
LEAST = 20  # number of emoji that a class of the tasks needs
HELD, MOST = 6, 40  # tested emoji of a subcategory; largest number of training emoji
BATCH, RATE, EPOCHS, SEED, SHIFT = 128, 2e-3, 40, 0, 3


def classes(pictures: emojis.Emojis) -> tuple[list[int], list[int]]:
    """Return the subcategories for the tasks, and those that train the convolutions."""
    sizes = pictures.sizes()
    tasks = [group for group, name in enumerate(pictures.names) if name[0] != APART and sizes[group] >= LEAST]
    return tasks, [group for group in range(len(pictures.names)) if group not in tasks]


def network(outputs: int) -> nn.Sequential:
    """Return the convolutions with an output layer, without a norm after the last one, as in the paper."""
    layers: list[nn.Module] = []
    last = len(CHANNELS) - 2
    for number, (before, after) in enumerate(pairwise(CHANNELS)):
        layers.append(nn.Conv2d(before, after, 3, stride=1 if number == 0 else 2, padding=1, bias=number == last))
        if number < last:
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(nn.Sequential(*layers, nn.Flatten()), nn.ReLU(), nn.Linear(FEATURES, outputs))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images shifted by up to ``SHIFT`` pixels on white, half of them mirrored."""
    count, _, side, _ = images.shape
    wide = pad(images, [SHIFT] * 4, value=1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(side), right + torch.arange(side)
    columns = torch.where(torch.rand(count, 1, generator=generator) < 0.5, columns.flip(1), columns)
    return wide[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def learn(images: Tensor, labels: Tensor) -> nn.Sequential:
    """Train a network to classify images, and return it."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = network(int(labels.max()) + 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    steps = max(EPOCHS * len(images) // BATCH, 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for _ in tqdm(range(steps), desc="convolutions", unit="step", delay=2, mininterval=1, leave=False):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(moved(images[rows], generator)), labels[rows]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def make(pictures: emojis.Emojis, file: Path) -> None:
    """Write the features of the tasks' images with their emoji and classes.

    Features are scaled to mean 0 and standard deviation 1 over the training images of the convolutions.
    """
    tasks, left = (torch.tensor(groups) for groups in classes(pictures))
    wanted, others = (torch.isin(pictures.groups, groups).nonzero().squeeze(1) for groups in (tasks, left))
    drawn, _ = emojis.split(pictures.emoji[others], pictures.groups[others], 0, MOST, SEED)
    others = others[drawn]
    model = learn(pictures.images[others], torch.searchsorted(left, pictures.groups[others]))
    with torch.no_grad():
        known, found = (
            torch.cat([model[0](part) for part in pictures.images[rows].split(256)]) for rows in (others, wanted)
        )
    tensors = {
        "features": (found - known.mean()) / known.std(),
        "emoji": pictures.emoji[wanted],
        "labels": torch.searchsorted(tasks, pictures.groups[wanted]),
    }
    save_file(tensors, file)


def load(seed: int, work: Path) -> digits.Sets:
    """Return the features of the tasks' emoji, split at random by emoji.

    Args:
        seed: Seed of the split and of the order; all seeds have the same convolutions.
        work: Folder that keeps the features.
    """
    made = (emojis.STYLES, CHANNELS, LEAST, MOST, BATCH, RATE, EPOCHS, SEED, SHIFT, torch.__version__)
    folder = runner.cached(
        work / "emoji" / runner.key(*made), lambda place: make(emojis.load(), place / "features.safetensors")
    )
    found = load_file(folder / "features.safetensors")
    parts = emojis.split(found["emoji"], found["labels"], HELD, MOST, seed)
    train, test = ((found["features"][rows], found["labels"][rows]) for rows in parts)
    return digits.Sets(*train, *test)
