"""Fused kernels against float64: on the CPU in Triton's interpreter, on a GPU with ``-m gpu --device cuda``."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from squisher_mergekit.merging import fused
from squisher_mergekit.merging.fused import Model
from tests.merging.reference import (
    assert_within,
    draw_fisher,
    elected_reference,
    largest,
    squisher_reference,
    ubgm_reference,
)

pytest.importorskip("triton", reason="the kernels are written in Triton")
# The interpreter computes with numpy, which warns of intended IEEE arithmetic.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("small_blocks")]

WEIGHTS = (1.0, 0.3, 2.0, 0.7, 1.3, 0.11, 3.0, 0.5)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZE = 2503  # a prime; on the CPU one block and a part of another
COMBINATIONS = [*((count, torch.float32) for count in (1, 2, 5, 8)), *((3, dtype) for dtype in DTYPES)]


class Case(NamedTuple):
    """Models on the CPU, and a base."""

    thetas: list[Tensor]
    fishers: list[Tensor]
    weights: Sequence[float]
    base: Tensor
    base_fisher: Tensor

    def models(self, device: torch.device) -> list[Model]:
        """Return the models on a device."""
        parts = zip(self.thetas, self.fishers, self.weights, strict=True)
        return [Model(theta.to(device), fisher.to(device), weight) for theta, fisher, weight in parts]

    def spread(self) -> Tensor:
        """Return S of the tolerance of ``ubgm_squisher``."""
        moved = zip(self.weights, self.thetas, strict=True)
        return self.base.double().abs() + sum(w * (t.double() - self.base.double()).abs() for w, t in moved)


def _case(count: int, dtype: torch.dtype = torch.float32, size: int = SIZE, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(100 * count + seed)
    thetas = [torch.randn(size, generator=generator).to(dtype) for _ in range(count + 1)]
    fishers = [draw_fisher([size], generator) for _ in range(count + 1)]
    return Case(thetas[1:], fishers[1:], WEIGHTS[:count], thetas[0], fishers[0])


def _work(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _units(device: torch.device, dtype: torch.dtype) -> float:
    """Return the units of the last place that rounding may cost; the interpreter truncates bfloat16."""
    return 1.0 if device.type == "cpu" and dtype == torch.bfloat16 else 0.5


def _check_squisher(case: Case, device: torch.device, out: torch.dtype) -> fused.FusedMerge:
    merged = fused.squisher(case.models(device), _work(*case.thetas, *case.fishers), out)
    reference = squisher_reference(case.thetas, case.fishers, case.weights)
    assert_within(merged.values.cpu(), reference, largest(case.thetas), _units(device, out))
    return merged


def _check_ubgm(case: Case, device: torch.device, prior: float, out: torch.dtype) -> fused.FusedMerge:
    merged = fused.ubgm_squisher(
        case.base.to(device),
        case.base_fisher.to(device),
        case.models(device),
        _work(case.base, *case.thetas, *case.fishers),
        out,
        prior=prior,
    )
    reference = ubgm_reference(case.base, case.base_fisher, case.thetas, case.fishers, case.weights, prior)
    assert_within(merged.values.cpu(), reference, case.spread(), _units(device, out))
    return merged


@pytest.mark.parametrize(("count", "dtype"), COMBINATIONS, ids=str)
def test_squisher_is_eq_13(device: torch.device, count: int, dtype: torch.dtype) -> None:
    """The kernel agrees with float64 for any number of models, any dtype, and F of 0 or from 1e-38 to 1e+30."""
    case = _case(count, dtype)
    merged = _check_squisher(case, device, dtype)
    stacked = torch.stack(case.thetas)
    low, high = stacked.amin(0), stacked.amax(0)
    values = merged.values.cpu()
    assert bool(((values >= low) & (values <= high)).all()) or _units(device, dtype) > 0.5
    assert sum(float(share) for share in merged.shares) == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("prior", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize(("count", "dtype"), COMBINATIONS, ids=str)
def test_ubgm_is_its_formula(device: torch.device, count: int, dtype: torch.dtype, prior: float) -> None:
    """Gradient matching in the kernel agrees with float64, with and without a prior, in any dtype."""
    _check_ubgm(_case(count, dtype), device, prior, dtype)


@pytest.mark.parametrize(("blocks", "more"), [(0, 1), (0, 2), (0, 1009), (1, 0), (2, 0), (2, 1)])
def test_any_size(device: torch.device, blocks: int, more: int) -> None:
    """Tensors of one entry, of whole blocks and of one entry more are merged to the end."""
    case = _case(2, size=blocks * fused.BLOCK + more)
    _check_squisher(case, device, torch.float32)
    _check_ubgm(case, device, 0.5, torch.float32)


def test_no_entry_at_all(device: torch.device) -> None:
    """An empty tensor gives an empty result and counts of 0."""
    merged = fused.squisher(_case(2, size=0).models(device), torch.float32, torch.float16)
    assert (merged.values.numel(), merged.values.dtype, float(merged.fell_back)) == (0, torch.float16, 0)


def test_dtypes_may_differ_between_models(device: torch.device) -> None:
    """Weights and Fishers of four dtypes merge in one call."""
    case = _case(4)
    small = [f.clamp(1e-7, 6e4) for f in case.fishers]
    thetas = [theta.to(dtype) for theta, dtype in zip(case.thetas, DTYPES, strict=True)]
    fishers = [fisher.to(dtype) for fisher, dtype in zip(small, DTYPES[::-1], strict=True)]
    mixed = case._replace(thetas=thetas, fishers=fishers)
    for out in DTYPES:
        _check_squisher(mixed, device, out)
        _check_ubgm(mixed, device, 0.1, out)


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e30, 3e38])
def test_equal_fishers_of_any_size_cancel(device: torch.device, value: float) -> None:
    """The merge is the weighted mean if all F are one number, from the smallest above 0 to the largest."""
    case = _case(3)
    flat = case._replace(fishers=[torch.full((SIZE,), value)] * 3)
    mean = sum(w * t.double() for w, t in zip(case.weights, case.thetas, strict=True)) / sum(case.weights)
    merged = fused.squisher(flat.models(device), torch.float32, torch.float32)
    assert_within(merged.values.cpu(), mean, largest(case.thetas))
    assert float(merged.fell_back) == (SIZE if value == 0 else 0)
    shares = [w / sum(case.weights) for w in case.weights]
    assert [float(share) for share in merged.shares] == pytest.approx(shares, rel=1e-5)


def test_weights_and_scales_of_any_size(device: torch.device) -> None:
    """Factors far apart enter exactly: a scale of F counts like a larger F."""
    case, scales = _case(3), (1e-9, 1.0, 1e6)
    weights = (1e-6, 1.0, 1e3)
    given = zip(case.thetas, case.fishers, weights, scales, strict=True)
    models = [Model(t.to(device), f.to(device), w, s) for t, f, w, s in given]
    scaled = [fisher.double() * scale for fisher, scale in zip(case.fishers, scales, strict=True)]
    merged = fused.squisher(models, torch.float32, torch.float32)
    assert_within(merged.values.cpu(), squisher_reference(case.thetas, scaled, weights), largest(case.thetas))
    matched = fused.ubgm_squisher(
        case.base.to(device), case.base_fisher.to(device), models, torch.float32, torch.float32, 1e-3, prior=0.1
    )
    own = case.base_fisher.double() * 1e-3
    reference = ubgm_reference(case.base, own, case.thetas, scaled, weights, 0.1)
    assert_within(matched.values.cpu(), reference, case._replace(weights=weights).spread())


def test_shares_and_counts_are_those_of_the_reference(device: torch.device) -> None:
    """Mean coefficients and the number of entries without information come from the same pass."""
    case = _case(3)
    merged = fused.squisher(case.models(device), torch.float32, torch.float32)
    parts = torch.stack([w * f.double() for w, f in zip(case.weights, case.fishers, strict=True)])
    blank = parts.sum(0) == 0
    plain = torch.tensor(case.weights, dtype=torch.float64)[:, None].expand_as(parts)
    parts = torch.where(blank, plain, parts)
    shares = (parts / parts.sum(0)).mean(1)
    assert [float(share) for share in merged.shares] == pytest.approx(shares.tolist(), rel=1e-5)
    assert int(merged.fell_back) == int(blank.sum()) > 0


def test_a_model_of_weight_0_does_not_enter(device: torch.device) -> None:
    """A weight of 0 leaves a model out, whatever its weights and F. Only its invalid entries are counted."""
    case = _case(3)
    wild = case._replace(weights=(1.0, 0.0, 2.0))
    wild.thetas[1][:] = float("nan")
    wild.fishers[1][3:5] = float("inf")
    kept = Case(wild.thetas[::2], wild.fishers[::2], wild.weights[::2], case.base, case.base_fisher)
    for check in (_check_squisher, lambda c, d, o: _check_ubgm(c, d, 0.1, o)):
        expected = check(kept, device, torch.float32)
        merged = (
            fused.squisher(wild.models(device), torch.float32, torch.float32)
            if check is _check_squisher
            else fused.ubgm_squisher(
                case.base.to(device), case.base_fisher.to(device), wild.models(device), *[torch.float32] * 2, prior=0.1
            )
        )
        assert torch.equal(merged.values, expected.values)
        assert merged.shares[1] == 0
        assert [counts.tolist() for counts in merged.invalid[:3]] == [[0, 0, 0], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_invalid_entries_are_counted_by_fisher_and_kind(device: torch.device, dtype: torch.dtype) -> None:
    """NaN, infinite and negative entries are counted at any position. Minus infinity counts as both kinds."""
    case = _case(3, size=2 * fused.BLOCK + 7)
    fishers = [fisher.clamp(1e-6, 1e4).to(dtype) for fisher in [*case.fishers, case.base_fisher]]
    fishers[0][[0, -1]] = float("nan")
    fishers[1][1:4] = float("inf")
    fishers[1][-2] = -float("inf")
    fishers[3][fused.BLOCK] = -1.0
    bad = case._replace(fishers=fishers[:3])
    work = _work(fishers[0])
    merged = fused.squisher(bad.models(device), work, torch.float32)
    assert [counts.tolist() for counts in merged.invalid] == [[2, 0, 0], [0, 4, 1], [0, 0, 0]]
    base = case.base.to(device)
    matched = fused.ubgm_squisher(base, fishers[3].to(device), bad.models(device), work, torch.float32)
    assert [counts.tolist() for counts in matched.invalid] == [[2, 0, 0], [0, 4, 1], [0, 0, 0], [0, 0, 1]]


def test_minus_zero_is_valid(device: torch.device) -> None:
    """A Fisher of -0.0 is valid and carries no information."""
    case = _case(2)._replace(fishers=[torch.full((SIZE,), -0.0)] * 2)
    merged = _check_squisher(case, device, torch.float32)
    assert (int(merged.fell_back), [c.tolist() for c in merged.invalid]) == (SIZE, [[0, 0, 0]] * 2)


def test_a_nan_among_the_weights_shows(device: torch.device) -> None:
    """A NaN in the weights of a model stays NaN in the result, despite the clamping to the inputs."""
    case = _case(3)
    case.thetas[2][11] = float("nan")
    assert bool(fused.squisher(case.models(device), torch.float32, torch.float32).values[11].isnan())


def test_density_puts_the_base_back(device: torch.device) -> None:
    """Entries outside the mask of a model count as the base's, also with a base of another dtype."""
    case = _case(3, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    masks = [torch.rand(SIZE, generator=generator) < 0.4, None, torch.rand(SIZE, generator=generator) < 0.9]
    origin = case.base.float() + 1e-4
    models, trimmed = [], []
    for model, theta, mask in zip(case.models(device), case.thetas, masks, strict=True):
        kept = None if mask is None else (mask.to(device), origin.to(device))
        models.append(Model(model.theta, model.fisher, model.weight, kept=kept))
        trimmed.append(theta if mask is None else torch.where(mask, theta.float(), origin))
    merged = fused.squisher(models, torch.float32, torch.float32)
    reference = squisher_reference(trimmed, case.fishers, case.weights)
    assert_within(merged.values.cpu(), reference, largest([*trimmed, *case.thetas]))
    matched = fused.ubgm_squisher(case.base.to(device), None, models, torch.float32, torch.float32)
    reference = ubgm_reference(case.base, torch.zeros(SIZE), trimmed, case.fishers, case.weights)
    assert_within(matched.values.cpu(), reference, case._replace(thetas=trimmed).spread())


@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_power_is_of_every_fisher(device: torch.device, power: float, dtype: torch.dtype) -> None:
    """F^power replaces F without underflow of ratios. A power of 0 gives the weighted mean."""
    case, scales = _case(3, dtype), (1.0, 1e-3, 50.0)
    given = zip(case.thetas, case.fishers, case.weights, scales, strict=True)
    models = [Model(t.to(device), f.to(device), w, s) for t, f, w, s in given]
    raised = [(fisher.double() * scale) ** power for fisher, scale in zip(case.fishers, scales, strict=True)]
    merged = fused.squisher(models, dtype, dtype, power)
    assert_within(merged.values.cpu(), squisher_reference(case.thetas, raised, case.weights), largest(case.thetas))
    if power == 0:
        return
    matched = fused.ubgm_squisher(
        case.base.to(device), case.base_fisher.to(device), models, dtype, dtype, prior=0.1, power=power
    )
    reference = ubgm_reference(case.base, case.base_fisher.double() ** power, case.thetas, raised, case.weights, 0.1)
    assert_within(matched.values.cpu(), reference, case.spread())


@pytest.mark.parametrize("power", [0.1, 0.5])
def test_power_of_a_fisher_below_1e_38_is_not_that_of_zero(monkeypatch, power: float) -> None:
    """A logarithm on a GPU takes a number below 1.2e-38 for 0; entries of such Fishers still have their share."""
    from triton.runtime.interpreter import InterpreterBuilder

    def flushing(builder, x):
        narrow = x.data.dtype == np.float32
        return builder.unary_op(x, lambda values: np.log2(np.where(narrow & (values < 1.1754944e-38), 0, values)))

    monkeypatch.setattr(InterpreterBuilder, "create_log2", flushing)
    fishers = [torch.tensor([1e-40, 3e-45, 1e-39, 0.0]), torch.tensor([1e-5, 1e-12, 1e-39, 1e-3])]
    thetas = [torch.ones(4), torch.zeros(4)]
    models = [Model(theta, fisher, 1.0) for theta, fisher in zip(thetas, fishers, strict=True)]
    merged = fused.squisher(models, torch.float32, torch.float32, power)
    expected = squisher_reference(thetas, [fisher.double() ** power for fisher in fishers], [1.0, 1.0])
    assert torch.allclose(merged.values.double(), expected, rtol=1e-4, atol=0)
    assert float(expected[0]) > 1e-18


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_only_models_with_the_elected_sign_vote(device: torch.device, count: int) -> None:
    """Models that do not move along sign(sum_i w_i F_i d_i) have no vote. Without F the weights elect the sign."""
    case = _case(count)
    for theta in case.thetas:
        theta[::5] = case.base[::5]
    merged = fused.squisher(case.models(device), torch.float32, torch.float32, elect_from=case.base.to(device))
    reference, clear = elected_reference(case.base, case.thetas, case.fishers, case.weights)
    assert float(clear.double().mean()) > 0.99
    assert_within(merged.values.cpu()[clear], reference[clear], largest([*case.thetas, case.base])[clear])


def test_a_tie_gives_the_base(device: torch.device) -> None:
    """The result is theta_0 if the votes cancel or no model moves, and no model gets a share there."""
    base = torch.tensor([1.0, 2.0, 3.0, -1.0])
    thetas = [base + torch.tensor([1.0, 0.0, 1.0, 0.0]), base - torch.tensor([1.0, 0.0, 0.0, 4.0])]
    fishers = [torch.tensor([2.0, 1.0, 1e-30, 1e30]), torch.tensor([2.0, 1.0, 1e30, 1e-30])]
    models = [Model(t.to(device), f.to(device), 1.0) for t, f in zip(thetas, fishers, strict=True)]
    merged = fused.squisher(models, torch.float32, torch.float32, elect_from=base.to(device))
    assert merged.values.tolist() == [1.0, 2.0, 4.0, -5.0]
    assert [float(share) for share in merged.shares] == [0.25, 0.25]


def test_the_sum_of_fishers_is_in_float64(device: torch.device) -> None:
    """The mean behind the prior adds numbers from 1e-38 to 1e+30 in float64, each Fisher with its factor."""
    case = _case(3, size=2 * fused.BLOCK + 13)
    fishers = [case.fishers[0], case.fishers[1].clamp(1e-6, 1e4).half(), case.fishers[2].bfloat16()]
    total = fused.weighted_sum([fisher.to(device) for fisher in fishers], [1.0, 0.3, 1e-5])
    expected = sum(x * fisher.double().sum() for x, fisher in zip([1.0, 0.3, 1e-5], fishers, strict=True))
    assert (total.dtype, total.ndim) == (torch.float64, 0)
    assert float(total) == pytest.approx(float(expected), rel=1e-7)


def test_kernels_run_on_gpus_or_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on GPUs, and on the CPU only in Triton's interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    known = [fused.runs_on(torch.device(kind)) for kind in ("cuda", "cpu", "meta", "mps")]
    assert known == [True, False, False, False]


@pytest.mark.gpu
def test_more_entries_than_32_bits_count(device: torch.device) -> None:
    """Offsets have 64 bits, so a tensor of more than 2^31 entries is merged to its end."""
    size = (1 << 31) + 1009
    thetas = [torch.full((size,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 3.0)]
    fishers = [torch.full((size,), value, dtype=torch.bfloat16, device=device) for value in (1.0, 3.0)]
    fishers[1][-1] = 0
    merged = fused.squisher([Model(t, f, 1.0) for t, f in zip(thetas, fishers, strict=True)], *[torch.float32] * 2)
    values = merged.values
    assert (values[0].item(), values[-2].item(), values[-1].item()) == (2.5, 2.5, 1.0)
    assert bool((values[:-1] == 2.5).all())
