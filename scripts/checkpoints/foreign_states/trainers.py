"""Cases of trainers with names of their own, by their real models and conversions: litgpt, torchtune, diffusers, timm.

The second moments are those of a live AdamW. Their Hugging Face names come from the trainer's own conversion of
weights, which is applied to the second moments. Fabric and timm write their files themselves. torchtune's recipes need
data and a tokenizer, so that the file of their state is written here, in their form.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import BETAS, STEPS, Case, Made, adamw

_SHAPES = (
    {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40, "vocab_size": 37},
    {"hidden_size": 14, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 14, "vocab_size": 19},
)


def _train_on_tokens(model: nn.Module, vocabulary: int) -> Any:
    """Train a model that returns logits; return the optimizer."""
    optimizer = adamw(model.parameters())
    for step in range(STEPS):
        ids = torch.randint(0, vocabulary, (3, 9), generator=torch.Generator().manual_seed(step))
        logits = model(ids)
        loss = nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def _seconds(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Return the second moments of a live optimizer under the model's own names."""
    return {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters() if p in optimizer.state}


def _config(folder: Path, kind: str, **settings: Any) -> None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

    folder.mkdir(parents=True, exist_ok=True)
    config = AutoConfig.for_model(kind, num_hidden_layers=2, tie_word_embeddings=False, **settings)
    config.architectures = [CLASSES[kind]]  # as that of the model that was fine-tuned
    config.save_pretrained(folder)


def litgpt(out: Path, shape: int) -> Made:
    """Save ``step-N/lit_model.pth`` by Fabric; the truth is named by litgpt's own conversion."""
    from lightning.fabric import Fabric
    from litgpt import GPT, Config
    from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama

    sizes = _SHAPES[shape]
    config = Config(
        name="case",
        block_size=32,
        vocab_size=sizes["vocab_size"],
        padded_vocab_size=sizes["vocab_size"] + 3,
        n_layer=2,
        n_head=sizes["num_attention_heads"],
        n_query_groups=sizes["num_key_value_heads"],
        n_embd=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
    )
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = _train_on_tokens(model, sizes["vocab_size"])
    truth: dict[str, Tensor] = {}
    copy_weights_llama(config, truth, _seconds(model, optimizer))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        truth[name] = truth[name][: sizes["vocab_size"]]
    step = out / f"step-{STEPS:08}"
    state = {"model": model, "optimizer": optimizer, "iter_num": STEPS, "step_count": STEPS}
    Fabric(accelerator="cpu", devices=1).save(step / "lit_model.pth", state)
    _config(step, "llama", **sizes)
    return Made(truth, trainer="litgpt, saved by Fabric", file=f"{step.name}/lit_model.pth")


_TORCHTUNE = {  # builder, and the conversion of weights to Hugging Face's
    "llama": ("torchtune.models.llama3", "llama3", "torchtune.models.convert_weights", "tune_to_hf"),
    "qwen2": ("torchtune.models.qwen2", "qwen2", "torchtune.models.qwen2._convert_weights", "qwen2_tune_to_hf"),
    "phi3": ("torchtune.models.phi3", "phi3", "torchtune.models.phi3._convert_weights", "phi3_tune_to_hf"),
}


def torchtune(out: Path, kind: str, shape: int, named: bool = False) -> Made:
    """Save ``recipe_state/recipe_state.pt`` beside ``epoch_0``; the truth is named by torchtune's own conversion."""
    package, builder, conversion, convert = _TORCHTUNE[kind]
    sizes = _SHAPES[shape]
    torch.manual_seed(0)
    model = getattr(importlib.import_module(package), builder)(
        vocab_size=sizes["vocab_size"],
        num_layers=2,
        num_heads=sizes["num_attention_heads"],
        num_kv_heads=sizes["num_key_value_heads"],
        embed_dim=sizes["hidden_size"],
        max_seq_len=32,
        intermediate_dim=sizes["intermediate_size"],
    )
    optimizer = _train_on_tokens(model, sizes["vocab_size"])
    heads = {"num_heads": sizes["num_attention_heads"], "num_kv_heads": sizes["num_key_value_heads"]}
    heads |= {"dim": sizes["hidden_size"]}
    to_hugging_face = getattr(importlib.import_module(conversion), convert)
    truth = to_hugging_face(_seconds(model, optimizer), **(heads if kind != "phi3" else {}))
    state = optimizer.state_dict()
    if named:  # as the distributed recipes gather it
        names = [name for name, _ in model.named_parameters()]
        groups = [{**group, "params": [names[k] for k in group["params"]]} for group in state["param_groups"]]
        state = {"state": {names[k]: entry for k, entry in state["state"].items()}, "param_groups": groups}
    (out / "recipe_state").mkdir()
    bundle = {"optimizer": state, "seed": 0, "epochs_run": 1, "total_epochs": 2, "max_steps_per_epoch": None}
    torch.save(bundle, out / "recipe_state" / "recipe_state.pt")
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if kind == "phi3" else {}
    _config(out / "epoch_0", kind, **sizes, **special)
    return Made(truth, trainer="torchtune, file in the form of its recipes")


_DIFFUSERS: Mapping[str, Mapping[str, Any]] = {
    "UNet2DModel": {
        "sample_size": 8,
        "block_out_channels": (4, 8),
        "norm_num_groups": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 4,
        "num_attention_heads": 2,
        "joint_attention_dim": 8,
        "caption_projection_dim": 8,
        "pooled_projection_dim": 8,
        "pos_embed_max_size": 8,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "in_channels": 4,
        "num_layers": 2,
        "cross_attention_dim": 8,
        "sample_size": 8,
        "caption_channels": 8,
    },
}


def diffusers(out: Path, name: str, **changes: Any) -> Made:
    """Save ``checkpoint-N`` as accelerate's hook leaves it: the state at the top, the model in a folder of its own.

    The gradients are random, as a model of images needs no loss to fill an optimizer.
    """
    model = getattr(importlib.import_module("diffusers"), name)(**{**_DIFFUSERS[name], **changes})
    optimizer = adamw(model.parameters())
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    checkpoint = out / f"checkpoint-{STEPS}"
    model.save_pretrained(checkpoint / ("unet" if name.startswith("UNet") else "transformer"))
    torch.save(optimizer.state_dict(), checkpoint / "optimizer.bin")
    return Made(_seconds(model, optimizer), trainer="diffusers, state in accelerate's form", file=checkpoint.name)


def timm(out: Path, width: int) -> Made:
    """Save ``last.pth.tar`` by timm's CheckpointSaver, with timm's own groups."""
    from argparse import Namespace

    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import create_optimizer_v2
    from timm.utils import CheckpointSaver

    torch.manual_seed(0)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=width, depth=2, num_heads=2, num_classes=5)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, betas=BETAS)
    for step in range(STEPS):
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(model(images), torch.arange(4)).backward()
        optimizer.step()
        optimizer.zero_grad()
    saver = CheckpointSaver(model, optimizer, args=Namespace(model="vit", epochs=1), checkpoint_dir=str(out))
    saver.save_checkpoint(0, metric=1.0)
    for file in out.iterdir():
        if file.name != "last.pth.tar":
            file.unlink()
    return Made(_seconds(model, optimizer), trainer="timm CheckpointSaver", file="last.pth.tar")


CASES = {
    **{f"litgpt_{k}": Case(litgpt, {"shape": k}, libraries=("litgpt",)) for k in (0, 1)},
    **{
        f"torchtune_{kind}_{k}": Case(torchtune, {"kind": kind, "shape": k}, libraries=("torchtune",))
        for kind in _TORCHTUNE
        for k in (0, 1)
    },
    "torchtune_named": Case(torchtune, {"kind": "llama", "shape": 0, "named": True}, libraries=("torchtune",)),
    **{f"diffusers_{name}": Case(diffusers, {"name": name}, libraries=("diffusers",)) for name in _DIFFUSERS},
    "diffusers_small": Case(
        diffusers, {"name": "SD3Transformer2DModel", "num_layers": 2, "qk_norm": None}, libraries=("diffusers",)
    ),
    **{f"timm_{width}": Case(timm, {"width": width}, libraries=("timm",)) for width in (8, 12)},
}
