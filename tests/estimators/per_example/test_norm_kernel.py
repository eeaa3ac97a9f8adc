"""Fused kernel of norms against autograd in float64, in Triton's interpreter on a CPU."""

import pytest
import torch
import transformers as tf
from torch import nn

pytest.importorskip("triton")

from squisher_mergekit.estimators.per_example import kernel_fallback, norm_kernel
from squisher_mergekit.estimators.per_example.norm_kernel import (
    Normalization,
    norm_gradients,
    normalization_of,
    try_norm_gradients,
)

pytestmark = pytest.mark.usefixtures("interpreter")


def _pair(device, dtype, shape=(3, 13, 37)):
    generator = torch.Generator().manual_seed(0)
    x, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return (x + 0.5).to(device), b.to(device)


def _expected(x, b, norm):
    x = x.double()
    if norm.centered:
        x = x - x.mean(-1, keepdim=True)
    return (x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt() * b.double()).sum(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("centered", [False, True], ids=["rms", "layer"])
def test_the_kernel_sums_normalized_inputs_times_gradients(device, dtype, centered):
    """The kernel returns sum_t normalize(x_nt) * b_nt for each example, also for sizes that no block divides."""
    x, b = _pair(device, dtype)
    norm = Normalization(1e-5, centered)
    found = norm_gradients(x, b, norm)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), _expected(x, b, norm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 8, 41])
def test_each_row_is_in_one_chunk(device, rows, monkeypatch):
    """Each row is in one chunk, for any number of programs per example."""
    monkeypatch.setattr(norm_kernel, "_processors", lambda _: 9)
    x, b = _pair(device, torch.float32, (2, rows, 5))
    norm = Normalization(1e-5, False)
    torch.testing.assert_close(norm_gradients(x, b, norm).double(), _expected(x, b, norm), rtol=1e-5, atol=1e-5)


def test_inputs_may_have_any_strides(device):
    """A transposed input and an expanded gradient give the gradient of contiguous ones."""
    x, b = _pair(device, torch.float32, (3, 13, 13))
    x, b = x.transpose(1, 2), b[:1].expand(3, -1, -1)
    norm = Normalization(1e-5, True)
    torch.testing.assert_close(norm_gradients(x, b, norm).double(), _expected(x, b, norm), rtol=1e-5, atol=1e-5)


def test_a_large_mean_is_subtracted_before_squares(device):
    """A row around 1000 with a spread of 1 is normalized to within 1e-3."""
    x, b = _pair(device, torch.float32)
    norm = Normalization(1e-5, True)
    expected = _expected(x + 1000, b, norm)
    torch.testing.assert_close(norm_gradients(x + 1000, b, norm).double(), expected, rtol=1e-3, atol=1e-3)


# ---- the formula of a module


def _llama_norm():
    return tf.models.llama.modeling_llama.LlamaRMSNorm(11, 1e-6)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LayerNorm(11, 1e-6), Normalization(1e-6, True)),
        (nn.RMSNorm(11, 1e-6), Normalization(1e-6, False)),
        (nn.RMSNorm(11), Normalization(torch.finfo(torch.float32).eps, False)),
        (_llama_norm(), Normalization(1e-6, False)),
        (tf.models.gemma.modeling_gemma.GemmaRMSNorm(11, 1e-6), Normalization(1e-6, False)),
        (tf.models.t5.modeling_t5.T5LayerNorm(11, 1e-6), Normalization(1e-6, False)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_usual_norms_have_a_formula(module, expected):
    """The norms of torch are recognised by their class, those of language models by their values."""
    assert normalization_of(module) == expected


def test_another_formula_is_recognized_by_its_values():
    """A norm named RMSNorm that adds its epsilon to the root has no formula."""

    class _RootRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(11)), 1e-6

        def forward(self, x):
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps)

    assert normalization_of(_RootRMSNorm()) is None


@pytest.mark.parametrize(
    "module", [nn.GroupNorm(1, 11), nn.LayerNorm((3, 11)), nn.RMSNorm((3, 11)), nn.BatchNorm1d(11)]
)
def test_norms_over_other_axes_have_none(module):
    """A norm over other axes than the last has no formula."""
    assert normalization_of(module) is None


# ---- where the kernel runs


@pytest.fixture
def offered(monkeypatch):
    """Offer the kernel on every device where it has not failed."""
    failed = set()
    monkeypatch.setattr(kernel_fallback, "_failed", failed)
    monkeypatch.setattr(norm_kernel, "can_launch", lambda *_: not failed)


def test_all_axes_between_example_and_feature_are_summed(offered, device):
    """The norm of attention heads has one more axis, which is summed as well."""
    x, b = _pair(device, torch.float32, (2, 3, 5, 11))
    found = try_norm_gradients(_llama_norm(), "weight", x, b)
    expected = _expected(x.flatten(1, 2), b.flatten(1, 2), Normalization(1e-6, False))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["bias", "float64", "shape"])
def test_other_cases_do_not_use_the_kernel(offered, case):
    """The kernel declines biases, float64 tensors and outputs of another shape."""
    x, b = _pair("cpu", torch.float64 if case == "float64" else torch.float32, (2, 3, 11))
    name = "bias" if case == "bias" else "weight"
    assert try_norm_gradients(nn.LayerNorm(11), name, x, b[:, :1] if case == "shape" else b) is None


def test_a_cpu_is_not_offered_the_kernel():
    """A CPU computes without the kernel, because the interpreter would run it."""
    assert try_norm_gradients(nn.LayerNorm(37), "weight", *_pair("cpu", torch.float32)) is None


def test_a_failing_kernel_is_logged_once(offered, monkeypatch, caplog):
    """A failing kernel is logged once, and torch computes the gradients."""

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(norm_kernel, "norm_gradients", fail)
    for _ in range(2):
        assert try_norm_gradients(nn.LayerNorm(37), "weight", *_pair("cpu", torch.float32)) is None
    assert [record.message for record in caplog.records] == [
        "the fused kernel norm does not run on cpu (no compiler); torch takes its place"
    ]


def test_the_kernel_is_launched_on_the_gpu_of_its_tensors(device, monkeypatch):
    """Triton launches on the current GPU, which need not be that of the tensors."""
    entered = []
    original = norm_kernel.launching_on
    monkeypatch.setattr(norm_kernel, "launching_on", lambda where: entered.append(where) or original(where))
    x, b = _pair(device, torch.float32)
    norm_gradients(x, b, Normalization(1e-5, False))
    assert entered == [x.device]
