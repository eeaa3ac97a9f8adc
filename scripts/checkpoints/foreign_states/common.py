"""Shared parts of all cases: a tiny model, its batches, a plain run as reference, and the files of a case."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

STEPS, BETAS, BATCH = 4, (0.9, 0.97), 4
LIBRARIES = ("torch", "transformers", "accelerate", "safetensors")


@dataclass(frozen=True)
class Case:
    """Recipe of a checkpoint.

    Attributes:
        make: function that writes the checkpoint and returns the second moments; each rank calls it.
        options: keyword arguments of ``make``.
        ranks: number of processes.
        refuse: names of errors that are the right answer; empty if the checkpoint must be read.
        why: reason for the refusal.
        libraries: packages whose versions ``case.json`` records.
        note: remark for the list of cases.
    """

    make: Callable[..., Made]
    options: Mapping[str, Any] = field(default_factory=dict)
    ranks: int = 1
    refuse: tuple[str, ...] = ()
    why: str = ""
    libraries: tuple[str, ...] = ()
    note: str = ""


@dataclass
class Made:
    """Description of a checkpoint that was written; only that of rank 0 counts.

    Attributes:
        truth: parameter name -> second moment of the live optimizer.
        optimizer: class of the optimizer.
        trainer: library that wrote the file.
        beta2: decay, or None if there is no single one.
        step: number of steps, or None if there is no single one.
        file: file to open, or an empty string for the folder.
        more: further entries of ``case.json``.
    """

    truth: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer: str = "torch.optim.AdamW"
    trainer: str = ""
    beta2: float | None = BETAS[1]
    step: int | None = STEPS
    file: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)


def tiny(wide: bool = False, layers: int = 1, **changes: Any) -> Any:
    """Return a small Llama with tied embeddings from a fixed seed, of odd sizes, or ``wide`` enough for 8 bits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 15, "intermediate_size": 21, "vocab_size": 33}
    if wide:
        sizes = {"hidden_size": 63, "intermediate_size": 67, "vocab_size": 67}
    settings = {
        "num_hidden_layers": layers,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **settings, **changes}))


def batches(rank: int = 0, ranks: int = 1, steps: int = STEPS) -> list[Tensor]:
    """Return the token ids of each step for one rank, its part of the global batch."""
    everything = [
        torch.randint(1, 33, (BATCH * ranks, 7), generator=torch.Generator().manual_seed(i)) for i in range(steps)
    ]
    return [ids[rank * BATCH : (rank + 1) * BATCH] for ids in everything]


def freeze(model: nn.Module, most: bool = False) -> None:
    """Freeze one matrix and one norm in the middle, or with ``most`` almost all parameters."""
    kept = ("embed_tokens.weight", "q_proj.weight", ".norm.weight")
    for name, parameter in model.named_parameters():
        few = name.endswith(("self_attn.k_proj.weight", "post_attention_layernorm.weight"))
        if (not name.endswith(kept)) if most else few:
            parameter.requires_grad_(False)


def groups_of(model: nn.Module, two: bool) -> list[dict[str, Any]]:
    """Return the trainable parameters in one group, or in two: matrices with weight decay, vectors without."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not two:
        return [{"params": trained}]
    vectors = {id(p) for name, p in model.named_parameters() if "norm" in name}
    return [
        {"params": [p for p in trained if id(p) not in vectors], "weight_decay": 0.1},
        {"params": [p for p in trained if id(p) in vectors], "weight_decay": 0.0},
    ]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """Return the loss of the language model."""
    return model(input_ids=ids, labels=ids).loss


def train(model: Any, optimizer: Any, steps: int = STEPS, rank: int = 0, ranks: int = 1) -> None:
    """Train in a plain loop."""
    for ids in batches(rank, ranks, steps):
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(groups: Any, **more: Any) -> torch.optim.AdamW:
    """Return the optimizer of most cases."""
    return torch.optim.AdamW(groups, lr=1e-3, betas=BETAS, **more)


def compare_with_plain_run(
    truth: Mapping[str, Tensor], ranks: int, frozen: bool | str, two: bool, rough: bool = False
) -> None:
    """Compare second moments with those of a plain run in one process over the data of all ranks.

    Raises:
        AssertionError: They differ, so they were read from the live optimizer in a wrong way.
    """
    model = tiny()
    if frozen:
        freeze(model, frozen == "most")
    optimizer = adamw(groups_of(model, two))
    for parts in zip(*(batches(rank, ranks) for rank in range(ranks)), strict=True):
        loss_of(model, torch.cat(parts)).backward()
        optimizer.step()
        optimizer.zero_grad()
    plain = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p.requires_grad}
    assert set(truth) == set(plain), sorted(set(truth) ^ set(plain))
    for name, v in plain.items():
        a, b = truth[name].double().sqrt().flatten(), v.double().sqrt().flatten()
        assert truth[name].shape == v.shape, name
        like = float(a @ b / (a.norm() * b.norm()))
        assert like > (0.99 if rough else 1 - 1e-6), f"{name}: {like}"
        assert abs(float(a.norm() / b.norm()) - 1) < (0.05 if rough else 1e-3), name


def keep_weights(out: Path, config: Any, state: Mapping[str, Tensor]) -> None:
    """Write ``model.safetensors`` and ``config.json``; a tied tensor has the name that transformers keeps."""
    kept = {name: value.detach().clone().contiguous() for name, value in state.items() if name != "lm_head.weight"}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    config.dtype = next(iter(kept.values())).dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)


def under_numbers(
    order: Mapping[str, Tensor], rename: Callable[[dict[str, Tensor]], Mapping[str, Tensor]], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return tensors under the names of Hugging Face, where a trainer's own are known.

    The entries of the Hugging Face model are numbered, renamed as the trainer's, and looked up there.

    Args:
        order: Tensors of the Hugging Face model, for their names and shapes.
        rename: Function that gives tensors with the names of Hugging Face those of the trainer.
        own: Tensors under the trainer's names.
    """
    numbers, count = {}, 0
    for name, tensor in order.items():
        numbers[name] = torch.arange(count, count + tensor.numel()).reshape(tensor.shape)
        count += tensor.numel()
    flat = torch.full((count,), torch.nan)
    for name, places in rename(numbers).items():
        flat[places.long().reshape(-1)] = own[name].reshape(-1)
    return {name: flat[places] for name, places in numbers.items()}


def declare_torchvision() -> None:
    """Declare the two operators for which torchvision registers rules on import, where its compiled part does not load.

    transformers, timm and Composer import torchvision where it is installed, and use none of its operators here.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    with contextlib.suppress(RuntimeError):
        importlib.import_module("torchvision")
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def keep_config(folder: Path, config: Any) -> None:
    """Write the ``config.json`` of a causal language model alone."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = [CLASSES[config.model_type]]
    config.save_pretrained(folder)


def keep_case(out: Path, name: str, case: Case, made: Made) -> None:
    """Write ``case.json`` and, unless the case must be refused, ``expected.safetensors``."""
    if not case.refuse:
        assert made.truth
        save_file(
            {key: value.detach().cpu().clone().contiguous() for key, value in made.truth.items()},
            out / "expected.safetensors",
        )
    versions = {library: importlib.metadata.version(library) for library in (*LIBRARIES, *case.libraries)}
    described = {
        "name": name,
        "expect": f"refuse:{case.why}" if case.refuse else "accept",
        "optimizer": made.optimizer,
        "trainer": made.trainer,
        "beta2": made.beta2,
        "step": made.step,
        "world_size": case.ranks,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "note": case.note,
        "versions": versions | {"python": platform.python_version()},
        **made.more,
    }
    if case.refuse:
        described["errors"] = list(case.refuse)
    if made.file:
        described["optimizer_file"] = made.file
    (out / "case.json").write_text(json.dumps(described, indent=2, sort_keys=True) + "\n")
