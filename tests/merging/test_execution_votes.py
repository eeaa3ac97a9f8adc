"""Execution of merges with options of the vote: chunks, whole tensors, and the fused kernel."""

from typing import Any

import pytest
import torch
from torch import Tensor

from squisher_mergekit.merging import execution
from squisher_mergekit.merging.density import Ranking, Trim
from squisher_mergekit.merging.execution import merge_squisher, merge_ubgm
from squisher_mergekit.merging.inputs import Ballot, Input
from squisher_mergekit.merging.votes.options import VoteOptions
from tests.merging.reference import assert_within, draw_fisher, largest
from tests.merging.votes.reference import mask_of, score_of, voted_reference

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
def test_a_whole_tensor_on_an_accelerator(device: torch.device) -> None:
    """Abstention, lambda and the Fisher of the result run without a kernel."""
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
