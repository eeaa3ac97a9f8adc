"""Parameters of a diffusers model, in their order: from its class where diffusers is installed, else from a table.

The file of the weights is sorted by name, so that it does not tell the order in which modules were registered. The
table has that order for U-Nets and for the transformers of Stable Diffusion 3, PixArt and DiT. That of Flux changed
with diffusers 0.35, so that the version must be on the side of the one that trained it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NamingError
from squisher_mergekit.models.names import NAMES_CURE, CheckpointNames, ParameterInfo
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.safetensors import read_header, safetensors_files

_BASENAME = "diffusion_pytorch_model"
_CLASS = "_class_name"
_IN_TABLE = (
    "UNet2DModel", "UNet2DConditionModel", "SD3Transformer2DModel", "PixArtTransformer2DModel", "DiTTransformer2DModel",
)  # fmt: skip
_VERSION = "_diffusers_version"
_REORDERED = {"FluxTransformer2DModel": (0, 35)}  # class -> version of diffusers that registers its modules otherwise
_OLDEST = (0, 17)  # earlier versions register the norms of a transformer's block after its attentions
# Blocks of a U-Net whose modules the table has in order; others, such as those of the K-diffusion, have another one.
_BLOCKS = frozenset(f"{kind}{way}" for kind in ("", "Attn", "CrossAttn") for way in ("DownBlock2D", "UpBlock2D")) | {
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
}
_MIDDLE = (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn")
_BUFFER = "pos_embed.pos_embed"  # positions of Stable Diffusion 3, which are not trained
# Children of one module, in the order of registration; the first line that has all children of a module counts.
_ORDERS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in (
        "conv_in time_embedding encoder_hid_proj class_embedding add_embedding down_blocks up_blocks mid_block "
        "conv_norm_out conv_out",
        "attentions resnets downsamplers upsamplers",
        "norm1 conv1 time_emb_proj norm2 conv2 conv_shortcut",
        "group_norm spatial_norm norm_q norm_k norm_cross to_q to_k to_v add_k_proj add_v_proj add_q_proj to_out "
        "to_add_out norm_added_q norm_added_k",
        "norm proj_in transformer_blocks proj_out",
        "pos_embed time_text_embed context_embedder transformer_blocks norm_out proj_out",
        "scale_shift_table pos_embed transformer_blocks proj_out adaln_single caption_projection",
        "pos_embed transformer_blocks proj_out_1 proj_out_2",
        "scale_shift_table norm1 attn1 norm2 attn2 norm3 ff",
        "norm1 norm1_context attn attn2 norm2 ff norm2_context ff_context",
        "timestep_embedder class_embedder",
        "timestep_embedder resolution_embedder aspect_ratio_embedder",
        "timestep_embedder text_embedder",
        "emb linear",
        "embedding_table",
        "linear_1 cond_proj linear_2",
        "net",
        "proj",
        "conv",
        "weight bias",
    )
)


def is_diffusers(config: Mapping[str, Any] | None) -> bool:
    """Return True for the content of a ``config.json`` that diffusers wrote."""
    return config is not None and isinstance(config.get(_CLASS), str) and "model_type" not in config


def model_folders(folder: Path) -> list[Path]:
    """Return the folders of diffusers models in a checkpoint, such as ``unet``."""
    configs = [path / "config.json" for path in sorted(folder.iterdir()) if path.is_dir()]
    return [file.parent for file in configs if file.is_file() and is_diffusers(read_mapping(file))]


def diffusers_names(folder: Path) -> CheckpointNames:
    """Return the names of the model that a ``config.json`` of diffusers describes.

    Raises:
        NamingError: diffusers is not installed, and the table lacks the class or one of its modules.
        CorruptFileError: diffusers cannot build the model.
    """
    config = read_mapping(folder / "config.json")
    parameters = _of_class(config, folder) if find_spec("diffusers") else _of_files(config, folder)
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    return CheckpointNames(
        tuple(parameters), {name: name for name in shapes}, {name: (name,) for name in shapes}, shapes, {}, dict
    )


def _of_class(config: Mapping[str, Any], folder: Path) -> list[ParameterInfo]:
    import diffusers  # type: ignore[import-not-found]

    try:
        check_version(config, diffusers.__version__, folder)
        with torch.device("meta"):
            model = getattr(diffusers, config[_CLASS]).from_config(dict(config))
        return [
            ParameterInfo(name, tuple(p.shape), frozenset(), p.requires_grad) for name, p in model.named_parameters()
        ]
    except NamingError:
        raise
    except Exception as error:  # a config can make a model's constructor raise nearly anything
        raise CorruptFileError(
            f"{folder / 'config.json'} must describe a model of diffusers, but {str(error)[:200]}; give {NAMES_CURE}"
        ) from error


def check_version(config: Mapping[str, Any], installed: str, folder: Path) -> None:
    """Refuse a version of diffusers that orders the modules of a class otherwise than the one that trained it.

    Args:
        config: Content of ``config.json``.
        installed: The installed version.
        folder: Folder of the model, for messages.

    Raises:
        NamingError: The versions are on different sides of the change, or the config does not tell its version.
    """
    changed = _REORDERED.get(str(config[_CLASS]))
    versions = [tuple(map(int, re.findall(r"\d+", str(text))[:2])) for text in (config.get(_VERSION, ""), installed)]
    if changed is not None and (not versions[0] or len({version >= changed for version in versions}) > 1):
        raise NamingError(
            f"the order of the parameters of {config[_CLASS]} in {folder} changed with diffusers "
            f"{'.'.join(map(str, changed))}, and {installed} is installed, but {config.get(_VERSION, 'no version')} is "
            f"recorded; install the version that trained it, or give {NAMES_CURE}"
        )


def _of_files(config: Mapping[str, Any], folder: Path) -> list[ParameterInfo]:
    infos = {
        name: info for file in safetensors_files(folder, _BASENAME) for name, info in read_header(file).infos.items()
    }
    infos.pop(_BUFFER, None)
    if config[_CLASS] not in _IN_TABLE or not infos:
        raise NamingError(
            f"the order of the parameters of {config[_CLASS]} in {folder} follows from its class in diffusers, which "
            f"is not installed; install diffusers, or give {NAMES_CURE}"
        )
    _check_table(config, folder)
    return [ParameterInfo(name, infos[name].shape) for name in in_order(list(infos))]


def _check_table(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a model whose modules the table would put into a wrong order.

    Raises:
        NamingError: A block is not in the table, or the model was trained with a version before it.
    """
    types = [kind for key in ("down_block_types", "up_block_types") for kind in config.get(key) or ()]
    middle = config.get("mid_block_type")
    other = next((kind for kind in types if kind not in _BLOCKS), None if middle in _MIDDLE else middle)
    if other is not None:
        raise NamingError(
            f"the order of the modules in {other} of {folder} follows from its class in diffusers, which is not "
            f"installed; install diffusers, or give {NAMES_CURE}"
        )
    version = tuple(map(int, re.findall(r"\d+", str(config.get(_VERSION, "")))[:2]))
    if version and version < _OLDEST:
        raise NamingError(
            f"the order of the modules of {config[_CLASS]} in {folder} changed after diffusers {config[_VERSION]}, "
            f"which trained it; give {NAMES_CURE}, as printed by named_parameters() under that version"
        )


def in_order(names: Sequence[str]) -> list[str]:
    """Return the names of a model's parameters in the order of the modules.

    Raises:
        NamingError: The table lacks a module.

    Example:
        >>> in_order(["mid_block.resnets.0.conv1.weight", "up_blocks.1.resnets.0.norm1.bias", "conv_in.weight"])
        ['conv_in.weight', 'up_blocks.1.resnets.0.norm1.bias', 'mid_block.resnets.0.conv1.weight']
    """
    return [".".join(path) for path in _walk([tuple(name.split(".")) for name in names])]


def _walk(paths: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    children = dict.fromkeys(path[0] for path in paths)
    if all(child.isdecimal() for child in children):
        order = sorted(children, key=int)
    else:
        line = next((line for line in _ORDERS if set(children) <= set(line)), None)
        if line is None:
            raise NamingError(
                f"the order of the modules {', '.join(children)[:120]} follows from their class in diffusers, which is "
                f"not installed; install diffusers, or give {NAMES_CURE}"
            )
        order = sorted(children, key=line.index)
    for child in order:
        inner = [path[1:] for path in paths if path[0] == child]
        if inner == [()]:
            yield (child,)
        else:
            yield from ((child, *rest) for rest in _walk([path for path in inner if path]))
