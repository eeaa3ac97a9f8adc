"""Loading of a saved model and its tokenizer, and sharding by FSDP2."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from squisher_mergekit.errors import MismatchError, NotFoundError, RefusedError
from squisher_mergekit.estimators.tasks import DataTask
from squisher_mergekit.models.weights import Weights, check_finite, check_folder, refuse_quantised
from squisher_mergekit.tensors.input_files import expanded

ModelDtype = Literal["fp32", "bf16", "fp16"]
MODEL_DTYPES: dict[ModelDtype, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
_AUTO_CLASSES: dict[DataTask, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked-lm": "AutoModelForMaskedLM",
    "regression": "AutoModelForSequenceClassification",
}

BAR_DELAY = 2  # seconds


def load_model(model: str, task: DataTask, progress: bool, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """Return a model on the CPU, and its tokenizer; only the adapter of a LoRA is trainable, and stays in float32.

    Args:
        model: Folder or Hub id of a model or of an adapter.
        task: Task of the model, which selects transformers' class.
        progress: True to show transformers' progress bars.
        dtype: Dtype of the weights; modules that transformers keeps in float32 stay in float32.

    Raises:
        NotFoundError: No such model exists, or transformers cannot load it for the task without code of its own.
        MismatchError: The files lack weights that the model for the task has.
    """
    import transformers

    bars = transformers.utils.logging
    verbosity = bars.get_verbosity()
    bars.set_verbosity_error()  # its table of new weights has many lines, of which the error needs one
    if not progress:
        bars.disable_progress_bar()
    hooked = getattr(bars, "set_tqdm_hook", lambda hook: None)  # transformers before 5 has none
    previous = hooked(lambda bar, given, options: bar(*given, **{"delay": BAR_DELAY, **options}))
    try:
        base = _base_of(model)
        for folder in filter(None, (model, base)):
            check_folder(Path(folder))
        refuse_quantised(Weights(expanded(base or model)), base or model)
        loaded, info = getattr(transformers, _AUTO_CLASSES[task]).from_pretrained(
            base or model, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
        if base is not None:
            loaded, new = _with_adapter(loaded, model, new)
        _refuse_new_weights(new, model, task)
        _refuse_encoder(loaded.config, model, task)
        for name, parameter in loaded.named_parameters():
            check_finite(parameter, name, model)
        tokenizer = _tokenizer(model, base)
    except RefusedError:
        raise
    except Exception as error:  # transformers raises many types for a missing file
        raise NotFoundError(
            f"{model} must be a model for {task} with its tokenizer, local or on the Hub, but "
            f"{_reason(error)}; check its name and --task"
        ) from error
    finally:
        hooked(previous)
        bars.enable_progress_bar()
        bars.set_verbosity(verbosity)
    if getattr(loaded.config, "pad_token_id", None) is None:
        # Without a padding token a classifier cannot find the end of a text; batches pad with the same token.
        pads = tokenizer.pad_token_id
        loaded.config.pad_token_id = tokenizer.eos_token_id if pads is None else pads
    return loaded, tokenizer


def _reason(error: Exception) -> str:
    """Return an error of transformers in one short line, without its advice to run code."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return "it needs code of its own, which is never run (transformers must have the model's class)"
    return text[:200]


def _with_adapter(model: nn.Module, adapter: str, new: set[str]) -> tuple[nn.Module, set[str]]:
    """Return a model with an adapter, and the new weights of both; modules saved with the adapter replace the model's.

    Args:
        model: The base model.
        adapter: Folder or Hub id of the adapter.
        new: Weights that the base model's files lack.
    """
    import peft

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    missing = [str(warning.message) for warning in caught if "missing adapter keys" in str(warning.message)]
    replaced = [
        name.removeprefix("base_model.model.").removeprefix("base_model.")
        for name, module in adapted.named_modules()
        if hasattr(module, "modules_to_save")
    ]
    rest = {name for name in new if not any(name.startswith(f"{module}.") for module in replaced)}
    return adapted, rest | {name for text in missing for name in re.findall(r"'([^']+)'", text)}


def _refuse_new_weights(new: set[str], model: str, task: DataTask) -> None:
    """Refuse a model with weights that its files lack and that transformers has drawn at random.

    Raises:
        MismatchError: There is such a weight.
    """
    if new:
        raise MismatchError(
            f"every weight of a model for {task} must come from its files, but {model} lacks {len(new)}, newly "
            f"initialised at random: {', '.join(sorted(new)[:3])}; give the fine-tuned model, or the --task it was "
            "trained for"
        )


def _refuse_encoder(config: Any, model: str, task: DataTask) -> None:
    """Refuse an encoder as a causal language model: it sees the tokens that it would have to predict.

    Raises:
        MismatchError: The model is one.
    """
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    if task == "causal-lm" and type(config) in MODEL_FOR_MASKED_LM_MAPPING and config.is_decoder is False:
        raise MismatchError(
            f"a model for {task} must not see the tokens after each one, but {model} is an encoder "
            f"({type(config).__name__} without is_decoder); give --task masked-lm, or a decoder"
        )


def _base_of(model: str) -> str | None:
    """Return the base model of an adapter; None for a model."""
    folder = expanded(model)
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
        return transformers.AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception:
        if base is None:
            raise
        return transformers.AutoTokenizer.from_pretrained(base, trust_remote_code=False)


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
