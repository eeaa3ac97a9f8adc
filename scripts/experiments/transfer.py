"""Task2Vec (Table 7 of the paper): transfer from the nearest task.

The paper fine-tunes BERT on about twenty text sets for three epochs, takes published transfers between all pairs, and
measures the rank of the best source in an order by distance. Here there are 19 tasks from 16 text sets, 14 of them with
two classes; no text is in two tasks. The first two layers of a MiniLM sentence encoder learn a task, with the mean over
tokens and a new head, in 32 steps of 16 texts. The embedding is made from the Squisher, the second moments of AdamW,
and from the empirical Fisher (true labels, per example) of 128 of the texts. The word embeddings are frozen, and heads
are excluded.

The experiment measures the transfer. For a target, the trunk of each source trains with a new head for 6 steps of 16
texts of the target, always the same texts and the same head. The score is the accuracy on 200 held-out texts (88 and 90
for the two smallest sets). "No source" starts from the published encoder. The target's own embedding comes from its 32
steps, as in the paper.

Decided before a reported seed was looked at:

* Distance: the package's defaults, the paper's cosine after a division of each embedding by its mean. Notes below the
  tables have three others.
* Recipe: that of ``task2vec``, but with a learning rate of 2e-4 for the trunk. Of 5e-5 and 2e-4, tried with six tasks,
  three targets and seed 100, the latter makes larger differences between sources. After 4 steps at 5e-5 a head has
  learnt nothing on some targets; after 8 steps, every source reaches 99 % on one target.
* Seeds 0, 1, 2 are reported. A seed draws texts, order and heads.
* The paper's in-class setting is a topic here; only topics with at least three sources count.

Each task is the target of all others, on every seed. (A first version of the tables had a fifth of these targets; only
their number changed afterwards.)

    python -m scripts.experiments.transfer --full
"""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts.demo_tasks.data import Split, split
from scripts.experiments import encoder, runner, task2vec, texts
from scripts.experiments.runner import Experiment, Result, Settings
from scripts.experiments.transfer_report import DEFAULT, KINDS, NO_SOURCE, pictures, tables
from squisher_mergekit import estimate_fisher, load_fisher, save_squisher
from squisher_mergekit.applications.task2vec.distances import Metric, TaskNormalize, distance_matrix
from squisher_mergekit.applications.task2vec.embedding import Embedding, embed, read_embedding, write_embedding
from squisher_mergekit.applications.task2vec.ranking import orders_of

BATCH, LENGTH, CLIP = task2vec.BATCH, task2vec.LENGTH, task2vec.CLIP
# Name -> metric and normalization. The tables report the first one, DEFAULT.
METRICS: dict[str, tuple[Metric, TaskNormalize]] = {
    DEFAULT: ("cosine", "mean"),
    "cosine, not normalised": ("cosine", "none"),
    "asymmetric": ("asymmetric", "mean"),
    "plain cosine": ("plain_cosine", "mean"),
}
PAIRS = tuple(name for name, task in task2vec.TASKS.items() if task.labels)
TASKS = (
    *("movies", "products", "tweets", "imdb", "yelp", "phones", "drugs"),
    *("business-politics", "sports-tech", "reuters", "reuters-rest"),
    *("graphics-windows", "pc-mac", "autos-motorcycles", "baseball-hockey", "sci", "talk"),
    *("election", "spam"),
)
__all__ = ["EXPERIMENT", "main", "pictures", "tables"]


def rows_of(name: str) -> Sequence[tuple[str, str]]:
    """Return all texts of a task with their labels."""
    return task2vec.rows_of(name) if name in PAIRS else texts.rows_of(name)


def topic_of(name: str) -> str:
    """Return the topic of a task."""
    return texts.SETS[task2vec.TASKS[name].data if name in PAIRS else name].topic


@cache
def parts(name: str, train: int, test: int, seed: int) -> Split:
    """Return training and test texts; a third of a small set is for the test."""
    rows = rows_of(name)
    counts = [sum(label == one for _, label in rows) for one in sorted({label for _, label in rows})]
    classes, smallest = len(counts), min(counts)
    n_test = min(test // classes, smallest // 3)
    return split(rows, min(train // classes, smallest - n_test) * classes, n_test * classes, seed)


def batches(rows: Sequence[tuple[str, int]], steps: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Return one batch for each step, from passes over the rows in order."""
    repeated = [rows[place % len(rows)] for place in range(steps * BATCH)]
    return list(task2vec.batches(repeated))


def network(classes: int, seed: int, work: Path) -> task2vec.Network:
    """Return the published encoder with a new head, which is equal for equal numbers of classes."""
    model = task2vec.Network(encoder.encoder(work))
    torch.manual_seed(seed)
    model.classifier = nn.Linear(model.trunk.config.hidden_size, classes)
    return model


def train(model: task2vec.Network, rows: Sequence[tuple[str, int]], steps: int, rate: float) -> torch.optim.Optimizer:
    """Train a network and return its optimizer."""
    trunk = [parameter for parameter in model.trunk.parameters() if parameter.requires_grad]
    head = {"params": list(model.classifier.parameters()), "lr": task2vec.HEAD_LR}
    optimizer = torch.optim.AdamW([{"params": trunk, "lr": rate}, head])
    for inputs, labels in batches(rows, steps):
        nn.functional.cross_entropy(model(**inputs), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def learn(name: str, settings: Settings, work: Path) -> Path:
    """Learn a task, or return an earlier result.

    Returns:
        A folder with the weights of the trunk without word embeddings, and an embedding of each of ``KINDS``.
    """
    how = {key: settings[key] for key in ("seed", "steps", "train", "test", "rate", "fisher_texts")}
    folder = work / "transfer" / f"{name}-{runner.key(name, how)}"
    return runner.cached(folder, lambda out: _learn(name, how, work, out))


def _learn(name: str, how: Settings, work: Path, out: Path) -> None:
    part = parts(name, how["train"], how["test"], how["seed"])
    model = network(len(part.labels), how["seed"], work)
    optimizer = train(model, part.train, how["steps"], how["rate"])
    save_file(trunk_of(model), out / "trunk.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        facts = {"examples_per_step": BATCH, "max_grad_norm": CLIP, "loss_reduction": "mean"}
        save_squisher(model, optimizer, Path(folder), **facts)
        write_embedding(embed(load_fisher(folder), name=name), out / "squisher.safetensors")
    some = task2vec.batches(part.train[: how["fisher_texts"]])
    fisher = estimate_fisher(model, some, labels="true", grouping="example", task="classification", verify=False)
    write_embedding(embed(fisher, name=name), out / "fisher.safetensors")


def trunk_of(model: task2vec.Network) -> dict[str, Tensor]:
    """Return the trained weights without the head."""
    return {name: p.detach().clone() for name, p in model.trunk.named_parameters() if p.requires_grad}


@torch.inference_mode()
def halves(model: nn.Module, rows: Sequence[tuple[str, int]]) -> list[float]:
    """Return the accuracy in % on the texts of even index and on those of odd index."""
    right = []
    for batch in encoder.in_order(rows, LENGTH, 50):
        labels = batch.pop("labels")
        right += (model(**batch).argmax(-1) == labels).tolist()
    return [100 * sum(half) / len(half) for half in (right[::2], right[1::2])]


def cell(settings: Settings, work: Path) -> Result:
    """Measure the transfer from all tasks to one target, and the distances to the target."""
    target, names = settings["target"], list(settings["tasks"])
    part = parts(target, settings["train"], settings["test"], settings["seed"])
    places = {name: learn(name, settings, work) for name in names}
    model = network(len(part.labels), settings["seed"], work)
    published = trunk_of(model)
    head = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    scores = {}
    for name in (NO_SOURCE, *(name for name in names if name != target)):
        trunk = published if name == NO_SOURCE else load_file(places[name] / "trunk.safetensors")
        model.trunk.load_state_dict(trunk, strict=False)
        model.classifier.load_state_dict(head)
        train(model, part.train, settings["target_steps"], settings["rate"])
        scores[name] = halves(model, part.test)
    return {
        "halves": scores,
        "distances": {kind: _distances(kind, places, target) for kind in KINDS},
        "sizes": {name: len(rows_of(name)) for name in names},
        "topics": {name: topic_of(name) for name in names},
        "classes": {name: len({label for _, label in rows_of(name)}) for name in names},
    }


def _distances(kind: str, places: Mapping[str, Path], target: str) -> dict[str, dict[str, float]]:
    """Return a mapping from metrics and sources to distances from the target."""
    tasks: dict[str, Embedding] = {n: read_embedding(place / f"{kind}.safetensors") for n, place in places.items()}
    found = {}
    for label, (metric, normalize) in METRICS.items():
        column = orders_of(distance_matrix(tasks, metric, normalize), list(tasks), [target])[target]
        found[label] = {source: round(value, 8) for source, value in column.items()}
    return found


_FULL: dict[str, Any] = {
    "tasks": TASKS,
    "steps": 32,
    "target_steps": 6,
    "train": 512,
    "test": 200,
    "rate": 2e-4,
    "fisher_texts": 128,
}
_QUICK = {**_FULL, "tasks": TASKS[:4], "steps": 4, "target_steps": 2, "train": 64, "test": 40, "fisher_texts": 16}
EXPERIMENT = Experiment(
    "transfer",
    "Task2Vec: orders of source tasks by distance, against measured transfer.",
    cell,
    full=[{"seed": seed, "target": target, **_FULL} for seed in range(3) for target in TASKS],
    quick=[{"seed": seed, "target": TASKS[seed], **_QUICK} for seed in range(2)],
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment as a command."""
    return runner.main(EXPERIMENT, arguments)


if __name__ == "__main__":
    sys.exit(main())
