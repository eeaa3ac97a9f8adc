"""Probes of the layers that a LoRA wraps: products of the gradient of W with signs, taken in the backward pass."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.estimators.per_example.layer_kinds import exact
from squisher_mergekit.models.lora.live import LiveLayer
from squisher_mergekit.training.lora.equations import add_products, signs, unpack_signs


class LayerProbe:
    """Probe of one layer; its tensors are views of those of a :class:`ProbeBuffer`.

    Args:
        layer: The layer.
        signs: Signs z, then u, shape ``[in + out]``.
        sums: ``G^T u``, then ``G z``, shape ``[in + out]``.
        averages: Moving averages of the squared sums, shape ``[in + out]``.
        marks: Products of the signs with the gradient of B (u) or A (z), shape ``[r]``.
    """

    def __init__(self, layer: LiveLayer, signs: Tensor, sums: Tensor, averages: Tensor, marks: Tensor) -> None:
        sizes = [layer.a.shape[1], layer.b.shape[0]]
        self.layer, self.marks, self._sums = layer, marks, sums
        self.z, self.u = torch.split(signs, sizes)
        self._gu, self._gz = torch.split(sums, sizes)
        self._averages = averages
        self.columns, self.rows = torch.split(averages, sizes)
        # A compiler would trace the tap into the graph of the model, and lose its side effects.
        compiles = "torch._dynamo" in sys.modules
        tap = torch.compiler.disable(self._tap) if compiles else self._tap  # type: ignore[no-untyped-call]
        self._hooks = [
            layer.module.register_forward_hook(tap, with_kwargs=True),
            layer.reference.register_hook(self._mark),  # type: ignore[no-untyped-call]
        ]

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def add(self, inputs: Tensor, gradients: Tensor) -> None:
        """Add the products of one call, from its inputs and the gradients at its outputs."""
        with exact(self.z.device):
            x, d = (
                tensor.reshape(-1, len(side)).to(side.dtype) for tensor, side in ((inputs, self.z), (gradients, self.u))
            )
            add_products(x, d, self.z, self.u, self._gz, self._gu)

    @torch.no_grad()
    def average(self, beta: float, scale: Tensor) -> None:
        """Add the squared sums, times the square of a scale, to the averages."""
        gradients = self._sums * scale
        self._averages.mul_(beta).addcmul_(gradients, gradients, value=1 - beta)

    @torch.no_grad()
    def product(self, gradient: Tensor) -> Tensor:
        """Return the product of the signs with a gradient of B, shape ``[out, r]``, or of A, shape ``[r, in]``."""
        with exact(self.z.device):
            gradient = gradient.to(self.z.dtype)
            found: Tensor = self.u @ gradient if self.layer.reference is self.layer.b else gradient @ self.z
            return found

    def _mark(self, gradient: Tensor) -> None:
        """Record the gradient of B or A as a backward pass makes it."""
        if self.layer.module.training:
            self.marks.add_(self.product(gradient.detach()))

    def _tap(self, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        """Put a tap at the output of a layer, which calls the probe in the backward pass."""
        if not (module.training and output.requires_grad) or module.disable_adapters or module.merged:
            return None
        inputs = args[0] if args else kwargs["x"]
        tapped: Tensor = _Tap.apply(output, inputs, self)  # type: ignore[no-untyped-call]
        return tapped


class _Tap(torch.autograd.Function):
    """Identity whose backward pass gives a probe the inputs of the layer and the gradients at its outputs.

    Autograd keeps the inputs, so that gradient checkpointing can drop and recompute them.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, probe: LayerProbe) -> Tensor:
        """Return the output itself."""
        # Dirty, not a view: models may change the output of a layer in place.
        ctx.mark_dirty(output)
        ctx.save_for_backward(inputs)
        ctx.probe = probe
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Call the probe, and pass the gradient on."""
        (inputs,) = ctx.saved_tensors
        ctx.probe.add(inputs.detach(), gradients[0].detach())
        return gradients[0], None, None


class ProbeBuffer:
    """Probes of all layers on one device, with signs, sums and averages in one tensor each.

    Args:
        layers: Name of a weight -> its layer.

    Attributes:
        probes: Name of a weight -> its probe.
        sums: Sums of all layers over the backward passes of a step.
        marks: Products of the signs with the gradients of B or A of all layers, summed likewise.
    """

    def __init__(self, layers: Mapping[str, LiveLayer]) -> None:
        first = next(iter(layers.values())).a
        wide = any(layer.a.dtype == torch.float64 for layer in layers.values())
        sizes = [layer.a.shape[1] + layer.b.shape[0] for layer in layers.values()]
        ranks = [len(layer.a) for layer in layers.values()]
        dtype, device = torch.float64 if wide else torch.float32, first.device
        self._signs, self.sums, self._averages = (torch.zeros(sum(sizes), dtype=dtype, device=device) for _ in range(3))
        self.marks = torch.zeros(sum(ranks), dtype=dtype, device=device)
        parts = [torch.split(tensor, sizes) for tensor in (self._signs, self.sums, self._averages)]
        self.probes = {
            name: LayerProbe(layer, *views)
            for (name, layer), *views in zip(layers.items(), *parts, torch.split(self.marks, ranks), strict=True)
        }

    def begin(self, seed: int, step: int) -> None:
        """Clear the sums, and draw the signs of a step."""
        self.sums.zero_()
        self.marks.zero_()
        count = len(self._signs)
        packed = signs(count, seed, step).to(self._signs.device)
        self._signs.copy_(unpack_signs(packed, count, self._signs.dtype))

    def final_marks(self) -> Tensor:
        """Return the products of the signs with the gradients that the optimizer gets; 0 where there is none."""
        return torch.cat(
            [
                probe.marks.new_zeros(len(probe.marks)) if probe.layer.reference.grad is None
                else probe.product(probe.layer.reference.grad)
                for probe in self.probes.values()
            ]
        )  # fmt: skip

    @torch.no_grad()
    def average(self, names: Collection[str], beta: float, scale: Tensor) -> None:
        """Add the squared sums of layers, times the square of a scale, to their averages."""
        scale = scale.to(self.sums.device, self.sums.dtype)
        if len(names) < len(self.probes):
            for name in names:
                self.probes[name].average(beta, scale)
            return
        gradients = self.sums * scale
        self._averages.mul_(beta).addcmul_(gradients, gradients, value=1 - beta)
