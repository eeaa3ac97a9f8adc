"""Time the ways from a safetensors file in the page cache to a GPU, in GB/s.

``to``: one tensor after another, ``tensor.to(device)``, as mergekit moves them. ``mapped N``: N threads copy slices of
the mapped tensors into pinned buffers of their own, from which the GPU takes them. ``read N``: the same, but they
read the file into the buffers. Buffers of a thread take turns, so that reading and sending overlap.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from scripts.benchmarks.report import write_report

PIECE = 8 << 20
THREADS = (1, 4, 8, 16)


class Lane:
    """Two pinned buffers of one thread, and the stream that sends them."""

    def __init__(self, device: str) -> None:
        pinned = device == "cuda"
        self._buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        self._stream = torch.cuda.Stream() if pinned else None
        self._sent = [torch.cuda.Event() if pinned else None for _ in range(2)]
        self._turn = 0

    def send(self, fill: Callable[[Tensor], object], target: Tensor) -> None:
        """Fill a buffer as soon as it is free, and send it to a piece of the target."""
        buffer, event = self._buffers[self._turn][: target.numel()], self._sent[self._turn]
        self._turn = 1 - self._turn
        if event is None or self._stream is None:
            fill(buffer)
            target.copy_(buffer)
            return
        event.synchronize()
        fill(buffer)
        with torch.cuda.stream(self._stream):
            target.copy_(buffer, non_blocking=True)
            event.record()


def feed(file: Path, way: str, threads: int, device: str) -> list[Tensor]:
    """Bring all tensors of a file to the device, as bytes."""
    with safe_open(file, "pt") as opened, file.open("rb", buffering=0) as raw:
        header = 8 + int.from_bytes(raw.read(8), "little")
        infos = json.loads(raw.read(header - 8))
        offsets = {name: info["data_offsets"] for name, info in infos.items() if name != "__metadata__"}
        tensors = {name: opened.get_tensor(name).reshape(-1).view(torch.uint8) for name in offsets}
        if way == "to":
            return [tensor.to(device, non_blocking=True) for tensor in tensors.values()]
        targets = {name: torch.empty_like(tensor, device=device) for name, tensor in tensors.items()}
        pieces = [(name, at) for name, tensor in tensors.items() for at in range(0, tensor.numel(), PIECE)]

        def work(lane: Lane, first: int) -> None:
            for name, at in pieces[first::threads]:
                source, place = tensors[name][at : at + PIECE], header + offsets[name][0] + at
                if way == "mapped":
                    lane.send(lambda buffer, source=source: buffer.copy_(source), targets[name][at : at + PIECE])
                else:
                    lane.send(
                        lambda buffer, place=place: os.preadv(raw.fileno(), [buffer.numpy()], place),
                        targets[name][at : at + PIECE],
                    )

        lanes = [Lane(device) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, lanes, range(threads)))
        return list(targets.values())


def measure(file: Path, device: str, rounds: int) -> list[dict[str, Any]]:
    """Return GB/s of each way; every result is compared with the file."""
    ways = [("to", 1), *((way, threads) for way in ("mapped", "read") for threads in THREADS)]
    expected, found = feed(file, "to", 1, "cpu"), []
    for way, threads in ways:
        rates = []
        for _ in range(rounds):
            began = time.perf_counter()
            got = feed(file, way, threads, device)
            if device == "cuda":
                torch.cuda.synchronize()
            rates.append(file.stat().st_size / (time.perf_counter() - began) / 1e9)
        same = all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))
        found.append({"way": way, "threads": threads, "gb_per_s": statistics.median(rates), "same": same})
    return found


def main(arguments: list[str] | None = None) -> int:
    """Make a file, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--megabytes", type=int, default=4096, help="size of the file")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder of the file (default: the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="write all numbers there")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        file = Path(folder) / "model.safetensors"
        part = torch.randint(256, (min(options.megabytes, 64) * (1 << 20) - 7,), dtype=torch.uint8)
        save_file({f"w{i}": part.roll(i) for i in range(-(-options.megabytes // 64))}, file)
        found = measure(file, options.device, options.rounds)
    for one in found:
        print(f"{one['way']:<8}{one['threads']:>3}{one['gb_per_s']:>8.2f} GB/s  {'' if one['same'] else 'WRONG'}")
    if options.json:
        write_report(options.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
