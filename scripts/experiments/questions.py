"""Questions about Squishers that the paper leaves open, answered on merges of four text tasks.

1. After how many steps is a Squisher good? The weights are those of the last step; the Squisher is the one after 2, 5,
   10, 20 and 50 steps, with beta2 = 0.9, 0.98 and 0.999. One run gives all of them: beta2 changes the weights as well
   as the second moment, so the run has one AdamW (beta2 = 0.999) and separate averages of the squared (clipped)
   gradients.
2. What do fewer bits cost? bfloat16 and the compact forms ``log8``, ``log4`` and ``rank1``, written and read again; and
   an optimizer with an 8-bit state (AdamW8bit of bitsandbytes, for all tensors of at least 4,096 entries, word
   embeddings included). That run keeps a float32 average of the same gradients, so only the bits differ.
3. What does an estimate from other data cost? Fishers on the task's own training texts, with true labels and with
   labels drawn from the model; and, with drawn labels, on the texts of the next task and on movie reviews, which belong
   to no task.

Models are those of ``merging``: MiniLM, six layers, 50 steps of 16 texts a task, heads that start equal, because the
differences are largest there. In 50 steps a task sees each of its 800 texts once.

Decided before a reported seed was looked at: nothing is searched. All weights are 1, ``normalize`` is the package's
default (none for Squishers and other moving averages, mean for computed Fishers); computed Fishers have 128 texts.
Seeds 0, 1, 2 are reported. Rank correlations are means over the four tasks, over every eleventh entry of the merged
tensors without the word embeddings, in which almost half of the entries are exactly 0 (unseen words). Their ceiling is
the rank correlation of two Fishers on different sets of 128 training texts.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods import merge_state_dicts
from torch import Tensor, nn

from scripts.experiments import encoder
from scripts.experiments.encoder import HEAD, Recipe, Row
from scripts.experiments.questions_report import pictures, tables
from scripts.experiments.runner import Experiment, Result, Settings, main
from squisher_mergekit import Fisher, estimate_fisher, extract, load_fisher
from squisher_mergekit.fisher.compare import spearman
from squisher_mergekit.training import GradientSquares

__all__ = ["EXPERIMENT", "pictures", "tables"]
TASKS = ("tweets", "bbc", "newsgroups", "election")
ELSEWHERE = "movies"
BETAS = (0.9, 0.98, 0.999)
FORMS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "log8": {"compress": "log8"},
    "log4": {"compress": "log4"},
    "rank1": {"compress": "rank1"},
}
WORDS = "bert.embeddings.word_embeddings.weight"
STRIDE = 11
BITS8 = "bitsandbytes"
Fishers = Sequence[Mapping[str, Tensor]]


class Models:
    """Models of one seed, one for each task.

    Args:
        recipes: Recipe of each task's model.
        folders: Folder of each task's model.
        fisher_texts: Number of texts of a computed Fisher.
    """

    def __init__(self, recipes: Mapping[str, Recipe], folders: Mapping[str, Path], fisher_texts: int) -> None:
        self.recipes, self._texts = recipes, fisher_texts
        self.parts = {task: recipe.parts() for task, recipe in recipes.items()}
        self._models = {task: encoder.load(folders[task]) for task in recipes}
        self._trunks = {task: trunk_of(model) for task, model in self._models.items()}

    def accuracy(self, fishers: Fishers | None, normalize: str = "auto") -> float:
        """Return the mean accuracy of a merge over the tasks in %, by Fishers or as a plain average."""
        trunks = list(self._trunks.values())
        if fishers is None:
            merged = merge_state_dicts(trunks, "linear", parameters={"weight": 1.0})
        else:
            merged = merge_state_dicts(trunks, "squisher", parameters={"fisher": fishers, "normalize": normalize})
        found = []
        for task, model in self._models.items():
            parts = self.parts[task]
            encoder.with_weights(model, merged, head=False)
            found.append(encoder.accuracy(model, parts.test, self.recipes[task].length, len(parts.labels)))
        return round(sum(found) / len(found), 4)

    def estimated(self, rows: Mapping[str, Sequence[Row]], labels: str = "true") -> list[Fisher]:
        """Return a Fisher of each model, on the given rows of its task."""
        fishers = []
        for task, model in self._models.items():
            encoder.with_weights(model, self._trunks[task], head=False)
            batches = encoder.in_order(rows[task], self.recipes[task].length, 16)
            fishers.append(estimate_fisher(model, batches, labels=labels))
        return fishers

    def texts(self, part: int = 0) -> dict[str, list[Row]]:
        """Return the training texts of each task for a Fisher; another part has other texts."""
        begin = part * self._texts
        return {task: parts.train[begin : begin + self._texts] for task, parts in self.parts.items()}


def trunk_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the merged weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith(HEAD)}


def entries(fisher: Mapping[str, Tensor]) -> Tensor:
    """Return every eleventh entry of each merged tensor except the word embeddings, in the order of names."""
    names = sorted(name for name in fisher if name != WORDS and not name.startswith(HEAD))
    return torch.cat([fisher[name].reshape(-1)[::STRIDE].float() for name in names])


def rank(one: Fishers, other: Fishers) -> float:
    """Return the rank correlation of two Fishers, mean over the tasks."""
    found = [spearman(entries(a), entries(b)) for a, b in zip(one, other, strict=True)]
    return round(sum(value for value in found if value is not None) / len(found), 4)


def swapped(fishers: Fishers) -> Fishers:
    """Return the Fishers rotated, so that each model gets the Fisher of the next model."""
    return [*fishers[1:], fishers[0]]


def after_steps(settings: Settings, work: Path) -> Result:
    """Record Squishers along a run, and compare each with a computed Fisher at the final weights."""
    recipes = _recipes(settings)
    with _scratch(work) as scratch:
        for task, recipe in recipes.items():
            kept = Averages(scratch / "averages" / task, BETAS, settings["taken_at"])
            encoder.train(recipe, work, scratch / task, kept.watch)
            encoder.keep(recipe, work, scratch / task)  # the next questions use the same models
        models = Models(recipes, {task: scratch / task / "final" for task in recipes}, settings["fisher_texts"])
        fishers, others = (models.estimated(models.texts(part)) for part in range(2))
        rows = []
        for beta2 in BETAS:
            for step in settings["taken_at"]:
                found = [load_fisher(scratch / "averages" / task / place(beta2, step)) for task in recipes]
                accuracy = models.accuracy(found, "none")
                rows.append({"beta2": beta2, "step": step, "accuracy": accuracy, "rank": rank(found, fishers)})
        own = [load_fisher(scratch / task / "final") for task in recipes]
        return {
            "rows": rows,
            "average": models.accuracy(None),
            "fisher": models.accuracy(fishers),
            "ceiling": rank(others, fishers),
            "unlike_adams": max(_apart(a, b) for a, b in zip(found, own, strict=True)),
        }


def in_few_bits(settings: Settings, work: Path) -> Result:
    """Write Squishers in each form, read them again and merge; add the plain average and the control."""
    models, folders = _trained(settings, work)
    rows = []
    with _scratch(work) as scratch:
        for form, how in FORMS.items():
            found = [extract(folder, scratch / form / task, **how) for task, folder in folders.items()]
            size = sum(file.stat().st_size for file in (scratch / form).glob("*/fisher*.safetensors"))
            rows.append({"form": form, "bytes": size, "accuracy": models.accuracy(found)})
    weights = sum((folder / "model.safetensors").stat().st_size for folder in folders.values())
    control = models.accuracy(swapped([load_fisher(folder) for folder in folders.values()]))
    return {"rows": rows, "model_bytes": weights, "average": models.accuracy(None), "swapped": control}


def by_8bit_optimizer(settings: Settings, work: Path) -> Result:
    """Train with an 8-bit optimizer, and merge with its state and with a float32 average of the same gradients."""
    try:
        library = importlib.import_module(BITS8)
    except ImportError as error:
        raise RuntimeError(f"these cells train with {BITS8}, which is not installed; pip install {BITS8}") from error
    recipes = _recipes(settings)
    with _scratch(work) as scratch:
        for task, recipe in recipes.items():
            kept = Averages(scratch / "averages" / task, [recipe.beta2], [recipe.steps])
            encoder.train(recipe, work, scratch / task, kept.watch, library.optim.AdamW8bit)
        models = Models(recipes, {task: scratch / task / "final" for task in recipes}, settings["fisher_texts"])
        kinds = {
            "float32": [
                load_fisher(scratch / "averages" / task / place(r.beta2, r.steps)) for task, r in recipes.items()
            ],
            "8bit": [load_fisher(scratch / task / "final") for task in recipes],
        }
        return {
            "average": models.accuracy(None),
            "accuracy": {kind: models.accuracy(found, "none") for kind, found in kinds.items()},
            "zeros": {kind: _zeros(found) for kind, found in kinds.items()},
            "raised": _raised(kinds["float32"], kinds["8bit"]),
            "rank": rank(kinds["8bit"], kinds["float32"]),
            "version": library.__version__,
        }


def from_other_data(settings: Settings, work: Path) -> Result:
    """Estimate Fishers on own and other texts, and merge with each."""
    models, folders = _trained(settings, work)
    own = models.texts()
    following = dict(zip(own, [*list(own.values())[1:], next(iter(own.values()))], strict=True))
    elsewhere = encoder.Recipe(ELSEWHERE, settings["seed"]).parts().train[: settings["fisher_texts"]]
    fishers: dict[str, Fishers] = {
        "squisher": [load_fisher(folder) for folder in folders.values()],
        "own_true": models.estimated(own, "true"),
        "own_drawn": models.estimated(own, "sampled"),
        "next_drawn": models.estimated(following, "sampled"),
        "elsewhere_drawn": models.estimated(dict.fromkeys(own, elsewhere), "sampled"),
    }
    ceiling = rank(models.estimated(models.texts(1), "true"), fishers["own_true"])
    rows = [
        {"kind": kind, "accuracy": models.accuracy(found), "rank": rank(found, fishers["own_true"])}
        for kind, found in fishers.items()
    ]
    return {"rows": rows, "ceiling": ceiling, "swapped": models.accuracy(swapped(fishers["own_true"]))}


QUESTIONS: dict[str, Callable[[Settings, Path], Result]] = {
    "steps": after_steps,
    "forms": in_few_bits,
    "data": from_other_data,
    "8bit": by_8bit_optimizer,
}


class Averages:
    """Moving averages of the squared gradient along a run, one for each decay, written after given steps."""

    def __init__(self, folder: Path, betas: Sequence[float], steps: Sequence[int]) -> None:
        self._folder, self._betas, self._steps = folder, betas, steps
        self._averages: list[GradientSquares] = []

    def watch(self, step: int, model: nn.Module) -> None:
        """Add the gradients of a step."""
        self._averages = self._averages or [GradientSquares(model, beta) for beta in self._betas]
        for average in self._averages:
            average.update()
            if step in self._steps:
                average.save(self._folder / place(average.beta, step))


def place(beta2: float, step: int) -> str:
    """Return the folder of an average."""
    return f"{beta2}-{step}"


def cell(settings: Settings, work: Path) -> Result:
    """Answer one question with one seed."""
    return QUESTIONS[settings["question"]](settings, work)


def _recipes(settings: Settings) -> dict[str, Recipe]:
    # As in ``merging``, so that its trained models are used.
    keys = ("steps", "layers", "train", "validation", "test")
    given = {key: settings[key] for key in keys} | {"keep_at": tuple(settings["keep_at"])}
    seed = settings["seed"]
    return {task: Recipe(task, seed, head_seed=seed, **given) for task in settings["tasks"]}


def _trained(settings: Settings, work: Path) -> tuple[Models, dict[str, Path]]:
    recipes = _recipes(settings)
    folders = {task: encoder.fine_tune(recipe, work) / "final" for task, recipe in recipes.items()}
    return Models(recipes, folders, settings["fisher_texts"]), folders


def _apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two Fishers relative to their largest entry."""
    largest = max(float(b[name].max()) for name in b)
    return max(float((a[name] - b[name]).abs().max()) for name in b) / largest


def _zeros(fishers: Fishers) -> float:
    """Return the share of entries that are exactly 0 in %, mean over the tasks."""
    return round(100 * sum(float((entries(fisher) == 0).float().mean()) for fisher in fishers) / len(fishers), 4)


def _raised(exact: Fishers, coded: Fishers) -> float:
    """Return the share of the zeros of one Fisher that the other lacks in %, mean over the tasks."""
    shares = [float((entries(b)[entries(a) == 0] > 0).float().mean()) for a, b in zip(exact, coded, strict=True)]
    return round(100 * sum(shares) / len(shares), 4)


@contextmanager
def _scratch(work: Path) -> Iterator[Path]:
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".questions.", dir=work) as folder:
        yield Path(folder)


_FULL: dict[str, Any] = {
    "tasks": TASKS,
    "steps": 50,
    "keep_at": (20, 35),
    "layers": 6,
    "train": 800,
    "validation": 100,
    "test": 200,
    "fisher_texts": 128,
}
_QUICK = {**_FULL, "tasks": TASKS[:2], "steps": 6, "keep_at": (), "layers": 2, "fisher_texts": 16, "test": 100}
EXPERIMENT = Experiment(
    "questions",
    "What users ask of a Squisher and the paper does not answer.",
    cell,
    full=[
        {"question": question, "seed": seed, **_FULL}
        | ({"taken_at": (2, 5, 10, 20, 50)} if question == "steps" else {})
        for question in QUESTIONS
        for seed in range(3)
    ],
    quick=[
        {"question": question, "seed": 0, **_QUICK} | ({"taken_at": (2, 6)} if question == "steps" else {})
        for question in ("steps", "forms", "data")
    ],
)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
