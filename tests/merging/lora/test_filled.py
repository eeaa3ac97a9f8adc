"""Fisher of a LoRA with one value for layers of a kind that it left alone."""

import pytest
import torch

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.encoded import RankOneStore
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.lora.filled import FilledFisher

SHAPES = {
    **{f"model.layers.{i}.mlp.up_proj.weight": (4 + i, 3) for i in range(4)},
    **{f"model.layers.{i}.mlp.up_proj.bias": (4 + i,) for i in range(4)},
    "model.norm.weight": (3,),
}


def _known() -> Fisher:
    generator = torch.Generator().manual_seed(2)
    means = {}
    for i in (0, 2):
        row, col = torch.rand(4 + i, generator=generator), torch.rand(3, generator=generator)
        means[f"model.layers.{i}.mlp.up_proj.weight"] = (row, col * row.mean() / col.mean())
    config = FisherConfig(estimator="lifted_lora", statistic="ema", bias_corrected=True)
    return Fisher(
        RankOneStore(means, {"model.layers.3.mlp.up_proj.bias": torch.rand(7, generator=generator)}, "memory"), config
    )


def test_a_layer_of_a_known_kind_has_the_mean_of_all_entries() -> None:
    """Larger layers count more; known layers stay as they are."""
    known = _known()
    filled = FilledFisher(known, SHAPES)
    entries = torch.cat([known[f"model.layers.{i}.mlp.up_proj.weight"].flatten() for i in (0, 2)])
    for i in (1, 3):
        found = filled[f"model.layers.{i}.mlp.up_proj.weight"]
        assert found.shape == (4 + i, 3)
        assert torch.allclose(found.double(), entries.double().mean().expand_as(found), rtol=1e-6)
    assert all(torch.equal(filled[name], known[name]) for name in known)


def test_weights_and_biases_are_of_different_kinds() -> None:
    """A bias takes the mean over biases, and a kind without F stays without."""
    filled = FilledFisher(_known(), SHAPES)
    bias = _known()["model.layers.3.mlp.up_proj.bias"].mean()
    assert torch.allclose(filled["model.layers.0.mlp.up_proj.bias"], bias.expand(4))
    assert "model.norm.weight" not in filled
    assert filled.fills == {name for name in SHAPES if "up_proj" in name} - set(_known())


@pytest.mark.parametrize("scaling", ["raw", "debiased"])
def test_the_moments_are_those_of_the_known_layers(scaling: str) -> None:
    """Constant layers change neither mean nor norm."""
    known = _known()
    assert FilledFisher(known, SHAPES).moments(scaling) == known.moments(scaling)  # type: ignore[arg-type]
