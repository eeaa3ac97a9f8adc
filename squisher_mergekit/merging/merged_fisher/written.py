"""Fisher of the result of a merge, written beside it while the tensors are merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from squisher_mergekit.errors import ValuesError
from squisher_mergekit.fisher.config import Coverage, FisherConfig, SourceInfo
from squisher_mergekit.merging.merged_fisher.stream import FisherStream
from squisher_mergekit.merging.planning.records import TensorPlan
from squisher_mergekit.models.weights import Weights


class MergedFisher:
    """Fisher of a merged model: ``sum_i w_i F_i`` over the models that vote.

    Args:
        folder: Folder that gets the files.
        tensors: Plan of each output tensor.
        versions: Package -> version, for the metadata.
    """

    def __init__(self, folder: Path, tensors: Sequence[TensorPlan], versions: dict[str, str]) -> None:
        self._folder, self._versions = folder, versions
        planned = {tensor.name: tensor for tensor in tensors}
        self._without = {name: _reason(tensor) for name, tensor in planned.items() if _reason(tensor)}
        self._scale = _scale(tensors)
        self.stream = FisherStream(folder, [name for name in planned if name not in self._without])

    def add(self, name: str, fisher: Tensor) -> None:
        """Append the Fisher of one tensor.

        Raises:
            ValuesError: An entry leaves the range of float32.
        """
        fisher = fisher.to("cpu")
        if not bool(torch.isfinite(fisher).all()):
            raise ValuesError(
                f"the Fisher of a merge must stay within float32, but that of {name} does not; give smaller weight: or "
                "fisher_scale:, or remove write_fisher"
            )
        self.stream.add(name, fisher)

    def finish(self) -> FisherConfig:
        """Write the metadata, with the fingerprint of the weights in the folder."""
        config = FisherConfig(
            estimator="merged",
            statistic="mean",
            source=SourceInfo(layout=self._scale, versions=self._versions),
            coverage=Coverage(without=self._without),
            weights_fingerprint=Weights(self._folder).fingerprint,
        )
        return self.stream.finish(config, without="no Fisher in any model")


def _reason(tensor: TensorPlan) -> str:
    """Return the reason why a tensor of the result has no Fisher; empty if it has one."""
    if tensor.is_buffer:
        return "a buffer"
    if tensor.missing:
        return "without a Fisher in some model"
    if tensor.is_copied:
        return "copied from one model"
    return "" if tensor.settings.write_fisher else "write_fisher: false"


def _scale(tensors: Sequence[TensorPlan]) -> str:
    """Return the layout in the metadata, by which a later merge knows the scale of the Fisher."""
    for tensor in tensors:
        opened = [use.opened.fisher.config for use in tensor.uses if use.opened is not None]
        if tensor.normalize != "none" or not all(config.of_squishers for config in opened):
            return "merge"
    return "merge of squishers"
