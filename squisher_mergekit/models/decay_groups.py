"""Rules by which trainers split a model's parameters into two groups, with and without weight decay."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from squisher_mergekit.models.checkpoint_names import LAYER_NORM
from squisher_mergekit.models.names import ParameterInfo

# Modules without weight decay in transformers up to 4.52, beside torch's LayerNorm: the norms that its modelling files
# had registered. The norms of Qwen2, Mistral, Mixtral, Gemma and Phi-3 were not registered.
_REGISTERED_NORMS = frozenset(
    {
        "LlamaRMSNorm", "T5LayerNorm", "LongT5LayerNorm", "SwitchTransformersLayerNorm", "Pix2StructLayerNorm",
        "Pop2PianoLayerNorm", "IdeficsRMSNorm", "ChameleonRMSNorm", "GraniteMoeRMSNorm", "OlmoeRMSNorm",
        "MoshiRMSNorm", "NemotronLayerNorm1P", "RecurrentGemmaRMSNorm", "ZambaRMSNorm", "MegaRMSNorm",
    }
)  # fmt: skip
_SINCE_4_53 = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _until_4_48(parameter: ParameterInfo) -> bool:
    return not (parameter.types & (_REGISTERED_NORMS | {LAYER_NORM})) and "bias" not in parameter.name


def _until_4_52(parameter: ParameterInfo) -> bool:
    patterns = ("bias", "layernorm", "rmsnorm")
    return _until_4_48(parameter) and not any(pattern in parameter.name.lower() for pattern in patterns)


def _since_4_53(parameter: ParameterInfo) -> bool:
    return LAYER_NORM not in parameter.types and not _SINCE_4_53.search(parameter.name.lower())


Rule = Callable[[ParameterInfo], bool]

# Rule -> test for the members of the first of two groups.
DECAY_RULES: dict[str, Rule] = {
    "the weight-decay split of transformers up to 4.48": _until_4_48,
    "that of transformers 4.49 to 4.52": _until_4_52,
    "that of transformers since 4.53": _since_4_53,
}


AXES_RULES: dict[str, Rule] = {  # nanoGPT puts the matrices first, timm the vectors
    "the split by number of axes, matrices first": lambda parameter: len(parameter.shape) >= 2,
    "the split by number of axes, vectors first": lambda parameter: len(parameter.shape) < 2,
}


def variants(parameters: Sequence[ParameterInfo]) -> tuple[list[ParameterInfo], list[ParameterInfo]]:
    """Return the parameters that the model's constructor leaves trainable, and all parameters as trainable ones.

    A constructor freezes sinusoidal positions (Whisper, Marian). ``from_pretrained`` of transformers 5 makes them
    trainable, earlier releases keep them frozen.
    """
    return [p for p in parameters if p.trainable], [
        p if p.trainable else replace(p, trainable=True) for p in parameters
    ]


def candidates(
    parameters: Sequence[ParameterInfo], sizes: Sequence[int], rules: Mapping[str, Rule] | None = None
) -> dict[str, list[list[ParameterInfo]]]:
    """Return rule -> groups of parameters, for every rule that makes this number of groups.

    Args:
        parameters: The model's parameters, in order.
        sizes: Number of parameters in each group of the file.
        rules: Rules of two groups; None for all. A Trainer's rules need the types around the parameters.
    """
    groups: dict[str, list[list[ParameterInfo]]] = {}
    if len(sizes) == 2:
        typed = any(parameter.types for parameter in parameters)
        for rule, is_first in (DECAY_RULES | AXES_RULES if rules is None else rules).items():
            if typed or rule in AXES_RULES:
                groups[rule] = [[p for p in parameters if is_first(p) is kind] for kind in (True, False)]
    filled = [number for number, size in enumerate(sizes) if size]
    if len(filled) == 1:
        groups["the model's order"] = [list(parameters) if number in filled else [] for number in range(len(sizes))]
    return groups


_SCALE = "lr_scale"


def layers_of_groups(settings: Sequence[Mapping[str, Any]]) -> list[list[int]] | None:
    """Return the numbers of each layer's groups, where the learning rate decays layer by layer; None elsewhere.

    timm and the scripts after BEiT's make up to two groups for each layer, with and without weight decay, and record
    ``lr_scale`` in both. The layers follow the model's order.

    Args:
        settings: Settings of each group.

    Example:
        >>> layers_of_groups([{"lr_scale": 0.5}, {"lr_scale": 0.5}, {"lr_scale": 1.0}])
        [[0, 1], [2]]
    """
    scales = [group.get(_SCALE) for group in settings]
    layers = [(scale, [k for k, _ in run]) for scale, run in groupby(enumerate(scales), key=lambda pair: pair[1])]
    if None in scales or len({scale for scale, _ in layers}) != len(layers) or len(layers) < 2:
        return None
    return [numbers for _, numbers in layers]
