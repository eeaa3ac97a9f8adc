"""Statistics of a Fisher, against slow references."""

import pytest
import torch

from squisher_mergekit.errors import ConfigError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import BINS_PER_DECADE, human_bytes, kind_of, known_scaling, summarize
from squisher_mergekit.tensors.safetensors import MemoryStore


def _fisher(**tensors):
    return Fisher(MemoryStore(tensors), FisherConfig())


def _random(*shape, zeros=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = 10 ** (torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 - 9)
    return torch.where(torch.rand(*shape, generator=generator) < zeros, 0.0, values).float()


def test_rows_are_the_extremes_median_and_zeros_of_each_tensor():
    """A row has minimum, lower median, maximum and share of zeros, in the order of the Fisher."""
    tensors = {"b.weight": _random(7, 13, zeros=0.3), "a.bias": _random(11, seed=1).bfloat16()}
    summary = summarize(_fisher(**tensors))
    assert [row.name for row in summary.rows] == ["b.weight", "a.bias"]
    for row in summary.rows:
        values = sorted(tensors[row.name].flatten().double().tolist())
        assert (row.minimum, row.median, row.maximum) == (values[0], values[(len(values) - 1) // 2], values[-1])
        assert row.zeros == values.count(0.0) / len(values)
        assert row.shape == tuple(tensors[row.name].shape)
    assert [row.dtype for row in summary.rows] == ["float32", "bfloat16"]


@pytest.mark.parametrize("zeros", [0.0, 0.4, 0.9])
def test_over_all_entries(zeros):
    """The total has exact count, extremes, mean and zeros, and the median within half a bin."""
    tensors = {f"model.layers.{i}.mlp.weight": _random(17, 29, zeros=zeros, seed=i) for i in range(3)}
    summary = summarize(_fisher(**tensors))
    everything = torch.cat([tensor.flatten().double() for tensor in tensors.values()])
    assert summary.entries == 3 * 17 * 29
    assert (summary.minimum, summary.maximum) == (everything.min().item(), everything.max().item())
    assert summary.mean == pytest.approx(everything.mean().item(), rel=1e-12)
    assert summary.zeros == (everything == 0).double().mean().item()
    assert summary.median == pytest.approx(everything.median().item(), rel=10 ** (0.5 / BINS_PER_DECADE) - 1 + 1e-9)


def test_histograms_count_every_positive_entry_once_by_kind_of_layer():
    """Layers of one kind share a histogram, which counts all positive entries, including the smallest float32."""
    tensors = {
        "model.layers.0.mlp.weight": torch.tensor([1e-45, 3e38, 0.0]),
        "model.layers.1.mlp.weight": torch.tensor([1.0, 2.0]),
        "model.norm.weight": torch.tensor([0.0, 0.0]),
    }
    summary = summarize(_fisher(**tensors))
    assert {kind: int(counts.sum()) for kind, counts in summary.histograms.items()} == {"mlp": 4, "norm": 0}
    assert summary.zero_counts == {"mlp": 1, "norm": 2}


@pytest.mark.parametrize("start", [None, 0.25])
def test_a_scale_moves_every_number(start):
    """Rows, mean, zeros and histograms at the debiased scale are those of the scaled tensors."""
    statistic = {"statistic": "ema"} if start is None else {"statistic": "sum"}
    config = FisherConfig.model_validate(
        {"estimator": "squisher", "steps": {"default": 3, "b.weight": 1}}
        | {"optimizer": {"beta2": 0.9, "initial_accumulator_value": start}}
        | statistic
    )
    tensors = {"a.weight": _random(17, 13, zeros=0.3), "b.weight": _random(11, seed=1)}
    tensors = {name: (tensor * 1e9 + (start or 0)) for name, tensor in tensors.items()}
    fisher = Fisher(MemoryStore(tensors), config)
    summary = summarize(fisher, scaling=known_scaling(fisher))
    exact = {
        name: (tensor.double() - (start or 0)) * fisher.factor(name, "debiased") for name, tensor in tensors.items()
    }
    plain = summarize(_fisher(**exact))
    assert (summary.scaling, plain.scaling) == ("debiased", "raw")
    for found, wanted in zip(summary.rows, plain.rows, strict=True):
        assert (found.minimum, found.median, found.maximum) == pytest.approx(
            (wanted.minimum, wanted.median, wanted.maximum), rel=1e-12
        )
        assert found.zeros == wanted.zeros
    assert summary.mean == pytest.approx(plain.mean, rel=1e-12)
    assert summary.zero_counts == plain.zero_counts
    assert all(torch.equal(summary.histograms[kind], counts) for kind, counts in plain.histograms.items())


def test_an_unknown_scale_is_raw():
    """Without steps or decay in the metadata the scale is raw, and debiased is refused."""
    fisher = Fisher(MemoryStore({"w": torch.ones(3)}), FisherConfig(statistic="ema", steps=3))
    assert known_scaling(fisher) == "raw"
    with pytest.raises(ConfigError, match="beta2"):
        summarize(fisher, scaling="debiased")


def test_an_empty_tensor_is_described():
    """A tensor without entries has a row of zeros and does not count."""
    summary = summarize(_fisher(**{"a.weight": torch.zeros(0, 5)}))
    assert (summary.entries, summary.median, summary.zeros, summary.rows[0].shape) == (0, 0.0, 0.0, (0, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e-12])
def test_bad_entries_are_refused(bad):
    """NaN, infinite and negative entries are refused."""
    with pytest.raises(ValuesError, match=r"w .* has 1 (NaN|infinite|negative) of 2 entries"):
        summarize(_fisher(w=torch.tensor([1.0, bad])))


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (28_123_000_000, "28.1 GB"), (10**15, "1e+03 TB")]
)
def test_human_bytes(size, text):
    """Sizes have three digits and a unit of powers of 1000."""
    assert human_bytes(size) == text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.3.mlp.up_proj.weight", "mlp.up_proj"),
        ("model.layers.31.self_attn.q_proj.bias", "self_attn.q_proj"),
        ("model.embed_tokens.weight", "embed_tokens"),
        ("lm_head.weight", "lm_head"),
        ("transformer.h.0.attn.c_attn.weight", "attn.c_attn"),
        ("model.layers.2.block_sparse_moe.experts.7.w1.weight", "block_sparse_moe.experts.w1"),
        ("bert.embeddings.LayerNorm.bias", "embeddings.LayerNorm"),
        ("0.weight", "0.weight"),
        ("weight", "weight"),
        ("scale", "scale"),
    ],
)
def test_kinds(name, kind):
    """The kind of a layer is its name without layer and expert numbers, weight and bias. It is never empty."""
    assert kind_of(name) == kind


def test_layers_of_one_kind_share_it():
    """Weights and biases at one position of every layer share their kind."""
    names = [f"model.layers.{i}.mlp.fc.{part}" for i in range(12) for part in ("weight", "bias")]
    assert {kind_of(name) for name in names} == {"mlp.fc"}


def test_another_default_device_changes_no_statistics():
    """A program may have called ``torch.set_default_device``."""
    fisher = _fisher(w=_random(13, 7, zeros=0.2))
    wanted = summarize(fisher)
    with torch.device("meta"):
        found = summarize(fisher)
    assert (found.rows, found.median, found.mean) == (wanted.rows, wanted.median, wanted.mean)
