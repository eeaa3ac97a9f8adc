"""Order of the parameters of diffusers' U-Nets, and models whose order is not known."""

import json

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.diffusers_names import check_version, in_order
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


def _linear(*names):
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def _stable_diffusion_3(blocks=2):
    """Return the names of a Stable Diffusion 3.5 in the order of its modules; the last block has no context left."""
    order = _linear("pos_embed.proj")
    for embedder in ("timestep_embedder", "text_embedder"):
        order += _linear(f"time_text_embed.{embedder}.linear_1", f"time_text_embed.{embedder}.linear_2")
    order += _linear("context_embedder")
    for k in range(blocks):
        block, last = f"transformer_blocks.{k}.", k == blocks - 1
        order += _linear(f"{block}norm1.linear", f"{block}norm1_context.linear")
        order += [f"{block}attn.norm_q.weight", f"{block}attn.norm_k.weight"]
        order += _linear(*(f"{block}attn.to_{part}" for part in "qkv"))
        order += _linear(*(f"{block}attn.add_{part}_proj" for part in "kvq"), f"{block}attn.to_out.0")
        order += [] if last else _linear(f"{block}attn.to_add_out")
        order += [f"{block}attn.norm_added_q.weight", f"{block}attn.norm_added_k.weight"]
        order += _linear(f"{block}ff.net.0.proj", f"{block}ff.net.2")
        order += [] if last else _linear(f"{block}ff_context.net.0.proj", f"{block}ff_context.net.2")
    return order + _linear("norm_out.linear", "proj_out")


def _pixart():
    """Return the names of a PixArt in the order of its modules; parameters come before the modules beside them."""
    block = "transformer_blocks.0."
    order = ["scale_shift_table", *_linear("pos_embed.proj"), f"{block}scale_shift_table"]
    for attention in ("attn1", "attn2"):
        order += _linear(*(f"{block}{attention}.to_{part}" for part in "qkv"), f"{block}{attention}.to_out.0")
    order += _linear(f"{block}ff.net.0.proj", f"{block}ff.net.2", "proj_out")
    order += _linear("adaln_single.emb.timestep_embedder.linear_1", "adaln_single.emb.timestep_embedder.linear_2")
    return order + _linear("adaln_single.linear", "caption_projection.linear_1", "caption_projection.linear_2")


@pytest.mark.parametrize(
    ("kind", "order"), [("SD3Transformer2DModel", _stable_diffusion_3()), ("PixArtTransformer2DModel", _pixart())]
)
def test_a_transformer_is_named_without_diffusers(kind, order, tmp_path):
    """All matrices are square, so that the order alone decides; positions that are saved are no parameter."""
    moments = {name: torch.rand(6, 6) if name.endswith("weight") else torch.rand(6) for name in order}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"_class_name": kind}))
    weights = {name: torch.randn(t.shape) for name, t in moments.items()} | {"pos_embed.pos_embed": torch.ones(1, 4, 6)}
    save_file(weights, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    torch.save(adam(moments, numbered=True), tmp_path / "optimizer.bin")
    assert_moments(load_fisher(tmp_path), moments)


@pytest.mark.parametrize("recorded", ["0.31.0", "0.36.0", None])
@pytest.mark.parametrize("installed", ["0.34.0", "0.42.1"])
def test_a_class_whose_order_changed_is_built_by_its_own_side_of_the_change(recorded, installed, tmp_path):
    """Flux registers its modules otherwise since diffusers 0.35, in equal shapes."""
    config = {"_class_name": "FluxTransformer2DModel"} | ({"_diffusers_version": recorded} if recorded else {})
    if (recorded, installed) in {("0.31.0", "0.34.0"), ("0.36.0", "0.42.1")}:
        check_version(config, installed, tmp_path)
    else:
        with pytest.raises(NamingError, match="install the version that trained it"):
            check_version(config, installed, tmp_path)


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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"down_block_types": ["DownBlock2D", "KCrossAttnDownBlock2D"]}, "modules in KCrossAttnDownBlock2D"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "modules in UNetMidBlock2DSimpleCrossAttn"),
        ({"_diffusers_version": "0.14.0"}, "changed after diffusers 0.14.0"),
    ],
)
def test_blocks_of_another_order_are_refused(changes, reason, tmp_path):
    """Their modules have the names in the table, but were registered in another order."""
    folder = tmp_path / "checkpoint-30" / "unet"
    folder.mkdir(parents=True)
    tensors = {name: torch.rand(shape) for name, shape in _u_net().items()}
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **changes}))
    torch.save(adam(tensors, numbered=True), folder.parent / "optimizer.bin")
    with pytest.raises(NamingError, match=reason):
        load_fisher(folder.parent)
