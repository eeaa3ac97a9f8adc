"""LoRA in training: its wrapped layers with the names of their weights on disk, and the parameters trained whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.models.checkpoint_names import of_model
from squisher_mergekit.models.convert import unchanged_matrices
from squisher_mergekit.models.lora.pairs import (
    PREFIX,
    check_module,
    is_lora,
    refuse_other_kinds,
    replaced_on_disk,
    weight_on_disk,
)
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import describe, parameters_of, rebuilt, unwrap_model, unwrapped
from squisher_mergekit.models.weights import Weights

_PLACE = "the LoRA in training"


@dataclass(frozen=True)
class LiveLayer:
    """Layer of a model in training that a LoRA wraps, ``W = W0 + s B A``.

    Attributes:
        module: The layer of peft.
        a: A, shape ``[r, in]``.
        b: B, shape ``[out, r]``.
        transposed: True for a weight ``[in, out]``, as GPT-2's Conv1D keeps it.
    """

    module: Any
    a: nn.Parameter
    b: nn.Parameter
    transposed: bool

    @property
    def reference(self) -> nn.Parameter:
        """B, or A where B is frozen."""
        return self.b if self.b.requires_grad else self.a


@dataclass(frozen=True)
class LiveLora:
    """LoRA in training, under the names of the base's weights on disk.

    Attributes:
        layers: Name of a wrapped weight -> the layer.
        whole: Name of a weight that the adapter holds whole (``modules_to_save``, ``bias``) -> the parameter.
        base: Weights of the base on disk; None where the base is no local folder and not in the cache of the Hub.
        names: Names of all weights of the base on disk.
        aliases: Other name of a tied weight -> name that is saved.
    """

    layers: Mapping[str, LiveLayer]
    whole: Mapping[str, nn.Parameter]
    base: Weights | None
    names: tuple[str, ...]
    aliases: Mapping[str, str]


def live_lora(model: nn.Module) -> LiveLora:
    """Return the LoRA that a model trains.

    Args:
        model: A model of peft, wrapped or not.

    Raises:
        UnsupportedStateError: The model trains no plain LoRA of linear layers from a random draw, or several at once.
        NamingError: transformers cannot build the base from its config.
    """
    inner = unwrap_model(model)
    config, key = _only_adapter(inner)
    refuse_other_kinds(config, _PLACE)
    base: Any = inner.get_base_model()  # type: ignore[operator]
    folder = _folder_of(config, base)
    on_disk = None if folder is None else Weights(folder)
    names = _names_of(base, on_disk)
    stored = {} if names is None else unchanged_matrices(names, names.shapes)
    layers: dict[str, LiveLayer] = {}
    for full, module in inner.named_modules():
        if not is_lora(module) or key not in {*module.lora_A, *module.lora_embedding_A}:
            continue
        name = unwrapped(full)
        check_module(name, module, _PLACE, quantised=True)
        layer = _layer(module, key)
        if layer.reference.requires_grad:
            weight = f"{name.removeprefix(PREFIX)}.weight"
            layers[weight if names is None else weight_on_disk(weight, names, stored, _PLACE)] = layer
    if not layers:
        raise UnsupportedStateError(
            f"a recorder needs a LoRA that is trained, but {_PLACE} has no layer whose A or B requires a gradient; "
            "load the adapter with is_trainable=True"
        )
    whole = _whole(inner, key, names)
    if names is None:
        return LiveLora(layers, whole, on_disk, (*layers, *whole), {})
    stored_names = () if on_disk is None else on_disk.infos
    # Files of a quantised base have further tensors, such as scales.
    known = tuple(name for name in stored_names if name in names.sources or name in names.aliases)
    return LiveLora(layers, whole, on_disk, known or tuple(names.sources), names.aliases)


def _only_adapter(model: Any) -> tuple[Mapping[str, Any], str]:
    """Return config and name of the one adapter that a model of peft trains.

    Raises:
        UnsupportedStateError: The model is none of peft, or has several active adapters.
    """
    import peft

    if not isinstance(model, peft.PeftModel):
        raise UnsupportedStateError(
            f"a recorder of merged weights needs a LoRA of peft, but the model is a {type(model).__name__}; train a "
            "model of peft.get_peft_model, or record full weights by SquisherCallback(beta=0.999)"
        )
    active = model.active_adapters
    if len(active) != 1:
        raise UnsupportedStateError(
            f"a recorder needs one active LoRA, but {len(active)} are: {', '.join(active)}; train them one by one"
        )
    config = model.peft_config[active[0]].to_dict()
    config["peft_type"] = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    return config, active[0]


def _layer(module: Any, key: str) -> LiveLayer:
    """Return a wrapped layer with its factors."""
    a, b = module.lora_A[key].weight, module.lora_B[key].weight
    return LiveLayer(module, a, b, bool(getattr(module, "fan_in_fan_out", False)))


def _folder_of(config: Mapping[str, Any], base: Any) -> Path | None:
    """Return the folder of the base, local or in the cache of the Hub; None if there is none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    named = config.get("base_model_name_or_path") or getattr(base, "name_or_path", None)
    if not named:
        return None
    if (Path(named) / "config.json").is_file():
        return Path(named)
    try:
        found = try_to_load_from_cache(named, "config.json", revision=config.get("revision"))
    except HFValidationError:  # the path of a folder that is gone
        return None
    return Path(found).parent if isinstance(found, str) else None


def _names_of(base: nn.Module, on_disk: Weights | None) -> CheckpointNames | None:
    """Return the names of a base's parameters; None for a model that is none of transformers'."""
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        return None
    return of_model(rebuilt(base), () if on_disk is None else on_disk.infos)


def _whole(inner: nn.Module, key: str, names: CheckpointNames | None) -> dict[str, nn.Parameter]:
    """Return the trained parameters that peft saves besides the factors, by the names of the weights on disk."""
    saved = describe(inner).adapter or {}
    found = {}
    for name, parameter in parameters_of(inner).items():
        if not parameter.requires_grad or ".lora_" in name or name not in saved:
            continue
        if names is None:
            found[name.removeprefix(PREFIX).replace(f".modules_to_save.{key}.", ".").replace(".base_layer.", ".")] = (
                parameter
            )
        else:
            found[replaced_on_disk(name, key, names, "the base", _PLACE)] = parameter
    return found
