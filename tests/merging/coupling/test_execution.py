"""Execution of coupled merges over whole matrices."""

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.merging.coupling import equations
from squisher_mergekit.merging.coupling import execution as coupled
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.execution import merge_squisher
from squisher_mergekit.merging.inputs import Input
from tests.merging.coupling.reference import REFERENCES
from tests.merging.reference import WEIGHTS

SHAPES = [(7, 5), (13, 3), (1, 5), (11, 1)]


def _draw(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    thetas = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    fishers = [1e-12 * torch.rand(shape, generator=generator, dtype=torch.float64) ** 4 for _ in range(count)]
    fishers[0][0] = 0
    return base, thetas, fishers


def _merge(base, thetas, fishers, structure, weights, dtype=torch.float64, transposed=False):
    def given(tensor):
        return (tensor.T if transposed else tensor).to(dtype)

    known = [None] * len(thetas) if fishers is None else [given(fisher) for fisher in fishers]
    inputs = [Input(given(t), f, w) for t, f, w in zip(thetas, known, weights, strict=True)]
    return merge_coupled(given(base), inputs, structure, dtype, transposed)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("block", [1, 3, 4, 100])
def test_a_merge_equals_a_dense_solve(kind, count, shape, block):
    """Odd sizes, and blocks that do not divide, give the reference; with Fishers and from the task vectors alone."""
    base, thetas, fishers = _draw(shape, count)
    weights = WEIGHTS[:count]
    for known in (fishers, None):
        wanted = REFERENCES[kind](base, thetas, known, weights, block, 0.1)
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
            outcome = _merge(base, thetas, known, Structure(kind, block, 0.1, steps=60), weights, dtype)
            torch.testing.assert_close(outcome.values.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_transposed_matrix_gives_the_transpose(kind):
    """A matrix [in, out] is merged as its transpose."""
    base, thetas, fishers = _draw((7, 5), 3)
    structure, weights = Structure(kind, 3), WEIGHTS[:3]
    plain, turned = (_merge(base, thetas, fishers, structure, weights, transposed=t) for t in (False, True))
    torch.testing.assert_close(turned.values.T, plain.values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", REFERENCES)
def test_narrow_fishers_are_summed_in_float32(kind):
    """Fishers in bfloat16 give the merge of the same numbers in float32."""
    base, thetas, fishers = _draw((7, 300), 3)
    narrow = [fisher.bfloat16() for fisher in fishers]
    results = []
    for known in (narrow, [fisher.float() for fisher in narrow]):
        inputs = [Input(theta.float(), fisher) for theta, fisher in zip(thetas, known, strict=True)]
        results.append(merge_coupled(base.float(), inputs, Structure(kind, 3), torch.float32))
    assert torch.equal(results[0].values, results[1].values)
    assert list(map(float, results[0].shares)) == list(map(float, results[1].shares))


@pytest.mark.parametrize("kind", REFERENCES)
def test_panels_change_nothing(kind, monkeypatch):
    """A matrix merged in many panels equals the matrix merged in one."""
    base, thetas, fishers = _draw((17, 11), 3)
    structure, weights = Structure(kind, 3), WEIGHTS[:3]
    whole = _merge(base, thetas, fishers, structure, weights)
    monkeypatch.setattr(coupled, "PANEL", 40)
    parts = _merge(base, thetas, fishers, structure, weights)
    torch.testing.assert_close(parts.values, whole.values, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.tensor(parts.shares), torch.tensor(whole.shares))


@pytest.mark.parametrize("kind", REFERENCES)
def test_one_model_is_returned_to_the_bit(kind):
    """Models of weight 0 leave the other as it is."""
    base, thetas, fishers = _draw((7, 5), 3)
    outcome = _merge(base, thetas, fishers, Structure(kind, 3), [0.0, 0.5, 0.0], torch.float32)
    assert torch.equal(outcome.values, thetas[1].float())


@pytest.mark.parametrize("kind", REFERENCES)
def test_equal_models_are_returned(kind):
    """Three copies of a model with three Fishers give the model."""
    base, thetas, fishers = _draw((7, 5), 3)
    outcome = _merge(base, [thetas[0]] * 3, fishers, Structure(kind, 3), WEIGHTS[:3])
    torch.testing.assert_close(outcome.values, thetas[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", REFERENCES)
def test_large_damping_gives_the_weighted_mean(kind):
    """With uniform shares and a damping far above the factors, no coupling is left."""
    base, thetas, fishers = _draw((7, 5), 3)
    weights = WEIGHTS[:3]
    outcome = _merge(base, thetas, fishers, Structure(kind, 3, 1e9, uniform=True), weights)
    mean = sum(w * t for w, t in zip(weights, thetas, strict=True)) / sum(weights)
    torch.testing.assert_close(outcome.values, mean, rtol=0, atol=1e-8)


def test_blocks_of_one_row_without_damping_are_the_diagonal_merge_by_rows():
    """Each row is weighted by the sum of its Fishers."""
    base, thetas, fishers = _draw((7, 5), 3)
    outcome = _merge(base, thetas, fishers, Structure("rows", 1, 0.0), WEIGHTS[:3])
    by_row = [
        Input(t, f.sum(1, keepdim=True).expand_as(t), w) for t, f, w in zip(thetas, fishers, WEIGHTS, strict=False)
    ]
    torch.testing.assert_close(outcome.values, merge_squisher(by_row, torch.float64).values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_common_factor_on_all_fishers_changes_nothing(kind):
    """Fishers are known up to a factor, from 1e-30 to 1e+30."""
    base, thetas, fishers = _draw((7, 5), 3)
    results = [
        _merge(base, thetas, [f * factor for f in fishers], Structure(kind, 3), WEIGHTS[:3], torch.float32).values
        for factor in (1.0, 1e-18, 1e30)
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["rows", "columns", "kron"])
def test_a_factor_on_one_fisher_changes_nothing_with_uniform_shares(kind):
    """Uniform shares take only the form of each Fisher."""
    base, thetas, fishers = _draw((7, 5), 3)
    structure = Structure(kind, 3, uniform=True, steps=60)
    plain = _merge(base, thetas, fishers, structure, WEIGHTS[:3])
    scaled = _merge(base, thetas, [fishers[0], 1e6 * fishers[1], fishers[2]], structure, WEIGHTS[:3])
    torch.testing.assert_close(scaled.values, plain.values, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_matrix_without_any_signal_is_the_weighted_mean(kind):
    """Fishers that are all 0 are counted as without a signal."""
    base, thetas, _ = _draw((7, 5), 2)
    outcome = _merge(base, thetas, [torch.zeros(7, 5, dtype=torch.float64)] * 2, Structure(kind, 3), [1.0, 3.0])
    torch.testing.assert_close(outcome.values, (thetas[0] + 3 * thetas[1]) / 4)
    assert int(outcome.fell_back) == 35


@pytest.mark.parametrize("kind", REFERENCES)
def test_shares_sum_to_one(kind):
    """The mean coefficients of the models sum to 1."""
    base, thetas, fishers = _draw((7, 5), 3)
    outcome = _merge(base, thetas, fishers, Structure(kind, 3), WEIGHTS[:3])
    assert sum(map(float, outcome.shares)) == pytest.approx(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_an_invalid_fisher_is_refused(value):
    """NaN, infinite and negative entries raise, with the label."""
    base, thetas, fishers = _draw((7, 5), 2)
    fishers[1][3, 2] = value
    with pytest.raises(ValuesError):
        _merge(base, thetas, fishers, Structure("rows", 3), [1.0, 1.0])


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("where", ["base", "model"])
def test_a_weight_that_is_not_finite_is_refused(kind, where):
    """A NaN in the base or in a model raises, and gives no merged NaN."""
    base, thetas, fishers = _draw((7, 5), 2)
    (base if where == "base" else thetas[1])[3, 2] = float("nan")
    with pytest.raises(ValuesError, match="1 NaN"):
        _merge(base, thetas, fishers, Structure(kind, 3), [1.0, 1.0])


@pytest.mark.parametrize("kind", REFERENCES)
def test_the_number_of_threads_changes_nothing(kind):
    """Panels are merged by workers of one thread each, to the same bits."""
    base, thetas, fishers = _draw((230, 190), 3)
    inputs = [Input(t.float(), f.float()) for t, f in zip(thetas, fishers, strict=True)]
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(merge_coupled(base.float(), inputs, Structure(kind, 16), torch.float32, reported=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].values, results[1].values)
    assert torch.equal(results[0].report.figures, results[1].report.figures)


class _OneDevice(TorchFunctionMode):
    """Mode that fails when an operation mixes devices, as on a GPU but not on the device `meta`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.ndim]
        assert len({tensor.device for tensor in tensors}) <= 1, function
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("known", [True, False])
def test_an_accelerator_moves_no_tensor(kind, known, monkeypatch):
    """All intermediate results are on the device of the weights, in panels of its size, also those of the report."""
    seen = torch.empty(300, 200, device="meta", dtype=torch.bfloat16)
    fisher = torch.empty(300, 200, device="meta") if known else None
    # The device has no values to look at.
    monkeypatch.setattr(coupled, "_check_inputs", lambda base, inputs: None)
    monkeypatch.setattr(coupled, "_is_finite", lambda tensor: True)
    monkeypatch.setattr(equations, "_solve", lambda matrices, right: matrices @ right)
    with _OneDevice():
        outcome = merge_coupled(seen, [Input(seen, fisher)] * 3, Structure(kind), torch.bfloat16, reported=True)
    assert (outcome.values.device.type, outcome.values.dtype) == ("meta", torch.bfloat16)
    assert outcome.report.figures.device.type == "meta"


@pytest.mark.parametrize("kind", REFERENCES)
def test_a_device_gives_the_merge_of_the_cpu(kind, device):
    """The panels of an accelerator are larger than those of a CPU."""
    base, thetas, fishers = _draw((70, 50), 3)
    inputs = [Input(t.float().to(device), f.float().to(device)) for t, f in zip(thetas, fishers, strict=True)]
    found = merge_coupled(base.float().to(device), inputs, Structure(kind, 16), torch.float32)
    wanted = _merge(base, thetas, fishers, Structure(kind, 16), [1.0] * 3)
    torch.testing.assert_close(found.values.cpu().double(), wanted.values, rtol=0, atol=1e-3)


def test_a_vector_is_merged_by_the_diagonal():
    """A tensor with one axis has no rows to couple."""
    base, thetas, fishers = torch.zeros(5), [torch.ones(5), torch.zeros(5)], [torch.ones(5), 3 * torch.ones(5)]
    inputs = [Input(t, f) for t, f in zip(thetas, fishers, strict=True)]
    assert torch.equal(merge_coupled(base, inputs, Structure("rows"), torch.float32).values, torch.full((5,), 0.25))
