"""CPU time to compute a Fisher and to read a Squisher (Table 1 of the paper).

The paper times the computation of the Fisher and the reading of the optimizer state in each of its settings. Here each
setting has a small counterpart on one CPU thread: MiniLM for merging, gradient matching, FISH mask and Task2Vec, a
small convolutional network for pruning, and a perceptron for EWC. Two functions compute the same Fisher:

* ``loop``, as users do today: one example at a time, its gradient squared and added;
* ``estimate_fisher``, which takes the examples of a batch at once.

Labels are the true ones; EWC takes all outputs of the model (the exact Fisher), as in the paper. Examples are in
memory, and texts are tokenized, before the clock starts. The Squisher is read from the state that torch saved, and from
the portable file; each tensor is summed, so all bytes are read. Files are in the system's cache. The cost of a pass
does not depend on the weights, so models have seen two steps. It grows with the number of examples, which the table has
(the paper takes whole training sets). Seconds are medians of CPU time over three repeats; they alone differ between
runs.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from scripts.experiments import digits, drawing, encoder, forgetting
from scripts.experiments.runner import Experiment, Result, Settings, main
from scripts.experiments.tables import Table
from squisher_mergekit import estimate_fisher, extract, load_fisher

Batch = Any  # keyword arguments of an encoder, or a pair of images and labels
BATCH = 16


@dataclass(frozen=True)
class Setting:
    """Setting of the paper.

    Attributes:
        title: label of the row.
        paper: seconds for the Fisher in the paper.
        make: function from a number of examples and a work folder to model, single examples and batches.
        labels: labels of the Fisher.
    """

    title: str
    paper: float
    make: Callable[[int, Path], tuple[nn.Module, list[Batch], list[Batch]]]
    labels: str = "true"


def texts_of(data: str, **recipe: Any) -> Callable[[int, Path], tuple[nn.Module, list[Batch], list[Batch]]]:
    """Return a function that makes an encoder, single texts without padding, and batches of similar length."""

    def make(examples: int, work: Path) -> tuple[nn.Module, list[Batch], list[Batch]]:
        settings = encoder.Recipe(data, 0, **recipe)
        rows = settings.parts().train[:examples]
        model = encoder.load(encoder.encoder(work), settings.labels, settings.layers)
        if settings.frozen_words:
            model.get_input_embeddings().requires_grad_(False)
        singles = [encoder.encode([row], settings.length) for row in rows]
        return model, singles, list(encoder.in_order(rows, settings.length, BATCH))

    return make


def images_of(network: Callable[[], nn.Module]) -> Callable[[int, Path], tuple[nn.Module, list[Batch], list[Batch]]]:
    """Return a function that makes a network and digits."""

    def make(examples: int, work: Path) -> tuple[nn.Module, list[Batch], list[Batch]]:
        data = digits.load(0)
        pixels, labels = data.train[:examples], data.train_labels[:examples]
        parts = [list(zip(pixels.split(size), labels.split(size), strict=True)) for size in (1, 100)]
        return network(), parts[0], parts[1]

    return make


def convolutional() -> nn.Module:
    """Return three pairs of convolutions, a small version of the paper's VGG."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, digits.SIDE, digits.SIDE))]
    for before, width in ((1, 8), (8, 16), (16, 32)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 3 * 3, digits.CLASSES))


def perceptron() -> nn.Module:
    """Return the perceptron of the experiment with EWC."""
    return forgetting.network(digits.SIDE**2, digits.CLASSES, seed=0)


SETTINGS = {
    "merging": Setting("merging: MiniLM, 5 classes", 29266, texts_of("tweets")),
    "gradient_matching": Setting("gradient matching: MiniLM, 2 classes", 436, texts_of("movies", labels=2)),
    "pruning": Setting("pruning: small CNN, digits", 2.5, images_of(convolutional)),
    "fish_mask": Setting(
        "FISH mask: MiniLM, 2 layers, words frozen",
        698,
        texts_of("movies", labels=2, layers=2, length=32, frozen_words=True),
    ),
    "task2vec": Setting("Task2Vec: MiniLM, 2 layers", 51902, texts_of("newsgroups", labels=4, layers=2)),
    "ewc": Setting("EWC: perceptron, digits, exact", 1246, images_of(perceptron), "exact"),
}


def loop(model: nn.Module, singles: Sequence[Batch], labels: str) -> dict[str, Tensor]:
    """Return the Fisher of a loop over single examples, whose gradients are squared and averaged.

    Args:
        model: Classifier.
        singles: Examples, each a batch of one.
        labels: ``true``, or ``exact`` for one pass per class, weighted by its probability.
    """
    model.eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in trained.items()}
    for single in singles:
        for loss, weight in _losses(*_logits(model, single), labels):
            gradients = torch.autograd.grad(loss, list(trained.values()), retain_graph=labels == "exact")
            for name, gradient in zip(trained, gradients, strict=True):
                total[name] += weight * gradient**2
    return {name: tensor / len(singles) for name, tensor in total.items()}


def _logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    if isinstance(batch, Mapping):
        return model(**{key: value for key, value in batch.items() if key != "labels"}).logits, batch["labels"]
    return model(batch[0]), batch[1]


def _losses(logits: Tensor, target: Tensor, labels: str) -> Iterator[tuple[Tensor, float]]:
    """Yield the losses of one example with their weights."""
    logs = logits.log_softmax(-1)[0]
    if labels == "exact":
        yield from zip(-logs, logs.exp().tolist(), strict=True)
    else:
        yield -logs[target.item()], 1.0


def cell(settings: Settings, work: Path) -> Result:
    """Time one setting."""
    torch.manual_seed(0)
    setting, repeats = SETTINGS[settings["setting"]], settings["repeats"]
    model, singles, batches = setting.make(settings["examples"], work)
    ours, found = _timed(lambda: estimate_fisher(model, batches, labels=setting.labels), repeats)
    theirs, looped = _timed(lambda: loop(model, singles, setting.labels), repeats)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".cost.", dir=work) as scratch:
        names = checkpoint(model, batches[:2], Path(scratch))
        state = Path(scratch) / "optimizer.pt"
        optimizer, _ = _timed(lambda: touched(state, model=scratch, names=names), max(repeats, 5))
        extract(state, Path(scratch) / "portable", model=scratch, names=names)
        portable, _ = _timed(lambda: touched(Path(scratch) / "portable"), max(repeats, 5))
    return {
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "apart": apart(found, looped),
        "cpu_seconds": {"loop": theirs, "estimate": ours, "optimizer": optimizer, "portable": portable},
    }


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return the largest difference relative to the largest entry of its tensor.

    Tensors below 1e-12 of the model's largest entry count as of that size: the key bias of an attention layer has a
    gradient of rounding only, because adding one number to all scores changes nothing.
    """
    largest = {name: float(tensor.max()) for name, tensor in expected.items()}
    floor = 1e-12 * max(largest.values())
    return max(float((found[name] - expected[name]).abs().max()) / max(largest[name], floor) for name in expected)


def checkpoint(model: nn.Module, batches: Sequence[Batch], folder: Path) -> list[str]:
    """Train one step on each batch, save weights and optimizer state, and return the parameter names."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-4)
    for batch in batches:
        nn.functional.cross_entropy(*_logits(model, batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    save_model(model, str(folder / "model.safetensors"))
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return list(trained)


def touched(source: Path, **given: Any) -> int:
    """Open a Squisher, read each tensor, and return their number."""
    fisher = load_fisher(source, **given)
    for name in fisher:
        fisher[name].sum()
    return len(fisher)


def _timed(run: Callable[[], Any], repeats: int) -> tuple[list[float], Any]:
    """Return the CPU seconds of each repeat, and the last return value."""
    spent, found = [], None
    for _ in range(repeats):
        begin = time.process_time()
        found = run()
        spent.append(round(time.process_time() - begin, 5))
    return spent, found


EXPERIMENT = Experiment(
    "cost",
    "CPU seconds to compute a Fisher, and to read a Squisher.",
    cell,
    full=[
        {"setting": name, "examples": 1000 if name in ("pruning", "ewc") else 128, "repeats": 3} for name in SETTINGS
    ],
    quick=[{"setting": name, "examples": 50, "repeats": 1} for name in ("pruning", "ewc")],
    revision=2,
    repeats=False,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table with one row for each setting."""
    rows, measured = [], medians(report)
    for one in report["cells"]:
        name = one["settings"]["setting"]
        spent = measured[name]
        rows.append(
            (
                SETTINGS[name].title,
                [
                    f"{one['result']['parameters'] / 1e6:.2f} M",
                    str(one["settings"]["examples"]),
                    f"{spent['loop']:.2f}",
                    f"{spent['estimate']:.2f} ({spent['loop'] / spent['estimate']:.1f} times less)",
                    f"{spent['optimizer']:.4f}",
                    f"{spent['portable']:.4f}",
                    f"{spent['estimate'] / spent['optimizer']:,.0f}",
                    f"{SETTINGS[name].paper:,g}",
                ],
            )
        )
    columns = [
        "trained parameters",
        "examples",
        "Fisher one example at a time",
        "Fisher by `estimate_fisher`",
        "Squisher from `optimizer.pt`",
        "Squisher from the portable file",
        "Fisher (ours) / Squisher (`optimizer.pt`)",
        "the paper's Fisher, seconds",
    ]
    return [Table("**Cost of a Fisher and of a Squisher.** CPU seconds on one thread", columns, rows, _notes(report))]


def medians(report: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return the median CPU seconds of each method, by setting."""
    return {
        one["settings"]["setting"]: {
            way: statistics.median(spent) for way, spent in one["result"]["cpu_seconds"].items()
        }
        for one in report["cells"]
    }


def _notes(report: Mapping[str, Any]) -> list[str]:
    found = medians(report)
    ratios = {name: spent["estimate"] / spent["optimizer"] for name, spent in found.items()}
    least = min(ratios, key=ratios.__getitem__)
    most = max(one["result"]["apart"] for one in report["cells"])
    slower = [SETTINGS[name].title for name, spent in found.items() if spent["estimate"] >= spent["loop"]]
    repeats = {one["settings"]["repeats"] for one in report["cells"]}
    notes = [
        f"Medians over {', '.join(map(str, sorted(repeats)))} repeats (readings: at least 5), files in the system's "
        f"cache. Both ways to the Fisher give the same, to {most:.0e} of a tensor's largest entry. Computing grows "
        "with the number of examples, which are few here; the paper takes whole training sets, and gives 0.1 s and "
        "less for a Squisher (EWC: less than 1 s). Even so, reading the optimizer's file is at least "
        f"{ratios[least]:,.0f} times cheaper than `estimate_fisher` ({SETTINGS[least].title})."
    ]
    if slower:
        notes.append(f"`estimate_fisher` was not faster than one example at a time in: {'; '.join(slower)}.")
    return notes


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of CPU seconds by setting and method on a logarithmic axis."""
    found = medians(report)
    figure = drawing.new(9, 3.8)
    axes = figure.add_subplot()
    looks = {
        "loop": ("Fisher, one example at a time", "0.25", ""),
        "estimate": ("Fisher, estimate_fisher", "0.6", "//"),
        "optimizer": ("Squisher, optimizer.pt", "0.85", ".."),
        "portable": ("Squisher, portable file", "1.0", "xx"),
    }
    for number, (way, (label, shade, hatch)) in enumerate(looks.items()):
        places = [place + 0.2 * (number - 1.5) for place in range(len(found))]
        heights = [spent[way] for spent in found.values()]
        axes.bar(places, heights, 0.2, label=label, color=shade, hatch=hatch, edgecolor="black", linewidth=0.6)
    axes.set_yscale("log")
    axes.set_ylabel("CPU time on one thread (s)")
    axes.set_xticks(range(len(found)), [SETTINGS[name].title.replace(": ", ":\n", 1) for name in found], fontsize=7)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return {"cost.png": drawing.png(figure)}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
