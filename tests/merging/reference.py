"""Slow float64 references, and the files of the merge tests."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from squisher_mergekit.cli.plan import command as plan_command
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.merging.mergekit.commands import read_config
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.tensors.safetensors import MemoryStore

Tensors = dict[str, Tensor]
WEIGHTS = (1.0, 0.3, 2.0, 0.7, 1.3)


def squisher_reference(thetas: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return Eq. 13 in float64, with the weighted mean where no model has information."""
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
    """Return UBGM in float64, with the base value where no model has information."""
    base, base_fisher = base.double(), base_fisher.double()
    known = base_fisher + sum(w * f.double() for w, f in zip(weights, fishers, strict=True))
    d = prior * known.mean()
    step = sum(
        w * (base_fisher + d + f.double()) * (t.double() - base)
        for w, f, t in zip(weights, fishers, thetas, strict=True)
    )
    return torch.where(known == 0, base, base + step / (known + d))


def elected_reference(
    base: Tensor, thetas: Sequence[Tensor], fishers: Sequence[Tensor], weights: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return Fisher merging of the models with the elected sign, and a mask of entries whose sign rounding keeps."""
    steps = torch.stack([theta.double() - base.double() for theta in thetas])
    parts = torch.stack([w * f.double() for w, f in zip(weights, fishers, strict=True)])
    plain = torch.tensor(weights, dtype=torch.float64)[:, None].expand_as(parts)
    parts = torch.where(parts.sum(0) == 0, plain, parts)
    elected = (parts * steps).sum(0)
    votes = torch.where((steps.sign() == elected.sign()) & (steps != 0), parts, 0)
    merged = base + (votes * steps).sum(0) / votes.sum(0).clamp_min(1e-300)
    return torch.where(elected == 0, base.double(), merged), elected.abs() >= 1e-5 * (parts * steps).abs().amax(0)


def keep_largest(theta: Tensor, origin: Tensor, fisher: Tensor, density: float) -> Tensor:
    """Reset all but the ``density`` share of entries with the largest F to the base; ties go to the first."""
    values = fisher.flatten().tolist()
    count = max(1, round(density * len(values)))
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    result = origin.flatten().double()
    result[kept] = theta.flatten().double()[kept]
    return result.reshape(theta.shape)


def assert_within(result: Tensor, reference: Tensor, size: Tensor, units: float = 0.5) -> None:
    """Assert ``|result - reference| <= 2e-6 size + units (half) of the last place``; any NaN fails."""
    assert result.shape == reference.shape
    info = torch.finfo(result.dtype)
    unit = units * info.eps * (reference.abs() + info.smallest_normal)
    excess = (result.double() - reference).abs() - (2e-6 * size.double() + unit)
    worst = int(excess.argmax())
    assert bool((excess <= 0).all()), (
        f"entry {worst}: {result.flatten()[worst].item()!r} against {reference.flatten()[worst].item()!r}"
    )


def largest(thetas: Sequence[Tensor]) -> Tensor:
    """Return S of the tolerance of ``squisher``."""
    return torch.stack([theta.double().abs() for theta in thetas]).amax(0)


def draw_fisher(shape: Sequence[int], generator: torch.Generator, zeros: float = 0.2) -> Tensor:
    """Draw F log-uniformly from 1e-38 to 1e+30, with a share of exact zeros."""
    exponent = torch.rand(*shape, generator=generator, dtype=torch.float64) * 68 - 38
    fisher = (10**exponent).float()
    fisher[torch.rand(*shape, generator=generator) < zeros] = 0
    return fisher


def llama(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **changes: object) -> Tensors:
    """Write a random Llama with odd shapes; return its tensors on disk."""
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
    """Write a Fisher of the given weights, by default into their folder; return its tensors."""
    generator = torch.Generator().manual_seed(1000 + seed)
    tensors = {name: draw_fisher(tensor.shape, generator) for name, tensor in weights.items()}
    store_fisher(out or folder, tensors, fingerprint(folder), **config)
    return tensors


def store_fisher(out: Path, tensors: Mapping[str, Tensor], print_: str | None = None, **config: object) -> None:
    """Write tensors as a portable Fisher with the given metadata, without a check of their values."""
    defaults: dict[str, object] = {"estimator": "squisher", "statistic": "mean", "weights_fingerprint": print_}
    settings = FisherConfig.model_validate(defaults | config)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "fisher.safetensors")
    (out / "fisher_config.json").write_text(settings.to_json(), encoding="utf-8")


def write_checked(out: Path, tensors: Mapping[str, Tensor], **config: object) -> None:
    """Write a portable Fisher with the package's own writer."""
    write_fisher(Fisher(MemoryStore(tensors), FisherConfig.model_validate(config)), out)


def merge(config: Mapping[str, object], out: Path, *flags: str) -> Result:
    """Run stock ``mergekit-yaml`` on a configuration in this process."""
    from mergekit.scripts.run_yaml import main

    out.parent.mkdir(parents=True, exist_ok=True)
    file = out.parent / f"{out.name}.yml"
    file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    return CliRunner().invoke(main, [str(file), str(out), "--no-copy-tokenizer", "--quiet", *flags])


def merged(config: Mapping[str, object], out: Path, *flags: str) -> Tensors:
    """Run stock ``mergekit-yaml`` and return the written tensors."""
    result = merge(config, out, *flags)
    assert result.exit_code == 0, result.output + repr(result.exception)
    return load_file(out / "model.safetensors")


def assert_squisher(
    result: Tensors, weights: list[Tensors], fishers: list[Tensors], factors: tuple[float, ...] = WEIGHTS
) -> None:
    """Assert that a merged model is the Fisher merging of models, in float64 on the same files."""
    assert set(result) == set(weights[0])
    for name, tensor in result.items():
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [model[name] for model in fishers], factors[: len(weights)])
        assert_within(tensor, reference, largest(thetas))


def assert_ubgm(
    result: Tensors, weights: list[Tensors], fishers: list[Tensors], factors: tuple[float, ...], prior: float = 0.0
) -> None:
    """Assert that a merged model is the gradient matching of a base and models."""
    for name, tensor in result.items():
        base, *thetas = [model[name] for model in weights]
        base_fisher, *others = [model[name] for model in fishers]
        size = base.double().abs() + sum(
            w * (t.double() - base.double()).abs() for w, t in zip(factors, thetas, strict=True)
        )
        assert_within(tensor, ubgm_reference(base, base_fisher, thetas, others, factors, prior), size)


def reference_at(
    weights: list[Tensors], fishers: list[Tensors], scales: list[float], name: str
) -> tuple[Tensor, Tensor]:
    """Return the Fisher merging of one tensor with scaled Fishers, and the size for its tolerance."""
    thetas = [model[name] for model in weights]
    scaled = [fisher[name].double() * scale for fisher, scale in zip(fishers, scales, strict=True)]
    return squisher_reference(thetas, scaled, [1.0] * len(weights)), largest(thetas)


def assert_trimmed(result: Tensor, base: Tensor, thetas: list[Tensor], fishers: list[Tensor], kept: Any) -> None:
    """Assert that a tensor is the Fisher merging of models that keep a share of their task vectors."""
    trimmed = [keep_largest(t, base, f, d) for t, f, d in zip(thetas, fishers, kept, strict=True)]
    reference = squisher_reference(trimmed, fishers, [1.0] * len(thetas))
    assert_within(result, reference, largest([*thetas, base]))


def assert_row(result: Tensor, method: str, base: Tensor, thetas: list[Tensor], fishers: list[Tensor]) -> None:
    """Assert that a row of a vocabulary is a merge of rows by either method."""
    if method == "squisher":
        reference = squisher_reference(thetas, fishers, [1.0, 1.0])
    else:
        reference = ubgm_reference(base, torch.zeros_like(base), thetas, fishers, [1.0, 1.0])
    assert_within(result, reference, 2 * largest([base, *thetas]) + 1)


def preview_of(root: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Run ``squisher plan``; return the preview as data and as text."""
    import json

    file = root / "plan.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(plan_command, [str(file), "--json", str(root / "plan.json")])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads((root / "plan.json").read_text(encoding="utf-8"))
    return found | {"text": result.output}


def planned(config: Mapping[str, object], out: Path) -> list[Any]:
    """Return the graph of a merge planned by mergekit: one task per output tensor, then the end."""
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    parsed, options = read_config(yaml.safe_dump(dict(config))), MergeOptions(quiet=True)
    architecture = get_architecture_info(parsed, options)
    LoaderCache().setup(options=options)
    output = _model_out_config(parsed, architecture)
    tasks: list[Any] = MergePlanner(parsed, architecture, options, output).plan_to_disk(str(out))
    return tasks


def merge_raw(tmp_path: Path, config: dict[str, Any], *flags: str) -> Any:
    """Run stock ``mergekit-pytorch`` on a configuration in this process."""
    from mergekit.scripts.merge_raw_pytorch import main

    file = tmp_path / "raw.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return CliRunner().invoke(main, [str(file), str(tmp_path / "out"), *flags])


def assert_refused(result: Result, out: Path, *words: str) -> None:
    """Assert that a command printed one line, exited with 1 and left no output folder."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.output
    assert "Traceback" not in result.output
    for word in words:
        assert word in lines[0], lines[0]
    assert not out.exists()


def assert_config_refused(root: Path, config: Mapping[str, object], *words: str) -> None:
    """Assert that stock ``mergekit-yaml`` refuses a configuration in one line with the given words."""
    assert_refused(merge(config, root / "out"), root / "out", *words)
