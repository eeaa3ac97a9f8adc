"""Gradients at the outputs against derivatives and expectations computed one by one."""

import pytest
import torch

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.output_gradients import (
    class_output_gradients,
    factor_columns,
    regression_output_gradients,
)


def _p(*shape, spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread).softmax(-1)


@pytest.mark.parametrize("classes", [2, 3, 11])
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
def test_the_factor_is_that_of_the_covariance_of_a_draw(classes, spread):
    """The factor satisfies L L^T = diag(p) - p p^T to rounding, also for classes with probability 0."""
    p = _p(7, classes, spread=spread)
    columns = torch.stack(list(factor_columns(p)), -1)
    assert columns.shape == (7, classes, classes - 1)
    covariance = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(columns @ columns.mT, covariance, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["true", "predicted"])
def test_one_label_gives_the_derivative_of_its_cross_entropy(kind):
    """The gradient is p - e_y, equal to autograd's, and 0 at ignored targets."""
    logits = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(7, (3, 5))
    targets[1, 2:] = -100
    (column,) = class_output_gradients(logits.detach(), targets, kind, 1, None)
    chosen = targets if kind == "true" else logits.argmax(-1).masked_fill(targets < 0, -100)
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), chosen.flatten(), ignore_index=-100, reduction="sum"
    ).backward()
    torch.testing.assert_close(column, logits.grad)
    assert not column[1, 2:].any()


def test_draws_follow_the_models_distribution():
    """The frequency of each class over 20000 draws is within five standard errors of its probability."""
    logits = torch.tensor([[0.0, 1.0, -2.0, 3.0]], dtype=torch.float64)
    p = logits.softmax(-1)
    draws = 20_000
    counts = torch.zeros(1, 4, dtype=torch.float64)
    for column in class_output_gradients(logits, None, "sampled", draws, torch.Generator().manual_seed(5)):
        counts += (column * draws**0.5 - p).round().neg()
    error = (p * (1 - p) / draws).sqrt()
    assert counts.sum() == draws
    assert ((counts / draws - p).abs() < 5 * error).all()


def test_the_same_seed_draws_the_same_labels():
    """Draws depend on the generator alone, not on torch's global state."""
    logits = torch.randn(11, 5)
    one, two = (
        [*class_output_gradients(logits, None, "sampled", 3, torch.Generator().manual_seed(7))] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_impossible_labels_are_refused():
    """Missing true labels, exact labels of tokens and predicted labels of a regression raise an error."""
    with pytest.raises(ConfigError, match="needs the labels"):
        next(class_output_gradients(torch.zeros(2, 3), None, "true", 1, None))
    with pytest.raises(ConfigError, match="take labels sampled"):
        next(class_output_gradients(torch.zeros(2, 5, 3), None, "exact", 1, None))
    with pytest.raises(ConfigError, match="needs the targets"):
        next(regression_output_gradients(torch.zeros(2, 3), None, "true", 1, 1.0, None))
    with pytest.raises(ConfigError, match="must not be predicted for a regression"):
        next(regression_output_gradients(torch.zeros(2, 3), None, "predicted", 1, 1.0, None))
