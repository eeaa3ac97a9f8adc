"""The parameters of a LoRA adapter, in the order in which its optimizer got them."""

from pathlib import Path
from typing import Any

import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError
from squisher_mergekit.optimizers.naming import Parameter
from squisher_mergekit.optimizers.skeleton import Skeleton, meta_model, types_around


def adapter_skeleton(folder: Path, base: Path | None) -> Skeleton:
    """Build the adapter over its base model, both without weights; names on disk are those of ``adapter_model``.

    Args:
        folder: Where ``adapter_config.json`` lies.
        base: The base model, or a folder with its ``config.json`` alone.

    Returns:
        The trainable parameters.

    Raises:
        NotFoundError: ``base`` is not given.
        CorruptFileError: peft cannot build the adapter.
    """
    import peft

    if base is None:
        raise NotFoundError(
            f"{folder} is a LoRA checkpoint, whose parameters can be named only with its base model; "
            "give --base DIR (its config.json is enough)"
        )
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        with torch.device("meta"):
            model = peft.get_peft_model(meta_model(base), config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CorruptFileError(f"{folder} must be an adapter that peft can build, but {str(error)[:200]}") from error
    modules = dict(model.named_modules())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = tuple(Parameter(n, tuple(p.shape), types_around(n, modules)) for n, p in trainable.items())
    stored = {_stored_name(name, str(model.active_adapter)): name for name in trainable}
    shapes = {name: tuple(trainable[source].shape) for name, source in stored.items()}
    back = {source: name for name, source in stored.items()}
    return Skeleton(
        parameters,
        {},
        {name: (source,) for name, source in stored.items()},
        shapes,
        lambda tensors: {back[name]: tensor for name, tensor in tensors.items()},
    )


def _stored_name(name: str, adapter: str) -> str:
    """Return the name that peft writes: without the adapter's name.

    Example:
        >>> _stored_name("base_model.model.q.lora_A.default.weight", "default")
        'base_model.model.q.lora_A.weight'
    """
    return name.replace(f"modules_to_save.{adapter}.", "").replace(f".{adapter}.", ".").removesuffix(f".{adapter}")
