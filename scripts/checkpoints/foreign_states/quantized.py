"""Cases of states in 8 bits and less: bitsandbytes and torchao, decoded by the library's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, groups_of, keep_weights, tiny, train
from scripts.checkpoints.foreign_states.plain import REFUSED, built, corrected, trainer


def of_bitsandbytes(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the second moments of an optimizer of bitsandbytes."""
    from bitsandbytes.functional import dequantize_blockwise

    truth = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        if "state2" not in state:
            continue
        v = state["state2"]
        if v.dtype == torch.uint8:
            v = dequantize_blockwise(v, absmax=state["absmax2"], code=state["qmap2"], blocksize=256)
        truth[name] = v
    return truth


def of_torchao(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the second moments of an optimizer of torchao."""
    found = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p in optimizer.state}
    return {
        name: v.dequantize() if hasattr(v, "dequantize") and type(v) is not Tensor else v for name, v in found.items()
    }


def bitsandbytes(out: Path, name: str, two: bool = True, bf16: bool = False, **settings: Any) -> Made:
    """Save a state_dict of an optimizer of bitsandbytes."""
    model = tiny(wide=True)
    if bf16:
        model = model.bfloat16()
    settings = {"lr": 1e-3, "betas": BETAS, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    optimizer = built("bitsandbytes.optim", name, groups_of(model, two), settings)
    train(model, optimizer)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    truth = of_bitsandbytes(model, optimizer)
    more = {"bias_corrected": corrected("bitsandbytes.optim", name, settings, "state2")} if truth else {}
    beta2 = settings["betas"][1] if "betas" in settings else None
    return Made(truth, f"bitsandbytes.optim.{name}", "plain torch", beta2, STEPS, "optimizer.pt", more)


def torchao(out: Path, name: str, bf16: bool = False, even: bool = True, few: bool = False, **settings: Any) -> Made:
    """Save a state_dict of an optimizer of torchao."""
    sizes = {"hidden_size": 48, "intermediate_size": 96, "vocab_size": 96} if even else {}
    if few:  # quantizes the embeddings only
        sizes = {"hidden_size": 33, "intermediate_size": 21, "vocab_size": 128}
    model = tiny(wide=True, **sizes)
    if bf16:
        model = model.bfloat16()
    settings = {"lr": 1e-3, "betas": BETAS, **settings}
    optimizer = built("torchao.optim", name, groups_of(model, True), settings)
    train(model, optimizer)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    more = {"bias_corrected": corrected("torchao.optim", name, settings)}
    return Made(
        of_torchao(model, optimizer), f"torchao.optim.{name}", "plain torch", BETAS[1], STEPS, "optimizer.pt", more
    )


def trained(out: Path, optim: str, library: str, **more: Any) -> Made:
    """Train with the Hugging Face Trainer."""
    return trainer(out, optim, True, of_torchao if library == "torchao" else of_bitsandbytes, **more)


def _bnb(name: str, refuse: bool = False, **options: Any) -> Case:
    why = "one moment alone" if refuse else ""
    return Case(bitsandbytes, {"name": name, **options}, 1, REFUSED if refuse else (), why, ("bitsandbytes",))


def _torchao(name: str, **options: Any) -> Case:
    return Case(torchao, {"name": name, **options}, libraries=("torchao",))


def _trained(optim: str, library: str, refuse: bool = False) -> Case:
    why = "one moment alone" if refuse else ""
    return Case(trained, {"optim": optim, "library": library}, 1, REFUSED if refuse else (), why, (library,))


CASES = {
    "bnb_adamw8bit": _bnb("AdamW8bit"),
    "bnb_adam8bit_bf16": _bnb("Adam8bit", bf16=True),
    "bnb_adamw32bit": _bnb("AdamW32bit"),
    "bnb_paged_adamw8bit": _bnb("PagedAdamW8bit"),
    "bnb_ademamix8bit": _bnb("AdEMAMix8bit", betas=(*BETAS, 0.9999), two=False),
    "bnb_lamb8bit": _bnb("LAMB8bit", two=False),
    "bnb_lion8bit": _bnb("Lion8bit", refuse=True),
    "bnb_lion32bit": _bnb("Lion32bit", refuse=True),
    "bnb_rmsprop8bit": _bnb("RMSprop8bit", refuse=True, betas=None),
    "bnb_sgd8bit": _bnb("SGD8bit", refuse=True, betas=None, momentum=0.9),
    "bnb_adagrad8bit": _bnb("Adagrad8bit", refuse=True, betas=None),
    "torchao_8bit": _torchao("AdamW8bit"),
    "torchao_8bit_bf16": _torchao("AdamW8bit", bf16=True),
    "torchao_8bit_block_64": _torchao("AdamW8bit", block_size=64),
    "torchao_8bit_odd": _torchao("AdamW8bit", even=False),
    "torchao_4bit": _torchao("AdamW4bit"),
    "torchao_4bit_few": _torchao("AdamW4bit", few=True),
    "torchao_4bit_bf16": _torchao("Adam4bit", bf16=True),
    "torchao_fp8": _torchao("AdamWFp8"),
    "torchao_fp8_bf16": _torchao("AdamFp8", bf16=True),
    "trainer_bnb_8bit": _trained("adamw_bnb_8bit", "bitsandbytes"),
    "trainer_bnb_paged_8bit": _trained("paged_adamw_8bit", "bitsandbytes"),
    "trainer_bnb_paged_32bit": _trained("paged_adamw_32bit", "bitsandbytes"),
    "trainer_bnb_ademamix_8bit": _trained("ademamix_8bit", "bitsandbytes"),
    "trainer_bnb_ademamix": _trained("ademamix", "bitsandbytes"),
    "trainer_bnb_lion_8bit": _trained("lion_8bit", "bitsandbytes", refuse=True),
    "trainer_bnb_rmsprop_8bit": _trained("rmsprop_bnb_8bit", "bitsandbytes", refuse=True),
    "trainer_torchao_8bit": _trained("adamw_torch_8bit", "torchao"),
    "trainer_torchao_4bit": _trained("adamw_torch_4bit", "torchao"),
}
