"""Write the optimizer state of a random Llama: ``python -m scripts.benchmarks.states FOLDER LAYOUT RECIPE``.

LAYOUT is ``trainer`` (optimizer.pt), ``fsdp`` (a distributed checkpoint of two ranks, each tensor cut by rows) or
``deepspeed`` (ZeRO-2 of two ranks), with the weights in bfloat16 and both moments in float32; or ``nanotron``,
``torch_dist`` or ``neox``, with the second moments alone. The recipe is JSON with ``hidden``, ``layers``,
``intermediate`` and ``vocab``.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from scripts.benchmarks.models import Recipe, shapes, write_config, write_weights
from scripts.benchmarks.trainer_states import BETAS, RANKS, Draw, nanotron, neox, torch_dist_tensors

OF_TRAINERS = ("nanotron", "torch_dist", "neox")
GROUP = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "amsgrad": False}
STEPS = 1000


def make_state(folder: Path, layout: str, recipe: Recipe) -> None:
    """Write config, weights and optimizer state; the recipe comes last and marks a complete folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(len(layout))
    write_config(folder, recipe)
    if layout in OF_TRAINERS:
        draw = partial(_squares, generator=generator)
        {"nanotron": nanotron, "torch_dist": _torch_dist, "neox": neox}[layout](folder, recipe, STEPS, draw)
    else:
        write_weights(folder, recipe, generator)
        {"trainer": _trainer, "fsdp": _fsdp, "deepspeed": _deepspeed}[layout](folder, recipe, generator)
    (folder / "recipe.json").write_text(json.dumps(recipe))


def _squares(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Return random squares that span orders of magnitude, as real second moments do."""
    spread = torch.rand(shape, generator=generator)
    return torch.randn(shape, generator=generator).mul_(spread).square_().mul_(1e-9)


def _order(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Return the names and shapes of the parameters in the order of the model."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


def _trainer(folder: Path, recipe: Recipe, generator: torch.Generator) -> None:
    named = sorted(_order(folder), key=lambda item: "norm" in item[0])
    decayed = sum("norm" not in name for name, _ in named)
    state = {
        number: {
            "step": torch.tensor(float(STEPS)),
            "exp_avg": torch.zeros(shape),
            "exp_avg_sq": _squares(shape, generator),
        }
        for number, (_, shape) in enumerate(named)
    }
    groups = [{**GROUP, "params": [*range(decayed)]}, {**GROUP, "params": [*range(decayed, len(named))]}]
    torch.save({"state": state, "param_groups": groups}, folder / "optimizer.pt")


class _Pieces:
    """Distributed checkpoint that is written piece by piece, one file for each rank."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        self.described: dict[str, Any] = {}
        self.stored: dict[Any, Any] = {}
        self.streams = [(place / f"__{rank}_0.distcp").open("wb") for rank in range(RANKS)]

    def _put(self, key: str, value: Any, rank: int, offsets: tuple[int, ...] | None) -> None:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        start = self.streams[rank].tell()
        self.streams[rank].write(buffer.getbuffer())
        index = MetadataIndex(key, None if offsets is None else torch.Size(offsets))
        self.stored[index] = _StorageInfo(f"__{rank}_0.distcp", start, self.streams[rank].tell() - start)

    def tensor(self, key: str, whole: torch.Tensor) -> None:
        """Write a tensor, cut along its first axis."""
        chunks, row = [], 0
        for rank, part in enumerate(whole.chunk(RANKS) if whole.ndim else (whole,)):
            offsets = (row, *[0] * (whole.ndim - 1)) if whole.ndim else ()
            self._put(key, part.clone(), rank, offsets)
            chunks.append(ChunkStorageMetadata(torch.Size(offsets), part.shape))
            row += len(part) if whole.ndim else 0
        self.described[key] = TensorStorageMetadata(TensorProperties(torch.float32), whole.shape, chunks)

    def value(self, key: str, value: Any) -> None:
        """Write a value that is no tensor."""
        self._put(key, value, 0, None)
        self.described[key] = BytesStorageMetadata()

    def close(self) -> None:
        """Write the index."""
        for stream in self.streams:
            stream.close()
        with (self.place / ".metadata").open("wb") as index:
            pickle.dump(Metadata(self.described, None, self.stored), index)


def _fsdp(folder: Path, recipe: Recipe, generator: torch.Generator) -> None:
    pieces = _Pieces(folder / "optimizer_0")
    for name, shape in shapes(recipe):
        pieces.tensor(f"optimizer.state.{name}.exp_avg", torch.zeros(shape))
        pieces.tensor(f"optimizer.state.{name}.exp_avg_sq", _squares(shape, generator))
        pieces.tensor(f"optimizer.state.{name}.step", torch.tensor(float(STEPS)))
    for field, value in {**GROUP, "params": [name for name, _ in shapes(recipe)]}.items():
        pieces.value(f"optimizer.param_groups.0.{field}", value)
    pieces.close()


def _torch_dist(folder: Path, recipe: Recipe, steps: int, draw: Draw) -> None:
    step = folder / f"iter_{steps:07}"
    pieces = _Pieces(step)
    for key, shape in torch_dist_tensors(recipe):
        pieces.tensor(key, draw(shape))
    pieces.close()
    (step / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    groups = [{"betas": BETAS, "step": steps, "params": []}]
    torch.save({"optimizer": {"optimizer": {"param_groups": groups}}}, step / "common.pt")


def _deepspeed(folder: Path, recipe: Recipe, generator: torch.Generator) -> None:
    from safetensors import safe_open

    named = _order(folder)
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as opened:
            weights |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    step = folder / f"global_step{STEPS}"
    step.mkdir()
    (folder / "latest").write_text(step.name)
    total = sum(torch.Size(shape).numel() for _, shape in named)
    size = -(-total // RANKS)
    moments, masters = torch.zeros(size * RANKS), torch.zeros(size * RANKS)
    offset = 0
    for name, shape in named:
        end = offset + torch.Size(shape).numel()
        moments[offset:end] = _squares(shape, generator).flatten()
        masters[offset:end] = weights[name].flatten()
        offset = end
    model = {
        "module": weights,
        "param_shapes": [OrderedDict((name, torch.Size(shape)) for name, shape in named)],
        "dp_world_size": RANKS,
        "global_steps": STEPS,
        "global_samples": 32 * STEPS,
    }
    torch.save(model, step / "mp_rank_00_model_states.pt")
    for rank in range(RANKS):
        part = slice(rank * size, (rank + 1) * size)
        state = {"step": STEPS, "exp_avg": torch.zeros(size), "exp_avg_sq": moments[part].clone()}
        optimizer = {
            "base_optimizer_state": {"state": {0: state}, "param_groups": [{**GROUP, "params": [0]}]},
            "single_partition_of_fp32_groups": [masters[part].clone()],
            "partition_count": [RANKS],
            "clip_grad": 1.0,
        }
        name = f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, step / name)


if __name__ == "__main__":
    make_state(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
