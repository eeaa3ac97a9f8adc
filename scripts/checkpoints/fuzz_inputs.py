"""Damage Fishers, masks, differences, embeddings, models and merge configurations, and verify that each is refused.

Each trial takes one input that this project itself wrote, damages it, and reads all of it with the function that the
commands use; some trials run a whole merge. The damage flips, cuts, inserts or overwrites bytes; replaces values in
safetensors headers, their metadata, JSON and YAML by values of wrong types and extreme numbers; nests JSON deeply;
exchanges tensors; puts FIFOs, folders and links in place of files; adds alias bombs and tags that would run code.

A trial passes if the reader returns the true content, or raises an error of this package in one line. A wrong tensor, a
merge with NaN, another exception, a hang, more than a gigabyte of memory or executed code is a failure; the program
then exits with 1. Formats without checksums (masks, differences, embeddings, weights) cannot reveal a flipped bit: such
trials count as unchecked.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.checkpoints import fuzz
from scripts.checkpoints.damage import BYTES, MARKER

HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 10**400, 1 << 63, 1 << 70, 1e308, -1e308, 1e-320, 3.5, float("nan"), float("inf"),
    float("-inf"), "", "text", "\ud800", "\x1b[2J", "a\nb", "../../x", "/dev/zero", "x" * 5000, [], {}, [1, 2], [[]],
    [-1], [1 << 62, 1 << 62], [None], {"a": 1}, {"default": None}, {"default": 1e308}, "[1e999]", "[3, -1]", "[[[1]]]",
    "{}", "null", "[4611686018427387904]", "[65536, 65536, 4]",
)  # fmt: skip
DEEP = "[" * 100_000 + "]" * 100_000
YAML_BOMBS = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "models: &m [*m, *m]\n",
    "models: " + DEEP + "\n",
    f"models: !!python/object/apply:os.system ['touch {MARKER}']\n",
    "models: !!timestamp nonsense\n",
    "models: !!int 1_2_x\n",
    "? [a, b]\n: 3\n",
    "{" * 5000,
    "merge_method: squisher\nmerge_method: &x\n",
    "\x00\x01",
    "<<: *x\n",
    "- - - - -\n",
    "~",
)


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


# ---- the inputs


def make_targets(root: Path) -> list[Target]:
    """Write one input of every kind, and return them with their readers."""
    import torch
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from squisher_mergekit.applications.fish_mask.difference import (
        DifferenceMetadata,
        read_difference,
        write_difference,
    )
    from squisher_mergekit.applications.masks import Mask, read_mask, write_mask
    from squisher_mergekit.applications.task2vec.embedding import embed, read_embedding, write_embedding
    from squisher_mergekit.fisher.config import FisherConfig
    from squisher_mergekit.fisher.mapping import Fisher
    from squisher_mergekit.fisher.write import write_fisher
    from squisher_mergekit.models.weights import Weights, open_weights
    from squisher_mergekit.optimizers.load import load_fisher

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
    truth = {}

    def read_fisher(folder: Path) -> None:
        found = load_fisher(folder, model=root / "models/a")
        for name in found:
            tensor = found[name]
            if not torch.equal(tensor, truth[folder.name][name]):
                raise AssertionError(f"{name} differs")
            for scaling in ("debiased", "per_example"):
                with contextlib.suppress(_refused()):
                    if not torch.isfinite(found.scaled(name, scaling)).all():
                        raise AssertionError(f"{name} is not finite at scaling {scaling}")
        with contextlib.suppress(_refused()):
            mean, norm = found.moments()
            if not (0 <= mean < float("inf") and 0 <= norm < float("inf")):
                raise AssertionError(f"mean {mean}, norm {norm}")

    targets = []
    for name, options in (
        ("fisher", {}), ("fisher-sharded", {"shard_bytes": 4000}), ("fisher-log8", {"compress": "log8"}),
        ("fisher-log4", {"compress": "log4"}), ("fisher-rank1", {"compress": "rank1"}),
    ):  # fmt: skip
        folder = root / "fishers" / name
        write_fisher(fisher, folder, **options)
        opened = load_fisher(folder)
        truth[name] = {key: opened[key] for key in opened}
        targets.append(Target(name, folder, read_fisher, True, "*"))

    masks = {name: torch.rand(tensor.shape) > 0.7 for name, tensor in weights.items()}
    masks["model.norm.weight"] = torch.ones(16, dtype=torch.bool)
    (root / "mask").mkdir()
    write_mask(Mask(masks, {"score": "random"}), root / "mask/mask.safetensors")

    def read_masks(folder: Path) -> None:
        found = read_mask(folder)
        found.check(Weights(root / "models/a").infos, "a")
        for name in found:
            if not torch.equal(found[name], masks[name]):
                raise AssertionError(f"{name} differs")

    targets.append(Target("mask", root / "mask", read_masks, False, "*"))

    (root / "difference").mkdir()
    tuned, base = Weights(root / "models/a"), Weights(root / "models/b")
    write_difference(tuned, base, root / "difference/difference.safetensors", DifferenceMetadata(tuned="{}", base="{}"))

    def read_differences(folder: Path) -> None:
        found = read_difference(folder)
        for name in tuned.infos:
            if found.changes(name) and not torch.equal(found.put(name, tuned.read(name), "base", "a"), base.read(name)):
                raise AssertionError(f"{name} differs")
        for name in found.whole("base"):
            found.read_whole(name, "base")

    targets.append(Target("difference", root / "difference", read_differences, False, "*"))

    write_embedding(embed(fisher, name="a"), root / "embedding/a.safetensors")

    def read_embeddings(folder: Path) -> None:
        for tensor in read_embedding(folder / "a.safetensors").tensors.values():
            if not torch.isfinite(tensor).all():
                raise AssertionError("an embedding is not finite")

    targets.append(Target("embedding", root / "embedding", read_embeddings, False, "*"))

    def read_model(folder: Path) -> None:
        found = open_weights(folder)
        _ = found.fingerprint, found.config, found.outline
        for name in found.infos:
            if name not in weights or not torch.equal(found.read(name), weights[name]):
                raise AssertionError(f"{name} differs")

    shutil.copytree(root / "models/a", root / "model")
    targets.append(Target("model", root / "model", read_model, False, "*"))

    (root / "yaml").mkdir()
    (root / "yaml/merge.yml").write_text(json.dumps(_merge(root)))
    targets.append(Target("yaml", root / "yaml", lambda folder: _run("plan", folder / "merge.yml"), True, "*"))

    shutil.copytree(root / "models/b", root / "merge/b")
    shutil.copytree(root / "fishers/fisher", root / "merge/fb")
    (root / "merge/merge.yml").write_text(json.dumps(_merge(root, root / "merge/b", root / "merge/fb")))

    def merge(folder: Path) -> None:
        out = root / "out"
        shutil.rmtree(out, ignore_errors=True)
        _run("merge", folder / "merge.yml", out, "--no-copy-tokenizer", "--quiet")
        for name, tensor in load_file(out / "model.safetensors").items():
            if not torch.isfinite(tensor).all():
                raise AssertionError(f"NaN in {name} of a merge that succeeded")

    targets.append(Target("merge", root / "merge", merge, False, "*"))
    return targets


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


def _refused() -> type[Exception]:
    from click import ClickException

    return ClickException


# ---- the damage


def places(value: Any, inside: Any = None, key: Any = None) -> Any:
    """Yield the container and key of every value in nested dicts and lists."""
    if inside is not None:
        yield inside, key
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], value, key)


def spoil_json(data: Any, chance: random.Random) -> str:
    """Replace, drop, rename or exchange values in parsed JSON, and return its text."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        found = [*places(data)]
        if not found:
            break
        inside, key = chance.choice(found)
        way = chance.random()
        if way < 0.6:
            inside[key] = chance.choice(HOSTILE)
        elif way < 0.7:
            del inside[key]
        elif way < 0.8 and isinstance(inside, dict):
            inside[chance.choice(("", "x", "\ud800", "w.shape", "default", "model.norm.weight"))] = inside.pop(key)
        else:
            other, second = chance.choice(found)
            with contextlib.suppress(KeyError, IndexError, TypeError, ValueError):
                inside[key], other[second] = other[second], inside[key]
    try:
        text = json.dumps(data)
    except (ValueError, RecursionError):  # the exchange put a value into itself
        return "[" + DEEP
    if chance.random() < 0.05:
        text = text.replace(":", ":" + DEEP, 1) if chance.random() < 0.5 else DEEP
    return text


def spoil_header(content: bytes, chance: random.Random) -> bytes:
    """Damage the JSON in the header of a safetensors file, or exchange its tensors; the tensors' bytes stay."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    way = chance.random()
    names = [name for name in header if name != "__metadata__"]
    if way < 0.15 and len(names) > 1:
        first, second = chance.sample(names, 2)
        header[first], header[second] = header[second], header[first]
        text = json.dumps(header)
    elif way < 0.5 and isinstance(header.get("__metadata__"), dict):
        noted = header["__metadata__"]
        key = chance.choice(list(noted))
        noted[key] = chance.choice((*HOSTILE, *("0", "[16]", "[4, 4]", DEEP, json.dumps({"x": [1e999]}))))
        text = json.dumps(header)
    else:
        text = spoil_json(header, chance)
    raw = text.encode("utf-8", "surrogatepass")
    claimed = chance.choice((len(raw),) * 8 + (0, 1 << 63, len(raw) + 1, len(raw) - 1))
    return struct.pack("<Q", claimed) + raw + content[8 + length :]


def spoil_yaml(content: bytes, chance: random.Random) -> bytes:
    """Damage a configuration: its values, its keys, or its text."""
    import yaml

    if chance.random() < 0.15:
        bomb = chance.choice(YAML_BOMBS)
        return (content + b"\n" + bomb.encode()) if chance.random() < 0.3 else bomb.encode()
    data = json.loads(content)
    text = spoil_json(data, chance)
    if chance.random() < 0.5:
        with contextlib.suppress(Exception):
            return yaml.safe_dump(json.loads(text)).encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")


def damage(file: Path, content: bytes, chance: random.Random) -> str:
    """Damage one file on disk, and return the name of the damage."""
    if chance.random() < 0.04:
        file.unlink()
        kind = chance.choice(("fifo", "folder", "loop", "missing", "empty"))
        {
            "fifo": lambda: os.mkfifo(file),
            "folder": file.mkdir,
            "loop": lambda: file.symlink_to(file.name),
            "missing": lambda: None,
            "empty": file.touch,
        }[kind]()
        return kind
    if file.suffix == ".safetensors" and chance.random() < 0.7:
        file.write_bytes(spoil_header(content, chance))
        return "header"
    if file.suffix == ".json" and chance.random() < 0.8:
        file.write_bytes(spoil_json(json.loads(content), chance).encode("utf-8", "surrogatepass"))
        return "json"
    if file.suffix == ".yml" and chance.random() < 0.9:
        file.write_bytes(spoil_yaml(content, chance))
        return "yaml"
    change = chance.choice(BYTES)
    file.write_bytes(change(content, chance))
    return change.__name__


# ---- the trials


def trial(target: Target, chance: random.Random) -> tuple[str, str]:
    """Damage an input, judge its reader, and restore it; return the damage and the outcome."""
    file = chance.choice(target.files)
    way = f"{target.name}: {damage(file, target.contents[file], chance)} of {file.name}"
    unchecked = not target.verified and target.name != "merge"
    outcome = fuzz.guarded(lambda: judge(target, unchecked))
    target.restore()
    if Path(MARKER).exists():
        Path(MARKER).unlink()
        outcome = "FAILED: code was run"
    return way, outcome


def judge(target: Target, unchecked: bool) -> str:
    """Read a damaged input, and return the outcome."""
    try:
        target.read(target.folder)
    except _refused() as error:
        if "\n" in error.format_message():
            raise AssertionError(f"an error of several lines: {error!s:.300}") from error
        return "refused"
    except AssertionError as error:
        if unchecked and "differs" in str(error):
            return "unchecked"
        raise
    return "right"


def work(seed: int, numbers: range, only: str | None, pipe: Any) -> None:
    """Run the trials of the given numbers, and report each before and after."""
    fuzz.prepare()
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        targets = [target for target in make_targets(Path(scratch)) if only is None or only in target.name]
        for target in targets:
            if judge(target, unchecked=False) != "right":
                raise AssertionError(f"{target.name} must be read right without damage")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        for number in numbers:
            chance = random.Random(f"{seed}/{number}")
            pipe.send((number, None, None))
            way, outcome = trial(chance.choice(targets), chance)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            if grown > fuzz.GIGABYTE:
                outcome, before = f"FAILED: {grown / fuzz.GIGABYTE:.1f} GB of memory", before + grown
            pipe.send((number, way, outcome))
    pipe.close()


if __name__ == "__main__":
    sys.exit(fuzz.main(work, __doc__, trials=5_000))
