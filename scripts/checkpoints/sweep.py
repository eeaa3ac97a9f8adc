"""Merges of two tiny random models of many architectures: whole by Eq. 13, or refused before anything is written.

python -m scripts.checkpoints.sweep [CLASS ...]
"""

import contextlib
import copy
import io
import logging
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scripts.checkpoints.architectures import KINDS
from squisher_mergekit.errors import SquisherError
from squisher_mergekit.fisher.config import FisherConfig

SHARES = (1.0, 0.6)


@dataclass(frozen=True)
class Outcome:
    """Outcome of the merge of one architecture.

    Attributes:
        kind: Kind of the architecture.
        name: Class of the model.
        verdict: ``whole``, ``refused`` or ``WRONG``.
        detail: Number of tensors, reason of the refusal, or the fault.
        seconds: Time that it took.
    """

    kind: str
    name: str
    verdict: str
    detail: str
    seconds: float


def sweep(names: Sequence[str] = ()) -> Iterator[Outcome]:
    """Merge each architecture, or some, and yield the outcomes."""
    for kind, classes in KINDS.items():
        for name, arguments in classes.items():
            if not names or name in names:
                start = time.perf_counter()
                with tempfile.TemporaryDirectory() as folder, _silence():
                    verdict, detail = _try(name, arguments, Path(folder))
                yield Outcome(kind, name, verdict, detail, time.perf_counter() - start)


def _try(name: str, arguments: dict[str, Any], root: Path) -> tuple[str, str]:
    """Merge two models, and judge the result by float64 on the models in memory."""
    cls = getattr(transformers, name)
    models, fishers = [_draw(cls, arguments, seed) for seed in (0, 1)], [_draw(cls, arguments, seed) for seed in (2, 3)]
    for i, (model, fisher) in enumerate(zip(models, fishers, strict=True)):
        with torch.no_grad():
            for tensor in (*fisher.parameters(), *fisher.buffers()):
                if tensor.is_floating_point():
                    tensor.square_().add_(0.01)
        model.save_pretrained(root / f"m{i}")
        fisher.save_pretrained(root / f"f{i}")
        _store_fisher(fisher, root / f"f{i}", root / f"m{i}")
    out = root / "merged"
    try:
        _merge(root, out)
    except SquisherError as error:
        return ("WRONG", f"refused, but left {out.name}") if out.exists() else ("refused", str(error))
    merged, info = cls.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    for key in ("missing_keys", "mismatched_keys"):
        if info[key]:
            return "WRONG", f"{len(info[key])} {key}: {sorted(map(str, info[key]))[:2]}"
    wrong = list(_differences(merged, models, fishers))
    if wrong:
        return "WRONG", f"{len(wrong)} tensors are not Eq. 13: {wrong[:2]}"
    return "whole", f"{len(load_file(out / 'model.safetensors'))} tensors"


def _draw(cls: Any, arguments: dict[str, Any], seed: int) -> Any:
    """Build a model with random weights and buffers."""
    model = cls(cls.config_class(**copy.deepcopy(arguments)))
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in state.items():
            # A table that is computed anew is not saved.
            if tensor.is_floating_point() and name not in (model._keys_to_ignore_on_save or ()):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def _store_fisher(fisher: nn.Module, folder: Path, target: Path) -> None:
    """Write a model's values as a portable Fisher; a buffer has none."""
    buffers = {name for name, _ in fisher.named_buffers()}
    tensors = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if name not in buffers}
    save_file(tensors, target / "fisher.safetensors")
    config = FisherConfig.model_validate({"estimator": "squisher", "statistic": "mean"})
    (target / "fisher_config.json").write_text(config.to_json(), encoding="utf-8")


def _merge(root: Path, out: Path) -> None:
    """Merge as ``mergekit-yaml`` does, in this process."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    models = [{"model": str(root / f"m{i}"), "parameters": {"weight": share}} for i, share in enumerate(SHARES)]
    config = MergeConfiguration.model_validate({"merge_method": "squisher", "models": models, "dtype": "float32"})
    run_merge(config, str(out), MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False))


def _differences(merged: nn.Module, models: Sequence[nn.Module], fishers: Sequence[nn.Module]) -> Iterator[str]:
    """Yield the parameters that differ from Eq. 13, and the buffers that differ from the weighted mean."""
    weights, scales = [dict(each.state_dict()) for each in models], [dict(each.state_dict()) for each in fishers]
    parameters = {name for name, _ in merged.named_parameters(remove_duplicate=False)}
    for name, found in merged.state_dict().items():
        thetas = [each[name].double() for each in weights]
        if not found.is_floating_point():
            expected = thetas[0]
        else:
            factors = [each[name].double() if name in parameters else torch.ones(()) for each in scales]
            expected = _eq13(thetas, factors)
        if found.shape != expected.shape or not torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6):
            yield name


def _eq13(thetas: Sequence[Tensor], fishers: Sequence[Tensor]) -> Tensor:
    numerator = sum(w * f * theta for w, f, theta in zip(SHARES, fishers, thetas, strict=True))
    return torch.as_tensor(numerator / sum(w * f for w, f in zip(SHARES, fishers, strict=True)))


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Drop log lines, bars and messages."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def main(names: Sequence[str]) -> int:
    """Print the table; return 1 if a merge was wrong."""
    wrong = total = 0
    for outcome in sweep(names):
        wrong += outcome.verdict == "WRONG"
        total += 1
        print(
            f"{outcome.kind:<11}{outcome.name:<38}{outcome.verdict:<9}{outcome.seconds:>5.1f} s  {outcome.detail}",
            flush=True,
        )
    print(f"{total} architectures, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
