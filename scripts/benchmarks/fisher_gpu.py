r"""Measure the cost of a Fisher on a GPU relative to a plain forward and backward pass, in float32 and bfloat16.

Large: a random Llama of 1.1B parameters, 8 sequences of 512 tokens. Small: the CNN, BERT and Llama of
``scripts.benchmarks.fisher``, eagerly and as CUDA graphs. The goals are those of GOALS. Times are medians between CUDA
events; a plain pass is the model's own loss and its backward pass, in the same dtype. Matrix products of float32 are
exact (no TF32). On a CPU with ``--quick`` everything runs in small, which only shows that it runs.

    python -m scripts.benchmarks.fisher_gpu --device cuda --json fisher_gpu.json
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from scripts.benchmarks.fisher_gpu_kernels import measure_kernels
from scripts.benchmarks.fisher_models import Batch, build, convert, labels_of, task_of, terms
from scripts.benchmarks.gpu_timing import Budget, environment, median_ms, milliseconds, peak_gb, relative_l2
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.tensors.devices.streams import SecondStream

SECONDS = 150.0
GOALS = {"large bfloat16": 1.4, "checked": 2.0, "bert": 1.5, "llama": 1.5}  # as ratios to a plain pass
SMALL = ("cnn", "bert", "llama")
CHECKED = (1, 3, 7)  # batches whose examples are masked for a check


def large_llama(device: torch.device, quick: bool) -> tuple[nn.Module, Batch]:
    """Return a random Llama of 1.1B parameters in float32, its weights rounded to bfloat16, and a batch."""
    sizes = {"hidden_size": 2048, "num_hidden_layers": 22, "intermediate_size": 5632, "vocab_size": 32000}
    heads, shape = {"num_attention_heads": 32, "num_key_value_heads": 4}, (8, 512)
    if quick:
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 176, "vocab_size": 128}
        heads, shape = {"num_attention_heads": 4, "num_key_value_heads": 2}, (4, 16)
    torch.manual_seed(0)
    with torch.device(device):
        config = transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=False, use_cache=False)
        model = transformers.LlamaForCausalLM(config).eval()
        ids = torch.randint(sizes["vocab_size"], shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model, {"input_ids": ids, "labels": ids}


def plain(model: nn.Module, batch: Batch) -> None:
    """Run a forward and backward pass with the gradients of all parameters."""
    model.zero_grad(set_to_none=True)
    if isinstance(batch, tuple):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    else:
        model(**batch).loss.backward()


def one_by_one(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return the sums of squared gradients of single examples, in float32."""
    named = dict(model.named_parameters())
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    for n in range(len(labels_of(batch))):
        logits, targets = terms(model, convert(batch, lambda part, n=n: part[n : n + 1]))
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        for name, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
            total[name].addcmul_(gradient.float(), gradient.float())
    return total


def totals(model: nn.Module, accumulator: FisherAccumulator) -> dict[str, Tensor]:
    """Return the accumulators by the names of the parameters."""
    return {name: accumulator.accumulators[p] for name, p in model.named_parameters()}


def passes(
    model: nn.Module, batch: Batch, device: torch.device, count: int, inline: bool = False, **options: Any
) -> tuple[FisherAccumulator, dict[str, Any]]:
    """Add one batch again and again; return the accumulator, and the times in ms of all kinds of passes.

    ``inline`` launches the checks of replayed batches on the stream of their graph, not on a second one.
    """
    accumulator = FisherAccumulator(model, task=task_of(batch), **options)
    if inline and accumulator._graphs:
        accumulator._graphs._cuda.second = SecondStream(torch.device("cpu"))
    times, graphs = [], []
    for _ in range(count):
        times.append(milliseconds(lambda: accumulator.add(batch), device))
        graphs.append(len(accumulator._graphs._graphs) if accumulator._graphs else 0)
    others = [ms for number, ms in enumerate(times) if number and number not in CHECKED]
    figures = {
        "first_ms": times[0],
        "checked_ms": statistics.median(times[number] for number in CHECKED if number < count),
        "checked": [
            {"batch": number + 1, "ms": times[number], "replayed": graphs[number] > 0}
            for number in CHECKED
            if number < count
        ],
        # Kernels are compiled and captured in the first passes.
        "ms": statistics.median(others[-4:]),
        "all_ms": [round(ms, 3) for ms in times],
        "graphs": graphs[-1],
    }
    return accumulator, figures


def ratios(figures: dict[str, Any], plain_ms: float) -> dict[str, Any]:
    """Add the ratios to a plain pass."""
    kinds = {"ratio": "ms", "first_ratio": "first_ms", "checked_ratio": "checked_ms"}
    checked = [one | {"ratio": one["ms"] / plain_ms} for one in figures["checked"]]
    return figures | {ratio: figures[ms] / plain_ms for ratio, ms in kinds.items()} | {"checked": checked}


def measure_large(
    model: nn.Module, batch: Batch, expected: dict[str, Tensor], device: torch.device, budget: Budget, quick: bool
) -> dict[str, Any]:
    """Return times, errors and memory of the large model in its dtype.

    Args:
        model: Model.
        batch: Batch.
        expected: Sums of squares in float32, one example at a time.
        device: Device of model and batch.
        budget: Remaining time.
        quick: If True, repeat less often.
    """
    narrow = next(model.parameters()).dtype != torch.float32
    repeat = 3 if quick or not narrow else 7
    found: dict[str, Any] = {}
    with peak_gb(device) as peak:
        plain_ms = median_ms(lambda: plain(model, batch), device, repeat, warm=2)
    model.zero_grad(set_to_none=True)
    found["plain"] = {"ms": plain_ms, "peak_gb": peak}
    for kind in ("true", "sampled"):

        def run(kind: str = kind) -> dict[str, Any]:
            with peak_gb(device) as peak:
                _, figures = passes(model, batch, device, 7 if quick or not narrow else 12, labels=kind)
            figures["peak_gb"] = peak
            if kind == "true":
                once = FisherAccumulator(model, labels=kind, task=task_of(batch), verify=False)
                once.add(batch)
                figures["error"] = relative_l2(totals(model, once), expected)
            return ratios(figures, plain_ms)

        found[kind] = budget.attempt(f"large {kind} {'narrow' if narrow else 'wide'}", run, least=5.0)
    if narrow:
        found["inline"] = budget.attempt(
            "large inline", lambda: ratios(passes(model, batch, device, 9, inline=True)[1], plain_ms), least=5.0
        )
        found["loop_error"] = budget.attempt(
            "large loop", lambda: relative_l2(one_by_one(model, batch), expected), least=5.0
        )
        found["kernels"] = budget.attempt("large profile", lambda: profile(model, batch, device), least=8.0)
        found["offload"] = budget.attempt(
            "large offload", lambda: measure_offload(model, batch, expected, device, plain_ms), least=15.0
        )
    return found


def measure_offload(
    model: nn.Module, batch: Batch, expected: dict[str, Tensor], device: torch.device, plain_ms: float
) -> dict[str, Any]:
    """Return times and memory with accumulators in host memory, and their error."""
    with peak_gb(device) as peak:
        accumulator = FisherAccumulator(model, task=task_of(batch), verify=False, offload=True)
        times = [milliseconds(lambda: accumulator.add(batch), device) for _ in range(3)]
    for total in accumulator.accumulators.values():
        total /= 3
    wide = {name: tensor.cpu() for name, tensor in expected.items()}
    error = relative_l2(totals(model, accumulator), wide)
    return {"ms": min(times), "ratio": min(times) / plain_ms, "peak_gb": peak, "error": error}


def profile(model: nn.Module, batch: Batch, device: torch.device) -> dict[str, Any]:
    """Return the kernels that take most of the time of a plain pass and of ours, in ms."""
    if device.type != "cuda":
        return {}
    accumulator = FisherAccumulator(model, task=task_of(batch), verify=False, cuda_graph=False)
    accumulator.add(batch)
    works: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(model, batch),
        "ours": lambda: accumulator.add(batch),
    }
    found = {}
    for title, work in works.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize(device)
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        found[title] = {
            "ms": sum(event.self_device_time_total for event in events) / 1e3,
            "most": [
                [event.key[:90], event.count, round(event.self_device_time_total / 1e3, 3)] for event in events[:14]
            ],
        }
    model.zero_grad(set_to_none=True)
    return found


def tiny(name: str, device: torch.device) -> tuple[nn.Module, Batch]:
    """Return a model and a batch of the same kind as the small ones, for a CPU."""
    torch.manual_seed(0)
    if name == "cnn":
        model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
        return model.to(device).eval(), (torch.randn(3, 3, 6, 6, device=device), torch.arange(3, device=device))
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24}
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2}
    ids = torch.randint(3, 31, (3, 7), device=device)
    if name == "bert":
        config = transformers.BertConfig(**sizes, **layers, num_labels=3, max_position_embeddings=9)
        model = transformers.BertForSequenceClassification(config)
        return model.to(device).eval(), {"input_ids": ids, "labels": torch.arange(3, device=device)}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **layers, use_cache=False))
    return model.to(device).eval(), {"input_ids": ids, "labels": ids}


def measure_small(name: str, dtype: torch.dtype, device: torch.device, quick: bool) -> dict[str, Any]:
    """Return times of a small model, eagerly and as CUDA graphs, and how far both are from single examples."""
    model, batch = tiny(name, device) if quick else build(name, str(device))
    model = model.to(dtype)
    batch = convert(batch, lambda part: part.to(dtype) if part.is_floating_point() else part)
    wide = convert(batch, lambda part: part.float() if part.is_floating_point() else part)
    expected = one_by_one(copy.deepcopy(model).float(), wide)
    plain_ms = median_ms(lambda: plain(model, batch), device, 3 if quick else 20, warm=3)
    found: dict[str, Any] = {"plain_ms": plain_ms}
    count = 9 if quick else 21
    sums = {}
    for title, graph in (("eager", False), ("graph", True)):
        accumulator, figures = passes(model, batch, device, count, cuda_graph=graph)
        sums[title] = {key: total / count for key, total in totals(model, accumulator).items()}
        figures["error"] = relative_l2(sums[title], expected)
        found[title] = ratios(figures, plain_ms)
    found["graph_against_eager"] = relative_l2(sums["graph"], sums["eager"])
    drawn = [passes(model, batch, device, 8, labels="sampled", cuda_graph=graph)[0] for graph in (False, True)]
    found["drawn_against_eager"] = relative_l2(totals(model, drawn[1]), totals(model, drawn[0]))
    return found


def measure_fallback(device: torch.device) -> dict[str, Any]:
    """Return True if a model that waits for the host runs without graphs and then draws random numbers."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=4, experts_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).to(device).eval()
    ids = torch.randint(64, (4, 16), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected = one_by_one(model, batch)
    accumulator, figures = passes(model, batch, device, 7)
    error = relative_l2({key: total / 7 for key, total in totals(model, accumulator).items()}, expected)
    return {
        "error": error,
        "graphs": figures["graphs"],
        "random": float(torch.randn(3, device=device).isfinite().all()),
    }


def measure(device: torch.device | str, quick: bool = False, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure everything, and return the figures.

    Args:
        device: A GPU; or a CPU, in small.
        quick: If True, models are tiny and few passes are timed.
        seconds: Time after which no further part begins.

    Returns:
        ``environment``, ``large`` (by dtype), ``small`` (by model and dtype), ``kernels``, ``fallback``, ``goals`` and
        ``problems``: the parts that failed or were left out, and why.
    """
    device, budget = torch.device(device), Budget(seconds)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    found: dict[str, Any] = {"environment": environment(device), "small": {}, "seconds": {}}

    def part(title: str, work: Callable[[], Any], least: float = 0.0) -> Any:
        began = time.monotonic()
        result = budget.attempt(title, work, least)
        found["seconds"][title] = round(time.monotonic() - began, 1)
        return result

    found["large"] = measure_both(device, quick, budget, part)
    for name in SMALL:
        found["small"][f"{name} float32"] = part(name, lambda n=name: measure_small(n, torch.float32, device, quick), 5)
    found["fallback"] = part("fallback", lambda: measure_fallback(device), 5)
    found["kernels"] = part("kernels", lambda: measure_kernels(device, quick, budget), 10)
    for name in SMALL:
        title = f"{name} bfloat16"
        found["small"][title] = part(title, lambda n=name: measure_small(n, torch.bfloat16, device, quick), 8)
    found["goals"], found["problems"] = goals(found), budget.problems
    return found


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters alone: rotary frequencies stay in float32, as ``from_pretrained`` leaves them."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def measure_both(
    device: torch.device, quick: bool, budget: Budget, part: Callable[..., Any]
) -> dict[str, dict[str, Any] | None]:
    """Return the figures of the large model in bfloat16 and float32, with the same weights."""
    model, batch = large_llama(device, quick)
    expected = part("reference", lambda: one_by_one(model, batch))
    if expected is None:
        return {}
    found = {}
    for dtype, least in ((torch.bfloat16, 0), (torch.float32, 25)):
        title = str(dtype).removeprefix("torch.")
        _cast_parameters(model, dtype)
        found[title] = part(
            f"large {title}",
            lambda model=model: measure_large(model, batch, expected, device, budget, quick),
            least if not quick else 0,
        )
    return found


def goals(found: dict[str, Any]) -> dict[str, Any]:
    """Return a mapping from goals to number, limit and verdict, without goals that have no number."""
    large = (found["large"].get("bfloat16") or {}).get("true") or {}
    reached = {"large bfloat16": large.get("ratio"), "checked": large.get("checked_ratio")}
    for name in ("bert", "llama"):
        small = found["small"].get(f"{name} float32") or {}
        reached[name] = (small.get("graph") or {}).get("ratio")
    return {
        name: {"figure": round(figure, 3), "most": GOALS[name], "met": figure <= GOALS[name]}
        for name, figure in reached.items()
        if figure is not None
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return a short table of the numbers."""
    rows = [", ".join(f"{key} {value}" for key, value in found["environment"].items())]
    for title, figures in found["large"].items():
        if figures:
            rows.append(f"large {title}: plain {figures['plain']['ms']:.1f} ms, peak {figures['plain']['peak_gb']} GB")
            kinds = ("true", "sampled", "inline", "offload")
            rows += [f"  {kind}: {_row(figures[kind])}" for kind in kinds if figures.get(kind)]
    for title, figures in found["small"].items():
        if figures:
            rows.append(f"{title}: plain {figures['plain_ms']:.2f} ms")
            rows += [f"  {kind}: {_row(figures[kind])}" for kind in ("eager", "graph")]
    for title, figures in (found["kernels"] or {}).items():
        if figures:
            rows.append(f"{title}: " + ", ".join(f"{name} {ms:.3f}" for name, ms in figures["ms"].items()))
    rows += [f"goal {name}: {goal}" for name, goal in found["goals"].items()]
    rows += [f"problem {part}: {problem}" for part, problem in found["problems"].items()]
    return rows


def _row(figures: dict[str, Any]) -> str:
    kept = ("ratio", "checked_ratio", "first_ratio", "error", "graphs", "peak_gb")
    shown = {key: figures[key] for key in kept if key in figures}
    for one in figures.get("checked", ()):
        shown[f"batch {one['batch']}{' (graph)' if one['replayed'] else ''}"] = one["ratio"]
    return ", ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )


def main() -> int:
    """Measure, print a table, and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, few passes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="after which no further part begins")
    parser.add_argument("--json", type=Path, help="write the figures to a file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    found = measure(options.device, options.quick, options.seconds)
    print("\n".join(lines(found)), flush=True)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
