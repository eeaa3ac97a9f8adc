"""A diagonal Fisher of a model from data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator, Grouping
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.tasks import Batch, Datum, Forward, Task
from squisher_mergekit.fisher.mapping import Fisher


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Batch],
    labels: Labels = "true",
    grouping: Grouping = "example",
    statistic: Literal["mean", "sum"] = "mean",
    num_samples: int = 1,
    task: Task = "auto",
    forward: Forward | None = None,
    *,
    noise: float = 1.0,
    seed: int = 0,
    verify: bool = True,
    datum: Datum = "example",
    distributed: bool = False,
) -> Fisher:
    """Estimate the diagonal Fisher of a model's trainable parameters.

    With ``g_n(y)`` the gradient of ``-log p(y | x_n)`` and N examples, ``mean`` divides by N:

    * ``true``, ``example``: ``sum_n g_n(y_n)^2``, the empirical Fisher (Eq. 6-7), the paper's "Fisher". It is not the
      Fisher: at well fitted examples it is far smaller.
    * ``sampled``, ``example``: the same with labels drawn from the model, an unbiased estimate of the Fisher (Eq. 4-5).
    * ``exact``, ``example``: the Fisher itself, ``sum_n sum_c p_nc g_n(c)^2``; for classes, not for tokens.
    * ``predicted``, ``example``: with the model's likeliest label; an estimate of neither.
    * ``true``, ``batch``: ``(sum_n g_n(y_n))^2`` over each batch, the joint empirical Fisher (Eq. 10). It is what
      Adam's accumulator averages (that of a mean loss over B examples is this divided by B^2).
    * ``sampled``, ``batch``: the joint Fisher (Eq. 9), in expectation the Fisher itself.

    A sequence is one example of a language model: its loss is the sum over its unmasked tokens. With ``datum="token"``
    each token is one, given those before it: N counts tokens, and g is of one token's loss. It takes a backward pass
    for each place of a sequence. Of drawn labels the sums are the same in expectation, as tokens are drawn one by one;
    of true labels they are not, because the gradients of a sequence's tokens go together.

    Args:
        model: Any module; parameters that ask for no gradient are left out. It runs in eval mode, and neither mode nor
            ``.grad`` are different afterwards.
        batches: Dicts of what the model takes, ``labels`` included, or pairs ``(inputs, labels)``; examples in front.
        labels: See above.
        grouping: See above.
        statistic: ``mean`` over the examples or ``sum``.
        num_samples: Draws for each example, of ``sampled``.
        task: What the outputs mean; ``auto`` goes by the model's architecture, or by the labels.
        forward: Takes model and inputs, and returns the logits, where the model does not do so itself.
        noise: Standard deviation of a regression's targets.
        seed: Of the labels that are drawn.
        verify: Hold the first two examples against gradients taken one by one, and see in the batches 1, 2, 4, 8 and so
            on that the model does not mix its examples.
        datum: See above.
        distributed: The batches are this process's share, and the sums are added up over all processes of
            torch.distributed. Of a model sharded by FSDP2 they are in any case; all must have as many batches then.

    Returns:
        The Fisher, float32 (float64 of a float64 model), by the names that saving the model gives its parameters.

    Raises:
        ConfigError: The arguments do not go together, or there is no example.
        UnsupportedStateError: A module mixes its examples, or a parameter's gradients cannot be told apart.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> _ = nn.init.ones_(model.weight)
        >>> estimate_fisher(model, [(x, y)], task="regression")["weight"]
        tensor([[ 9., 36.]])
    """
    accumulator = FisherAccumulator(model, labels, grouping, num_samples, task, forward, noise, seed, verify, datum)
    for batch in batches:
        accumulator.add(batch)
    if distributed or accumulator.sharded:
        accumulator.reduce()
    if not accumulator.examples:
        raise ConfigError("a Fisher needs at least one batch of examples, found none")
    if statistic == "mean":
        accumulator.divide()
    return accumulator.fisher(statistic=statistic, num_examples=accumulator.examples)
