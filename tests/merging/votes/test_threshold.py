"""One threshold for a whole model against a global sort."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from squisher_mergekit.merging.votes import threshold
from squisher_mergekit.merging.votes.threshold import model_choices
from squisher_mergekit.tensors.topk import keys
from tests.merging.votes.reference import mask_of

SIZES = {"a": 5000, "b": 1, "c": 1200, "d": 3777}


class _Models:
    """Scores of models, which count how often they are read."""

    def __init__(self, scores: dict[str, dict[str, Tensor]]) -> None:
        self.scores = scores
        self.reads = 0

    def read(self, models: frozenset[str] | None) -> Iterator[tuple[str, str, Callable[[int], Iterator[Tensor]]]]:
        """Yield the tensors of some models."""
        self.reads += 1
        for name in SIZES:
            for model, scores in self.scores.items():
                if models is None or model in models:
                    yield model, name, lambda stride, part=scores[name]: iter([part[::stride]])  # type: ignore[misc]


def _assert_chosen(models: _Models, densities: dict[str, float]) -> None:
    entries = dict.fromkeys(densities, sum(SIZES.values()))
    found = model_choices(models.read, densities, entries)
    for model, density in densities.items():
        whole = torch.cat(list(models.scores[model].values())).double()
        expected = mask_of(whole, density).split(list(SIZES.values()))
        for (name, scores), mask in zip(models.scores[model].items(), expected, strict=True):
            choice = found[model][name]
            kept = choice.cut.take(keys(scores)) & (scores > 0)
            assert torch.equal(kept, mask), (model, name)
            assert (choice.kept, choice.size) == (int(mask.sum()), len(scores)) or not (scores > 0).all()


@pytest.mark.parametrize("sample", [1 << 20, 700, 40])
@pytest.mark.parametrize("levels", [0, 5, 300])
def test_a_global_sort(sample: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample, also a small one, finds the entries of a stable sort over all tensors, ties and zeros included."""
    monkeypatch.setattr(threshold, "SAMPLE", sample)
    generator = torch.Generator().manual_seed(levels)
    scores: dict[str, dict[str, Tensor]] = {}
    for model in ("x", "y", "z"):
        drawn = {name: torch.rand(size, generator=generator) ** 4 for name, size in SIZES.items()}
        scores[model] = {n: (t * levels).floor() / levels if levels else t for n, t in drawn.items()}
    _assert_chosen(_Models(scores), {"x": 0.05, "y": 0.5, "z": 0.97})


def test_a_small_model_is_read_once() -> None:
    """A model that is its own sample is read once."""
    models = _Models({"x": {name: torch.rand(size) for name, size in SIZES.items()}})
    _assert_chosen(models, {"x": 0.3})
    assert models.reads == 1


def test_a_misleading_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A threshold outside the range of the sample is found by histograms."""
    monkeypatch.setattr(threshold, "SAMPLE", 100)
    stride = threshold._stride(sum(SIZES.values()))
    scores = {name: torch.rand(size) for name, size in SIZES.items()}
    for part in scores.values():
        part[::stride] = 9.0
    models = _Models({"x": scores})
    _assert_chosen(models, {"x": 0.2})
    assert models.reads > 2


def test_zeros_are_never_kept() -> None:
    """A model with fewer positive scores than its share keeps those alone."""
    models = _Models({"x": {name: (torch.arange(size) % 10 == 3).float() for name, size in SIZES.items()}})
    _assert_chosen(models, {"x": 0.4})
