"""Execution of the equations: chunks, the pool, and the fused pass."""

import sys
import weakref

import pytest
import torch

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.merging import execution, fused
from squisher_mergekit.merging.execution import merge_squisher, merge_ubgm
from squisher_mergekit.merging.inputs import Ballot, Input
from squisher_mergekit.merging.pool import Pool
from squisher_mergekit.merging.run import Run
from tests.merging.reference import assert_within, draw_fisher, largest, squisher_reference, ubgm_reference

SIZE = 2 * execution.CHUNK + 7919
WEIGHTS = (1.0, 0.3, 2.0)


# The interpreter computes with numpy, which warns of intended IEEE arithmetic.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def _inputs(size: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu") -> list[Input]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Input(
            torch.randn(size, generator=generator).to(device, dtype),
            draw_fisher([size], generator).to(device),
            weight,
            1.0,
            (f"w{i}", "f"),
        )
        for i, weight in enumerate(WEIGHTS)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_chunks_over_the_pool_agree_with_float64(dtype: torch.dtype) -> None:
    """A tensor of several chunks, the last one short, merges as in float64 in every dtype."""
    inputs = _inputs(SIZE, dtype)
    thetas, fishers = [i.theta for i in inputs], [i.fisher for i in inputs]
    outcome = merge_squisher(inputs, dtype)
    assert outcome.values.dtype == dtype
    assert_within(outcome.values, squisher_reference(thetas, fishers, WEIGHTS), largest(thetas))


def test_chunks_in_the_normal_range_agree_with_float64() -> None:
    """Fishers far from overflow and underflow, in one chunk or in all, merge as in float64 by both methods."""
    generator = torch.Generator().manual_seed(7)
    inputs = [
        Input(torch.randn(SIZE, generator=generator), 10 ** (torch.rand(SIZE, generator=generator) * 20 - 20), weight)
        for weight in (1.0, *WEIGHTS)
    ]
    assert inputs[1].fisher is not None
    inputs[1].fisher[:5] = 0
    base, *others = inputs
    thetas, fishers = [i.theta for i in others], [i.fisher for i in others]
    merged = merge_squisher(others, torch.float32)
    assert_within(merged.values, squisher_reference(thetas, fishers, WEIGHTS), largest(thetas))
    assert (sum(merged.shares), merged.fell_back) == (pytest.approx(1, rel=1e-6), 0)
    size = base.theta.double().abs() + sum(
        w * (t.double() - base.theta).abs() for w, t in zip(WEIGHTS, thetas, strict=True)
    )
    for prior in (0.0, 0.1):
        reference = ubgm_reference(base.theta, base.fisher, thetas, fishers, WEIGHTS, prior)
        assert_within(merge_ubgm(base, others, prior, torch.float32).values, reference, size)


def test_the_thread_count_is_restored_and_changes_no_bit() -> None:
    """One or three torch threads give bit-equal results, and torch's thread count is restored."""
    inputs, before = _inputs(SIZE, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = merge_squisher(inputs, torch.float32).values
        torch.set_num_threads(3)
        pooled = merge_squisher(inputs, torch.float32).values
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, pooled)


def test_a_worker_has_one_torch_thread() -> None:
    """Torch uses one thread in the pool, for any default. More threads would spin at every operation."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        pool = Pool().get(3)
        counts = [pool.submit(lambda: (torch.ones(3) + 1, torch.get_num_threads())[1]).result() for _ in range(6)]
        pool.shutdown()
    finally:
        torch.set_num_threads(before)
    assert counts == [1] * 6


def test_inputs_are_not_changed_and_may_be_strided() -> None:
    """Transposed inputs merge like contiguous ones, and no input is written to."""
    generator = torch.Generator().manual_seed(1)
    thetas = [torch.randn(31, 17, generator=generator) for _ in range(2)]
    fishers = [draw_fisher([31, 17], generator) for _ in range(2)]
    copies = [tensor.clone() for tensor in (*thetas, *fishers)]
    strided = merge_squisher(
        [Input(t.t().contiguous().t(), f.t().contiguous().t()) for t, f in zip(thetas, fishers, strict=True)],
        torch.float32,
    )
    plain = merge_squisher([Input(t, f) for t, f in zip(thetas, fishers, strict=True)], torch.float32)
    assert torch.equal(strided.values, plain.values)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*thetas, *fishers), copies, strict=True))


@pytest.mark.parametrize(("bad", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-1e-9, "negative")])
@pytest.mark.parametrize("place", [3, SIZE - 1])
def test_an_invalid_entry_is_named(bad: float, word: str, place: int) -> None:
    """NaN, infinite and negative entries of F are refused with the tensor, the file and the kind."""
    inputs = _inputs(SIZE, torch.float32)
    assert inputs[1].fisher is not None
    inputs[1].fisher[place] = bad
    with pytest.raises(ValuesError, match=f"w1 in f has 1 {word} of {SIZE}"):
        merge_squisher(inputs, torch.float32)


def test_without_fishers_the_weighted_mean() -> None:
    """Models without a Fisher enter by their weights. UBGM adds the mean difference to the base."""
    inputs = [Input(i.theta, None, i.weight) for i in _inputs(101, torch.float32)]
    mean = sum(i.weight * i.theta.double() for i in inputs) / sum(WEIGHTS)
    outcome = merge_squisher(inputs, torch.float32)
    torch.testing.assert_close(outcome.values.double(), mean, rtol=1e-6, atol=1e-6)
    assert outcome.fell_back == 101
    with_base = merge_ubgm(Input(torch.full((101,), 5.0), None), inputs, 0.0, torch.float32)
    torch.testing.assert_close(with_base.values.double(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.parametrize("prior", [None, 0.0, 0.5])
def test_the_fused_pass_agrees_with_float64(device: torch.device, prior: float | None) -> None:
    """The accelerator path gives the merges, shares and counts of the chunks on the CPU."""
    inputs = _inputs(1009, torch.bfloat16, device=device)
    thetas, fishers = [i.theta.cpu() for i in inputs], [i.fisher.cpu() for i in inputs]
    if prior is None:
        outcome = merge_squisher(inputs, torch.float32)
        assert_within(outcome.values.cpu(), squisher_reference(thetas, fishers, WEIGHTS), largest(thetas))
        assert float(sum(outcome.shares)) == pytest.approx(1.0, rel=1e-5)
        return
    base, *others = inputs
    outcome = merge_ubgm(base, others, prior, torch.float32)
    reference = ubgm_reference(thetas[0], fishers[0], thetas[1:], fishers[1:], WEIGHTS[1:], prior)
    size = thetas[0].double().abs() + sum(
        w * (t.double() - thetas[0].double()).abs() for w, t in zip(WEIGHTS[1:], thetas[1:], strict=True)
    )
    assert_within(outcome.values.cpu(), reference, size)


@pytest.mark.usefixtures("as_accelerator")
def test_the_fused_pass_takes_strided_inputs(device: torch.device) -> None:
    """Transposed, sliced and repeated tensors merge like their contiguous copies on an accelerator as well."""
    generator = torch.Generator().manual_seed(3)
    theta, fisher = torch.randn(62, 34, generator=generator).to(device), draw_fisher([62, 34], generator).to(device)
    views = [
        lambda t: t[:31, :17],
        lambda t: t[::2, ::2],
        lambda t: t[:17, :31].t(),
        lambda t: t[:1, :17].expand(31, 17),
    ]
    inputs = [Input(view(theta), view(fisher)) for view in views]
    copies = [Input(item.theta.contiguous(), item.fisher.contiguous()) for item in inputs if item.fisher is not None]
    assert torch.equal(merge_squisher(inputs, torch.float32).values, merge_squisher(copies, torch.float32).values)
    lines = [
        Input(theta.flatten()[::3], fisher.flatten()[::3]),
        Input(theta.flatten()[::3] + 1, fisher.flatten()[1::3]),
    ]
    copies = [Input(item.theta.clone(), item.fisher.clone()) for item in lines if item.fisher is not None]
    assert torch.equal(
        merge_ubgm(lines[0], lines[1:], 0.1, torch.float32).values,
        merge_ubgm(copies[0], copies[1:], 0.1, torch.float32).values,
    )


@pytest.mark.usefixtures("as_accelerator")
def test_the_fused_pass_flags_invalid_entries_later(device: torch.device) -> None:
    """The accelerator path does not wait for the flag of invalid entries. The check of the outcome reads it."""
    inputs = _inputs(1009, torch.float32, device=device)
    assert inputs[2].fisher is not None
    inputs[2].fisher[5] = float("nan")
    outcome = merge_squisher(inputs, torch.float32)
    with pytest.raises(ValuesError, match="w2 in f has 1 NaN of 1009 entries"):
        outcome.check()


@pytest.mark.usefixtures("as_accelerator")
def test_an_outcome_holds_no_fisher_and_no_result(device: torch.device) -> None:
    """The outcome of an accelerator run keeps counts only, not Fishers or results."""
    run = Run("squisher")
    inputs = _inputs(1009, torch.float32, device=device)
    outcome = merge_squisher(inputs, torch.float32)
    held = [weakref.ref(tensor) for item in inputs for tensor in (item.theta, item.fisher)] + [
        weakref.ref(outcome.values)
    ]
    run.record("w", ["0", "1", "2"], outcome)
    del inputs, outcome
    assert [ref() for ref in held] == [None] * 7
    run.check()


@pytest.mark.slow
@pytest.mark.usefixtures("by_formula")
@pytest.mark.filterwarnings("ignore")
def test_the_fused_pass_compiles_once_for_all_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled pass serves other sizes and weights without compiling again, and agrees with float64."""
    import torch._dynamo

    monkeypatch.setattr(execution, "COMPILE_FROM", 1)
    torch._dynamo.reset()
    execution._COMPILED.clear()
    counters = torch._dynamo.utils.counters
    counters.clear()  # other tests in this process compile as well
    compiled = []
    for seed, size in enumerate((1009, 2003, 3001)):
        inputs = [
            Input(i.theta, i.fisher, i.weight * (1 + seed), 1.0 + seed) for i in _inputs(size, torch.bfloat16, seed)
        ]
        thetas, fishers = [i.theta for i in inputs], [i.fisher for i in inputs]
        outcome = merge_squisher(inputs, torch.bfloat16)
        assert_within(outcome.values, squisher_reference(thetas, fishers, WEIGHTS), largest(thetas))
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] == compiled[1] == compiled[2] == 1
    assert not execution._COMPILER_MISSING.is_set()


def test_without_a_compiler_the_pass_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If torch.compile fails, one line says so, and the plain function runs from then on."""

    def broken(function: object, **_: object) -> object:
        def fail(*_: object) -> object:
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(execution, "_COMPILED", {})
    monkeypatch.setattr(execution, "_COMPILER_MISSING", type(execution._COMPILER_MISSING)())
    assert execution.compiled(lambda x: x + 1, execution.COMPILE_FROM)(1) == 2
    assert execution.compiled(lambda x: x + 2, execution.COMPILE_FROM)(1) == 3
    assert len([record for record in caplog.records if "eager" in record.message]) == 1


@pytest.mark.usefixtures("by_formula")
def test_without_triton_the_formula_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If kernel and compiler fail, the plain formula runs, and one line in total is logged."""

    def broken(function: object, **_: object) -> object:
        return lambda *_: (_ for _ in ()).throw(RuntimeError("no compiler"))

    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    monkeypatch.setattr(fused, "_GAVE_UP", type(fused._GAVE_UP)())
    monkeypatch.setattr(execution, "_COMPILED", {})
    monkeypatch.setattr(execution, "_COMPILER_MISSING", type(execution._COMPILER_MISSING)())
    monkeypatch.setattr(execution, "COMPILE_FROM", 1)
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(sys.modules, "squisher_mergekit.merging.fused_kernels", None)
    monkeypatch.delattr("squisher_mergekit.merging.fused_kernels", raising=False)
    inputs = _inputs(1009, torch.float32)
    thetas, fishers = [i.theta for i in inputs], [i.fisher for i in inputs]
    for _ in range(2):
        outcome = merge_squisher(inputs, torch.float32)
        assert_within(outcome.values, squisher_reference(thetas, fishers, WEIGHTS), largest(thetas))
    assert [record.message.split(" (")[0] for record in caplog.records] == ["the fused kernel is not usable here"]


@pytest.mark.usefixtures("by_formula")
def test_out_of_memory_keeps_the_kernel_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without memory for a result stops the merge, and the kernel stays in use."""

    def full() -> fused.FusedMerge:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    with pytest.raises(torch.OutOfMemoryError):
        fused.attempt(full, [torch.ones(3)])
    assert not fused.gave_up()


@pytest.mark.usefixtures("by_formula")
def test_more_models_than_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formula replaces the kernel from 33 models on."""
    monkeypatch.setattr(fused, "runs_on", lambda device: True)
    inputs = [Input(torch.full((7,), float(i)), torch.ones(7)) for i in range(33)]
    assert merge_squisher(inputs, torch.float32).values.tolist() == pytest.approx([16.0] * 7)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("known", [True, False])
def test_a_weight_that_is_not_finite_is_refused(value: float, known: bool) -> None:
    """On the CPU the message names the model, with Fishers and without."""
    inputs = [
        Input(item.theta, item.fisher if known else None, item.weight, 1.0, item.label, model=f"model-{i}")
        for i, item in enumerate(_inputs(SIZE, torch.float32))
    ]
    inputs[1].theta[SIZE - 3] = value
    with pytest.raises(ValuesError, match=f"w1 of model-1 has 1 {'NaN' if value != value else 'infinite'}"):
        merge_squisher(inputs, torch.float32)


def test_an_infinite_entry_that_all_models_share_stays() -> None:
    """A mask of minus infinity in a buffer is no fault, where the mean is taken."""
    buffer = torch.tensor([0.0, float("-inf")])
    assert torch.equal(merge_squisher([Input(buffer, None), Input(buffer, None)], torch.float32).values, buffer)


@pytest.mark.parametrize(("dtype", "weight"), [(torch.float16, 1e6), (torch.bfloat16, 1e30)])
def test_a_result_that_leaves_its_dtype_is_refused(dtype: torch.dtype, weight: float) -> None:
    """Weights of gradient matching that carry the result out of the output's range are refused, not written."""
    base, first, second = _inputs(1009, torch.float32)
    others = [Input(item.theta * 1e10, torch.zeros(1009), weight) for item in (first, second)]
    assert base.fisher is not None
    with pytest.raises(ValuesError, match="leaves the range"):
        merge_ubgm(Input(base.theta, base.fisher + 1), others, 0.0, dtype)


@pytest.mark.usefixtures("as_accelerator")
@pytest.mark.parametrize("ubgm", [False, True])
def test_an_accelerator_counts_results_that_are_not_finite(device: torch.device, ubgm: bool) -> None:
    """The kernel and the formula count NaN and infinite results, which are looked at later."""
    inputs = _inputs(1009, torch.float32, device=device)
    inputs[1].theta[[3, 700]] = float("nan")
    inputs[1].theta[5] = float("inf")
    outcome = merge_ubgm(inputs[0], inputs[1:], 0.0, torch.float32) if ubgm else merge_squisher(inputs, torch.float32)
    assert int(outcome.not_finite) == int((~torch.isfinite(outcome.values)).sum()) >= 2
    run = Run("squisher")
    run.record("w", ["a"] * len(outcome.shares), outcome)
    with pytest.raises(ValuesError, match=r"w has . NaN or infinite entries"):
        run.check()


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_tensor_without_entries(known: bool, recorded: bool) -> None:
    """A tensor without entries, such as the embedding of no token types, merges to itself by both methods."""
    theta = torch.zeros(0, 7, dtype=torch.bfloat16)
    inputs = [Input(theta, theta.float() if known else None, weight) for weight in WEIGHTS]
    ballot = Ballot(recorded=recorded)
    for outcome in (
        merge_squisher(inputs, torch.float16, ballot),
        merge_ubgm(Input(theta, None), inputs, 0.5, torch.float16, ballot),
    ):
        assert (outcome.values.shape, outcome.values.dtype) == ((0, 7), torch.float16)
        assert (outcome.shares, int(outcome.fell_back)) == ([0.0] * 3, 0)
        assert (outcome.fisher is not None) == (known and recorded)
