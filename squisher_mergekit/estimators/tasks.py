"""Forward passes: the outputs and targets of a batch, for each task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.output_gradients import Labels, class_output_gradients, regression_output_gradients

DataTask = Literal["classification", "token-classification", "causal-lm", "seq2seq", "masked-lm", "regression"]
Task = Literal["auto"] | DataTask
Datum = Literal["example", "token"]
Batch = Mapping[str, Any] | tuple[Any, Tensor]
Forward = Callable[[nn.Module, Any], Tensor]

IGNORED = -100
# Tasks whose attention mask tells the tokens of the outputs from padding.
_MASKED = ("causal-lm", "masked-lm", "token-classification")


@dataclass(frozen=True)
class Outputs:
    """Outputs of a model for one batch, with their targets.

    Attributes:
        task: Meaning of the outputs, not ``auto``.
        values: Logits ``(N, C)`` or ``(N, T, C)``, or predictions ``(N, D)``.
        targets: Classes ``(N)`` or ``(N, T)``, negative ones ignored; or numbers ``(N, D)``; None without labels.
        labelled: False if the targets are no labels, but tell tokens from padding.
    """

    task: Task
    values: Tensor
    targets: Tensor | None
    labelled: bool = True

    @property
    def size(self) -> int:
        """Number of examples."""
        return len(self.values)

    @property
    def tokens(self) -> Tensor | int:
        """Number of tokens with a target; of all tokens without targets."""
        if self.targets is None:
            return self.values[..., 0].numel()
        return (self.targets >= 0).sum()

    def output_gradients(
        self, kind: Labels, num_samples: int, noise: float, generator: torch.Generator | None, datum: Datum = "example"
    ) -> Iterator[Tensor]:
        """Yield the gradients at the values; see :mod:`squisher_mergekit.estimators.output_gradients`.

        With ``datum="token"`` each gradient is split into one for each position of the sequences.
        """
        detached = self.values.detach()
        if self.task == "regression":
            found = regression_output_gradients(detached, self.targets, kind, num_samples, noise, generator)
        else:
            targets = self.targets if self.labelled or kind != "true" else None
            found = class_output_gradients(detached, targets, kind, num_samples, generator)
        if datum == "example":
            yield from found
            return
        for gradient in found:
            for position in range(gradient.shape[1]):
                single = torch.zeros_like(gradient)
                single[:, position] = gradient[:, position]
                yield single


def infer_task(task: Task, model: nn.Module, batch: Batch) -> DataTask:
    """Return the task of a model: ``task`` itself, or for ``auto`` the task of its architecture or of its labels.

    Args:
        task: The user's choice.
        model: The model; transformers' class names end in their task.
        batch: A batch. In a pair, whole numbers as labels mean classification, others regression.

    Raises:
        ConfigError: Neither architecture nor labels decide.
    """
    if task != "auto":
        return task
    architecture = type(getattr(model, "base_model", model) if hasattr(model, "peft_config") else model).__name__
    names = [architecture, *(getattr(getattr(model, "config", None), "architectures", None) or [])]
    for name in names:
        for ending, found in _TASK_OF_ENDING.items():
            if name.endswith(ending):
                return _by_config(found, getattr(model, "config", None))
    if isinstance(batch, tuple) and isinstance(batch[1], Tensor):
        return "regression" if batch[1].is_floating_point() else "classification"
    raise ConfigError(
        f"task must be given for {architecture}, which is no model of transformers with a head; take one of "
        "classification, token-classification, causal-lm, seq2seq, masked-lm, regression"
    )


def _by_config(found: DataTask, config: Any) -> DataTask:
    """Return the task of an architecture whose name leaves a choice to its config.

    Raises:
        ConfigError: The model has several labels at once.
    """
    if found == "classification":
        problem = getattr(config, "problem_type", None)
        if problem == "multi_label_classification":
            raise ConfigError(
                "a classifier must have one label for each example, but problem_type is multi_label_classification; "
                "leave this model out"
            )
        # The loss of transformers takes one output as a number.
        single = problem is None and getattr(config, "num_labels", None) == 1
        return "regression" if single or problem == "regression" else found
    # Decoders that see images or hear sounds have the ending as well.
    return "causal-lm" if found == "seq2seq" and getattr(config, "is_encoder_decoder", True) is False else found


_TASK_OF_ENDING: dict[str, DataTask] = {
    "ForSequenceClassification": "classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "classification",
    "ForAudioClassification": "classification",
    "ForMultipleChoice": "classification",
    "ForConditionalGeneration": "seq2seq",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
}


def run_model(model: nn.Module, batch: Batch, task: Task, forward: Forward | None) -> Outputs:
    """Run a model on a batch.

    Args:
        model: The model, in eval mode.
        batch: A dict of the model's arguments and ``labels``, or a pair of inputs and labels.
        task: Meaning of the outputs, not ``auto``.
        forward: Function of model and inputs that returns the logits, for models that do not return them.

    Returns:
        Outputs and targets, aligned: a causal language model's output at a token predicts the next one.
    """
    inputs, labels = _split_labels(model, batch, task)
    if forward is not None:
        found: Any = forward(model, inputs)
    elif isinstance(inputs, Mapping):
        # A cache of keys and values, or of Mamba's states, costs memory, and mixes examples for per-example gradients.
        inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        cached = "use_cache" in inspect.signature(inner.forward).parameters and "use_cache" not in inputs
        found = model(**inputs, **({"use_cache": False} if cached else {}))
    else:
        found = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    values = found if isinstance(found, Tensor) else found["logits"] if isinstance(found, Mapping) else found.logits
    values = values if values.dtype == torch.float64 else values.float()
    labelled = labels is not None
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) and task in _MASKED else None
    mask = mask if mask is not None and mask.shape == values.shape[:2] else None
    if labels is None and mask is not None:
        labels = mask.new_zeros(mask.shape, dtype=torch.int64).masked_fill(mask == 0, IGNORED)
    if task == "causal-lm":
        values = values[:, :-1]
        labels = None if labels is None else labels[:, 1:]
        if labels is not None and mask is not None:
            labels = labels.masked_fill(mask[:, 1:] == 0, IGNORED)
    if task == "regression":
        values = values.reshape(len(values), -1)
        labels = None if labels is None else labels.reshape(values.shape).to(values.dtype)
    return Outputs(task, values, labels, labelled)


def _split_labels(model: Any, batch: Batch, task: Task) -> tuple[Any, Tensor | None]:
    """Return the model's inputs and the labels."""
    if not isinstance(batch, Mapping):
        return batch[0], batch[1]
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = batch.get("labels")
    if task == "seq2seq" and "decoder_input_ids" not in inputs:
        if labels is None:
            raise ConfigError("a seq2seq batch must have labels or decoder_input_ids; give the targets of each example")
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None) or getattr(model, "_shift_right", None)
        # Some models can only shift labels inside their forward pass.
        inputs |= {"labels": labels} if shift is None else {"decoder_input_ids": shift(labels)}
    return inputs, labels


def count_examples(batch: Batch) -> int:
    """Return the number of examples of a batch.

    Raises:
        ConfigError: No tensor has a batch axis.
    """
    parts = [*batch.values()] if isinstance(batch, Mapping) else [*batch][::-1]
    for part in parts:
        if isinstance(part, Tensor) and part.ndim:
            return len(part)
    raise ConfigError(
        "a batch must have a tensor with the examples along its first axis, found none; give inputs as tensors"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Run a model in eval mode and uncompiled, then restore the mode of every module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with ExitStack() as stack:
        for module, mode in modes:
            stack.callback(setattr, module, "training", mode)
        stack.enter_context(torch.enable_grad())
        # A graph compiled without the hooks would not call them.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield
