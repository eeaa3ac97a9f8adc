"""Checkpoints of trainers that cannot be read, recognised by the names of their files, with the reason and a cure."""

import re
from pathlib import Path

from squisher_mergekit.tensors.safetensors import read_header, safetensors_files

_ESTIMATE = "convert the weights to a Hugging Face model and estimate a Fisher from data"
_JAX = f"reading it takes JAX's tensorstore, which this package does not use; {_ESTIMATE}"
_TENSORFLOW = f"reading it takes TensorFlow, which this package does not use; {_ESTIMATE}"
# Pattern of a name -> whose it is, and what reading it would take.
_NAMES = (
    (
        r"distrib_optim\.pt|model_optim_rng\.pt",
        f"Megatron-LM's of one rank, in flat buffers without names; {_ESTIMATE}",
    ),
    (
        r"layer_\d+-model_\d+.*",
        "of pipeline parallelism, without the optimizer's files; copy *_optim_states.pt as well",
    ),
    (r"rank\d+\.pt", "a rank's part of OLMo's legacy sharded checkpoint; unshard it by OLMo's scripts/unshard.py"),
    (r".*\.data-\d+-of-\d+|.*\.ckpt-\d+\.(?:index|meta)", f"TensorFlow's; {_TENSORFLOW}"),
    (r".*\.keras|.*\.weights\.h5|.*\.h5", f"Keras's; {_TENSORFLOW}"),
    (r"manifest\.ocdbt|_CHECKPOINT_METADATA|\.zarray|zarr\.json", f"that of Orbax, T5X or Levanter; {_JAX}"),
    (r".*\.msgpack|checkpoint_\d+", f"that of Flax; {_JAX}"),
    (
        r"latest_checkpointed_iteration\.txt",
        f"of Megatron-LM or verl, whose checkpoint it names is missing; {_ESTIMATE}",
    ),
)
_KOHYA = re.compile(r"lora_(?:unet|te\d?|transformer)_\w+\.(?:lora_(?:down|up)\.weight|alpha)")
_DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
_MOST = 20_000  # entries of a folder that are looked at


def whose(path: Path) -> str | None:
    """Return whose checkpoint a file or folder is, with the reason why it cannot be read; None for an unknown one.

    Args:
        path: A file, or a folder, of which the files below count as well.

    Example:
        >>> whose(Path("model.ckpt-1000.index")).partition(";")[0]
        "model.ckpt-1000.index is TensorFlow's"
    """
    names = [path.name]
    if path.is_dir():
        names = [found.name for _, found in zip(range(_MOST), path.rglob("*"), strict=False)]
    for pattern, reason in _NAMES:
        found = next((name for name in names if re.fullmatch(pattern, name)), None)
        if found is not None:
            return f"{found} is {reason}"
    return None


def lora_without_order(folder: Path) -> str | None:
    """Return whose LoRA a folder has, where no file tells the order of its parameters; None for any other folder.

    Args:
        folder: Folder of a numbered state.
    """
    if (folder / _DIFFUSERS_LORA).is_file():
        return f"a LoRA of diffusers ({_DIFFUSERS_LORA})"
    names = (name for file in safetensors_files(folder, "model") for name in read_header(file).infos)
    return "a LoRA of kohya's sd-scripts" if any(map(_KOHYA.fullmatch, names)) else None
