"""Costs on paper: memory of ``squisher estimate`` on a GPU, and bytes and seconds of merges of large models.

Everything follows from the shapes of the models and from the rates below, which options change. Seconds are those of
each resource alone; a merge that overlaps them takes as long as the slowest, which is its bound.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from typing import NamedTuple

GB = 1e9
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}
FISHER_WIDTH = {"float32": 4.0, "bfloat16": 2.0, "log8": 1 + 4 / 128}  # bytes of an entry, scales included
CARD = 80  # GB
# Bytes of saved activations of one token in one layer, in units of hidden size times the width of the dtype, with
# fused attention (Korthikanti et al., arXiv 2205.05198, have 34 bytes at 2 bytes an entry).
SAVED = 17
LOGITS = 4  # copies of the logits in float32: outputs, probabilities, gradients, and one temporary
DECODING = 50  # bytes of the GPU's memory that decoding an entry in log8 moves: it computes in float64
CHECKED = 2  # examples whose gradients the first batch compares one by one


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama.

    Attributes:
        hidden: Hidden size.
        layers: Number of layers.
        wide: Size between the two projections of an MLP.
        vocab: Entries of the vocabulary.
        keys: Size of all keys of a token.
    """

    hidden: int
    layers: int
    wide: int
    vocab: int
    keys: int

    @property
    def parameters(self) -> int:
        """Number of parameters, with an untied head."""
        layer = 2 * self.hidden**2 + 2 * self.keys * self.hidden + 3 * self.hidden * self.wide + 2 * self.hidden
        return self.layers * layer + (2 * self.vocab + 1) * self.hidden

    @property
    def largest(self) -> int:
        """Number of entries of the largest tensor."""
        return self.hidden * max(self.vocab, self.wide)


LLAMAS = {
    "Llama-2 7B": Shape(4096, 32, 11008, 32000, 4096),
    "Llama-2 70B": Shape(8192, 80, 28672, 32000, 1024),
    "Llama-3.1 405B": Shape(16384, 126, 53248, 128256, 1024),
}


# ---- memory of an estimate


class EstimateMemory(NamedTuple):
    """Bytes on the device of ``squisher estimate`` at its peak.

    Attributes:
        weights: Weights in the dtype of the model.
        sums: Accumulators in float32; of an offloaded estimate, the largest tensor alone.
        gradients: Gradients of one example, which the first batch compares.
        activations: Saved activations and logits of a batch.
        host: Bytes of the accumulators in host memory.
    """

    weights: float
    sums: float
    gradients: float
    activations: float
    host: float

    @property
    def device(self) -> float:
        """Bytes on the device at the peak: the first batch has gradients, but few examples at that time."""
        return self.weights + self.sums + self.peak_of_passes

    @property
    def peak_of_passes(self) -> float:
        """Bytes of the larger of two peaks: single gradients of the compared examples, and a whole batch."""
        return max(self.gradients, self.activations)


def estimate_memory(
    shape: Shape, dtype: str, offload: bool = False, examples: int = 8, tokens: int = 512
) -> EstimateMemory:
    """Return the memory of an estimate of all parameters.

    Args:
        shape: Sizes of the model.
        dtype: Dtype of the weights: fp32, bf16 or fp16.
        offload: True if the accumulators are in host memory.
        examples: Examples of a batch.
        tokens: Tokens of an example.

    Example:
        >>> memory = estimate_memory(LLAMAS["Llama-2 7B"], "bf16")
        >>> round(memory.weights / 1e9, 1), round(memory.sums / 1e9, 1)
        (13.5, 27.0)
    """
    width, sums = WIDTH[dtype], 4.0 * shape.parameters
    per_token = SAVED * width * shape.hidden * shape.layers + LOGITS * 4 * shape.vocab
    return EstimateMemory(
        weights=width * shape.parameters,
        sums=4.0 * shape.largest if offload else sums,
        gradients=width * shape.parameters + per_token * tokens * min(examples, CHECKED),
        activations=per_token * tokens * examples,
        host=sums if offload else 0.0,
    )


# ---- time of a merge


@dataclass(frozen=True)
class Rates:
    """Rates of a machine.

    Attributes:
        read: Bytes a second that its disk reads.
        write: Bytes a second that its disk writes.
        cores: Number of cores.
        core: Entries of models that a core merges a second, with Fishers in float32.
        digest: Bytes of Fishers a second whose digests a core checks.
        decode: Entries of compact Fishers a second that a core decodes.
        link: Bytes a second from host memory to the GPU.
        memory: Bytes a second of the GPU's memory.
    """

    read: float = 3 * GB
    write: float = 2 * GB
    cores: int = 2
    core: float = 0.23e9
    digest: float = 2.5e9
    decode: float = 0.1e9
    link: float = 13 * GB
    memory: float = 3350 * GB


class MergeCost(NamedTuple):
    """Bytes and seconds of a merge.

    Attributes:
        read: Bytes read from disk.
        written: Bytes written to disk.
        seconds: Resource -> seconds that it alone takes.
    """

    read: float
    written: float
    seconds: dict[str, float]

    @property
    def bound(self) -> str:
        """Name of the slowest resource."""
        return max(self.seconds, key=self.seconds.__getitem__)


def merge_cost(
    shape: Shape, rates: Rates, models: int = 2, fisher: str = "log8", width: int = 2, gpu: bool = False
) -> MergeCost:
    """Return bytes and seconds of ``squisher`` over a number of models.

    Digests cost time of one core, also where the GPU merges; compact Fishers do where it does not.

    Args:
        shape: Sizes of each model.
        rates: Rates of the machine.
        models: Number of models.
        fisher: Dtype or compact form of the Fishers in their files.
        width: Bytes of an entry of the weights.
        gpu: True for a merge on the GPU, which decodes compact Fishers.

    Example:
        >>> cost = merge_cost(LLAMAS["Llama-2 7B"], Rates(), fisher="float32")
        >>> round(cost.read / 1e9), round(cost.written / 1e9), cost.bound
        (81, 13, 'CPU')
        >>> merge_cost(LLAMAS["Llama-2 7B"], Rates(), gpu=True).bound
        'disk, reading'
    """
    entries = shape.parameters
    read, written = models * entries * (width + FISHER_WIDTH[fisher]), float(entries * width)
    seconds = {"disk, reading": read / rates.read, "disk, writing": written / rates.write}
    compact = models * entries if fisher == "log8" else 0
    if gpu:
        decoding = compact * DECODING
        seconds |= {"link": (read + written) / rates.link, "GPU memory": (read + written + decoding) / rates.memory}
    merged = 0.0 if gpu else models * entries / (rates.core * rates.cores) + compact / rates.decode
    seconds["CPU"] = merged + models * entries * FISHER_WIDTH[fisher] / rates.digest
    return MergeCost(read, written, seconds)


# ---- the tables


def main(arguments: list[str] | None = None) -> int:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("read", 3.0), ("write", 2.0), ("link", 13.0), ("memory", 3350.0)):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"GB a second (default: {default:g})")
    parser.add_argument("--cores", type=int, default=2, help="cores of the CPU (default: 2)")
    parser.add_argument("--examples", type=int, default=8, help="examples of a batch (default: 8)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of an example (default: 512)")
    options = parser.parse_args(arguments)
    given = {name: getattr(options, name) * GB for name in ("read", "write", "link", "memory")}
    rates = Rates(**given, cores=options.cores)
    print("\n".join([*memory_lines(options.examples, options.tokens), "", *merge_lines(rates)]))
    return 0


def memory_lines(examples: int, tokens: int) -> list[str]:
    """Return the table of the memory of an estimate."""
    lines = [
        f"squisher estimate, batches of {examples} x {tokens} tokens: GB on a card of {CARD} GB",
        f"{'':<16}{'options':<24}{'weights':>9}{'sums':>8}{'passes':>8}{'card':>8}{'host':>8}  fits",
    ]
    for name, shape in LLAMAS.items():
        for dtype in ("fp32", "bf16"):
            for offload in (False, True):
                memory = estimate_memory(shape, dtype, offload, examples, tokens)
                cells = (memory.weights, memory.sums, memory.peak_of_passes, memory.device, memory.host)
                title = f"--dtype {dtype}{' --offload' if offload else ''}"
                fits = "yes" if memory.device < CARD * GB else "no"
                numbers = "".join(f"{cell / GB:>{9 if i == 0 else 8}.1f}" for i, cell in enumerate(cells))
                lines.append(f"{name:<16}{title:<24}{numbers}  {fits}")
    return lines


def merge_lines(rates: Rates) -> list[str]:
    """Return the table of merges of two models."""
    lines = [
        f"squisher over 2 models in bf16, seconds of each resource: disk {rates.read / GB:g} and {rates.write / GB:g} "
        f"GB/s, {rates.cores} cores, link {rates.link / GB:g} GB/s, GPU memory {rates.memory / GB:g} GB/s",
        f"{'':<16}{'Fishers':<10}{'on':<5}{'read GB':>8}{'write GB':>10}  seconds",
    ]
    for name, shape in LLAMAS.items():
        for fisher in ("log8", "float32"):
            for gpu in (False, True):
                cost = merge_cost(shape, rates, fisher=fisher, gpu=gpu)
                seconds = ", ".join(f"{key} {value:,.1f}" for key, value in cost.seconds.items())
                sizes = f"{'GPU' if gpu else 'CPU':<5}{cost.read / GB:>8,.0f}{cost.written / GB:>10,.0f}"
                lines.append(f"{name:<16}{fisher:<10}{sizes}  {seconds}; bound: {cost.bound}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
