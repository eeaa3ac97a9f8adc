"""Pruning of single weights of a small convolutional network on digits: accuracy against sparsity.

    PYTHONPATH=scripts python -m experiments.pruning --plot accuracy.png

The network has the layout of the paper's, in small: pairs of convolutions with BatchNorm, a pool after each, one linear
layer, trained by Adam on 4,000 digits of 14 x 14. The Squisher is read from that Adam; the Fisher is the empirical one
of 1,000 training images. Of each seed and sparsity, all scores prune the same network, which is then trained a little
under the mask. Statistics of BatchNorm are taken anew before accuracy is measured right after pruning, as they are
those of the whole network otherwise.
"""

import argparse
import copy
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy
from tqdm import tqdm

from experiments import digits
from squisher_mergekit import estimate_fisher
from squisher_mergekit.applications.pruning.modules import choose_weights
from squisher_mergekit.training.ewc import live_squisher
from squisher_mergekit.training.masked import MaskedTraining

WIDTHS, BATCH, RATE = (12, 24), 64, 1e-3
STEPS, RETRAIN = 250, 30  # optimizer steps
EXAMPLES = 1000  # behind the Fisher
SCORES = ("fisher", "squisher", "magnitude", "random")
SPARSITIES = (0.5, 0.75, 0.85, 0.9, 0.95)
SEEDS = (0, 1, 2)
_STYLES = {"fisher": ("o", "-"), "squisher": ("s", "--"), "magnitude": ("^", "-."), "random": ("x", ":")}


@dataclass(frozen=True)
class Data:
    """Images [n, 1, 14, 14] and labels for training and testing."""

    train: Tensor
    labels: Tensor
    test: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Point:
    """Accuracy right after pruning, with new statistics of BatchNorm, and after training under the mask."""

    at_once: float
    retrained: float


def load(seed: int) -> Data:
    """Return the digits of a seed, pixels averaged two by two and centred."""
    found = digits.load(seed)

    def small(pixels: Tensor) -> Tensor:
        return avg_pool2d(pixels.reshape(-1, 1, digits.SIDE, digits.SIDE), 2) - 0.13

    return Data(small(found.train), found.train_labels, small(found.test), found.test_labels)


def network(seed: int) -> nn.Sequential:
    """Return the network: two pairs of convolutions, a pool to 7 x 7 and to 3 x 3, one linear layer."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    last = 1
    for width in WIDTHS:
        for _ in range(2):
            layers += [nn.Conv2d(last, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
            last = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(last * 9, digits.CLASSES))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data, steps: int, seed: int) -> None:
    """Train by mini-batches that the seed draws."""
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        rows = torch.randint(len(data.labels), (BATCH,), generator=order)
        optimizer.zero_grad()
        cross_entropy(model(data.train[rows]), data.labels[rows]).backward()
        optimizer.step()


@torch.no_grad()
def renew_statistics(model: nn.Module, images: Tensor, batch: int = 250) -> None:
    """Take the running mean and variance of each BatchNorm anew, as plain averages over batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    for part in images.split(batch):
        model(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of test images that are told right."""
    model.eval()
    return (model(data.test).argmax(1) == data.test_labels).double().mean().item()


def curves(
    seed: int, sparsities: Sequence[float] = SPARSITIES, scores: Sequence[str] = SCORES, steps: int = STEPS
) -> tuple[float, dict[str, list[Point]]]:
    """Train one network and prune it by each score to each sparsity.

    Args:
        seed: Of the split, the network, the order of the images and the random score.
        sparsities: Shares of the weights of the convolutions that become 0.
        scores: Of ``SCORES``.
        steps: Of the training before.

    Returns:
        Accuracy of the whole network, and score -> a point for each sparsity.
    """
    data, model = load(seed), network(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    train(model, optimizer, data, steps, seed)
    fishers: Mapping[str, Mapping[str, Tensor]] = {
        "squisher": live_squisher(model, optimizer),
        "fisher": estimate_fisher(
            model, zip(data.train[:EXAMPLES].split(250), data.labels[:EXAMPLES].split(250), strict=True)
        ),
    }
    found: dict[str, list[Point]] = {score: [] for score in scores}
    for score in scores:
        for sparsity in sparsities:
            kind = "fisher" if score in fishers else score
            mask = choose_weights(model, fishers.get(score), sparsity, score=kind, seed=seed).mask
            pruned = copy.deepcopy(model)
            for name, parameter in pruned.named_parameters():
                parameter.data.mul_(mask[name])
            found[score].append(retrain(pruned, data, mask, seed))
    return accuracy(model, data), found


def retrain(pruned: nn.Module, data: Data, mask: Mapping[str, Tensor], seed: int) -> Point:
    """Measure a pruned network, train it a little under its mask, and measure it again."""
    renew_statistics(pruned, data.train[:EXAMPLES])
    at_once = accuracy(pruned, data)
    optimizer = torch.optim.Adam(pruned.parameters(), lr=RATE)
    with MaskedTraining(pruned, optimizer, mask):
        train(pruned, optimizer, data, RETRAIN, seed + 1)
    renew_statistics(pruned, data.train[:EXAMPLES])
    return Point(at_once, accuracy(pruned, data))


def report(seeds: Sequence[int], whole: Sequence[float], found: Sequence[Mapping[str, list[Point]]]) -> list[str]:
    """Return a table: mean accuracy in % over the seeds, right after pruning and after training under the mask."""
    rows = [f"accuracy in %, mean of {len(seeds)} seeds; whole networks {100 * sum(whole) / len(whole):.1f}"]
    rows.append(f"{'sparsity':<12}" + "".join(f"{f'{sparsity:.0%}':>15}" for sparsity in SPARSITIES))
    for score in SCORES:
        cells = []
        for column in range(len(SPARSITIES)):
            at_once, retrained = (
                100 * sum(getattr(one[score][column], kind) for one in found) / len(found)
                for kind in ("at_once", "retrained")
            )
            cells.append(f"{at_once:>8.1f} ->{retrained:>5.1f}")
        rows.append(f"{score:<12}" + "".join(cells))
    return rows


def plot(whole: Sequence[float], found: Sequence[Mapping[str, list[Point]]]) -> bytes:
    """Draw accuracy against sparsity, right after pruning and after training; bars from the lowest seed to the highest.

    Returns:
        A PNG.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"at_once": "right after pruning", "retrained": f"after {RETRAIN} steps under the mask"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), titles.items(), strict=True):
        axes.axhline(100 * sum(whole) / len(whole), color="black", linewidth=0.8, label="whole network")
        for number, score in enumerate(SCORES):
            values = 100 * torch.tensor([[getattr(point, kind) for point in one[score]] for one in found])
            mean = values.mean(0)
            spread = torch.stack([mean - values.min(0).values, values.max(0).values - mean])
            places = [100 * sparsity + 0.4 * (number - 1.5) for sparsity in SPARSITIES]
            marker, line = _STYLES[score]
            axes.errorbar(
                places, mean.tolist(), spread.tolist(), label=score, marker=marker, linestyle=line, capsize=2,
                linewidth=1.2, markersize=5, color=f"C{number}",
            )  # fmt: skip
        axes.set(title=title, xlabel="sparsity of the convolutions in %", xticks=[100 * each for each in SPARSITIES])
        axes.grid(linewidth=0.3)
    figure.axes[0].set_ylabel("test accuracy in %")
    figure.axes[1].legend(loc="lower left", fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--plot", type=Path, help="write a PNG there")
    options = parser.parse_args(arguments)
    whole, found = zip(*(curves(seed) for seed in tqdm(options.seeds, unit="seed")), strict=True)
    print("\n".join(report(options.seeds, whole, found)))
    if options.plot:
        options.plot.write_bytes(plot(whole, found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
