"""FISH mask (Table 6 of the paper): accuracy of a fine-tuned model after a reset of all but a few weights.

The paper fine-tunes BERT-large on GLUE, keeps the 0.5 % of the weights with the largest Fisher or Squisher, and resets
all others to their pre-trained values. Here a MiniLM encoder cut to two layers is fine-tuned on each of five text sets
(sentiment of tweets and of reviews, spam, authors, newsgroups), for 100 steps of 16 texts of at most 32 tokens, and
scored on 600 others. Its word embeddings are frozen and excluded from all masks, the random one included: most of their
rows occur in no batch, and a random mask would waste its entries there. Pooler and classifier are the head (this
encoder was pre-trained without a pooler), which is kept whole. As in the paper, shares refer to all weights, including
the word embeddings but not the head. The word embeddings are three quarters of so small a model: 0.5 % of the weights
are 2 % of the trained ones, 10 % are 41 %.

Decided on seed 100, before a reported seed was looked at:

* Recipe: learning rate 2e-4, the head's 1e-3, clipping at 1. Film reviews were left out: this encoder learns too little
  of them in 100 steps (accuracy of 66 %).
* Scores: F, as in the paper; (theta - theta_0)^2 F / 2; |theta - theta_0|; random. F is the Squisher, or the empirical
  Fisher (true labels, per example) of 256 training texts.
* Training inside a mask is another experiment: the pre-trained model is trained with the same batches, and only the
  weights in the mask (by the Squisher of the dense run, or random) change. Fewer weights have to move further, so each
  mask and share has its own learning rate of the trunk (``RATES``), which ``fish_rates`` found on seed 100. The rates
  1e-3 and 3e-3 were tried before the reported seeds ran; the others were tried later, and changed only the rate of the
  random mask at 0.5 %.
* Seeds 0, 1, 2 are reported. A seed draws texts, order, dropout, head, and the random mask. (An earlier version of this
  experiment reported tweets alone, at other shares and on the same seeds.)

    python -m scripts.experiments.fish_mask --full
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed

from scripts.experiments import encoder, texts
from scripts.experiments.encoder import Recipe
from scripts.experiments.fish_mask_report import ROWS, TRAINED, pictures, tables
from scripts.experiments.runner import Experiment, Result, Settings, main
from squisher_mergekit import Fisher, estimate_fisher, load_fisher
from squisher_mergekit.applications.fish_mask.recipe import select
from squisher_mergekit.applications.fish_mask.resetting import reset
from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.training import MaskedTraining

WORDS = "word_embeddings"
HEAD = tuple(f"^{part}" for part in encoder.HEAD)
TASKS = ("tweets", "products", "spam", "election", "newsgroups")
# Row -> share -> learning rate of the trunk inside the mask, found by ``fish_rates``.
RATES = {"squisher": (1e-3, 1e-3, 1e-3), "random": (1e-2, 3e-3, 1e-3)}

__all__ = ["EXPERIMENT", "main", "pictures", "tables"]


def recipe_of(settings: Settings) -> Recipe:
    """Return the recipe of the dense model."""
    sizes = {name: settings[name] for name in ("steps", "train", "validation", "test")}
    task = settings["task"]
    how = {"layers": 2, "length": 32, "lr": 2e-4, "head_lr": 1e-3, "frozen_words": True}
    return Recipe(task, settings["seed"], **sizes, labels=texts.classes(task), **how)


class Run:
    """Dense fine-tuning with its starting point."""

    def __init__(self, recipe: Recipe, work: Path, fisher_texts: int = 0) -> None:
        self.recipe, self.parts, self._work = recipe, recipe.parts(), work
        folder = encoder.fine_tune(recipe, work) / "final"
        self.dense = encoder.load(folder)
        self.base = self.start()
        self.fishers: dict[str, Fisher] = {"squisher": load_fisher(folder)}
        if fisher_texts:
            rows = encoder.in_order(self.parts.train[:fisher_texts], recipe.length, 16)
            self.fishers["fisher"] = estimate_fisher(self.dense, rows, labels="true", grouping="example")

    def start(self) -> Any:
        """Return the model before training: the published encoder with a new head."""
        set_seed(self.recipe.seed)
        model = encoder.load(encoder.encoder(self._work), self.recipe.labels, self.recipe.layers)
        model.get_input_embeddings().requires_grad_(False)
        return model

    def mask(self, row: str, share: float) -> Mask:
        """Return the mask of a row: the head and a share of all other weights."""
        source, score = ROWS[row]
        fisher = None if source is None else self.fishers[source]
        sizes = {name: p.numel() for name, p in self.dense.named_parameters()}
        head = sum(size for name, size in sizes.items() if name.startswith(encoder.HEAD))
        words = sum(size for name, size in sizes.items() if WORDS in name)
        total = sum(sizes.values())
        keep = (head + share * (total - head)) / (total - words)
        return select(
            self.dense, fisher, keep, base=self.base, score=score, head=HEAD, exclude=(WORDS,), seed=self.recipe.seed
        )

    def accuracy(self, model: nn.Module, part: str = "test") -> float:
        """Return the accuracy of a model in %."""
        return encoder.accuracy(model, getattr(self.parts, part), self.recipe.length)

    def after_reset(self, row: str, keep: float) -> float:
        """Return the accuracy of the dense model after a reset of the weights outside a mask."""
        model = copy.deepcopy(self.dense)
        reset(model, self.base, self.mask(row, keep))
        return self.accuracy(model)

    def trained_inside(self, mask: Mask, rate: float) -> Any:
        """Train the pre-trained model inside a mask, with the dense recipe but another learning rate of the trunk."""
        model, recipe = self.start(), replace(self.recipe, lr=rate)
        set_seed(recipe.seed)
        model.train()
        optimizer = torch.optim.AdamW(encoder.groups(model, recipe), betas=(0.9, recipe.beta2))
        with MaskedTraining(model, optimizer, mask):
            for batch in encoder.batches(self.parts.train, recipe, recipe.steps):
                model(**batch).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
                optimizer.step()
                optimizer.zero_grad()
        return model


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune on a task, select, reset and score, and train inside masks, for one seed."""
    run = Run(recipe_of(settings), work, settings["fisher_texts"])
    shares = settings["keep"]
    inside = {
        row: {
            share: run.trained_inside(run.mask(row, share), rate)
            for share, rate in zip(shares, settings["rates"][row], strict=True)
        }
        for row in TRAINED
    }
    return {
        "classes": run.recipe.labels,
        "dense": run.accuracy(run.dense),
        "reset": {row: {str(share): run.after_reset(row, share) for share in shares} for row in ROWS},
        "trained": {
            row: {str(share): run.accuracy(model) for share, model in found.items()} for row, found in inside.items()
        },
    }


_FULL: dict[str, Any] = {
    "steps": 100,
    "train": 1200,
    "validation": 200,
    "test": 600,
    "fisher_texts": 256,
    "keep": (0.005, 0.025, 0.1),
    "rates": RATES,
}
_QUICK = {
    **_FULL,
    "steps": 10,
    "train": 160,
    "validation": 40,
    "test": 100,
    "fisher_texts": 16,
    "keep": (0.025,),
    "rates": {"squisher": (1e-3,), "random": (3e-3,)},
}
EXPERIMENT = Experiment(
    "fish_mask",
    "FISH mask: all but a few fine-tuned weights go back to their pre-trained values.",
    cell,
    full=[{"task": task, "seed": seed, **_FULL} for task in TASKS for seed in range(3)],
    quick=[{"task": "tweets", "seed": 0, **_QUICK}],
)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
