"""LoRA over a base model: the pairs A and B with their scales, the weights that it replaces, and the merged weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError, NotFoundError, UnsupportedStateError
from squisher_mergekit.models.adapters import ADAPTER_CONFIG, adapted_model, disk_names
from squisher_mergekit.models.checkpoint_names import checkpoint_names
from squisher_mergekit.models.convert import unchanged_matrices
from squisher_mergekit.models.fingerprint import fingerprint_of
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.weights import Weights, refuse_quantised
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.safetensors import TensorInfo

PREFIX = "base_model.model."
# Initial values of A that are a random draw; every other one of peft's is computed from the weights or from data.
_RANDOM = (True, False, None, "gaussian", "orthogonal")
# Keys of adapter_config.json that make the weight something other than W0 + s B A.
_VARIANTS = {
    "use_dora": "DoRA",
    "target_parameters": "a LoRA of packed experts",
    "trainable_token_indices": "a LoRA with trained tokens",
    "alora_invocation_tokens": "an activated LoRA",
    "arrow_config": "an Arrow router",
    "kasa_config": "KaSA",
    "layer_replication": "a LoRA of replicated layers",
    "lora_bias": "a LoRA with biases of its own",
    "megatron_config": "a LoRA of Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# Layers of peft over quantised linear layers of bitsandbytes.
_QUANTISED = ("Linear4bit", "Linear8bitLt")
_CURE = "estimate a Fisher of the merged model from data (squisher estimate)"


@dataclass(frozen=True)
class LoraPair:
    """Factors of one wrapped weight, ``W = W0 + scale B A``.

    Attributes:
        a: Name of A in ``adapter_model.safetensors``, shape ``[r, in]``.
        b: Name of B there, shape ``[out, r]``.
        scale: s, by peft's own rules for alpha, rank and patterns.
        transposed: True for a weight ``[in, out]``, as GPT-2's Conv1D keeps it.
    """

    a: str
    b: str
    scale: float
    transposed: bool


@dataclass(frozen=True)
class LoraAdapter:
    """LoRA over a base model, under the names of the base's weights on disk.

    Attributes:
        weights: The adapter's own tensors.
        base: The base model, or a folder with its ``config.json`` alone.
        pairs: Name of a wrapped weight -> its factors.
        replaced: Name of a weight that the adapter holds whole (``modules_to_save``, ``bias``) -> name in the adapter.
        names: Names of the base's parameters.
    """

    weights: Weights
    base: Weights
    pairs: Mapping[str, LoraPair]
    replaced: Mapping[str, str]
    names: CheckpointNames

    @cached_property
    def touched(self) -> frozenset[str]:
        """Names of the base's weights that the adapter changes."""
        return frozenset(self.pairs) | frozenset(self.replaced)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a weight that the adapter changes."""
        if name in self.replaced:
            return self.weights.infos[self.replaced[name]].shape
        pair = self.pairs[name]
        shape = self.weights.infos[pair.b].shape[0], self.weights.infos[pair.a].shape[1]
        return (shape[1], shape[0]) if pair.transposed else shape

    def merged(self, name: str, before: Tensor) -> Tensor:
        """Return one weight of the merged model, ``W0 + s B A`` in the dtype of W0.

        The arithmetic is that of peft's ``merge_and_unload`` on a CPU, bit for bit.

        Args:
            name: Name of the weight.
            before: W0, which is not written to.
        """
        if name in self.replaced:
            return self.weights.read(self.replaced[name]).to(before.dtype)
        pair = self.pairs.get(name)
        if pair is None:
            return before
        a, b = (_at_least_float32(self.weights.read(factor)) for factor in (pair.a, pair.b))
        delta = b @ a
        return before.clone().add_((delta.T if pair.transposed else delta) * pair.scale)


class AdaptedWeights(Weights):
    """Weights of a base model with a LoRA added as they are read; folder, config and headers are the base's.

    Args:
        lora: The LoRA.
    """

    def __init__(self, lora: LoraAdapter) -> None:
        self.__dict__.update({key: value for key, value in lora.base.__dict__.items() if key != "fingerprint"})
        self.lora = lora

    def read(self, name: str) -> Tensor:
        """Return one merged tensor."""
        return self.lora.merged(name, super().read(name))

    def _fingerprint(self, *, overlapping: bool = False) -> str | None:
        """Return the digest of the merged weights, that of the files that peft writes of them; None without."""
        changed = dict.fromkeys(self.lora.touched & set(self.infos), self.read)
        return fingerprint_of(self.headers.values(), changed, overlapping=overlapping)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_lora(adapter: Weights, base: Weights) -> LoraAdapter:
    """Read the names, scales and shapes of a LoRA over its base model; no weight is read.

    Args:
        adapter: The adapter's folder, with ``adapter_model.safetensors``.
        base: The base model; a folder with its ``config.json`` is enough.

    Raises:
        NotFoundError: The adapter has no safetensors.
        UnsupportedStateError: The adapter is no plain LoRA from a random draw, or the base is quantised.
        MismatchError: The shapes of the adapter do not fit the base.
    """
    refuse_other_kinds(read_mapping(adapter.folder / ADAPTER_CONFIG), str(adapter.folder))
    refuse_quantised(base, str(base.folder))
    if not adapter.infos:
        raise NotFoundError(
            f"an adapter must have its weights in adapter_model.safetensors, but {adapter.folder} has none; save it by "
            "save_pretrained"
        )
    model, folder = adapted_model(adapter.folder, base.folder), adapter.folder
    on_disk = disk_names(model, model.state_dict())
    names = checkpoint_names(base.folder, base.infos)
    stored = unchanged_matrices(names, names.shapes)
    pairs: dict[str, LoraPair] = {}
    factors: set[str] = set()
    for module_name, module in model.named_modules():
        if not is_lora(module):
            continue
        check_module(module_name, module, str(folder))
        key = str(model.active_adapter)
        a, b = (on_disk[f"{module_name}.{part}.{key}.weight"] for part in ("lora_A", "lora_B"))
        pair = LoraPair(a, b, float(module.scaling[key]), bool(module.fan_in_fan_out))
        name = weight_on_disk(f"{module_name.removeprefix(PREFIX)}.weight", names, stored, str(folder))
        _check_pair(name, pair, adapter, base, names)
        pairs[name] = pair
        factors |= {a, b}
    whole = {}
    for memory, held in on_disk.items():
        if held in adapter.infos and ".original_module." in memory:  # of the base, unused
            factors.add(held)
        elif held in adapter.infos and held not in factors:
            whole[replaced_on_disk(memory, str(model.active_adapter), names, str(base.folder), str(folder))] = held
    _check_strangers(adapter, factors | set(whole.values()))
    return LoraAdapter(adapter, base, pairs, whole, names)


def refuse_other_kinds(config: Mapping[str, Any], place: str) -> None:
    """Refuse an adapter that is no plain LoRA from a random draw, by its config.

    Args:
        config: Content of ``adapter_config.json``.
        place: Place of the adapter, for messages.

    Raises:
        UnsupportedStateError: The config names another kind.
    """
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if kind != "LORA":
        raise UnsupportedStateError(
            f"an adapter must be a plain LoRA, whose weight is W0 + s B A, but {place} is of peft_type {kind}; {_CURE}"
        )
    variant = next((text for key, text in _VARIANTS.items() if config.get(key)), None)
    if variant is not None:
        raise UnsupportedStateError(
            f"an adapter must be a plain LoRA, whose weight is W0 + s B A, but {place} is {variant}; {_CURE}"
        )
    if start not in _RANDOM:
        raise UnsupportedStateError(
            f"the A of a LoRA must begin as a random draw, independent of the gradient, but {place} has "
            f"init_lora_weights: {start}; {_CURE}"
        )


def is_lora(module: Any) -> bool:
    """Return True for a layer of peft with a LoRA of any kind."""
    from peft.tuners.lora import LoraLayer

    return isinstance(module, LoraLayer)


def check_module(name: str, module: Any, place: str, quantised: bool = False) -> None:
    """Refuse a layer whose weight is no matrix that a linear layer multiplies by.

    Args:
        name: Name of the layer in memory.
        module: The layer of peft.
        place: Place of the adapter, for messages.
        quantised: Accept layers of a quantised base as well, as a QLoRA in training has them.

    Raises:
        UnsupportedStateError: The layer is an embedding, a convolution, packed experts, or attention in one piece.
    """
    from peft.tuners import lora
    from transformers.pytorch_utils import Conv1D

    layer = module.get_base_layer()
    other = quantised and (isinstance(module, lora.Linear) or type(module).__name__ in _QUANTISED)
    if (type(module) is lora.Linear or other) and isinstance(layer, torch.nn.Linear | Conv1D):
        return
    raise UnsupportedStateError(
        f"a LoRA must wrap linear layers alone, but {place} wraps {name.removeprefix(PREFIX)}, "
        f"of class {type(layer).__name__}; {_CURE}"
    )


def weight_on_disk(name: str, names: CheckpointNames, unchanged: Mapping[str, str], place: str) -> str:
    """Return the name on disk of a wrapped weight.

    Args:
        name: Name in memory in the base model.
        names: Names of the base's parameters.
        unchanged: Name in memory -> name on disk of the matrices that are saved as they are.
        place: Place of the adapter, for messages.

    Raises:
        UnsupportedStateError: The weight is tied to another, or is not saved as one tensor.
    """
    first = names.first.get(name, name)
    tied = sorted(other for other, found in names.first.items() if found == first and other != name)
    if tied:
        raise UnsupportedStateError(
            f"a LoRA must wrap weights of one use, but {place} wraps {name}, which is tied to {tied[0]}; {_CURE}"
        )
    if first not in unchanged:
        raise UnsupportedStateError(
            f"a LoRA must wrap weights that are saved as they are, but {place} wraps {name}, which is converted when "
            f"the model is saved; {_CURE}"
        )
    return unchanged[first]


def replaced_on_disk(memory: str, key: str, names: CheckpointNames, base: str, place: str) -> str:
    """Return the name on disk of a weight that an adapter holds whole.

    Args:
        memory: Name in memory in the model of peft.
        key: Name of the adapter in peft.
        names: Names of the base's parameters.
        base: Place of the base, for messages.
        place: Place of the adapter, for messages.

    Raises:
        UnsupportedStateError: The tensor is none of the base's, or its weight is tied or converted.
    """
    name = memory.removeprefix(PREFIX).replace(f".modules_to_save.{key}.", ".").replace(".base_layer.", ".")
    made = [stored for stored, sources in names.sources.items() if names.first.get(name) in sources]
    tied = [other for other, found in names.first.items() if found == names.first.get(name)]
    if len(made) != 1 or len(tied) != 1 or len(names.sources[made[0]]) != 1:
        raise UnsupportedStateError(
            f"a weight that a LoRA holds whole must be one tensor of the base with one use, but {name} in {place} is "
            f"{'tied to another' if len(tied) > 1 else f'none of {base}'}; {_CURE}"
        )
    return made[0]


def _check_pair(name: str, pair: LoraPair, adapter: Weights, base: Weights, names: CheckpointNames) -> None:
    """Refuse factors that are missing, do not fit the weight of the base, or have no effect.

    Raises:
        MismatchError: A factor is missing, or its shape differs.
        UnsupportedStateError: The scale is 0.
    """
    missing = next((factor for factor in (pair.a, pair.b) if factor not in adapter.infos), None)
    if missing is not None:
        raise MismatchError(
            f"an adapter must have the factors that its {ADAPTER_CONFIG} names, but {adapter.folder} lacks {missing}; "
            "save it by save_pretrained"
        )
    a, b = (adapter.infos[factor].shape for factor in (pair.a, pair.b))
    info: TensorInfo | None = base.infos.get(name)
    wanted = tuple(names.shapes[name] if info is None else info.shape)
    found = (a[-1], b[0]) if pair.transposed else (b[0], a[-1])
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or found != wanted:
        raise MismatchError(
            f"a LoRA must fit its base, but {pair.a} and {pair.b} in {adapter.folder} are {list(a)} and {list(b)}, and "
            f"{name} in {base.folder} is {list(wanted)}; give the base that it was trained on"
        )
    if pair.scale == 0:
        raise UnsupportedStateError(
            f"a LoRA must have a scale other than 0, but lora_alpha of {name} in {adapter.folder} is 0; {_CURE}"
        )


def _check_strangers(adapter: Weights, used: set[str]) -> None:
    """Refuse an adapter with factors that its config does not explain.

    Raises:
        MismatchError: A factor belongs to no layer of the base.
    """
    strangers = sorted(name for name in adapter.infos if ".lora_" in name and name not in used)
    if strangers:
        raise MismatchError(
            f"the tensors of an adapter must be those of its {ADAPTER_CONFIG} over the base, but {adapter.folder} has "
            f"{strangers[0]} ({len(strangers)} of {len(adapter.infos)}); give the base that it was trained on"
        )
