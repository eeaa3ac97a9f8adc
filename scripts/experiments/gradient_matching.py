"""Gradient matching (UBGM) of four sentiment domains over a base that was trained on a fifth (Table 4 of the paper).

The paper fine-tunes RoBERTa on IMDB, from there on Yelp, RT, SST2 and Amazon, and merges the four with one shared head.
Here the base is MiniLM, six layers, fine-tuned on movie reviews (60 steps of 16 texts, learning rate 1e-4); from there
one model each for products and tweets (60 steps, 5e-5) and for Yelp and phones (30 steps): one pass over the training
texts, of 32 tokens each. The whole model is merged, pooler and classifier included.

Decided before a reported seed was looked at:

* Fishers come at the package's default scale (``normalize: auto``), times the number of training texts
  (``fisher_scale``), as in the original. The computed Fisher is the empirical one of the first 128 training texts.
* For each seed, alpha (``weight``) and the prior are chosen by the mean accuracy on 100 validation texts a domain, on
  one grid for all methods; of equal choices the first counts, and the package's defaults come first. Task arithmetic
  has no prior; the plain average and ``squisher`` have neither, because a common factor cancels.
* The base's validation texts are not used: a merge is for the four domains.
* Seeds 0, 1, 2 are reported. A seed draws texts, order, dropout, and the classifier of the base, which all four share.
"""

import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file
from torch import Tensor

from scripts.experiments import drawing, encoder
from scripts.experiments.encoder import Recipe
from scripts.experiments.merging import dots, empirical_fisher, signed
from scripts.experiments.runner import Experiment, Result, Settings, main
from scripts.experiments.tables import Table, mean_sd
from squisher_mergekit import Fisher, load_fisher

LENGTH = 32
ALPHAS = (1.0, 0.75, 0.5, 0.25)
PRIORS = (0.0, 0.1, 1.0)
ROWS = {
    "base": "base, before its fine-tuning on a domain",
    "single": "single models, each on its own domain",
    "linear": "plain average (`linear`)",
    "task_arithmetic": "`task_arithmetic`",
    "squisher-fisher": "`squisher` with the empirical Fisher",
    "squisher-squisher": "`squisher` with Squishers",
    "ubgm-fisher": "`ubgm_squisher` with the empirical Fisher",
    "ubgm-squisher": "`ubgm_squisher` with Squishers",
}
PerDomain = dict[str, float]
Choice = tuple[float, float]


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune the base and the domains, search, merge and score for one seed."""
    models = Models(settings, work)
    searched = {
        row: {
            f"{alpha} {prior}": round(_mean(models.score(models.merged(row, (alpha, prior)), "validation")), 4)
            for alpha, prior in product(ALPHAS, (0.0,) if row == "task_arithmetic" else PRIORS)
        }
        for row in ("task_arithmetic", "ubgm-fisher", "ubgm-squisher")
    }
    chosen = {row: max(found, key=found.__getitem__) for row, found in searched.items()}
    test = {
        row: models.score(models.merged(row, _choice(chosen.get(row, "1.0 0.0")))) for row in ROWS if row != "single"
    }
    return {
        "searched": searched,
        "chosen": {row: dict(zip(("alpha", "prior"), _choice(one), strict=True)) for row, one in chosen.items()},
        "test": {**test, "single": models.score_single()},
        "texts": {domain: len(parts.test) for domain, parts in models.parts.items()},
    }


def _choice(text: str) -> Choice:
    alpha, prior = text.split()
    return float(alpha), float(prior)


def _mean(found: Mapping[str, float]) -> float:
    return sum(found.values()) / len(found)


def domain_recipes(settings: Settings) -> dict[str, Recipe]:
    """Return the recipe of the base, and from there of each domain."""
    common = {"seed": settings["seed"], "labels": 2, "layers": settings["layers"], "length": LENGTH, "validation": 100}
    base = Recipe(settings["base"], steps=settings["base_steps"], train=960, **common)
    return {
        "base": base,
        **{
            domain: Recipe(domain, steps=steps, train=16 * steps, test=test, lr=5e-5, start=base.key, **common)
            for domain, (steps, test) in settings["domains"].items()
        },
    }


class Models:
    """Base and models of one seed, with their Squishers and Fishers."""

    def __init__(self, settings: Settings, work: Path) -> None:
        recipes = domain_recipes(settings)
        folders = {name: encoder.fine_tune(recipe, work) / "final" for name, recipe in recipes.items()}
        self.parts = {domain: recipe.parts() for domain, recipe in recipes.items() if domain != "base"}
        self._weights = {name: load_file(folder / "model.safetensors") for name, folder in folders.items()}
        self._texts = {name: recipe.train for name, recipe in recipes.items()}
        self._model = encoder.load(folders["base"])
        self._fishers = {
            "squisher": {name: load_fisher(folder) for name, folder in folders.items()},
            "fisher": {
                name: self._estimated(name, recipe, settings["fisher_texts"]) for name, recipe in recipes.items()
            },
        }

    def _estimated(self, name: str, recipe: Recipe, texts: int) -> Fisher:
        encoder.with_weights(self._model, self._weights[name])
        return empirical_fisher(self._model, recipe.parts().train[:texts], recipe.length)

    def merged(self, row: str, choice: Choice) -> Mapping[str, Tensor]:
        """Return the merged weights of a row, with alpha and the prior if the row has them."""
        alpha, prior = choice
        domains = {name: weights for name, weights in self._weights.items() if name != "base"}
        if row == "base":
            return self._weights["base"]
        if row == "linear":
            return merge_state_dicts(domains, "linear", parameters={"weight": 1.0})
        if row == "task_arithmetic":
            return merge_state_dicts(self._weights, row, base="base", parameters={"weight": alpha})
        method, kind = row.split("-")
        given = domains if method == "squisher" else self._weights
        parameters: dict[str, Any] = {
            "fisher": {name: self._fishers[kind][name] for name in given},
            "fisher_scale": {name: float(self._texts[name]) for name in given},
        }
        if method == "squisher":
            return merge_state_dicts(given, "squisher", parameters=parameters)
        parameters.update(weight=alpha, prior=prior)
        return merge_state_dicts(given, "ubgm_squisher", base="base", parameters=parameters)

    def score(self, weights: Mapping[str, Tensor], part: str = "test") -> PerDomain:
        """Return the accuracy of one model on each domain, in %."""
        encoder.with_weights(self._model, weights)
        return {
            domain: encoder.accuracy(self._model, getattr(parts, part), LENGTH) for domain, parts in self.parts.items()
        }

    def score_single(self) -> PerDomain:
        """Return the accuracy of each domain's model on its domain, in %."""
        found = {}
        for domain, parts in self.parts.items():
            encoder.with_weights(self._model, self._weights[domain])
            found[domain] = encoder.accuracy(self._model, parts.test, LENGTH)
        return found


FULL: dict[str, Any] = {
    "base": "movies",
    "base_steps": 60,
    # Domain -> steps of fine-tuning, and number of test texts.
    "domains": {"products": (60, 400), "tweets": (60, 400), "yelp": (30, 200), "phones": (30, 200)},
    "layers": 6,
    "fisher_texts": 128,
}
QUICK = {
    **FULL,
    "base_steps": 4,
    "domains": {"products": (4, 40), "yelp": (2, 20)},
    "layers": 1,
    "fisher_texts": 16,
}
EXPERIMENT = Experiment(
    "gradient_matching",
    "Gradient matching of four sentiment domains over a common base.",
    cell,
    full=[{"seed": seed, **FULL} for seed in range(3)],
    quick=[{"seed": 0, **QUICK}],
)


def means(report: Mapping[str, Any], row: str, *, by_size: bool = False) -> list[float]:
    """Return the mean of a row over the domains for each seed; if ``by_size``, weighted by the number of test texts."""
    found = []
    for result in _results(report):
        texts = result["texts"] if by_size else dict.fromkeys(result["texts"], 1)
        right = sum(result["test"][row][domain] * count for domain, count in texts.items())
        found.append(right / sum(texts.values()))
    return found


def _results(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [one["result"] for one in report["cells"]]


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return the table of accuracies by row and domain, with the mean and the mean weighted by size."""
    results = _results(report)
    domains = list(results[0]["texts"])
    rows = [
        (
            label,
            [
                mean_sd(means(report, row)),
                mean_sd(means(report, row, by_size=True)),
                *(mean_sd([result["test"][row][domain] for result in results]) for domain in domains),
            ],
        )
        for row, label in ROWS.items()
    ]
    sizes = ", ".join(f"{results[0]['texts'][domain]} {domain}" for domain in domains)
    return [
        Table(
            f"**Four sentiment domains, one head.** Accuracy in %, mean ± standard deviation over {len(results)} "
            f"seeds; held-out texts: {sizes}",
            ["mean", "weighted by size", *domains],
            rows,
            _notes(report),
        )
    ]


def _notes(report: Mapping[str, Any]) -> list[str]:
    """Return notes on the gains seed by seed, the choices, and the paper's order."""
    gains = {
        row: [a - b for a, b in zip(means(report, row), means(report, "linear"), strict=True)] for row in list(ROWS)[3:]
    }
    text = "; ".join(
        f"{ROWS[row]} {signed(found)} (above 0 in {sum(gain > 0 for gain in found)} of {len(found)} seeds)"
        for row, found in gains.items()
    )
    chosen = "; ".join(
        f"{ROWS[row]} "
        + ", ".join("/".join(f"{value:g}" for value in one["chosen"][row].values()) for one in _results(report))
        for row in ("task_arithmetic", "ubgm-fisher", "ubgm-squisher")
    )
    notes = [
        f"Points of mean accuracy above the plain average: {text}. alpha/prior chosen on the validation texts, seed by "
        f"seed: {chosen} ({_on_edge(report)})."
    ]
    if all(result["test"]["task_arithmetic"] == result["test"]["linear"] for result in _results(report)):
        domains = len(_results(report)[0]["texts"])
        notes.append(f"Task arithmetic came out as the plain average, which is what it is at an alpha of 1/{domains}.")
    ubgm = {"Fisher": gains["ubgm-fisher"], "Squisher": gains["ubgm-squisher"]}
    undecided = [name for name, found in ubgm.items() if min(found) <= 0]
    if undecided:
        notes.append(
            f"The paper's order (plain average 93.88, gradient matching 93.99 with the Fisher and 94.00 with the "
            f"Squisher) is not there on every seed with the {' and the '.join(undecided)}. The likely cause: models of "
            "one task that start from one base differ little, so that all merges do; a point is "
            f"{sum(_results(report)[0]['texts'].values()) / 100:.0f} of the texts tested on."
        )
    return notes


def _on_edge(report: Mapping[str, Any]) -> str:
    """Return a note on the choices at an end of the grid, except a prior of 0, the end of its range."""
    choices = [choice for result in _results(report) for choice in result["chosen"].values()]
    ends = (min(ALPHAS), max(ALPHAS))
    count = sum(choice["alpha"] in ends or choice["prior"] == max(PRIORS) for choice in choices)
    return f"{count} of {len(choices)} are at an end of the grid: alpha {ends[0]} or {ends[1]:g}, prior {max(PRIORS):g}"


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of accuracies by domain and row."""
    figure = drawing.new(8, 4.2)
    axes = figure.subplots()
    results = _results(report)
    found = {
        ROWS[row].replace("`", ""): {
            **{domain: [result["test"][row][domain] for result in results] for domain in results[0]["texts"]},
            "mean": means(report, row),
            "weighted by size": means(report, row, by_size=True),
        }
        for row in _SHOWN
    }
    dots(axes, found)
    axes.axvline(len(results[0]["texts"]) - 0.5, color="0.7", linewidth=0.8)
    axes.set_ylabel("accuracy on held-out texts (%)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return {"gradient_matching.png": drawing.png(figure)}


_SHOWN = (
    "single",
    "linear",
    "squisher-fisher",
    "squisher-squisher",
    "base",
    "task_arithmetic",
    "ubgm-fisher",
    "ubgm-squisher",
)


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
