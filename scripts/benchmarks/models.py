"""Write a random Llama and its Fisher: ``python -m scripts.benchmarks.models FOLDER SEED RECIPE [DEVICE]``.

The recipe is JSON with ``hidden``, ``layers``, ``intermediate``, ``vocab``, ``dtype``, ``fisher_dtype`` (a dtype, or a
compact form such as ``log8``) and ``shards``. DEVICE draws the numbers.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.safetensors import TensorInfo

Recipe = dict[str, Any]
DRAWN = 1 << 20  # entries


def make_model(folder: Path, seed: int, recipe: Recipe, device: str = "cpu") -> None:
    """Write config, weights and Fisher of a model; the recipe comes last and marks a complete folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    write_config(folder, recipe)
    write_weights(folder, recipe, generator)
    _write_fisher(folder, recipe, generator)
    (folder / "recipe.json").write_text(json.dumps(recipe))


def shapes(recipe: Recipe) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of each tensor of a Llama with an untied head."""
    hidden, wide = recipe["hidden"], recipe["intermediate"]
    yield "model.embed_tokens.weight", (recipe["vocab"], hidden)
    for layer in range(recipe["layers"]):
        for projection in "qkvo":
            yield f"model.layers.{layer}.self_attn.{projection}_proj.weight", (hidden, hidden)
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            yield f"model.layers.{layer}.mlp.{name}_proj.weight", shape
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (recipe["vocab"], hidden)


def write_config(folder: Path, recipe: Recipe) -> None:
    """Write the config of a Llama."""
    heads = max(recipe["hidden"] // 64, 2)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": recipe["hidden"],
        "intermediate_size": recipe["intermediate"],
        "num_hidden_layers": recipe["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": recipe["vocab"],
        "tie_word_embeddings": False,
        "torch_dtype": recipe["dtype"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def write_weights(folder: Path, recipe: Recipe, generator: torch.Generator) -> None:
    """Write random weights shard by shard, and their index."""
    everything = list(shapes(recipe))
    size = max(1, -(-len(everything) // recipe["shards"]))
    parts = [everything[start : start + size] for start in range(0, len(everything), size)]
    weight_map, total = {}, 0
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors" if len(parts) > 1 else "model.safetensors"
        tensors = {}
        for name, shape in part:
            tensor = drawn(shape, generator, lambda size, **draw: torch.randn(size, **draw).mul_(0.02))
            tensors[name] = tensor.to("cpu", getattr(torch, recipe["dtype"]))
            weight_map[name] = file
            total += tensors[name].nbytes
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
    if len(parts) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drawn(shape: tuple[int, ...], generator: torch.Generator, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Return a random tensor, of which a block is drawn and repeated: drawing takes longer than merging."""
    size = torch.Size(shape).numel()
    block = draw(min(size, DRAWN), generator=generator, device=generator.device)
    return block.repeat(-(-size // DRAWN))[:size].reshape(shape)


class _RandomStore:
    """Store of random squares that span orders of magnitude, as real second moments do."""

    location = "random"

    def __init__(self, recipe: Recipe, generator: torch.Generator) -> None:
        self._generator = generator
        self.infos = {
            name: TensorInfo(shape, torch.float32, 4 * torch.Size(shape).numel()) for name, shape in shapes(recipe)
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor."""

        def squares(size: int, **draw: Any) -> torch.Tensor:
            return torch.randn(size, **draw).mul_(torch.rand(size, **draw)).square_().mul_(1e-9)

        return drawn(self.infos[name].shape, self._generator, squares).cpu()


def _write_fisher(folder: Path, recipe: Recipe, generator: torch.Generator) -> None:
    """Write a Squisher into the folder of the weights."""
    config = FisherConfig(
        estimator="squisher",
        statistic="ema",
        optimizer={"class": "torch.optim.AdamW", "beta2": 0.999},
        steps=1000,
        bias_corrected=False,
        weights_fingerprint=fingerprint(folder),
    )
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        written = Path(temporary) / "fisher"
        fisher = Fisher(_RandomStore(recipe, generator), config)
        kind = recipe["fisher_dtype"]
        form = {"dtype": getattr(torch, kind)} if hasattr(torch, kind) else {"compress": kind}
        write_fisher(fisher, written, **form)
        for file in written.iterdir():
            file.rename(folder / file.name)


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:])
