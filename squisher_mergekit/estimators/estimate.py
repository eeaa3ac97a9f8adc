"""The public function :func:`~squisher_mergekit.estimate_fisher`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.output_gradients import Labels
from squisher_mergekit.estimators.requirements import Grouping, check_choice
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
    offload: bool = False,
    cuda_graph: bool = True,
    factors: str | None = None,
    block: int = 128,
) -> Fisher:
    """Estimate the diagonal Fisher of a model's trainable parameters.

    Let ``g_n(y)`` be the gradient of ``-log p(y | x_n)`` and N the number of examples. ``labels`` and ``grouping``
    choose the sum; ``statistic="mean"`` divides it by N:

    * ``true``, ``example``: ``sum_n g_n(y_n)^2``, the empirical Fisher (Eq. 6-7), the paper's "Fisher". It is not the
      Fisher: at well fitted examples it is far smaller.
    * ``sampled``, ``example``: the same sum with labels drawn from the model, an unbiased estimate of the Fisher
      (Eq. 4-5).
    * ``exact``, ``example``: the Fisher itself, ``sum_n sum_c p_nc g_n(c)^2``, for classifiers only.
    * ``predicted``, ``example``: the same sum with the model's likeliest label, an estimate of neither.
    * ``true``, ``batch``: ``(sum_n g_n(y_n))^2`` over each batch, the joint empirical Fisher (Eq. 10). Adam's
      accumulator averages it (divided by B^2 for a mean loss over B examples).
    * ``sampled``, ``batch``: the joint Fisher (Eq. 9), in expectation the Fisher itself.

    For a language model one sequence is one example: its loss is the sum over its unmasked tokens. With
    ``datum="token"`` each token is an example, N counts tokens, and a backward pass runs for each position. With drawn
    labels both sums have the same expectation. With true labels they differ, because the gradients of a sequence's
    tokens are correlated.

    Args:
        model: Any module. Frozen parameters have no Fisher. The model runs in eval mode; its training mode and every
            ``.grad`` are unchanged afterwards.
        batches: Dicts of the model's arguments and ``labels``, or pairs ``(inputs, labels)``; batch axis first.
        labels: Labels whose gradients are squared.
        grouping: Square the gradient of each ``example`` or of each ``batch``.
        statistic: ``mean`` over the examples or ``sum``.
        num_samples: Number of labels drawn for each example, for ``labels="sampled"``.
        task: Meaning of the outputs; ``auto`` infers it from the model's architecture or from the labels.
        forward: Function of model and inputs that returns the logits, for models that do not return them.
        noise: Standard deviation of a regression's targets.
        seed: Seed of the drawn labels.
        verify: Compare the gradients of the first two examples with a loop over single examples, and check in batches
            1, 2, 4, 8 and so on that masking an example makes its gradient zero in every layer.
        datum: Count and square each ``example`` or each ``token``.
        distributed: ``batches`` are this process's share; add up the sums of all processes of torch.distributed. For a
            model sharded by FSDP2 this always happens, and all processes must have the same number of batches.
        offload: Keep the accumulators of a model on a GPU in host memory. This saves four bytes of GPU memory for each
            parameter, and copies as many to the host for each batch.
        cuda_graph: Replay batches of a shape seen before as a CUDA graph, where launches take longer than their
            kernels; False: run every batch eagerly.
        factors: ``rows``, ``columns`` or ``kron`` (both): sums of ``G_n G_n^T`` and ``G_n^T G_n`` beside the diagonal,
            of the same gradients, for merges with that ``structure``; for the matrices of linear layers. None: none.
        block: Number of consecutive rows (or columns) in a block of the factors.

    Returns:
        The Fisher in float32 (float64 for a float64 model), under the parameter names of the saved model.

    Raises:
        ConfigError: The arguments do not fit together, or there is no example.
        UnsupportedStateError: A module mixes its examples, or a parameter has no per-example gradient.

    Source: Li, Dangel, Tam and Raffel, "Fishers for Free? Approximating the Fisher Information Matrix by Recycling the
    Squared Gradient Accumulator", Eq. 4-10.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)
        >>> _ = nn.init.ones_(model.weight)
        >>> estimate_fisher(model, [(x, y)], task="regression")["weight"]
        tensor([[ 9., 36.]])
    """
    check_choice("statistic", statistic, ("mean", "sum"))
    accumulator = FisherAccumulator(
        model,
        labels,
        grouping,
        num_samples,
        task,
        forward,
        noise,
        seed,
        verify,
        datum,
        offload=offload,
        cuda_graph=cuda_graph,
        factors=factors,
        block=block,
    )
    for batch in batches:
        accumulator.add(batch)
    if distributed or accumulator.sharded:
        accumulator.reduce()
    if not accumulator.examples:
        raise ConfigError("a Fisher needs at least one batch of examples, found none; give batches that are not empty")
    if statistic == "mean":
        accumulator.divide()
    return accumulator.fisher(statistic=statistic, num_examples=accumulator.examples)
