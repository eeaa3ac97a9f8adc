"""LoRA of given ranks that approximates changed weights: the factors by SVD, and the files of peft."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.models.adapters import ADAPTER_CONFIG
from squisher_mergekit.models.lora.pairs import LoraAdapter, LoraPair
from squisher_mergekit.tensors.input_files import read_mapping
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room

_PREFIX = "base_model.model."


def factorised(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """Return the factors of the nearest matrix of a rank, by the singular value decomposition.

    ``delta = U S V^T`` gives ``B = U_r sqrt(S_r)`` and ``A = sqrt(S_r) V_r^T``; the discarded energy is the sum of the
    other squares of S, the squared Frobenius norm of ``delta - B A``.

    Args:
        delta: The matrix, shape ``[out, in]``.
        rank: r, at most the shorter side.

    Returns:
        A, shape ``[r, in]``, and B, shape ``[out, r]``, in float32; the discarded energy, and the energy of ``delta``.

    Example:
        >>> a, b, discarded, whole = factorised(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
        >>> (b @ a).abs(), round(discarded, 4), round(whole, 4)
        (tensor([[0., 0.],
                [0., 4.]]), 9.0, 25.0)
    """
    left, sizes, right = torch.linalg.svd(delta.to(torch.float32), full_matrices=False)
    roots, energy = sizes[:rank].sqrt(), sizes.to(torch.float64).square()
    a, b = roots[:, None] * right[:rank], left[:, :rank] * roots
    return a.contiguous(), b.contiguous(), energy[rank:].sum().item(), energy.sum().item()


def ranks_of(loras: Sequence[LoraAdapter], rank: int | None) -> dict[str, int]:
    """Return the rank of each weight that LoRAs wrap: a given one, or the sum of theirs, at most the shorter side.

    Args:
        loras: The LoRAs.
        rank: The rank of all weights; None for the sums.
    """
    ranks: dict[str, int] = {}
    for lora in loras:
        for name, pair in lora.pairs.items():
            ranks[name] = ranks.get(name, 0) + lora.weights.infos[pair.a].shape[0]
    shapes = {name: lora.shape(name) for lora in loras for name in lora.pairs}
    return {name: min(rank or found, *shapes[name]) for name, found in ranks.items()}


def common_bias(folders: Sequence[Path]) -> str:
    """Return the kind of biases that LoRAs train, as in their configs.

    Raises:
        MismatchError: The LoRAs train different kinds of biases.
    """
    biases = {str(read_mapping(folder / ADAPTER_CONFIG).get("bias") or "none") for folder in folders}
    if len(biases) > 1:
        raise MismatchError(
            f"LoRAs that merge to an adapter must train one kind of biases, found bias: {', '.join(sorted(biases))}; "
            "merge them to a full model (without --as-adapter)"
        )
    return biases.pop() if biases else "none"


def write_adapter(
    folder: Path, loras: Sequence[LoraAdapter], rank: int | None, base: str, read: Callable[[str], Tensor]
) -> dict[str, Any]:
    """Write the change from a base to merged weights as an adapter of peft, one weight at a time.

    Args:
        folder: An empty folder.
        loras: The merged LoRAs, of one base.
        rank: The rank of all weights; None for the sum of the ranks of the LoRAs.
        base: Name of the base for ``adapter_config.json``.
        read: Function that returns a merged weight, in float32.

    Returns:
        ``rank``, the largest; ``discarded``, the share of the energy of the change that the ranks leave out; and
        ``modules``, name of a weight -> its ``rank`` and ``discarded``.

    Raises:
        MismatchError: The LoRAs train different kinds of biases.
    """
    ranks = ranks_of(loras, rank)
    pairs = {name: (lora, pair) for lora in reversed(loras) for name, pair in lora.pairs.items()}
    held = {name: (lora, stored) for lora in reversed(loras) for name, stored in lora.replaced.items()}
    names = [part for _, pair in pairs.values() for part in (pair.a, pair.b)] + [stored for _, stored in held.values()]
    config = _config(loras, ranks, pairs, base)
    modules: dict[str, dict[str, Any]] = {}
    total, lost = 0.0, 0.0
    with SafetensorsWriter(folder / "adapter_model.safetensors", header_room(names)) as writer:
        for name in sorted(pairs):
            lora, pair = pairs[name]
            delta = read(name) - lora.base.read(name).to(torch.float32)
            a, b, discarded, whole = factorised(delta.T if pair.transposed else delta, ranks[name])
            writer.add(pair.a, a)
            writer.add(pair.b, b)
            modules[name] = {"rank": ranks[name], "discarded": discarded / whole if whole else 0.0}
            total, lost = total + whole, lost + discarded
        for name, (_, stored) in sorted(held.items()):
            writer.add(stored, read(name))
    config.save_pretrained(str(folder))
    return {"rank": max(ranks.values()), "discarded": lost / total if total else 0.0, "modules": modules}


def _config(
    loras: Sequence[LoraAdapter], ranks: Mapping[str, int], pairs: Mapping[str, tuple[LoraAdapter, LoraPair]], base: str
) -> Any:
    """Return the config of peft for the merged adapter, whose scale is 1."""
    import peft

    given = [read_mapping(lora.weights.folder / ADAPTER_CONFIG) for lora in loras]
    bias = common_bias([lora.weights.folder for lora in loras])
    modules = {pair.a.removeprefix(_PREFIX).removesuffix(".lora_A.weight"): ranks[n] for n, (_, pair) in pairs.items()}
    most = max(modules.values())
    lower = {module: rank for module, rank in modules.items() if rank != most}
    whole = sorted({name for config in given for name in config.get("modules_to_save") or ()})
    return peft.LoraConfig(
        r=most,
        lora_alpha=most,
        rank_pattern=lower,
        alpha_pattern=lower,
        target_modules=sorted(modules),
        modules_to_save=whole or None,
        bias=bias,
        fan_in_fan_out=any(pair.transposed for _, pair in pairs.values()),
        task_type=given[0].get("task_type"),
        base_model_name_or_path=base,
        inference_mode=True,
    )
