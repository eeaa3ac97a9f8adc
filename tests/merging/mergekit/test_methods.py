"""Methods in mergekit's registry, called in memory with Fishers as mappings of tensors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from mergekit.merge_methods.base import TensorGroup

from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.mergekit.methods import SQUISHER, ResolvedFisher
from squisher_mergekit.merging.read import LoadedFisher
from squisher_mergekit.merging.run import Run
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.merging.reference import (
    Tensors,
    assert_refused,
    assert_trimmed,
    assert_within,
    draw_fisher,
    keep_largest,
    largest,
    merge,
    squisher_reference,
    ubgm_reference,
)

SHAPES = {"encoder.weight": (7, 13), "encoder.bias": (13,)}


def _models(count: int) -> tuple[list[Tensors], list[Tensors]]:
    generator = torch.Generator().manual_seed(0)
    weights = [{n: torch.randn(*s, generator=generator) for n, s in SHAPES.items()} for _ in range(count)]
    return weights, [{n: draw_fisher(s, generator) for n, s in SHAPES.items()} for _ in range(count)]


def test_state_dicts() -> None:
    """`merge_state_dicts` merges every tensor by Eq. 13, with unscaled plain mappings."""
    weights, fishers = _models(3)
    result = merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "weight": [1.0, 0.5, 2.0]})
    for name in SHAPES:
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0, 0.5, 2.0])
        assert_within(result[name], reference, largest(thetas))


def test_state_dicts_by_id_with_a_base() -> None:
    """UBGM accepts models, Fishers and the base by id."""
    weights, fishers = _models(3)
    keys = ["base", "a", "b"]
    result = merge_state_dicts(
        dict(zip(keys, weights, strict=True)),
        "ubgm_squisher",
        base="base",
        parameters={"fisher": dict(zip(keys, fishers, strict=True)), "prior": 0.5},
    )
    for name in SHAPES:
        (base, *thetas), (base_fisher, *others) = [m[name] for m in weights], [f[name] for f in fishers]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        assert_within(result[name], ubgm_reference(base, base_fisher, thetas, others, [1.0, 1.0], 0.5), size)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("squisher", {}),
        ("squisher", {"power": 0.5, "normalize": "l2"}),
        ("squisher", {"density": 0.3}),
        ("squisher", {"density": 0.3, "density_by": "change", "density_scope": "model"}),
        ("squisher", {"consensus": "sign", "lambda": 1.5}),
        ("squisher", {"structure": "rows", "block": 5}),
        ("squisher", {"structure": "columns", "block": 5}),
        ("squisher", {"structure": "kron", "block": 5, "density": 0.5, "trimmed": "abstain"}),
        ("ubgm_squisher", {"prior": 0.1}),
    ],
)
def test_the_device_of_the_weights(method: str, options: dict[str, Any], device: torch.device) -> None:
    """A merge of weights on a device with Fishers on the CPU is there, and is the merge of the CPU."""
    weights, fishers = _models(3)
    keys = ["base", "a", "b"]
    parameters = {"fisher": dict(zip(keys, fishers, strict=True)), **options}
    expected = merge_state_dicts(dict(zip(keys, weights, strict=True)), method, base="base", parameters=parameters)
    placed = {key: {n: t.to(device) for n, t in model.items()} for key, model in zip(keys, weights, strict=True)}
    result = merge_state_dicts(placed, method, base="base", parameters=parameters)
    for name in SHAPES:
        assert result[name].device.type == device.type
        assert_within(result[name].cpu(), expected[name], 10 * largest([model[name] for model in weights]))


def test_one_tensor_by_name() -> None:
    """`merge_tensors` looks its tensor up by the given name."""
    weights, fishers = _models(2)
    name = "encoder.bias"
    thetas = [model[name] for model in weights]
    result = merge_tensors(thetas, "squisher", parameters={"fisher": fishers}, name=name)
    assert_within(result, squisher_reference(thetas, [f[name] for f in fishers], [1.0, 1.0]), largest(thetas))


def test_a_fisher_brings_its_scale() -> None:
    """A Fisher object is debiased by its own steps, as in a merge of files."""
    weights, fishers = _models(2)
    configs = [
        FisherConfig(estimator="squisher", statistic="ema", steps=steps, optimizer={"beta2": 0.99})
        for steps in (3, 200)
    ]
    given = [Fisher(MemoryStore(f), c) for f, c in zip(fishers, configs, strict=True)]
    result = merge_state_dicts(weights, "squisher", parameters={"fisher": given})
    for name in SHAPES:
        thetas = [model[name] for model in weights]
        scaled = [f[name].double() / (1 - 0.99**t) for f, t in zip(fishers, (3, 200), strict=True)]
        assert_within(result[name], squisher_reference(thetas, scaled, [1.0, 1.0]), largest(thetas))


def test_buffers_and_modules() -> None:
    """Modules merge too. Integer buffers are copied, and gradients are neither needed nor recorded."""
    torch.manual_seed(0)
    modules = [torch.nn.BatchNorm1d(5) for _ in range(2)]
    fishers = [{name: torch.rand(5) for name in modules[0].state_dict()} for _ in range(2)]
    result = merge_state_dicts(modules, "squisher", parameters={"fisher": fishers})
    assert result["num_batches_tracked"].dtype == torch.int64
    assert not result["weight"].requires_grad


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_is_refused_in_memory(dtype: torch.dtype) -> None:
    """A state dict in float8 is refused by name."""
    weights, fishers = _models(2)
    weights = [each | {"encoder.weight": each["encoder.weight"].to(dtype)} for each in weights]
    with pytest.raises(UnsupportedStateError, match=r"encoder\.weight of 0 is stored as float8"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers})


def test_refusals() -> None:
    """Missing mappings, missing tensors, wrong shapes, wrong keys and NaN are refused by name."""
    weights, fishers = _models(2)
    with pytest.raises(ConfigError, match="needs a Fisher for input 0: a mapping"):
        merge_state_dicts(weights, "squisher")
    with pytest.raises(MismatchError, match=r"Fisher of encoder\.bias for every input, but 1 has none"):
        merge_state_dicts(
            weights, "squisher", parameters={"fisher": [fishers[0], {"encoder.weight": torch.ones(7, 13)}]}
        )
    transposed = fishers[1] | {"encoder.weight": fishers[1]["encoder.weight"].t()}
    with pytest.raises(MismatchError, match=r"\[7, 13\].*\[13, 7\]"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": [fishers[0], transposed]})
    with pytest.raises(TypeError, match="wieght"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "wieght": 1.0})
    fishers[0]["encoder.bias"][2] = float("nan")
    with pytest.raises(ValuesError, match=r"encoder\.bias in memory has 1 NaN"):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers})


def test_missing_average() -> None:
    """With missing='average', a tensor that one mapping lacks is the weighted mean of all."""
    weights, fishers = _models(2)
    del fishers[1]["encoder.bias"]
    parameters = {"fisher": fishers, "weight": [1.0, 3.0], "missing": "average"}
    result = merge_state_dicts(weights, "squisher", parameters=parameters)
    mean = (weights[0]["encoder.bias"].double() + 3 * weights[1]["encoder.bias"].double()) / 4
    assert_within(result["encoder.bias"], mean, mean.abs() + 1)


def _in_memory() -> tuple[dict[str, Tensors], dict[str, Tensors]]:
    generator = torch.Generator().manual_seed(0)
    keys, shapes = ("base", "a", "b"), {"encoder.weight": (7, 13), "encoder.bias": (13,)}
    weights = {k: {n: torch.randn(*s, generator=generator) for n, s in shapes.items()} for k in keys}
    return weights, {k: {n: draw_fisher(s, generator) for n, s in shapes.items()} for k in keys}


def test_a_dropped_entry_counts_as_the_base(tmp_path: Path) -> None:
    """Half of [1, 5] with F [3, 1] is kept, and the second entry enters as the base's 9 with weight 1."""
    tensors = [torch.tensor([0.0, 9.0]), torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])]
    fishers = [{"w": torch.tensor([0.0, 0.0])}, {"w": torch.tensor([3.0, 1.0])}, {"w": torch.tensor([1.0, 3.0])}]
    parameters = {"fisher": fishers, "density": [1.0, 0.5, 0.5]}
    result = merge_tensors(tensors, "squisher", parameters=parameters, base_index=0, name="w")
    assert result.tolist() == [(3 * 1 + 1 * 0) / 4, (1 * 9 + 3 * 1) / 4]


def test_state_dicts_with_a_base() -> None:
    """`merge_state_dicts` takes theta_0 from its base. A base of weight 0 needs no Fisher and is not summed."""
    weights, fishers = _in_memory()
    shares = {"base": 0.5, "a": 0.2, "b": 0.6}
    summed = merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": shares})
    beside = {"fisher": {**fishers, "base": "auto"}, "density": shares, "weight": {"base": 0.0, "a": 1.0, "b": 1.0}}
    alone = merge_state_dicts(weights, "squisher", base="base", parameters=beside)
    for name, tensor in summed.items():
        base, *thetas = (model[name] for model in weights.values())
        known, *own = (fisher[name] for fisher in fishers.values())
        assert_trimmed(tensor, base, [base, *thetas], [known, *own], (1.0, 0.2, 0.6))
        assert_trimmed(alone[name], base, thetas, own, (0.2, 0.6))


def test_state_dicts_by_gradient_matching() -> None:
    """UBGM in memory computes the task vectors from its base."""
    weights, fishers = _in_memory()
    parameters = {"fisher": fishers, "density": 0.3}
    result = merge_state_dicts(weights, "ubgm_squisher", base="base", parameters=parameters)
    for name, tensor in result.items():
        base, *thetas = (model[name] for model in weights.values())
        known, *own = (fisher[name] for fisher in fishers.values())
        trimmed = [keep_largest(t, base, f, 0.3) for t, f in zip(thetas, own, strict=True)]
        size = base.double().abs() + sum((theta.double() - base.double()).abs() for theta in thetas)
        assert_within(tensor, ubgm_reference(base, known, trimmed, own, [1.0, 1.0]), size)


def test_refusals_in_memory() -> None:
    """A density below 1 without a base, a density of 0 and a NaN in F are refused in memory."""
    weights, fishers = _in_memory()
    with pytest.raises(ConfigError, match=r"density below 1 needs a base.*encoder.*merge_state_dicts\(base="):
        merge_state_dicts(weights, "squisher", parameters={"fisher": fishers, "density": [1.0, 0.5, 1.0]})
    with pytest.raises(ConfigError, match="density must be a number > 0 and <= 1"):
        merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": 0.0})
    fishers["a"]["encoder.bias"][3] = float("nan")
    with pytest.raises(ValuesError, match="1 NaN of 13"):
        merge_state_dicts(weights, "squisher", base="base", parameters={"fisher": fishers, "density": 0.5})


def test_a_base_of_another_shape_without_headers_is_refused() -> None:
    """A base without headers, as in pickled weights, is refused by name when it is read with another shape."""
    loaded = LoadedFisher("w", tensor=torch.ones(3), density=0.5, origin=torch.ones(4))
    given = {"fisher": dict.fromkeys(range(2), ResolvedFisher(loaded, Run("squisher"))), "weight": {0: 1.0, 1: 1.0}}
    with pytest.raises(MismatchError, match=r"w is \[3\] and the base's \[4\]"):
        SQUISHER.merge_group(TensorGroup.from_tensors([torch.ones(3), torch.ones(3)], name="w"), **given)


def test_ubgm_without_a_base(tmp_path: Path, pair: dict[str, Any]) -> None:
    """UBGM without a base is refused with the cure."""
    pair["merge_method"] = "ubgm_squisher"
    assert_refused(merge(pair, tmp_path / "out"), tmp_path / "out", "ubgm_squisher needs base_model:")
