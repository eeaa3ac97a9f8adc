"""Models and configurations of the merge tests."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.reference import Tensors, draw_fisher, give_fisher, llama, store_fisher

EMBEDDING, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def models_with_fishers(
    root: Path, count: int, dtype: torch.dtype = torch.float32, **changes: Any
) -> tuple[list[Tensors], list[Tensors]]:
    """Write models with Fishers; return the tensors of both."""
    weights = [llama(root / f"m{i}", i, dtype, **changes) for i in range(count)]
    return weights, [give_fisher(root / f"m{i}", tensors, i) for i, tensors in enumerate(weights)]


def entry(root: Path, i: int, **parameters: Any) -> dict[str, Any]:
    """Return the entry of model i under ``models:``."""
    return {"model": str(root / f"m{i}"), "parameters": parameters} if parameters else {"model": str(root / f"m{i}")}


def base_and_models(root: Path, count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensors], list[Tensors]]:
    """Write a base `m0` without a Fisher, and models with Fishers."""
    weights = [llama(root / f"m{i}", i, dtype) for i in range(count)]
    return weights, [{}, *(give_fisher(root / f"m{i}", weights[i], i) for i in range(1, count))]


def density_config(root: Path, densities: Sequence[Any], method: str = "squisher", **settings: Any) -> dict[str, Any]:
    """Return the configuration of a merge with one density per model."""
    models = [
        {"model": str(root / f"m{i}"), "parameters": {"density": value}} for i, value in enumerate(densities, start=1)
    ]
    if method == "ubgm_squisher":
        models.insert(0, {"model": str(root / "m0"), "parameters": {"fisher": "none"}})
    return {"merge_method": method, "base_model": str(root / "m0"), "models": models, **settings}


def base_without_norm(root: Path, config: dict[str, Any]) -> None:
    """Remove the last norm from the base."""
    from safetensors.torch import save_file

    file = root / "m0" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != NORM}, file, {"format": "pt"})


def word_tokenizer(folder: Path, words: list[str]) -> None:
    """Write a tokenizer with one token per word."""
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


def mixtral(folder: Path, seed: int) -> Tensors:
    """Write a random Mixtral; return its tensors on disk, one per expert."""
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=29, hidden_size=22, intermediate_size=13, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def packed_experts(tensors: Tensors) -> Tensors:
    """Pack the experts of each layer with the names and shapes of transformers 5 in memory."""
    packed = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items() if ".experts." not in n}
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (torch.stack([tensors[f"{old}.{k}.{w}.weight"] for k in range(3)]) for w in ("w1", "w2", "w3"))
        packed[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        packed[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return packed


def nets(tmp_path: Path, count: int) -> tuple[list[Tensors], list[Tensors]]:
    """Write single files with an integer buffer and a Fisher each."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"stem.weight": (11, 3, 3, 3), "stem.bias": (11,), "steps": ()}
    weights, fishers = [], []
    for i in range(count):
        folder = tmp_path / f"n{i}"
        folder.mkdir()
        tensors: Tensors = {n: torch.randn(*s, generator=generator) for n, s in shapes.items() if s}
        tensors["steps"] = torch.tensor(7)
        save_file(tensors, folder / "net.safetensors")
        fisher = {n: draw_fisher(t.shape, generator) for n, t in tensors.items() if t.is_floating_point()}
        store_fisher(folder, fisher, fingerprint(folder / "net.safetensors"))
        weights.append(tensors)
        fishers.append(fisher)
    return weights, fishers
