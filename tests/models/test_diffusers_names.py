"""Order of the parameters of diffusers' U-Nets, and models whose order is not known."""

import json

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.diffusers_names import in_order
from tests.other_trainers import adam, assert_moments


def _resnet(width, inner):
    shapes = {"norm1.weight": (width,), "norm1.bias": (width,), "conv1.weight": (inner, width, 3, 3),
              "conv1.bias": (inner,), "time_emb_proj.weight": (inner, 12), "time_emb_proj.bias": (inner,),
              "norm2.weight": (inner,), "norm2.bias": (inner,), "conv2.weight": (inner, inner, 3, 3),
              "conv2.bias": (inner,)}  # fmt: skip
    return shapes | (
        {"conv_shortcut.weight": (inner, width, 1, 1), "conv_shortcut.bias": (inner,)} if width != inner else {}
    )


def _attention(width, of="attn1."):
    parts = {f"{of}to_{part}.weight": (width, width) for part in "qkv"}
    return parts | {f"{of}to_out.0.weight": (width, width), f"{of}to_out.0.bias": (width,)}


def _transformer(width):
    inner = {f"norm1.{kind}": (width,) for kind in ("weight", "bias")} | _attention(width)
    inner |= {f"norm2.{kind}": (width,) for kind in ("weight", "bias")} | _attention(width, "attn2.")
    inner |= {f"norm3.{kind}": (width,) for kind in ("weight", "bias")}
    inner |= {"ff.net.0.proj.weight": (8, width), "ff.net.0.proj.bias": (8,), "ff.net.2.weight": (width, 4)}
    shapes = {"norm.weight": (width,), "norm.bias": (width,), "proj_in.weight": (width, width)}
    shapes |= {f"transformer_blocks.0.{name}": shape for name, shape in inner.items()}
    return shapes | {"proj_out.weight": (width, width)}


def _u_net(width=6):
    """Return name -> shape of a small conditional U-Net, in the order of its modules."""
    shapes = {"conv_in.weight": (width, 3, 3, 3), "conv_in.bias": (width,)}
    shapes |= {f"time_embedding.linear_{k}.{kind}": (12,) for k in (1, 2) for kind in ("weight", "bias")}
    for k in range(12):  # as text, block 10 would come before block 2
        block = {f"attentions.0.{n}": s for n, s in _transformer(width).items()} if k in (1, 10) else {}
        block |= {f"resnets.0.{n}": s for n, s in _resnet(width, width).items()}
        block |= {"downsamplers.0.conv.weight": (width, width, 3, 3), "downsamplers.0.conv.bias": (width,)}
        shapes |= {f"down_blocks.{k}.{n}": s for n, s in block.items()}
    shapes |= {f"up_blocks.0.resnets.0.{n}": s for n, s in _resnet(2 * width, width).items()}
    shapes |= {f"mid_block.attentions.0.{n}": s for n, s in _transformer(width).items()}
    shapes |= {f"mid_block.resnets.0.{n}": s for n, s in _resnet(width, width).items()}
    return shapes | {"conv_norm_out.weight": (width,), "conv_out.weight": (3, width, 3, 3), "conv_out.bias": (3,)}


@pytest.mark.parametrize("width", [6, 8])
@pytest.mark.parametrize("level", ["checkpoint-30", "", "checkpoint-30/optimizer.bin"])
def test_a_u_net_is_named_without_diffusers(level, width, tmp_path):
    """The run, the checkpoint and the file are accepted; the weights are sorted by name, the state is not."""
    torch.manual_seed(0)
    moments = {name: torch.rand(shape) for name, shape in _u_net(width).items()}
    folder = tmp_path / "checkpoint-30"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file(
        {n: torch.randn(t.shape) for n, t in moments.items()}, folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    torch.save(adam(moments, numbered=True), folder / "optimizer.bin")
    assert_moments(load_fisher(tmp_path / level), moments)
    assert_moments(load_fisher(tmp_path / level, folder / "unet"), moments)


def test_another_class_needs_diffusers(tmp_path):
    """The refusal has both cures."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save(adam({"a.weight": torch.rand(2, 2)}, numbered=True), tmp_path / "optimizer.bin")
    with pytest.raises(NamingError, match=r"FluxTransformer2DModel .*install diffusers, or give --names FILE"):
        load_fisher(tmp_path)


def test_an_unknown_module_is_not_guessed():
    """A module that the table lacks has no place in the order."""
    with pytest.raises(NamingError, match="ip_adapter"):
        in_order(["conv_in.weight", "ip_adapter.weight"])
