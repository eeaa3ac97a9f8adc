"""Damage to a file of a checkpoint, for ``fuzz``: to its bytes, the pickle in its archive, or its content."""

from __future__ import annotations

import io
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARKER = "SQUISHER_MARKER"  # name of the file that malicious pickles would make


# ---- damage to bytes


def flip(data: bytes, chance: random.Random) -> bytes:
    """Flip one to eight bits."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def truncate(data: bytes, chance: random.Random) -> bytes:
    """Cut the end off."""
    return data[: chance.randrange(len(data))]


def lengthen(data: bytes, chance: random.Random) -> bytes:
    """Insert bytes at the end, at the beginning, or between."""
    place = chance.choice((0, len(data), chance.randrange(len(data))))
    return data[:place] + chance.randbytes(chance.choice((1, 4, 100, 4096))) + data[place:]


def overwrite(data: bytes, chance: random.Random) -> bytes:
    """Overwrite a stretch with zeros, ones or noise."""
    start = chance.randrange(len(data))
    length = min(chance.choice((1, 4, 8, 64, 1024)), len(data) - start)
    filler = chance.choice((b"\0" * length, b"\xff" * length, chance.randbytes(length)))
    return data[:start] + filler + data[start + length :]


def exchange(data: bytes, chance: random.Random) -> bytes:
    """Exchange two stretches."""
    length = min(chance.choice((4, 64, 512)), len(data) // 2)
    first = chance.randrange(len(data) - 2 * length + 1)
    second = chance.randrange(first + length, len(data) - length + 1)
    a, b = data[first : first + length], data[second : second + length]
    return data[:first] + b + data[first + length : second] + a + data[second + length :]


BYTES: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, flip, truncate, lengthen, overwrite, exchange)


def archived(data: bytes, chance: random.Random, change: Callable[[bytes, random.Random], bytes]) -> bytes:
    """Damage the pickle in an archive, and update its checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content, chance) if name.endswith("data.pkl") else content)
    return out.getvalue()


def malicious(data: bytes, chance: random.Random) -> bytes:
    """Insert a call of the system's shell into a pickle."""
    call = f"cos\nsystem\n(S'touch {MARKER}'\ntR0".encode()
    place = chance.choice((0, 2, len(data) - 1, chance.randrange(len(data))))
    return data[:place] + call + data[place:]


# ---- damage to content


def restructured(data: bytes, chance: random.Random) -> bytes:
    """Load a file, damage its content, and save it again."""
    import torch

    from squisher_mergekit.optimizers.checkpoints import safe_pickle

    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        file.write(data)
        file.flush()
        whole = [own(safe_pickle.load(Path(file.name)))]
    places = [*walk(whole)]
    # Each entry at most once: two conversions of a number could undo the damage to its type but not to its value.
    for container, key in chance.sample(places, min(len(places), chance.choice((1, 1, 3)))):
        if key in container if isinstance(container, dict) else key < len(container):
            spoil(container, key, chance)
    out = io.BytesIO()
    torch.save(whole[0] if whole else None, out)
    return out.getvalue()


def own(value: Any) -> Any:
    """Return copies of containers and tensors; objects of libraries become None."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.clone() if type(value) is torch.Tensor else None
    if isinstance(value, dict):
        return {key: own(item) for key, item in value.items()}
    if isinstance(value, list):
        return [own(item) for item in value]
    return value if isinstance(value, int | float | str | bool | tuple | None) else None


def walk(value: Any) -> Any:
    """Yield the container and the key of every entry in nested dicts and lists."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from walk(value[key])


def spoil(container: Any, key: Any, chance: random.Random) -> None:
    """Drop an entry or replace its value."""
    import torch

    value = container[key]
    if isinstance(value, torch.Tensor) and value.ndim and chance.random() < 0.7:
        container[key] = chance.choice(
            (
                lambda: value[..., :-1].clone(),
                lambda: value.flatten(),
                # A transposed square matrix would have the same shape.
                lambda: value.T.contiguous() if value.ndim == 2 and len({*value.shape}) > 1 else value[None],
                lambda: value.to(chance.choice((torch.float16, torch.int32, torch.float64, torch.complex64))),
                lambda: value.flatten()[:1].expand(1 << 36),
                lambda: value.new_empty(0),
                lambda: torch.empty(value.shape, device="meta"),
                lambda: value.to_sparse(),
                lambda: -1.0 - value,
                lambda: value * float("nan"),
            )
        )()
    elif chance.random() < 0.5:
        del container[key]
    else:
        others = (None, -1, 0, 1 << 70, 3.5, float("nan"), "text", [], {}, [1, 2], {"a": 1}, (), torch.zeros(3), True)
        container[key] = chance.choice(others)


def damage(name: str, data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """Damage a file in a random way; return the name of the damage and the new content."""
    zipped = data[:2] == b"PK"
    ways = ["bytes"]
    if zipped:
        ways += ["pickle", "pickle", "code", "content", "content", "content"]
    elif name.endswith(".metadata"):
        ways += ["code"]
    way = chance.choice(ways)
    try:
        if way == "content":
            return way, restructured(data, chance)
        if way == "pickle":
            return way, archived(data, chance, chance.choice(BYTES))
        if way == "code":
            return way, archived(data, chance, malicious) if zipped else malicious(data, chance)
    except (pickle.PicklingError, RuntimeError, TypeError, ValueError, NotImplementedError, IndexError):
        pass  # the damaged content cannot be saved
    change = chance.choice(BYTES)
    return change.__name__, change(data, chance)
