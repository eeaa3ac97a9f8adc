"""Parameters of an adapter of peft, in the order in which its optimizer received them."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import CorruptFileError, NotFoundError, RefusedError, UnsupportedStateError
from squisher_mergekit.models.checkpoint_names import meta_model, types_around
from squisher_mergekit.models.names import CheckpointNames, ParameterInfo

ADAPTER_CONFIG = "adapter_config.json"


def adapter_names(folder: Path, base: Path | None) -> CheckpointNames:
    """Build an adapter over its base model, both without weights, and return the names of its parameters.

    Args:
        folder: Folder of ``adapter_config.json``.
        base: Folder of the base model; its ``config.json`` is enough.

    Returns:
        The trainable parameters; their names on disk are those in ``adapter_model.safetensors``.

    Raises:
        NotFoundError: ``base`` is not given, or holds no ``config.json``.
        CorruptFileError: peft cannot build the adapter.
        UnsupportedStateError: No trainable parameter is saved as a tensor of its own.
    """
    if base is None or not (base / "config.json").is_file():
        found = "" if base is None else f", but {base} has no config.json"
        raise NotFoundError(
            f"{folder} is the checkpoint of a LoRA or another adapter, whose parameters can be named only with its "
            f"base model{found}; give --base DIR (its config.json is enough)"
        )
    model = adapted_model(folder, base)
    on_disk = disk_names(model, model.state_dict())
    modules = dict(model.named_modules())
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parameters = tuple(ParameterInfo(n, tuple(p.shape), types_around(n, modules)) for n, p in trainable.items())

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {on_disk[name]: tensor for name, tensor in tensors.items()}

    saved = [name for name in trainable if name in on_disk]
    if not saved:
        kind = model.active_peft_config.peft_type
        raise UnsupportedStateError(
            f"a parameter of an adapter must be saved as a tensor of its own, but {kind.value} "
            f"of {folder} saves tensors that it computes from {len(trainable)} parameters, so that no second moment "
            "belongs to them; train a LoRA, prompt tuning, or prefix tuning without projection"
        )
    return CheckpointNames(
        parameters,
        {name: name for name in trainable},
        {on_disk[name]: (name,) for name in saved},
        {on_disk[name]: tuple(trainable[name].shape) for name in saved},
        {},
        convert,
    )


def adapted_model(folder: Path, base: Path) -> Any:
    """Build an adapter over its base model, both without weights.

    Args:
        folder: Folder of ``adapter_config.json``.
        base: Folder of the base model's ``config.json``.

    Raises:
        CorruptFileError: peft cannot build the adapter.
    """
    try:
        return _adapted(folder, meta_model(base))
    except RefusedError:
        raise
    except Exception as error:  # peft raises many classes for a config that does not fit the model
        raise CorruptFileError(
            f"{folder} must be an adapter that peft can build over {base}, but {str(error)[:200]}; "
            "give the --base it was trained on"
        ) from error


def _adapted(folder: Path, model: Any) -> Any:
    import peft

    config: Any = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = False  # in inference mode no parameter is trainable
    config.base_model_name_or_path = None  # peft warns of a base in another folder than that of the training
    if isinstance(config, peft.LoraConfig):
        config.init_lora_weights = True  # other initial values are computed from weights, which are not here
    with torch.device("meta"), warnings.catch_warnings():
        # peft calls a deprecated function of transformers.
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # peft corrects it by itself
        return peft.get_peft_model(model, config)


def disk_names(model: Any, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return name in memory -> name under which peft saves the tensor.

    peft converts the whole state dict, and the names are read off by the identity of the tensors.

    Args:
        model: A model of peft.
        state: Name in memory -> tensor.
    """
    import peft

    origins = {id(tensor): name for name, tensor in state.items()}
    with _prompt_uncomputed(model, state):
        # With "auto", peft asks the Hub; the base model's embeddings do not matter here.
        saved = peft.get_peft_model_state_dict(
            model, state_dict=dict(state), adapter_name=str(model.active_adapter), save_embedding_layers=False
        )
    return {origins[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in origins}


@contextmanager
def _prompt_uncomputed(model: Any, state: Mapping[str, Tensor]) -> Iterator[None]:
    """Let peft save a prompt's parameter in place of the output of its encoder, where the encoder is that parameter.

    Another encoder (an MLP, an LSTM) gives a tensor that is no parameter, and so has no name in memory.
    """
    if not model.active_peft_config.is_prompt_learning:
        yield
        return
    prefix = f"prompt_encoder.{model.active_adapter}."
    names = [name for name in state if name.startswith(prefix)]
    alone = names == [f"{prefix}embedding.weight"]
    prompt = state[names[0]] if alone else torch.empty(0)
    model.get_prompt_embedding_to_save = lambda adapter_name: prompt
    try:
        yield
    finally:
        del model.get_prompt_embedding_to_save
