"""FISH mask (Table 6 of the paper): which few fine-tuned weights make the model, if the others go back.

The paper fine-tunes BERT-large on GLUE, keeps the 0.5 % of the weights with the largest Fisher or Squisher, and gives
all others their pre-trained values back. Here a MiniLM encoder cut to two layers is fine-tuned on each of five text
sets (sentiment of tweets and of reviews, spam, authors, newsgroups), for 100 steps of 16 texts of at most 32 tokens,
and scored on 600 others. Its word embeddings are frozen and excluded from all masks, the random one among them: most of
their rows occur in no batch, and a random mask that falls there would be one of nothing. Pooler and classifier are the
head (this encoder was pre-trained to be read without a pooler): kept whole. Shares are, as in the paper, of all
weights, words included, but not of the head. Words are three quarters of so small a model: 0.5 % of it are 2 % of what
is trained, 10 % are 41 %.

Settled before a reported seed was looked at, on seed 100:

* Recipe: learning rate 2e-4, the head's 1e-3, clipping at 1. Film reviews were left out: this encoder learns too little
  of them in 100 steps (66 % right).
* Scores: F, as in the paper; (theta - theta_0)^2 F / 2; |theta - theta_0|; drawn. F is the Squisher, or the empirical
  Fisher (true labels, one example at a time) of 256 of the texts trained on.
* Training inside a mask is another experiment: the pre-trained model is trained anew, with the same batches, and only
  the weights in the mask (by the Squisher of the dense run, or drawn) change. The fewer they are the further they have
  to move: each mask and share has a rate of the trunk's own (``RATES``), found by ``fish_rates`` on seed 100. Two of
  its rates, 1e-3 and 3e-3, were tried before the reported seeds were run; those beyond, which only changed the random
  mask's at 0.5 %, after.
* Seeds 0, 1, 2 are reported. A seed draws texts, order, dropout, head, and the random mask. (An earlier version of this
  experiment reported tweets alone, at other shares and on the same seeds.)

    scripts/experiments/fish_mask.py --full
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
from squisher_mergekit.applications.fish_mask.choice import select
from squisher_mergekit.applications.fish_mask.resetting import reset
from squisher_mergekit.applications.masks import Mask
from squisher_mergekit.training import MaskedTraining

WORDS = "word_embeddings"
HEAD = tuple(f"^{part}" for part in encoder.HEAD)
TASKS = ("tweets", "products", "spam", "election", "newsgroups")
# Row -> the trunk's learning rate inside its mask, by share; as ``fish_rates`` found them.
RATES = {"squisher": (1e-3, 1e-3, 1e-3), "random": (1e-2, 3e-3, 1e-3)}

__all__ = ["EXPERIMENT", "main", "pictures", "tables"]


def recipe_of(settings: Settings) -> Recipe:
    """Return how the dense model is fine-tuned."""
    sizes = {name: settings[name] for name in ("steps", "train", "validation", "test")}
    task = settings["task"]
    how = {"layers": 2, "length": 32, "lr": 2e-4, "head_lr": 1e-3, "frozen_words": True}
    return Recipe(task, settings["seed"], **sizes, labels=texts.classes(task), **how)


class Run:
    """A dense fine-tuning, and what it started from."""

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
        """Return the mask of a row: the head, and a share of all other weights."""
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
        """Return the share of texts, in %, that a model classifies rightly."""
        return encoder.accuracy(model, getattr(self.parts, part), self.recipe.length)

    def after_reset(self, row: str, keep: float) -> float:
        """Return the accuracy of the dense model whose weights off a mask went back."""
        model = copy.deepcopy(self.dense)
        reset(model, self.base, self.mask(row, keep))
        return self.accuracy(model)

    def trained_inside(self, mask: Mask, rate: float) -> Any:
        """Return the pre-trained model trained inside a mask, as the dense one was but at a rate of the trunk's."""
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
