"""Fused kernel of squared products against float64, in Triton's interpreter on a CPU."""

import pytest
import torch

pytest.importorskip("triton")

from squisher_mergekit.estimators.per_example import kernel_fallback, square_kernel
from squisher_mergekit.estimators.per_example.square_kernel import SMALL, Tiling, add_product_squares, plan

pytestmark = pytest.mark.usefixtures("interpreter")

TINY = Tiling(16, 32, 16, 4, 2)
NESTED = Tiling(16, 32, 16, 4, 2, flat=False)
COPIED = Tiling(16, 16, 16, 4, 2, tma=True)


def _factors(device, dtype, examples=3, tokens=19, rows=23, columns=37):
    generator = torch.Generator().manual_seed(examples * 1000 + tokens)
    b = torch.randn(examples, tokens, rows, generator=generator).to(dtype)
    a = torch.randn(examples, tokens, columns, generator=generator).to(dtype)
    return b.to(device), a.to(device)


def _expected(b, a):
    return torch.bmm(b.double().transpose(1, 2), a.double()).square().sum(0)


def _assert_close(total, expected):
    """Compare with rounding of sums only; products of narrow floats are exact in float32."""
    assert float((total.double() - expected).abs().max()) <= 2e-6 * float(expected.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tiling", [TINY, NESTED], ids=["flat", "nested"])
def test_the_kernel_adds_squared_products(device, dtype, tiling):
    """The kernel adds sum_n (B_n^T A_n)^2 to the accumulator, also for sizes that no tile divides."""
    b, a = _factors(device, dtype)
    total = torch.full((23, 37), 2.0, device=device)
    add_product_squares(total, b, a, tiling=tiling)
    _assert_close(total, 2 + _expected(b, a))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
def test_tokens_need_not_fill_their_block(device, tokens):
    """Tokens beyond the last one count as 0."""
    b, a = _factors(device, torch.bfloat16, tokens=tokens)
    total = torch.zeros(23, 37, device=device)
    add_product_squares(total, b, a, tiling=TINY)
    _assert_close(total, _expected(b, a))


@pytest.mark.parametrize("shape", [(16, 16), (32, 48), (1, 1), (5, 33)])
def test_tiles_may_be_full_or_cut(device, shape):
    """Rows and columns beyond the edges are neither read nor written."""
    rows, columns = shape
    b, a = _factors(device, torch.bfloat16, tokens=16, rows=rows, columns=columns)
    frame = torch.full((rows + 2, columns + 2), 7.0, device=device)
    total = frame[1:-1, 1:-1]
    add_product_squares(total, b, a, tiling=TINY)
    _assert_close(total, 7 + _expected(b, a))
    assert bool((frame[[0, -1]] == 7).all())
    assert bool((frame[:, [0, -1]] == 7).all())


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_split_examples_add_up(device, splits):
    """Several programs sum parts of the examples, and each example counts once."""
    b, a = _factors(device, torch.bfloat16, examples=7, tokens=5)
    total = torch.ones(23, 37, device=device)
    add_product_squares(total, b, a, tiling=TINY, splits=splits)
    _assert_close(total, 1 + _expected(b, a))


def test_split_sums_are_the_same_each_time(device):
    """Partial sums are added in a fixed order, so two runs agree to the last bit."""
    b, a = _factors(device, torch.bfloat16, examples=7)
    totals = [torch.zeros(23, 37, device=device) for _ in range(2)]
    for total in totals:
        add_product_squares(total, b, a, tiling=TINY, splits=3)
    assert torch.equal(*totals)


def test_any_strides_are_read(device):
    """Factors may be transposed, expanded over the examples, or strided columns of a wider tensor."""
    b, a = _factors(device, torch.bfloat16, rows=46)
    b, a = b[:, :, ::2], a.transpose(1, 2).contiguous().transpose(1, 2)
    total = torch.zeros(37, 23, device=device).T
    add_product_squares(total, b[:1].expand(3, -1, -1), a, tiling=TINY)
    _assert_close(total, _expected(b[:1].expand(3, -1, -1), a))


def test_the_copy_engine_loads_the_same_tiles(device):
    """Descriptors give the sums of pointers, also at the ends of tokens, rows and columns."""
    b, a = _factors(device, torch.bfloat16, rows=24, columns=40)
    total = torch.zeros(24, 40, device=device)
    add_product_squares(total, b, a, tiling=COPIED)
    _assert_close(total, _expected(b, a))


def test_unaligned_rows_are_loaded_by_pointers(device):
    """Rows whose bytes are not a multiple of 16 have no descriptor and are loaded by pointers."""
    b, a = _factors(device, torch.bfloat16)
    assert not square_kernel._can_copy(b)
    total = torch.zeros(23, 37, device=device)
    add_product_squares(total, b, a, tiling=COPIED)
    _assert_close(total, _expected(b, a))


@pytest.mark.parametrize("scale", [1e-18, 1e17])
def test_squares_are_of_float32(device, scale):
    """Gradients of 1e-18 and 1e17 have squares outside the range of float16, and none is lost."""
    b, a = _factors(device, torch.bfloat16)
    b = b * scale
    total = torch.zeros(23, 37, device=device)
    add_product_squares(total, b, a, tiling=TINY)
    _assert_close(total, _expected(b, a))


def test_gradients_of_zero_leave_the_accumulator_alone(device):
    """Gradients of 0 change no bit of the accumulator."""
    b, a = _factors(device, torch.float16)
    total = torch.rand(23, 37, device=device)
    before = total.clone()
    add_product_squares(total, torch.zeros_like(b), a, tiling=TINY)
    assert torch.equal(total, before)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 0, 4), (2, 5, 3, 0)])
def test_empty_factors_add_nothing(device, shape):
    """The kernel does not launch without examples, tokens, rows or columns."""
    b, a = _factors(device, torch.bfloat16, *shape)
    total = torch.ones(shape[2:], device=device)
    add_product_squares(total, b, a)
    assert bool((total == 1).all())


def test_the_planned_tiling_is_right_too(device):
    """The planned tiling, which is larger than the parameter, gives the right sums."""
    b, a = _factors(device, torch.bfloat16, examples=2)
    total = torch.zeros(23, 37, device=device)
    add_product_squares(total, b, a)
    _assert_close(total, _expected(b, a))


# ---- the plan


@pytest.mark.parametrize("rows", [64, 256, 768, 2048, 5632, 32000])
@pytest.mark.parametrize("tokens", [64, 512])
def test_a_plan_fills_the_processors(rows, tokens):
    """At least half of the multiprocessors have a tile, and every part has an example."""
    tiling, splits = plan(rows, 768, 16, tokens, 132)
    tiles = -(-rows // tiling.rows) * -(-768 // tiling.columns)
    assert splits <= 16
    assert tiles * splits >= 66


def test_one_example_is_never_split():
    """One example is never split, because its tokens are summed before they are squared."""
    assert plan(64, 64, 1, 512, 132)[1] == 1


# ---- where the kernel runs


@pytest.fixture
def offered(monkeypatch):
    """Offer the kernel on every device where it has not failed."""
    failed = set()
    monkeypatch.setattr(kernel_fallback, "_failed", failed)
    monkeypatch.setattr(square_kernel, "is_offered", lambda *_: not failed)


def test_a_cpu_is_not_offered_the_kernel():
    """A CPU computes without the kernel, because the interpreter would run it."""
    b, a = _factors("cpu", torch.bfloat16)
    total = torch.zeros(23, 37)
    assert not square_kernel.try_product_squares(total, b, a)
    assert not total.any()


def test_a_card_with_little_memory_takes_the_small_tiling(offered, monkeypatch):
    """The small tiling follows a tiling that does not fit."""
    taken = []

    def launch(out, b, a, tiling, precision, add):
        if tiling != SMALL:
            raise RuntimeError("out of resource: shared memory")
        taken.append(tiling)

    monkeypatch.setattr(square_kernel, "_launch", launch)
    b, a = _factors("cpu", torch.bfloat16)
    assert square_kernel.try_product_squares(torch.zeros(23, 37), b, a)
    assert taken == [SMALL]


def test_a_failing_kernel_is_logged_once(offered, monkeypatch, caplog):
    """A failing kernel is logged once, and the device is not offered it again."""
    calls = []

    def launch(*args, **_):
        calls.append(args)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(square_kernel, "_launch", launch)
    b, a = _factors("cpu", torch.bfloat16)
    for _ in range(2):
        assert not square_kernel.try_product_squares(torch.zeros(23, 37), b, a)
    assert len(calls) == 2  # the planned tiling and the small one
    assert [record.message for record in caplog.records] == [
        "the fused kernel square does not run on cpu (no compiler); torch takes its place"
    ]


def test_columns_may_be_far_apart(device):
    """The patches of a large image have their columns as far apart as it has positions: beyond 2^31 entries in all."""
    columns, apart = 41, 2**31 // 37
    b, values = _factors(device, torch.bfloat16, examples=1, tokens=3, rows=5, columns=columns)
    a = torch.empty(columns * apart, dtype=torch.bfloat16, device=device).as_strided((1, 3, columns), (3, 1, apart))
    a.copy_(values)
    total = torch.zeros(5, columns, device=device)
    add_product_squares(total, b, a, tiling=TINY)
    _assert_close(total, _expected(b, values))


def test_the_kernel_is_launched_on_the_gpu_of_its_tensors(device, monkeypatch):
    """Triton launches on the current GPU, which need not be that of the tensors."""
    entered = []
    original = square_kernel.launching_on
    monkeypatch.setattr(square_kernel, "launching_on", lambda where: entered.append(where) or original(where))
    total = torch.zeros(23, 37, device=device)
    add_product_squares(total, *_factors(device, torch.bfloat16), tiling=TINY)
    assert entered == [total.device]
    assert kernel_fallback.launching_on(torch.device("cuda", 3)).idx == 3
