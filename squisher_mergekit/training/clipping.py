"""Clipping of gradients in a run of the Hugging Face Trainer: its norm, and the share of clipped steps."""

from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.models.parameters import unwrap_model
from squisher_mergekit.training.gradients import gradient_norm


def clip_limit(args: Any) -> float:
    """Return the norm at which the Trainer clips gradients; 0 if it does not clip, as for a norm of -1.

    Args:
        args: The Trainer's arguments.
    """
    return max(float(args.max_grad_norm or 0.0), 0.0)


class ClippingMonitor:
    """Counter of clipped steps. A clipped gradient is recognised by its norm, which is then the limit.

    A norm equal to the limit within its precision counts as clipped. The counts stay on the device of the gradients.

    Args:
        limit: Norm at which gradients are clipped; 0 if they are not; None if the limit is unknown.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> clipping = ClippingMonitor(limit=1.0)
        >>> for gradient in ([[3.0, 4.0]], [[0.3, 0.4]]):
        ...     layer.weight.grad = torch.tensor(gradient)
        ...     _ = nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        ...     _ = clipping.watch(layer)
        >>> clipping.share
        0.5
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self._clipped: Tensor | float = 0.0
        self._seen: Tensor | float = 0.0

    def watch(self, model: nn.Module) -> Tensor | None:
        """Count a step by its gradients after clipping, and return their norm; None without a limit."""
        if not self.limit:
            return None
        trained = [parameter for parameter in unwrap_model(model).parameters() if parameter.grad is not None]
        norm = gradient_norm(trained)
        precision = max((torch.finfo(p.grad.dtype).eps for p in trained if p.grad is not None), default=0.0)
        # Clipping divides by the norm plus 1e-6.
        reached = self.limit * (1 - max(precision, 1e-5)) - 1e-6
        self._clipped = self._clipped + ((norm >= reached) & torch.isfinite(norm)).double()
        self._seen = self._seen + torch.isfinite(norm).double()
        return norm

    def resume(self, share: float | None, steps: int) -> None:
        """Continue from an earlier share of clipped steps."""
        if share is not None and self.limit:
            self._clipped, self._seen = share * steps, float(steps)

    @property
    def share(self) -> float | None:
        """Share of the steps in which clipping was active; None if unknown."""
        if self.limit == 0:
            return 0.0
        seen = float(self._seen)
        return float(self._clipped) / seen if seen else None
