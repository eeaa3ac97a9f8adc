"""Execution of merges with options of the vote: chunks, whole tensors, and the fused kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from squisher_mergekit.merging import execution
from squisher_mergekit.merging.density import Ranking, Trim
from squisher_mergekit.merging.execution import merge_squisher, merge_ubgm
from squisher_mergekit.merging.inputs import Ballot, Input
from squisher_mergekit.merging.votes import results
from squisher_mergekit.merging.votes.options import VoteOptions
from tests.merging.reference import assert_within, draw_fisher, largest
from tests.merging.votes.reference import mask_of, score_of, trimmed_to, voted_reference

WEIGHTS = (1.0, 0.5, 2.0)


def _drawn(size: int, device: torch.device) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    base = torch.randn(size, generator=generator)
    thetas = [base + torch.randn(size, generator=generator) for _ in WEIGHTS]
    fishers = [draw_fisher((size,), generator) for _ in WEIGHTS]
    return base.to(device), [theta.to(device) for theta in thetas], [fisher.to(device) for fisher in fishers]


def _inputs(thetas: list[Tensor], fishers: list[Tensor], trims: list[Trim | None] | None = None) -> list[Input]:
    rest = trims or [None] * len(thetas)
    pairs = zip(thetas, fishers, WEIGHTS, rest, strict=True)
    return [Input(theta, fisher, weight, label=("w", "f"), trim=trim) for theta, fisher, weight, trim in pairs]


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("options", [{"power": 0.5}, {"consensus": "sign"}, {"power": 2.0, "consensus": "sign"}])
def test_one_pass_of_an_accelerator(device: torch.device, options: dict[str, Any]) -> None:
    """Powers and elections run in one pass of the kernel, or by the formula, and count entries without a vote."""
    base, thetas, fishers = _drawn(701, device)
    ballot = Ballot(VoteOptions(**options), base)
    outcome = merge_squisher(_inputs(thetas, fishers), torch.float32, ballot)
    elected = options.get("consensus") == "sign"
    power = options.get("power", 1.0)
    reference = voted_reference(
        [t.cpu() for t in thetas], [f.cpu() for f in fishers], WEIGHTS, base.cpu(), power=power, elected=elected
    )
    assert_within(outcome.values.cpu(), reference, largest([base.cpu(), *(t.cpu() for t in thetas)]) * 2)
    assert abs(float(sum(float(share) for share in outcome.shares)) + int(outcome.silent) / 701 - 1) < 1e-3


@pytest.mark.usefixtures("by_formula")
@pytest.mark.parametrize("part", [701, 100])
def test_the_parts_of_a_tensor_on_an_accelerator(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """Abstention, lambda and the Fisher of the result run without a kernel, and hold a part of the tensor at a time."""
    monkeypatch.setattr(results, "PART", part)
    base, thetas, fishers = _drawn(701, device)
    ranking = [Ranking("change", theta, positive=True) for theta in thetas]
    trims = [Trim(base, fisher, 0.4, None, order) for fisher, order in zip(fishers, ranking, strict=True)]
    ballot = Ballot(VoteOptions(trimmed="abstain", density_by="change", extent=1.5), base, recorded=True)
    outcome = merge_squisher(_inputs(thetas, fishers, list(trims)), torch.float32, ballot)
    _assert_trimmed(outcome, base, thetas, fishers)


def _assert_trimmed(outcome: Any, base: Tensor, thetas: list[Tensor], fishers: list[Tensor]) -> None:
    own, cpu = [f.cpu() for f in fishers], [t.cpu() for t in thetas]
    masks = [mask_of(score_of("change", t, base.cpu(), f), 0.4) for t, f in zip(cpu, own, strict=True)]
    reference = voted_reference(cpu, own, WEIGHTS, base.cpu(), masks=masks, extent=1.5)
    assert_within(outcome.values.cpu(), reference, largest([base.cpu(), *cpu]) * 2)
    expected = sum(w * f.double() * mask for w, f, mask in zip(WEIGHTS, own, masks, strict=True))
    assert_within(outcome.fisher.cpu(), expected, expected.clamp_max(1e30))
    assert [int(count) for count in outcome.abstained] == [int((~mask).sum()) for mask in masks]
    assert int(outcome.silent) == int((~torch.stack(masks).any(0)).sum())


def test_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a tensor add up to the same merge and the same counts."""
    monkeypatch.setattr(execution, "CHUNK", 100)
    base, thetas, fishers = _drawn(701, torch.device("cpu"))
    ranking = [Ranking("change", theta, positive=True) for theta in thetas]
    trims = [Trim(base, fisher, 0.4, None, order) for fisher, order in zip(fishers, ranking, strict=True)]
    ballot = Ballot(VoteOptions(trimmed="abstain", density_by="change", extent=1.5), base, recorded=True)
    outcome = merge_squisher(_inputs(thetas, fishers, list(trims)), torch.float32, ballot)
    _assert_trimmed(outcome, base, thetas, fishers)


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_gradient_matching_with_a_power(device: torch.device, power: float) -> None:
    """A power and a prior give the same merge by kernel, formula and chunks."""
    generator = torch.Generator().manual_seed(2)
    base, *thetas = (torch.randn(509, generator=generator).to(device) for _ in range(4))
    own, *fishers = (torch.rand(509, generator=generator).to(device) for _ in range(4))
    ballot = Ballot(VoteOptions(power=power))
    outcome = merge_ubgm(Input(base, own), _inputs(thetas, fishers), 0.5, torch.float32, ballot)
    raised = [fisher.double() ** power for fisher in (own, *fishers)]
    known = raised[0] + sum(w * f for w, f in zip(WEIGHTS, raised[1:], strict=True))
    prior = 0.5 * known.mean()
    step = sum(
        w * (raised[0] + prior + f) * (theta.double() - base.double())
        for w, f, theta in zip(WEIGHTS, raised[1:], thetas, strict=True)
    )
    reference = base.double() + step / (known + prior)
    assert_within(outcome.values.cpu(), reference.cpu(), largest([base.cpu(), *(t.cpu() for t in thetas)]) * 8)


MANY = (1.0, 0.3, 2.0, 0.7, 1.3, 0.11, 3.0, 0.5)
COMBINATIONS = [(1, torch.float64), (2, torch.bfloat16), (3, torch.float16), (5, torch.float32), (8, torch.bfloat16)]
PRIME = 577


def _cast(count: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Draw a base, models and Fishers of a dtype on the CPU: F from 1e-38 to 1e+30 and 0, some weights the base's."""
    generator = torch.Generator().manual_seed(40 + count)
    base = torch.randn(PRIME, generator=generator).to(dtype)
    thetas = [(base.float() + torch.randn(PRIME, generator=generator)).to(dtype) for _ in range(count)]
    for theta in thetas:
        theta[::7] = base[::7]
    # float16 ends at 65504; its models have Fishers in float32.
    narrow = torch.float32 if dtype == torch.float16 else dtype
    fishers = [draw_fisher((PRIME,), generator) for _ in range(count)]
    for fisher in fishers:
        fisher[:40] = 0
    return base, thetas, [fisher.to(narrow) for fisher in fishers]


def _is_clear(base: Tensor, thetas: list[Tensor], fishers: list[Tensor], power: float) -> Tensor:
    """Return the mask of the entries whose elected sign rounding cannot change."""
    parts = torch.stack([w * f.double() ** power for w, f in zip(MANY, fishers, strict=False)])
    plain = torch.tensor(MANY[: len(parts)], dtype=torch.float64)[:, None].expand_as(parts)
    parts = torch.where(torch.stack(fishers).amax(0) == 0, plain, parts)
    steps = torch.stack([theta.double() - base.double() for theta in thetas])
    return (parts * steps).sum(0).abs() >= 1e-5 * (parts * steps).abs().amax(0)


def _placed(
    case: tuple[Tensor, list[Tensor], list[Tensor]], device: torch.device, density: float, ranking: Ranking
) -> tuple[Tensor, list[Input]]:
    """Return the base and the inputs of a merge on a device."""
    base, thetas, fishers = case
    origin, inputs = base.to(device), []
    for theta, fisher, weight in zip(thetas, fishers, MANY, strict=False):
        on_device = fisher.to(device)
        trim = Trim(origin, on_device, density, None, ranking) if density < 1 else None
        inputs.append(Input(theta.to(device), on_device, weight, label=("w", "f"), trim=trim))
    return origin, inputs


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("options", "density"), [({"consensus": "sign"}, 1.0), ({"power": 0.5, "consensus": "sign"}, 0.45), ({}, 0.3)]
)
@pytest.mark.parametrize(("count", "dtype"), COMBINATIONS, ids=str)
def test_votes_of_any_number_of_models(
    device: torch.device, count: int, dtype: torch.dtype, options: dict[str, Any], density: float
) -> None:
    """Elections and densities on an accelerator agree with float64 in every dtype, by the kernel and by the formula."""
    base, thetas, fishers = case = _cast(count, dtype)
    origin, inputs = _placed(case, device, density, Ranking())
    out = torch.float64 if dtype == torch.float64 else torch.float32
    outcome = merge_squisher(inputs, out, Ballot(VoteOptions(**options), origin if options else None))
    moved = thetas
    if density < 1:
        masks = [mask_of(fisher.double(), density, positive=False) for fisher in fishers]
        moved = [trimmed_to(theta, base, mask) for theta, mask in zip(thetas, masks, strict=True)]
    power = options.get("power", 1.0)
    reference = voted_reference(
        moved, fishers, MANY[:count], base if options else None, power=power, elected=bool(options)
    )
    clear = _is_clear(base, moved, fishers, power) if options else torch.ones(PRIME, dtype=torch.bool)
    assert float(clear.double().mean()) > 0.98
    size = 2 * largest([base, *thetas])
    assert_within(outcome.values.cpu()[clear], reference[clear], size[clear])
    assert int(outcome.not_finite) == 0


@pytest.mark.usefixtures("by_formula")
@pytest.mark.parametrize(("count", "dtype"), COMBINATIONS, ids=str)
def test_abstention_of_any_number_of_models(device: torch.device, count: int, dtype: torch.dtype) -> None:
    """Models that abstain where they are trimmed, and lambda, agree with float64 in every dtype."""
    base, thetas, fishers = case = _cast(count, dtype)
    origin, inputs = _placed(case, device, 0.4, Ranking(positive=True))
    out = torch.float64 if dtype == torch.float64 else torch.float32
    outcome = merge_squisher(inputs, out, Ballot(VoteOptions(trimmed="abstain", extent=0.5), origin))
    masks = [mask_of(fisher.double(), 0.4) for fisher in fishers]
    reference = voted_reference(thetas, fishers, MANY[:count], base, masks=masks, extent=0.5)
    assert_within(outcome.values.cpu(), reference, 2 * largest([base, *thetas]))
    assert int(outcome.silent) == int((~torch.stack(masks).any(0)).sum())
