"""Checks of a Fisher against weights: names and shapes."""

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.fisher.config import Coverage, FisherConfig
from squisher_mergekit.fisher.fits import check_base, check_headers
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.weights import Weights


@pytest.mark.parametrize("shape", [(8, 3), (4, 3), (8, 4)], ids=["more rows", "fewer rows", "other columns"])
def test_other_shapes_are_refused(shape, tmp_path):
    """A Fisher has the shapes of its weights."""
    save_file({"embed": torch.ones(shape)}, tmp_path / "model.safetensors")
    fisher = Fisher({"embed": torch.ones(5, 3)}, FisherConfig(estimator="empirical", statistic="mean"))
    with pytest.raises(MismatchError, match="must have the weight's shape"):
        check_headers(fisher, Weights(tmp_path))


def _fisher(names, without=()):
    coverage = Coverage.model_validate({"with": len(names), "without": dict.fromkeys(without, "frozen")})
    config = FisherConfig(estimator="empirical", statistic="mean", coverage=coverage)
    return Fisher({name: torch.ones(5, 3) for name in names}, config)


def _base(folder, **tensors):
    save_file(
        {name.replace("__", "."): torch.ones(shape) for name, shape in tensors.items()}, folder / "model.safetensors"
    )
    return Weights(folder)


@pytest.mark.parametrize(
    ("names", "tensors", "found"),
    [
        (["net.a", "net.b"], {"decoder__a": (5, 3)}, "has no such tensor"),
        (["net.b", "net.a"], {"net__a": (7, 3)}, r"has \[7, 3\]"),
    ],
    ids=["other names", "other shapes"],
)
def test_a_base_of_another_architecture_is_refused(names, tensors, found, tmp_path):
    """Neither other names nor other shapes are ignored, and the message shows one tensor of both."""
    with pytest.raises(MismatchError, match=rf"net\.a is \[5, 3\], and the base {found}"):
        check_base(_fisher(names), _base(tmp_path, **tensors))


@pytest.mark.parametrize(
    ("names", "without", "tensors"),
    [
        (["net.a", "head"], (), {"net__a": (5, 3)}),
        (["net.a", "net.embed"], (), {"net__a": (5, 3), "net__embed": (2, 3)}),
        (["net.a"], (), {"a": (5, 3)}),
        (["a"], (), {"net__a": (5, 3)}),
        (["head"], ("net.a",), {"net__a": (5, 3)}),
    ],
    ids=["new head", "larger vocabulary", "bare model", "model with a head", "frozen body"],
)
def test_a_base_of_the_same_architecture_is_accepted(names, without, tensors, tmp_path):
    """A base may lack the head, the prefix of the names, and new tokens."""
    check_base(_fisher(names, without), _base(tmp_path, **tensors))
