"""Replacement of ``tests/common.py``, which mergekit's sdist lacks: tiny random models, and a check of a merge.

transformers must load the output of a merge without missing or unexpected weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors import safe_open


def _save(model: transformers.PreTrainedModel, path: Path | str) -> str:
    model.save_pretrained(str(path), safe_serialization=True)
    return str(path)


def make_picollama(path: Path | str, vocab_size: int = 64) -> str:
    """Write a Llama of two layers and width 32 with an untied head."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    return _save(transformers.LlamaForCausalLM(config), path)


def make_picogranite(path: Path | str, vocab_size: int = 64) -> str:
    """Write a Granite of two layers."""
    config = transformers.GraniteConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    return _save(transformers.GraniteForCausalLM(config), path)


def make_gpt2size(path: Path | str, vocab_size: int = 64) -> str:
    """Write a GPT-2 of its usual twelve layers, but narrow."""
    config = transformers.GPT2Config(vocab_size=vocab_size, n_ctx=128, n_positions=128, n_embd=32, n_layer=12, n_head=4)
    return _save(transformers.GPT2LMHeadModel(config), path)


def make_picoLlaVa(path: Path | str) -> str:
    """Write a LLaVA: a tiny CLIP tower, a projector and a tiny Llama."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=30,
        patch_size=6,
        projection_dim=32,
    )
    text = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=63)
    return _save(transformers.LlavaForConditionalGeneration(config), path)


def run_and_check_merge(
    config: MergeConfiguration,
    check_nan: bool = True,
    check_tensors: bool = True,
    validate: Callable[[str], object] | None = None,
    auto_arch: bool = False,
) -> None:
    """Merge into a temporary folder and check the output.

    Args:
        config: Configuration of the merge.
        check_nan: If True, NaN entries fail.
        check_tensors: If True, the output must load with exactly the weights of its architecture.
        validate: Function with further checks of the folder.
        auto_arch: If True, mergekit infers the architecture. Then weights may be missing: mergekit 0.1.5 drops the
            language model of a LLaVA, whose names in memory and in the file differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        run_merge(config, folder, MergeOptions(quiet=True))
        files = sorted(Path(folder).glob("*.safetensors"))
        assert files, f"no safetensors in {folder}"
        if check_nan:
            _check_nan(files)
        if check_tensors:
            _check_complete(folder, may_lack=auto_arch)
        if validate is not None:
            validate(folder)


def _check_nan(files: list[Path]) -> None:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                assert not torch.isnan(tensors.get_tensor(name)).any(), f"NaN in {name}"


def _check_complete(folder: str, may_lack: bool) -> None:
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    _, report = kind.from_pretrained(folder, output_loading_info=True)
    for problem in ("unexpected_keys", "mismatched_keys", *(() if may_lack else ("missing_keys",))):
        assert not report[problem], f"{problem}: {report[problem]}"
