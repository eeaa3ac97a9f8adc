"""Slow float64 references, and the files that the merge tests run on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import write_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.safetensors import MemoryStore

Tensors = dict[str, Tensor]


def squisher_reference(thetas: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Eq. 13 in ten lines of float64; the weighted mean where no model has information."""
    thetas = [theta.double() for theta in thetas]
    numerator = sum(w * f.double() * t for w, f, t in zip(weights, fishers, thetas, strict=True))
    denominator = sum(w * f.double() for w, f in zip(weights, fishers, strict=True))
    mean = sum(w * t for w, t in zip(weights, thetas, strict=True)) / sum(weights)
    return torch.where(denominator == 0, mean, numerator / denominator)


def ubgm_reference(
    base: Tensor,
    base_fisher: Tensor,
    thetas: Sequence[Tensor],
    fishers: Sequence[Tensor],
    weights: Sequence[float],
    prior: float = 0.0,
) -> Tensor:
    """UBGM in float64; the base value where no model has information."""
    base, base_fisher = base.double(), base_fisher.double()
    known = base_fisher + sum(w * f.double() for w, f in zip(weights, fishers, strict=True))
    d = prior * known.mean()
    step = sum(
        w * (base_fisher + d + f.double()) * (t.double() - base)
        for w, f, t in zip(weights, fishers, thetas, strict=True)
    )
    return torch.where(known == 0, base, base + step / (known + d))


def keep_largest(theta: Tensor, origin: Tensor, fisher: Tensor, density: float) -> Tensor:
    """Put back to the base all but the ``density`` share of entries with the largest F, the first among equals."""
    values = fisher.flatten().tolist()
    count = max(1, round(density * len(values)))
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    result = origin.flatten().double()
    result[kept] = theta.flatten().double()[kept]
    return result.reshape(theta.shape)


def assert_within(result: Tensor, reference: Tensor, size: Tensor) -> None:
    """Assert ``|result - reference| <= 2e-6 size + half a unit in the last place``; NaN anywhere fails."""
    assert result.shape == reference.shape
    info = torch.finfo(result.dtype)
    half_unit = info.eps / 2 * reference.abs() + info.smallest_normal * info.eps / 2
    excess = (result.double() - reference).abs() - (2e-6 * size.double() + half_unit)
    worst = int(excess.argmax())
    assert bool((excess <= 0).all()), (
        f"entry {worst}: {result.flatten()[worst].item()!r} against {reference.flatten()[worst].item()!r}"
    )


def largest(thetas: Sequence[Tensor]) -> Tensor:
    """S of the tolerance of ``squisher``."""
    return torch.stack([theta.double().abs() for theta in thetas]).amax(0)


def draw_fisher(shape: Sequence[int], generator: torch.Generator, zeros: float = 0.2) -> Tensor:
    """Draw F log-uniformly from 1e-38 to 1e+30, a share of it exactly 0."""
    exponent = torch.rand(*shape, generator=generator, dtype=torch.float64) * 68 - 38
    fisher = (10**exponent).float()
    fisher[torch.rand(*shape, generator=generator) < zeros] = 0
    return fisher


def llama(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: object) -> Tensors:
    """Write a random Llama with odd shapes; return its tensors as they are on disk."""
    settings: dict[str, object] = {
        "vocab_size": 29,
        "hidden_size": 33,
        "head_dim": 6,
        "intermediate_size": 17,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | changes))).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def give_fisher(
    folder: Path, weights: Mapping[str, Tensor], seed: int, out: Path | None = None, **config: object
) -> Tensors:
    """Write a Fisher for some weights, by default beside them; return its tensors."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {name: draw_fisher(tensor.shape, generator) for name, tensor in weights.items()}
    store_fisher(out or folder, tensors, fingerprint(folder), **config)
    return tensors


def store_fisher(out: Path, tensors: Mapping[str, Tensor], print_: str | None = None, **config: object) -> None:
    """Write tensors as a portable Fisher with given metadata, without a look at their values."""
    defaults: dict[str, object] = {"estimator": "squisher", "statistic": "mean", "weights_fingerprint": print_}
    settings = FisherConfig.model_validate(defaults | config)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "fisher.safetensors")
    (out / "fisher_config.json").write_text(settings.to_json(), encoding="utf-8")


def write_checked(out: Path, tensors: Mapping[str, Tensor], **config: object) -> None:
    """Write a portable Fisher as the package does."""
    write_fisher(Fisher(MemoryStore(tensors), FisherConfig.model_validate(config)), out)


def merge(config: Mapping[str, object], out: Path, *flags: str) -> Result:
    """Run stock ``mergekit-yaml`` on a configuration, in this process."""
    from mergekit.scripts.run_yaml import main

    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    return CliRunner().invoke(main, [str(file), str(out), "--no-copy-tokenizer", "--quiet", *flags])


def merged(config: Mapping[str, object], out: Path, *flags: str) -> Tensors:
    """Run stock ``mergekit-yaml`` and return what it wrote."""
    result = merge(config, out, *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return load_file(out / "model.safetensors")
