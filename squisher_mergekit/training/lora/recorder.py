"""Recorder of the Fisher of a LoRA's merged weights during training."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from squisher_mergekit.errors import ConfigError, MismatchError, RefusedError, UnsupportedStateError
from squisher_mergekit.fisher.config import FisherConfig, OptimizerInfo, SourceInfo, per_parameter
from squisher_mergekit.fisher.encoded import RankOneStore
from squisher_mergekit.fisher.files import tied_aliases
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.lora.live import LiveLayer, live_lora
from squisher_mergekit.models.lora.pairs import AdaptedWeights, read_lora
from squisher_mergekit.models.parameters import uses_deepspeed, uses_fsdp1
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.lifting.lift import RECORDED, coverage_of
from squisher_mergekit.optimizers.live import LAYOUT, TrainingInfo
from squisher_mergekit.tensors.safetensors import check_shape
from squisher_mergekit.tensors.sharded import is_sharded, rank
from squisher_mergekit.training.lora.equations import final_scale, recorded_means
from squisher_mergekit.training.lora.probes import LayerProbe, ProbeBuffer
from squisher_mergekit.training.writing import SavedFisher, replace_fisher

LOG = logging.getLogger("squisher_mergekit")
LIFT_CURE = "take squisher extract --lift on the checkpoint"
NO_GRADIENT = "no gradient was recorded"


class LoraRecorder(SavedFisher):
    """Recorder of the Fisher of the merged weights ``W0 + s B A``, in row means and column means.

    The backward pass of each wrapped layer multiplies the gradient G of W, which is never formed, by random signs; the
    squares of the products are averaged over optimizer steps (:mod:`.equations` has the derivation). Gradients are
    those that the optimizer gets: of the whole step, after accumulation, unscaling and clipping, the mean over
    processes. Weights that the adapter holds whole (``modules_to_save``, ``bias``) have the average of their squared
    gradient, entry by entry. Backward passes count while the model is in training mode.

    The averages are on the devices of the layers, in float32 (float64 for float64). Autograd keeps the input of each
    wrapped layer until its backward pass; without dropout and autocast it does so for A anyway.

    Args:
        model: The model of peft in training, wrapped or not, on its device.
        beta: Decay per optimizer step, between 0 and 1.
        seed: Seed of the signs, equal in all processes. torch's own random state is not used.

    Raises:
        ConfigError: ``beta`` is out of range.
        UnsupportedStateError: The model trains no plain LoRA of linear layers, or FSDP, DeepSpeed or DataParallel
            splits it.

    Example:
        >>> import peft
        >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(2, 1)), peft.LoraConfig(r=1, target_modules=["0"]))
        >>> recorder = LoraRecorder(model, beta=0.75)
        >>> model(torch.tensor([[3.0, 0.0]])).sum().backward()
        >>> recorder.update()
        True
        >>> recorder.fisher().scaled("0.weight")
        tensor([[9., 0.]])
    """

    def __init__(self, model: nn.Module, beta: float = 0.999, seed: int = 0) -> None:
        check_beta(beta)
        _check_whole(model)
        self.beta, self.seed = beta, seed
        self._lora = live_lora(model)
        devices: dict[torch.device, dict[str, LiveLayer]] = defaultdict(dict)
        for name, layer in self._lora.layers.items():
            devices[layer.a.device][name] = layer
        self._buffers = [ProbeBuffer(layers) for layers in devices.values()]
        self._probes: dict[str, LayerProbe] = {
            name: probe for buffer in self._buffers for name, probe in buffer.probes.items()
        }
        self._squares: dict[str, Tensor] = {}
        self.steps: dict[str, int] = {}
        self._drawn = 0
        self.clear()

    def clear(self) -> None:
        """Forget the backward passes since the last update."""
        for buffer in self._buffers:
            buffer.begin(self.seed, self._drawn)

    def remove(self) -> None:
        """Remove the hooks from the model; the averages stay."""
        for probe in self._probes.values():
            probe.remove()

    @torch.no_grad()
    def update(self) -> bool:
        """Add the gradients of a step; call the method in all processes, after clipping, before ``optimizer.step()``.

        Returns:
            True if the gradients were added; False if there are none, or one is not finite (an overflow of float16).
        """
        scale = self._scale()
        whole = {name: p.grad for name, p in self._lora.whole.items() if p.grad is not None}
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in whole.values())
        added = scale is not None and finite
        if scale is not None and finite:
            for buffer in self._buffers:
                active = [name for name, probe in buffer.probes.items() if probe.layer.reference.grad is not None]
                buffer.average(active, self.beta, scale)
                self._count(active)
            for name, gradient in whole.items():
                if name not in self._squares:
                    dtype = torch.promote_types(gradient.dtype, torch.float32)
                    self._squares[name] = torch.zeros_like(gradient, dtype=dtype)
                gradient = gradient.to(self._squares[name].dtype)
                self._squares[name].mul_(self.beta).addcmul_(gradient, gradient, value=1 - self.beta)
            self._count(list(whole))
        self._drawn += 1
        self.clear()
        return added

    def _scale(self) -> Tensor | None:
        """Return the factor from the gradients of the backward passes to those of the optimizer; None to skip a step.

        Over several processes, the sums become those over all of them first; the factor includes that of their mean.
        """
        if dist.is_available() and dist.is_initialized():
            for buffer in self._buffers:
                dist.all_reduce(buffer.sums)
                dist.all_reduce(buffer.marks)
        device = self._buffers[0].marks.device
        raw = torch.cat([buffer.marks.to(device) for buffer in self._buffers])
        final = torch.cat([buffer.final_marks().to(device) for buffer in self._buffers])
        scale = final_scale(raw, final)
        sums = torch.stack([buffer.sums.sum().to(device) for buffer in self._buffers]).sum()
        return scale if bool(torch.isfinite(scale * sums)) else None

    def _count(self, names: list[str]) -> None:
        for name in names:
            self.steps[name] = self.steps.get(name, 0) + 1

    def fisher(self, weights: str | Path | None = None, info: TrainingInfo | None = None) -> Fisher:
        """Return the recorded Fisher, under the names of the base's weights.

        Args:
            weights: Folder of the adapter as saved at this step, for the fingerprint of the merged weights.
            info: Metadata of the training run.

        Raises:
            MismatchError: No gradient was added yet.
        """
        if not self.steps:
            raise MismatchError(
                "a recorder needs at least one step with gradients, found none; call update() after backward(), with "
                "the model in training mode"
            )
        lora, means, whole = self._lora, {}, {}
        for name, steps in self.steps.items():
            factor = 1 / (1 - self.beta**steps)
            if name in self._squares:
                whole[name] = (self._squares[name].to("cpu", torch.float64) * factor).to(torch.float32)
                continue
            probe = self._probes[name]
            row, col = recorded_means(*(side.to("cpu", torch.float64) * factor for side in (probe.rows, probe.columns)))
            means[name] = (col, row) if probe.layer.transposed else (row, col)
        store = RankOneStore(means, whole, f"{weights or 'training'}: the recorder")
        reasons = dict.fromkeys([*lora.layers, *lora.whole], NO_GRADIENT)
        config = FisherConfig(
            estimator=RECORDED,
            statistic="ema",
            parameters="model",
            optimizer=OptimizerInfo(beta2=self.beta),
            steps=per_parameter(self.steps),
            bias_corrected=True,
            encoding={"default": "rank1"} | dict.fromkeys(whole, "float32"),
            source=SourceInfo(layout=LAYOUT),
            coverage=coverage_of(lora.names, lora.aliases, store.infos, reasons),
            weights_fingerprint=None if weights is None else self._fingerprint(Path(weights)),
        )
        config = config if info is None else info.note(config)
        return Fisher(store, config, tied_aliases(config))

    def _fingerprint(self, adapter: Path) -> str | None:
        """Return the fingerprint of the merged weights; None where adapter or base is not on disk, or quantised."""
        weights = Weights(adapter, "adapter_model")
        if self._lora.base is None or not self._lora.base.infos or not weights.infos:
            return None
        try:
            return AdaptedWeights(read_lora(weights, self._lora.base)).fingerprint
        except RefusedError as error:  # such as a quantised base: the Fisher is right without
            LOG.warning("the recorded Fisher for %s has no fingerprint of the merged weights: %s", adapter, error)
            return None

    def write(
        self, out: Path, weights: Path | None, info: TrainingInfo, dtype: torch.dtype, compress: str | None
    ) -> None:
        """Write the recorded Fisher in the first process; :meth:`save` with its arguments resolved."""
        if rank() == 0:
            replace_fisher(self.fisher(weights, info), out, dtype, compress)

    def state_dict(self) -> dict[str, Any]:
        """Return ``beta``, ``seed``, ``drawn``, ``steps``, and ``averages`` by the names of the weights."""
        averages = dict(self._squares)
        for name, probe in self._probes.items():
            averages |= {f"{name}.rows": probe.rows, f"{name}.columns": probe.columns}
        settings = {"beta": self.beta, "seed": self.seed, "drawn": self._drawn, "steps": dict(self.steps)}
        return settings | {"averages": averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`, and continue from it.

        Args:
            state: The state.

        Raises:
            ConfigError: The state has another decay.
            MismatchError: A name or a shape does not fit the LoRA.
        """
        if state["beta"] != self.beta:
            raise ConfigError(f"the averages must be those of beta {self.beta}, found {state['beta']}; give that beta")
        targets: dict[str, Tensor] = {}
        for name, probe in self._probes.items():
            targets |= {f"{name}.rows": probe.rows, f"{name}.columns": probe.columns}
        for name, tensor in state["averages"].items():
            known = targets.get(name, self._lora.whole.get(name))
            if known is None:
                raise MismatchError(
                    f"the averages of a recorder must fit the LoRA, but {name} is none of its weights; give the LoRA "
                    "that they were recorded of"
                )
            check_shape(name, tuple(tensor.shape), tuple(known.shape), "the state of LoraRecorder")
        for name, tensor in state["averages"].items():
            if name in targets:
                targets[name].copy_(tensor)
            else:
                parameter = self._lora.whole[name]
                dtype = torch.promote_types(parameter.dtype, torch.float32)
                self._squares[name] = tensor.to(parameter.device, dtype, copy=True)
        self.seed, self._drawn, self.steps = state["seed"], state["drawn"], dict(state["steps"])
        self.clear()


def check_beta(beta: float) -> None:
    """Refuse a decay that is not between 0 and 1.

    Raises:
        ConfigError: The decay is out of its range.
    """
    if not 0 < beta < 1:
        raise ConfigError(f"beta of a recorder must be between 0 and 1, found {beta}")


def _check_whole(model: nn.Module) -> None:
    """Refuse a model whose layers or gradients are split.

    Raises:
        UnsupportedStateError: The model is split.
    """
    if uses_fsdp1(model) or uses_deepspeed(model, None) or any(map(is_sharded, model.parameters())):
        raise UnsupportedStateError(
            "a recorder needs the whole gradient of A and B, but FSDP and DeepSpeed shard it; train with DDP or in one "
            f"process, or {LIFT_CURE}"
        )
    if isinstance(model, nn.DataParallel):
        raise UnsupportedStateError(
            "a recorder needs one process per GPU, but DataParallel copies the model to several; train with DDP "
            f"(torchrun), or {LIFT_CURE}"
        )
