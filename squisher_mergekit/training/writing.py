"""Writing of a Fisher during training, from one process or many, in place of an older one."""

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squisher_mergekit.errors import SquisherError
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import fisher_files, to_dtype, write_fisher
from squisher_mergekit.optimizers.live import TrainingInfo, squisher_of, states_of, unwrap_optimizer
from squisher_mergekit.optimizers.metadata import warnings_of
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.input_files import expanded
from squisher_mergekit.tensors.sharded import OnRankZero, rank

LOG = logging.getLogger("squisher_mergekit")
Attach = Callable[[Fisher], Fisher]


class SavedFisher(ABC):
    """Record of a training run that is written as a portable Fisher."""

    def save(
        self,
        out: str | Path,
        *,
        weights: str | Path | None = None,
        examples_per_step: float | None = None,
        tokens_per_step: float | None = None,
        max_grad_norm: float | None = None,
        clipped_share: float | None = None,
        loss_reduction: str | None = None,
        datum: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        compress: str | None = None,
    ) -> Fisher | None:
        """Write the record as a portable Fisher, in place of an older one.

        Call the method in all processes; the first one writes. The arguments are those of
        :func:`~squisher_mergekit.save_squisher`. For a LoRA ``weights`` is the folder of the adapter, and ``dtype`` and
        ``compress`` are for the weights that the adapter holds whole.

        Returns:
            The written Fisher; None in all processes but the first.

        Raises:
            MismatchError: No gradient was added yet, or the record does not fit the weights.
        """
        info = TrainingInfo(examples_per_step, tokens_per_step, max_grad_norm, clipped_share, loss_reduction, datum)
        folder = expanded(out)
        weights_folder = folder if weights is None else expanded(weights)
        self.write(folder, weights_folder, info, to_dtype(dtype), compress)
        return read_fisher(folder) if rank() == 0 else None

    @abstractmethod
    def write(
        self, out: Path, weights: Path | None, info: TrainingInfo, dtype: torch.dtype, compress: str | None
    ) -> None:
        """Write the record; :meth:`save` with its arguments resolved."""


def save_squisher(
    model: nn.Module,
    optimizer: Any,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    examples_per_step: float | None = None,
    tokens_per_step: float | None = None,
    max_grad_norm: float | None = None,
    clipped_share: float | None = None,
    loss_reduction: str | None = None,
    datum: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    compress: str | None = None,
) -> Fisher | None:
    """Write the second moments of an optimizer in memory as a portable Fisher.

    Model and optimizer may be wrapped by accelerate, DDP, FSDP or torch.compile. Call the function in all processes;
    the first one writes. An older Fisher in ``out`` is replaced once the new one is complete.

    Args:
        model: The model in training.
        optimizer: The optimizer that trains it, or a sequence of several.
        out: The folder to write into.
        weights: Folder of the weights saved at this step, for names and fingerprint; by default ``out``.
        examples_per_step: Examples behind one optimizer step, over all processes and accumulation.
        tokens_per_step: The same in tokens.
        max_grad_norm: Norm at which gradients were clipped.
        clipped_share: Share of the steps in which clipping was active.
        loss_reduction: Reduction of the loss over the examples, such as ``mean``.
        datum: Unit of the loss: ``example`` or ``token``.
        dtype: Dtype of the file: float32 or bfloat16.
        compress: Compression of the file, as for :func:`~squisher_mergekit.extract`.

    Returns:
        The written Fisher; None in all processes but the first.

    Raises:
        RefusedError: The optimizer has no second moment, or it does not fit the model or the weights.

    Example:
        >>> from tempfile import mkdtemp
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> model(torch.tensor([[1.0, 2.0]])).sum().backward()
        >>> optimizer.step()
        >>> fisher = save_squisher(model, optimizer, mkdtemp(), examples_per_step=1)
        >>> fisher.scaled("weight"), fisher.config.steps
        (tensor([[1., 4.]]), 1)
    """
    info = TrainingInfo(examples_per_step, tokens_per_step, max_grad_norm, clipped_share, loss_reduction, datum)
    folder = expanded(out)
    weights_folder = folder if weights is None else expanded(weights)
    several = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    write_squisher(model, several, folder, weights_folder, info, to_dtype(dtype), compress)
    return read_fisher(folder) if rank() == 0 else None


def write_squisher(
    model: nn.Module,
    optimizers: Sequence[Any],
    out: Path,
    weights: Path | None,
    info: TrainingInfo,
    dtype: torch.dtype,
    compress: str | None,
    warn: bool = True,
    attach: Attach | None = None,
) -> None:
    """Write the second moments of optimizers; :func:`save_squisher` with its arguments resolved.

    Args:
        model: The model in training.
        optimizers: The optimizers, wrapped or not.
        out: The folder to write into.
        weights: Folder of the weights saved at this step; None if there are none.
        info: Metadata of the training run.
        dtype: Dtype of the file: float32 or bfloat16.
        compress: Compression of the file, as for :func:`~squisher_mergekit.extract`.
        warn: Log defects of the second moments.
        attach: Function that adds recorded factors to the Fisher; None if there are none.

    Raises:
        RefusedError: As for :func:`save_squisher`.
    """
    on_rank_zero = OnRankZero()
    bare = [unwrap_optimizer(optimizer) for optimizer in optimizers]
    states = states_of(model, bare, on_rank_zero)

    def work() -> None:
        fisher, slots = squisher_of(model, bare, states, weights, info)
        replace_fisher(fisher if attach is None else attach(fisher), out, dtype, compress)
        for warning in warnings_of(slots, out) if warn else ():
            LOG.warning("%s: %s", out, warning)

    on_rank_zero.run(work)


def replace_fisher(fisher: Fisher, out: Path, dtype: torch.dtype = torch.float32, compress: str | None = None) -> None:
    """Write a Fisher into a folder, in place of an older one.

    Args:
        fisher: The Fisher.
        out: The folder; an older Fisher stays until the new one is complete.
        dtype: Dtype of the file: float32 or bfloat16.
        compress: Compression of the file, as for :func:`~squisher_mergekit.extract`.
    """
    write_fisher(fisher, out, dtype, compress=compress, existing="replace")


def copy_fisher(source: Path, out: Path) -> None:
    """Copy a portable Fisher into another folder, in place of an older one."""
    with written_beside(out, "replace", fisher_files) as folder:
        for file in fisher_files(source):
            shutil.copyfile(file, folder / file.name)


def attempt(failure: str, work: Callable[[], object]) -> bool:
    """Run a function whose failure must not stop training; return True if it succeeded."""
    try:
        work()
    except Exception as error:  # a failed Fisher must not cost hours of training
        LOG.warning("%s; training goes on: %s", failure, error)
        return False
    return True


def checkpoint_of(args: Any, state: Any) -> Path:
    """Return the folder of the Trainer's checkpoint at this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def resumed_from(args: Any, state: Any) -> Path:
    """Return the checkpoint from which the Trainer resumes.

    Raises:
        SquisherError: No such folder exists.
    """
    given = args.resume_from_checkpoint
    places = [Path(given)] if isinstance(given, str) and given.lower() != "true" else []
    folder = next((place for place in (*places, checkpoint_of(args, state)) if place.is_dir()), None)
    if folder is None:
        raise SquisherError(
            f"a resumed run needs its checkpoint, but there is no {checkpoint_of(args, state)}; name it in "
            "TrainingArguments.resume_from_checkpoint as well"
        )
    return folder
