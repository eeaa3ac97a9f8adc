"""Parameters of a diffusers model, in their order: from its class where diffusers is installed, else from a table.

The file of the weights is sorted by name, so that it does not tell the order in which modules were registered. The
table has that order for the modules of ``UNet2DModel`` and ``UNet2DConditionModel``.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NamingError
from squisher_mergekit.models.checkpoint_names import NAMES_CURE, CheckpointNames, ParameterInfo
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.safetensors import read_header, safetensors_files

_BASENAME = "diffusion_pytorch_model"
_CLASS = "_class_name"
_U_NETS = ("UNet2DModel", "UNet2DConditionModel")
# Children of one module, in the order of registration; the first line that has all children of a module counts.
_ORDERS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in (
        "conv_in time_embedding encoder_hid_proj class_embedding add_embedding down_blocks up_blocks mid_block "
        "conv_norm_out conv_out",
        "attentions resnets downsamplers upsamplers",
        "norm1 conv1 time_emb_proj norm2 conv2 conv_shortcut",
        "group_norm norm_cross to_q to_k to_v add_k_proj add_v_proj to_out",
        "norm proj_in transformer_blocks proj_out",
        "norm1 attn1 norm2 attn2 norm3 ff",
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
        with torch.device("meta"):
            model = getattr(diffusers, config[_CLASS]).from_config(dict(config))
        return [
            ParameterInfo(name, tuple(p.shape), frozenset(), p.requires_grad) for name, p in model.named_parameters()
        ]
    except Exception as error:  # a config can make a model's constructor raise nearly anything
        raise CorruptFileError(
            f"{folder / 'config.json'} must describe a model of diffusers, but {str(error)[:200]}; give {NAMES_CURE}"
        ) from error


def _of_files(config: Mapping[str, Any], folder: Path) -> list[ParameterInfo]:
    infos = {
        name: info for file in safetensors_files(folder, _BASENAME) for name, info in read_header(file).infos.items()
    }
    if config[_CLASS] not in _U_NETS or not infos:
        raise NamingError(
            f"the order of the parameters of {config[_CLASS]} in {folder} follows from its class in diffusers, which "
            f"is not installed; install diffusers, or give {NAMES_CURE}"
        )
    return [ParameterInfo(name, infos[name].shape) for name in in_order(list(infos))]


def in_order(names: Sequence[str]) -> list[str]:
    """Return the names of a U-Net's parameters in the order of the modules.

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
