"""Inputs that the fuzzer of inputs damages, one of every kind, with the function that reads each."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Target:
    """Input of one kind, with the function that reads it.

    Attributes:
        name: Name for the report.
        folder: Folder of the input.
        files: Files that are damaged.
        read: Function that reads everything, and raises an AssertionError if the content is wrong.
        verified: True if the reader must notice every changed byte of a tensor.
    """

    def __init__(self, name: str, folder: Path, read: Callable[[Path], None], verified: bool, pattern: str) -> None:
        self.name, self.folder, self.read, self.verified = name, folder, read, verified
        self.files = sorted(path for path in folder.rglob("*") if path.is_file() and path.match(pattern))
        self.contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def restore(self) -> None:
        """Write the folder's files as they were."""
        shutil.rmtree(self.folder)
        for path, content in self.contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@dataclass(frozen=True)
class World:
    """Small model and Fisher from which the inputs are made.

    Attributes:
        root: Folder of all files.
        weights: Weights of the model ``models/a``.
        fisher: A Fisher of it.
    """

    root: Path
    weights: Mapping[str, Any]
    fisher: Any


def make_world(root: Path) -> World:
    """Write two models, and return them with a Fisher."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher

    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    for number, name in enumerate(("a", "b")):
        torch.manual_seed(number)
        LlamaForCausalLM(config).save_pretrained(root / "models" / name)
    weights = load_file(root / "models/a/model.safetensors")
    metadata = FisherConfig(
        estimator="squisher", statistic="ema", steps=7, optimizer={"beta2": 0.99}, examples_per_step=4
    )
    fisher = Fisher({name: torch.rand_like(tensor) * 1e-6 for name, tensor in weights.items()}, metadata)
    return World(root, weights, fisher)


def make_targets(root: Path) -> list[Target]:
    """Write one input of every kind, and return them with their readers."""
    world = make_world(root)
    makers = (mask_target, difference_target, embedding_target, model_target, plan_target, merge_target)
    return [*fisher_targets(world), *(make(world) for make in makers)]


def fisher_targets(world: World) -> list[Target]:
    """Write the Fisher in each form, in one with factors."""
    import torch

    from squisher_mergekit.fisher.write import write_fisher
    from squisher_mergekit.optimizers.load import load_fisher

    truth = {}

    def read(folder: Path) -> None:
        found = load_fisher(folder, model=world.root / "models/a")
        for name in found:
            tensor = found[name]
            if not torch.equal(tensor, truth[folder.name][name]):
                raise AssertionError(f"{name} differs")
            for scaling in ("debiased", "per_example"):
                with contextlib.suppress(refused()):
                    if not torch.isfinite(found.scaled(name, scaling)).all():
                        raise AssertionError(f"{name} is not finite at scaling {scaling}")
        for stored, factor in factors_by_name(found).items():
            if not torch.equal(factor, truth[folder.name][stored]):
                raise AssertionError(f"{stored} differs")
        with contextlib.suppress(refused()):
            mean, norm = found.moments()
            if not (0 <= mean < float("inf") and 0 <= norm < float("inf")):
                raise AssertionError(f"mean {mean}, norm {norm}")

    with_factors = world.fisher.with_factors(draw_factors(world))
    targets = []
    for name, fisher, options in (
        ("fisher", world.fisher, {}), ("fisher-sharded", world.fisher, {"shard_bytes": 4000}),
        ("fisher-log8", world.fisher, {"compress": "log8"}), ("fisher-log4", world.fisher, {"compress": "log4"}),
        ("fisher-rank1", world.fisher, {"compress": "rank1"}), ("fisher-factors", with_factors, {}),
    ):  # fmt: skip
        folder = world.root / "fishers" / name
        write_fisher(fisher, folder, **options)
        opened = load_fisher(folder)
        truth[name] = {key: opened[key] for key in opened} | factors_by_name(opened)
        targets.append(Target(name, folder, read, True, "*"))
    return targets


def draw_factors(world: World) -> Any:
    """Return factors over both sides of the matrices, in blocks."""
    import torch

    from squisher_mergekit.fisher.config import FactorsInfo
    from squisher_mergekit.fisher.factors.blocks import second_moments
    from squisher_mergekit.fisher.factors.mapping import factors_in_memory

    matrices = {name: torch.randn_like(tensor) for name, tensor in world.weights.items() if tensor.ndim == 2}
    rows = {name: second_moments(matrix, 8) for name, matrix in matrices.items()}
    columns = {name: second_moments(matrix.mT, 8) for name, matrix in matrices.items()}
    shapes = {name: matrix.shape for name, matrix in matrices.items()}
    return factors_in_memory(
        {"rows": rows, "columns": columns}, FactorsInfo(source="recorded", statistic="ema"), shapes
    )


def factors_by_name(fisher: Any) -> dict[str, Any]:
    """Return ``NAME.SIDE`` -> factor."""
    return {f"{name}.{s}": f for s in ("rows", "columns") for name, f in fisher.factors.side(s).items()}


def mask_target(world: World) -> Target:
    """Write a mask."""
    import torch

    from squisher_mergekit.applications.masks import Mask, read_mask, write_mask
    from squisher_mergekit.models.weights import Weights

    masks = {name: torch.rand(tensor.shape) > 0.7 for name, tensor in world.weights.items()}
    masks["model.norm.weight"] = torch.ones(16, dtype=torch.bool)
    (world.root / "mask").mkdir()
    write_mask(Mask(masks, {"score": "random"}), world.root / "mask/mask.safetensors")

    def read(folder: Path) -> None:
        found = read_mask(folder)
        found.check(Weights(world.root / "models/a").infos, "a")
        for name in found:
            if not torch.equal(found[name], masks[name]):
                raise AssertionError(f"{name} differs")

    return Target("mask", world.root / "mask", read, False, "*")


def difference_target(world: World) -> Target:
    """Write the difference of two models."""
    import torch

    from squisher_mergekit.applications.fish_mask.difference import (
        DifferenceMetadata,
        read_difference,
        write_difference,
    )
    from squisher_mergekit.models.weights import Weights

    folder = world.root / "difference"
    folder.mkdir()
    tuned, base = Weights(world.root / "models/a"), Weights(world.root / "models/b")
    write_difference(tuned, base, folder / "difference.safetensors", DifferenceMetadata(tuned="{}", base="{}"))

    def read(folder: Path) -> None:
        found = read_difference(folder)
        for name in tuned.infos:
            if found.changes(name) and not torch.equal(found.put(name, tuned.read(name), "base", "a"), base.read(name)):
                raise AssertionError(f"{name} differs")
        for name in found.whole("base"):
            found.read_whole(name, "base")

    return Target("difference", folder, read, False, "*")


def embedding_target(world: World) -> Target:
    """Write an embedding of the Fisher."""
    import torch

    from squisher_mergekit.applications.task2vec.embedding import embed, read_embedding, write_embedding

    write_embedding(embed(world.fisher, name="a"), world.root / "embedding/a.safetensors")

    def read(folder: Path) -> None:
        for tensor in read_embedding(folder / "a.safetensors").tensors.values():
            if not torch.isfinite(tensor).all():
                raise AssertionError("an embedding is not finite")

    return Target("embedding", world.root / "embedding", read, False, "*")


def model_target(world: World) -> Target:
    """Write a copy of the model."""
    import torch

    from squisher_mergekit.models.weights import open_weights

    def read(folder: Path) -> None:
        found = open_weights(folder)
        _ = found.fingerprint, found.config, found.outline
        for name in found.infos:
            if name not in world.weights or not torch.equal(found.read(name), world.weights[name]):
                raise AssertionError(f"{name} differs")

    shutil.copytree(world.root / "models/a", world.root / "model")
    return Target("model", world.root / "model", read, False, "*")


def plan_target(world: World) -> Target:
    """Write a merge document, which is planned."""
    folder = world.root / "yaml"
    folder.mkdir()
    (folder / "merge.yml").write_text(json.dumps(_merge(world.root)))
    return Target("yaml", folder, lambda folder: _run("plan", folder / "merge.yml"), True, "*")


def merge_target(world: World) -> Target:
    """Write a model, a Fisher and a merge document, which is run."""
    import torch
    from safetensors.torch import load_file

    root, folder = world.root, world.root / "merge"
    shutil.copytree(root / "models/b", folder / "b")
    shutil.copytree(root / "fishers/fisher", folder / "fb")
    (folder / "merge.yml").write_text(json.dumps(_merge(root, folder / "b", folder / "fb")))

    def merge(folder: Path) -> None:
        out = root / "out"
        shutil.rmtree(out, ignore_errors=True)
        _run("merge", folder / "merge.yml", out, "--no-copy-tokenizer", "--quiet")
        for name, tensor in load_file(out / "model.safetensors").items():
            if not torch.isfinite(tensor).all():
                raise AssertionError(f"NaN in {name} of a merge that succeeded")

    return Target("merge", folder, merge, False, "*")


def _merge(root: Path, second: Path | None = None, fisher: Path | None = None) -> dict[str, Any]:
    """Return the configuration of a small merge."""
    models = [
        (root / "models/a", root / "fishers/fisher"),
        (second or root / "models/b", fisher or root / "fishers/fisher-log8"),
    ]
    return {
        "merge_method": "squisher",
        "base_model": str(models[0][0]),
        "dtype": "float32",
        "models": [
            {"model": str(model), "parameters": {"weight": 0.5, "fisher": str(path), "fisher_scale": 1.0}}
            for model, path in models
        ],
        "parameters": {"normalize": "mean", "floor": 0.01, "scaling": "debiased", "missing": "error"},
    }


def _run(verb: str, *arguments: Path | str) -> None:
    """Run a command in this process; its refusals are raised."""
    from squisher_mergekit.cli.main import main

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main.main([verb, *map(str, arguments)], standalone_mode=False)


def refused() -> type[Exception]:
    """Return the class of this package's refusals on the command line."""
    from click import ClickException

    return ClickException
