"""Loading of a saved model and its tokenizer, and sharding by FSDP2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.estimators.tasks import DataTask

_AUTO_CLASSES: dict[DataTask, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "regression": "AutoModelForSequenceClassification",
}


def load_model(model: str, task: DataTask, progress: bool) -> tuple[nn.Module, Any]:
    """Return a model in float32 on the CPU, and its tokenizer; only the adapter of a LoRA is trainable.

    Args:
        model: Folder or Hub id of a model or of an adapter.
        task: Task of the model, which selects transformers' class.
        progress: True to show transformers' progress bars.

    Raises:
        NotFoundError: No such model exists, or transformers cannot load it for the task.
    """
    import transformers

    bars = transformers.utils.logging
    if not progress:
        bars.disable_progress_bar()
    try:
        base = _base_of(model)
        loaded = getattr(transformers, _AUTO_CLASSES[task]).from_pretrained(base or model, dtype=torch.float32)
        if base is not None:
            import peft

            loaded = peft.PeftModel.from_pretrained(loaded, model, is_trainable=True)
        tokenizer = _tokenizer(model, base)
    except Exception as error:  # transformers raises many types for a missing file
        raise NotFoundError(
            f"{model} must be a model for {task} with its tokenizer, local or on the Hub, but "
            f"{' '.join(str(error).split())[:200]}; check its name and --task"
        ) from error
    finally:
        bars.enable_progress_bar()
    if getattr(loaded.config, "pad_token_id", None) is None:
        # Without a padding token a classifier cannot find the end of a text; batches pad with the same token.
        pads = tokenizer.pad_token_id
        loaded.config.pad_token_id = tokenizer.eos_token_id if pads is None else pads
    return loaded, tokenizer


def _base_of(model: str) -> str | None:
    """Return the base model of an adapter; None for a model."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        file = folder / "adapter_config.json"
        if not file.is_file():
            return None
        base: str = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        return base
    import peft
    from transformers.utils.peft_utils import find_adapter_config_file

    if find_adapter_config_file(model) is None:
        return None
    named: str = peft.PeftConfig.from_pretrained(model).base_model_name_or_path
    return named


def _tokenizer(model: str, base: str | None) -> Any:
    """Return the tokenizer of a model; for an adapter without one, its base model's."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(model)
    except Exception:
        if base is None:
            raise
        return transformers.AutoTokenizer.from_pretrained(base)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a model over all processes by FSDP2: each repeated layer by itself, then the rest.

    Args:
        model: The model. ``_no_split_modules`` of a transformers model names its repeated layers.
        device: Device of this process.

    Returns:
        The model, sharded in place.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    repeated = set(getattr(model, "_no_split_modules", None) or ())
    for module in [module for module in model.modules() if type(module).__name__ in repeated]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
