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
import json
import logging
import os
import random
import resource
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.checkpoints import fuzz
from scripts.checkpoints.damage import BYTES, MARKER
from scripts.checkpoints.fuzz_targets import Target, make_targets, refused

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
    except refused() as error:
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
