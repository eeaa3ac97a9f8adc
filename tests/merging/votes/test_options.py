"""Options of the vote as a whole: OTA-merge in our YAML, and merges in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mergekit.merge_methods import merge_state_dicts, merge_tensors
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.reference import Tensors, assert_within, largest, llama, merged, store_fisher
from tests.merging.votes.reference import drawn, mask_of, score_of, voted_reference

OTA = Path(__file__).parents[3] / "configs" / "ota.yml"


def ota_reference(
    base: Tensors, thetas: list[Tensors], moments: list[Tensors], thresholds: list[float], power: float
) -> Tensors:
    """Return OTA-merge in float64: weights ``v^power`` where ``v d^2 >= threshold``, the base where all are masked."""
    result = {}
    for name, origin in base.items():
        numerator = torch.zeros_like(origin, dtype=torch.float64)
        denominator = torch.zeros_like(numerator)
        for theta, moment, threshold in zip(thetas, moments, thresholds, strict=True):
            v, step = moment[name].double(), theta[name].double() - origin.double()
            weight = v**power * (v * step**2 >= threshold)
            numerator += weight * theta[name].double()
            denominator += weight
        result[name] = torch.where(denominator > 0, numerator / denominator, origin.double())
    return result


@pytest.mark.parametrize("seed", [0, 1])
def test_ota_merge(tmp_path: Path, seed: int) -> None:
    """configs/ota.yml is OTA-merge to 1e-6 of the inputs, with thresholds found for the same density."""
    generator = torch.Generator().manual_seed(seed)
    config: dict[str, Any] = yaml.safe_load(OTA.read_text(encoding="utf-8"))
    base = llama(tmp_path / "base", 10 * seed)
    config["base_model"] = str(tmp_path / "base")
    thetas, moments, thresholds = [], [], []
    for i, entry in enumerate(config["models"], start=1):
        folder = tmp_path / f"m{i}"
        theta = llama(folder, 10 * seed + i)
        v = {name: 10 ** (torch.randn(t.shape, generator=generator) * 2 - 9) for name, t in theta.items()}
        ema = {"statistic": "ema", "steps": 40 * i, "optimizer": {"beta2": 0.999}}
        store_fisher(folder, v, fingerprint(folder), **ema)
        entry["model"] = str(folder)
        scores = torch.cat([(v[n].double() * (theta[n].double() - base[n].double()) ** 2).flatten() for n in base])
        keep = round(entry["parameters"]["density"] * len(scores))
        thresholds.append(float(scores.sort(descending=True).values[keep - 1]))
        thetas.append(theta)
        moments.append(v)
    result = merged(config, tmp_path / "out")
    reference = ota_reference(base, thetas, moments, thresholds, config["parameters"]["power"])
    for name, tensor in result.items():
        size = largest([base[name], *(theta[name] for theta in thetas)])
        assert bool(((tensor.double() - reference[name]).abs() <= 1e-6 * size).all()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_in_memory(count: int, dtype: torch.dtype) -> None:
    """`merge_state_dicts` elects, trims, raises and extends."""
    given = drawn(count, (9, 14), count, dtype)
    keys = ["base", *map(str, range(count))]
    models = dict(zip(keys, [{"w": t} for t in (given["base"], *given["thetas"])], strict=True))
    fishers: dict[str, Any] = dict(zip(keys, ["auto", *({"w": f} for f in given["fishers"])], strict=True))
    parameters = {
        "fisher": fishers,
        "weight": dict(zip(keys, [0.0, *[1.0] * count], strict=True)),
        "density": 0.6,
        "density_by": "change",
        "trimmed": "abstain",
        "consensus": "sign",
        "lambda": 1.5,
    }
    result = merge_state_dicts(models, "squisher", base="base", parameters=parameters)["w"]
    masks = [
        mask_of(score_of("change", theta, given["base"], fisher), 0.6)
        for theta, fisher in zip(given["thetas"], given["fishers"], strict=True)
    ]
    reference = voted_reference(
        given["thetas"], given["fishers"], [1.0] * count, given["base"], masks=masks, elected=True, extent=1.5
    )
    assert result.dtype == dtype
    assert_within(result, reference, largest([given["base"], *given["thetas"]]) * 2)


def test_power_needs_no_base() -> None:
    """`merge_tensors` raises Fishers to a power without a base; 0 is the weighted mean."""
    given = drawn(3, (31,), 8)
    fishers = [{"w": fisher} for fisher in given["fishers"]]
    for power in (0, 0.5, 2):
        parameters = {"fisher": fishers, "power": power, "weight": [1.0, 0.5, 2.0]}
        result = merge_tensors(given["thetas"], "squisher", parameters=parameters, name="w")
        reference = voted_reference(given["thetas"], given["fishers"], [1.0, 0.5, 2.0], power=power)
        assert_within(result, reference, largest(given["thetas"]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lambda": 2.0}, "lambda: 2 needs a base"),
        ({"consensus": "sign"}, "consensus: sign needs a base"),
        ({"write_fisher": True}, "write_fisher: true needs a merge that writes files"),
    ],
)
def test_refused_in_memory(settings: dict[str, Any], words: str) -> None:
    """An option without its base, and a file of a merge in memory, are refused."""
    given = drawn(2, (5,), 0)
    fishers: list[dict[str, Tensor]] = [{"w": fisher} for fisher in given["fishers"]]
    with pytest.raises(ConfigError, match=words):
        merge_tensors(given["thetas"], "squisher", parameters={"fisher": fishers, **settings}, name="w")
