"""Callback of the Hugging Face Trainer that writes a Fisher into each checkpoint."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from squisher_mergekit.errors import SquisherError, UnsupportedStateError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import CONFIG_NAME, FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import has_fisher, to_dtype
from squisher_mergekit.models.parameters import unwrap_model, uses_deepspeed, uses_fsdp1
from squisher_mergekit.optimizers.live import TrainingInfo, unwrap_optimizer
from squisher_mergekit.optimizers.load import find_state, load_fisher
from squisher_mergekit.tensors.input_files import expanded
from squisher_mergekit.tensors.sharded import rank
from squisher_mergekit.training.clipping import ClippingMonitor, clip_limit
from squisher_mergekit.training.factors import GradientFactors, check_arguments
from squisher_mergekit.training.gradients import GradientSquares, unscale
from squisher_mergekit.training.lora.files import write_state
from squisher_mergekit.training.lora.recorder import LoraRecorder
from squisher_mergekit.training.lora.start import begin, check_lift
from squisher_mergekit.training.writing import (
    attempt,
    checkpoint_of,
    copy_fisher,
    replace_fisher,
    resumed_from,
    write_squisher,
)

LOG = logging.getLogger("squisher_mergekit")
EMA_FOLDER = "fisher_ema"
# Optimizer classes without a usable second moment, known before the first step.
_WITHOUT = {
    "SGD": "SGD keeps none",
    "ASGD": "ASGD keeps none",
    "Rprop": "Rprop keeps step sizes",
    "LBFGS": "LBFGS keeps a history of gradients",
    "Lion": "Lion keeps momentum alone",
    "Lion8bit": "Lion keeps momentum alone",
    "PagedLion": "Lion keeps momentum alone",
    "SignSGD": "SignSGD keeps none",
    "Adamax": "Adamax keeps a running maximum of the gradient",
    "Muon": "Muon keeps momentum alone",
    "Lomo": "LOMO keeps none",
    "AdaLomo": "AdaLomo keeps it outside of its state",
    "LayerWiseDummyOptimizer": "a layer-wise optimizer steps inside the backward pass",
    "GaLoreAdamW": "GaLore keeps it in a projected space",
    "GaLoreAdamW8bit": "GaLore keeps it in a projected space",
    "GaLoreAdafactor": "GaLore keeps it in a projected space",
}


class SquisherCallback(TrainerCallback):  # type: ignore[misc]
    """Callback that writes the optimizer's second moments as a portable Fisher, at each checkpoint and at the end.

    The Fisher records values that no file of a checkpoint has: examples and tokens per step, the norm at which
    gradients are clipped, and the share of clipped steps. A failure during training is logged, and training continues.
    Under DeepSpeed the callback reads the Fisher from the saved checkpoint; at the end it writes none unless the last
    step saved a checkpoint.

    Args:
        every_save: Write into each checkpoint.
        at_end: Write into the output folder when training ends. With ``load_best_model_at_end`` this is the Fisher of
            the best checkpoint.
        out: Folder for the end, in place of ``output_dir``.
        dtype: Dtype of the file: float32 or bfloat16.
        compress: Compression of the file, as for :func:`~squisher_mergekit.extract`.
        beta: Decay of a moving average of the squared gradient (see :class:`GradientSquares`), which is written into
            ``fisher_ema`` in the same folders; None keeps no average. The optimizer may then be one without second
            moment. The average uses clipped gradients, and continues after a resume; with ``compress`` or bfloat16
            from rounded values.
        loss_reduction: Reduction of the loss over the examples; the models of transformers take the mean.
        datum: Unit of the loss to record: ``example`` or ``token``.
        factors: ``rows``, ``columns`` or ``kron`` (both): factors of the gradients of matrices, recorded beside the
            Fisher for merges with that ``structure`` (see :class:`GradientFactors`); None records none.
        every: Number of optimizer steps per recorded gradient of the factors.
        block: Number of consecutive rows or columns in a block of the factors.
        factor_beta: Decay of the factors per recorded gradient.
        lift: ``record`` writes, in place of the second moments of A and B, the Fisher of the merged weights of a LoRA,
            recorded during training (see :class:`LoraRecorder`). The optimizer may then be one without second moment.
            None writes those of A and B.
        lift_beta: Decay of the recorder per optimizer step.

    Raises:
        ConfigError: ``dtype``, ``compress``, ``beta``, ``lift`` or an argument of the factors is out of range.

    Example:
        >>> callback = SquisherCallback(dtype="bfloat16")
        >>> # Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    """

    def __init__(
        self,
        every_save: bool = True,
        at_end: bool = True,
        out: str | Path | None = None,
        dtype: torch.dtype | str = torch.float32,
        compress: str | None = None,
        beta: float | None = None,
        loss_reduction: str | None = "mean",
        datum: str | None = None,
        factors: str | None = None,
        every: int = 10,
        block: int = 128,
        factor_beta: float = 0.95,
        lift: str | None = None,
        lift_beta: float = 0.999,
    ) -> None:
        self.every_save = every_save
        self.at_end = at_end
        self.out = None if out is None else expanded(out)
        self.dtype = to_dtype(dtype)
        self.compress = compress
        self.beta = beta
        self.loss_reduction = loss_reduction
        self.datum = datum
        self.squares: GradientSquares | None = None
        self.gradient_factors: GradientFactors | None = None
        self.lift, self.lift_beta = lift, lift_beta
        self.recorder: LoraRecorder | None = None
        self._factor_settings = (factors, every, block, factor_beta)
        self._keeps_moment = True
        self._clipping = ClippingMonitor()
        self._written: tuple[int, Path] | None = None  # step and folder of the last Fisher
        self._warned = False
        self._searching = False
        compact.check_name(compress)
        if beta is not None:
            GradientSquares(nn.Module(), beta)  # raises for a wrong decay before training begins
        if factors is not None:
            check_arguments(factors, every, block, factor_beta)
        if lift is not None:
            check_lift(lift, lift_beta, factors)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise for an optimizer without second moment; load the state of a resumed checkpoint."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        why = _WITHOUT.get(type(unwrap_optimizer(optimizer)).__name__)
        if why is not None and self.beta is None and self.lift is None:
            raise UnsupportedStateError(
                f"SquisherCallback needs an optimizer that keeps the mean squared gradient, but {why}; "
                "train with AdamW, or give SquisherCallback(beta=0.999)"
            )
        self._keeps_moment, self._written, self._warned = why is None, None, False
        self._searching = bool(state.is_hyper_param_search)
        if self._searching:  # the folders of the trials are unknown here
            LOG.warning("no Fisher is written in a hyper-parameter search; take squisher extract on a checkpoint")
        seen = None if uses_fsdp1(model) or uses_deepspeed(model, optimizer) else clip_limit(args)
        self._clipping = ClippingMonitor(seen)
        self.squares = GradientSquares(model, self.beta) if self.beta is not None else None
        factors, every, block, factor_beta = self._factor_settings
        self.gradient_factors = None
        if factors is not None:
            if uses_deepspeed(model, optimizer):
                raise UnsupportedStateError(
                    "factors need the whole gradient of each matrix, but DeepSpeed keeps gradients in flat buffers; "
                    "train with DDP or in one process, or give no factors="
                )
            self.gradient_factors = GradientFactors(model, factors, every, block, factor_beta)
        if self.recorder is not None:
            self.recorder.remove()
        self.recorder = None if self.lift is None else begin(model, optimizer, args, state, self.lift_beta)
        if state.global_step:
            self._resume(args, state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear the recorder of passes that belong to no step."""
        if self.recorder is not None:
            self.recorder.clear()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record if clipping was active, and add the gradient to the moving average."""
        if self.squares is not None or self.gradient_factors is not None or self.recorder is not None:
            unscale(kwargs["optimizer"])  # older Trainers do so only before they clip
        norm = self._clipping.watch(kwargs["model"])
        if self.squares is not None:
            self.squares.update(norm)
        if self.gradient_factors is not None and rank() == 0:
            self.gradient_factors.update(norm, state.global_step)
        if self.recorder is not None:
            self.recorder.update()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the Fisher into the checkpoint."""
        if not self.every_save or self._searching:
            return
        folder = checkpoint_of(args, state)
        if self._write(folder, folder, args, state, kwargs):
            self._written = (state.global_step, folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the Fisher into the output folder, or copy it from the checkpoint of the final weights."""
        if self.recorder is not None:
            self.recorder.remove()
        if not self.at_end or self._searching:
            return
        out = self.out or Path(args.output_dir)
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        last = self._written[1] if self._written is not None and self._written[0] == state.global_step else None
        if best is not None and Path(best) != last:
            last = Path(best)
        if last is None:
            self._write(out, None, args, state, kwargs)
        elif rank() == 0:
            attempt(f"no Fisher of the weights of {last} could be copied to {out}", lambda: _copy(last, out))

    def _write(self, out: Path, weights: Path | None, args: Any, state: Any, live: dict[str, Any]) -> bool:
        """Write the Fisher and the average; return True if both were written."""
        info = self._training_info(args, state, live["model"])
        done = True
        recorder = self.recorder
        if recorder is not None:
            done = attempt(
                f"no recorded Fisher could be written to {out}",
                lambda: self._write_recorded(recorder, out, weights, info),
            )
        elif self._keeps_moment:
            done = attempt(
                f"no Fisher could be written to {out}",
                lambda: self._write_squisher(out, weights, info, live["model"], live["optimizer"]),
            )
        squares = self.squares
        if squares is not None and squares.squares:
            ema = out / EMA_FOLDER
            wrote = attempt(
                f"no moving average could be written to {ema}",
                lambda: squares.write(ema, weights, info, self.dtype, self.compress, self._attach),
            )
            done = done and wrote
        return done

    def _write_squisher(
        self, out: Path, weights: Path | None, info: TrainingInfo, model: nn.Module, optimizer: Any
    ) -> None:
        if not uses_deepspeed(model, optimizer):
            write_squisher(
                model, [optimizer], out, weights, info, self.dtype, self.compress, not self._warned, self._attach
            )
            self._warned = True
        elif weights is None:
            raise UnsupportedStateError(
                "the state of DeepSpeed is read from a checkpoint, but none was saved at this step; save one"
            )
        elif rank() == 0:
            write_saved(weights, out, info, self.dtype, self.compress)

    def _write_recorded(self, recorder: LoraRecorder, out: Path, weights: Path | None, info: TrainingInfo) -> None:
        """Write the recorded Fisher, and into a checkpoint the state of the recorder."""
        if weights is not None:
            write_state(recorder, weights)
        recorder.write(out, weights, info, self.dtype, self.compress)

    def _attach(self, fisher: Fisher) -> Fisher:
        """Return a Fisher with the recorded factors, if some are recorded."""
        return fisher if self.gradient_factors is None else self.gradient_factors.attach(fisher)

    def _training_info(self, args: Any, state: Any, model: nn.Module) -> TrainingInfo:
        tokens = getattr(args, "include_num_input_tokens_seen", "no") not in ("no", False)
        counted = state.num_input_tokens_seen / state.global_step if tokens and state.global_step else None
        return TrainingInfo(
            examples_per_step=examples_per_step(args, state, model),
            tokens_per_step=counted or None,
            max_grad_norm=clip_limit(args) or None,
            clipped_share=self._clipping.share,
            loss_reduction=self.loss_reduction,
            datum=self.datum,
        )

    def _resume(self, args: Any, state: Any) -> None:
        """Load clipping, average and factors from the resumed checkpoint, each by itself."""

        def clipping() -> None:
            place = _first_with_fisher(resumed_from(args, state))
            if has_fisher(place):
                self._clipping.resume(FisherConfig.from_file(place / CONFIG_NAME).clipped_share, state.global_step)

        attempt("the clipping of the resumed checkpoint was not loaded", clipping)
        squares, factors = self.squares, self.gradient_factors
        if squares is not None:
            attempt(
                "the average of the resumed checkpoint was not loaded",
                lambda: squares.load_fisher(read_fisher(resumed_from(args, state) / EMA_FOLDER)),
            )
        if factors is not None:
            attempt(
                "the factors of the resumed checkpoint were not loaded",
                lambda: factors.load_fisher(read_fisher(_first_with_fisher(resumed_from(args, state)))),
            )


def write_saved(checkpoint: Path, out: Path, info: TrainingInfo, dtype: torch.dtype, compress: str | None) -> None:
    """Write the Fisher of a saved checkpoint, with the metadata of the training run.

    Raises:
        RefusedError: The checkpoint has no optimizer state, or it cannot be read.
    """
    place = find_state(checkpoint)
    if place is None:
        raise UnsupportedStateError(f"{checkpoint} must hold the optimizer's state; train with save_only_model=False")
    fisher = load_fisher(place, model=checkpoint)
    fisher.config = info.note(fisher.config)
    replace_fisher(fisher, out, dtype, compress)


def examples_per_step(args: Any, state: Any, model: nn.Module) -> int:
    """Return the number of examples per optimizer step: batch x accumulation x data-parallel processes.

    Args:
        args: The Trainer's arguments.
        state: The Trainer's state, with a batch size that was found automatically.
        model: The model, which may be split over processes that share their data.
    """
    batch = int(state.train_batch_size or args.train_batch_size) * int(args.gradient_accumulation_steps)
    if getattr(args.accelerator_config, "split_batches", False):
        return batch
    parallel = getattr(args, "parallelism_config", None)
    tensor: Any = getattr(unwrap_model(model), "_tp_size", None) or getattr(parallel, "tp_size", 1)
    sharing = int(tensor) * int(getattr(parallel, "cp_size", 1)) * int(getattr(parallel, "sp_size", 1))
    return batch * max(int(args.world_size) // sharing, 1)


def _places(folder: Path) -> tuple[Path, Path]:
    """Return the folders in a checkpoint that can have a Fisher."""
    return folder, folder / EMA_FOLDER


def _first_with_fisher(folder: Path) -> Path:
    return next((place for place in _places(folder) if has_fisher(place)), folder)


def _copy(source: Path, out: Path) -> None:
    found = [pair for pair in zip(_places(source), _places(out), strict=True) if has_fisher(pair[0])]
    if not found:
        raise SquisherError("it has no Fisher")
    for place, target in found:
        copy_fisher(place, target)
