"""Cases of optimizers of other packages, saved by torch.save or the Trainer, and of optimizers to refuse."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.checkpoints.foreign_states.common import (
    BATCH,
    BETAS,
    STEPS,
    Case,
    Made,
    adamw,
    batches,
    groups_of,
    keep_weights,
    loss_of,
    tiny,
    train,
)

REFUSED = ("UnsupportedStateError", "NothingKeptError", "UnsafeFileError")


def live(model: nn.Module, optimizer: torch.optim.Optimizer, key: str = "exp_avg_sq") -> dict[str, Tensor]:
    """Return the second moments of a live optimizer by parameter name."""
    return {name: optimizer.state[p][key] for name, p in model.named_parameters() if key in optimizer.state.get(p, {})}


def built(package: str, name: str, groups: Any, settings: Mapping[str, Any]) -> Any:
    """Return an optimizer of a package."""
    return getattr(importlib.import_module(package), name)(groups, **settings)


def corrected(package: str, name: str, settings: Mapping[str, Any], key: str = "exp_avg_sq") -> bool:
    """Return True if an optimizer stores a bias-corrected moving average; a trial with constant gradients decides.

    Raises:
        AssertionError: The state is neither 1 nor 1 - beta2^t times the squared gradient.
    """
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = built(package, name, [parameter], settings)
    if hasattr(optimizer, "train"):
        optimizer.train()
    for _ in range(3):
        parameter.grad = torch.full((2, 3), 0.1)
        optimizer.step()
    found = float(optimizer.state[parameter][key].mean()) / 0.1**2
    beta2 = settings.get("betas", BETAS)[1]
    assert min(abs(found - 1), abs(found - (1 - beta2**3))) < 1e-3, found
    return abs(found - 1) < 1e-3


def single(
    out: Path, package: str, name: str, trial: bool = True, mode: str = "", two: bool = False, **settings: Any
) -> Made:
    """Save the state dict of one optimizer as ``optimizer.pt``, and the weights."""
    settings = {"lr": 1e-3, "betas": BETAS, **settings}
    settings = {key: value for key, value in settings.items() if value is not None}
    model = tiny(layers=2)
    optimizer = built(package, name, groups_of(model, two), settings)
    if mode:
        optimizer.train()
    train(model, optimizer)
    if mode == "eval":
        optimizer.eval()
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    more = {"bias_corrected": corrected(package, name, settings)} if trial else {}
    beta2 = settings["betas"][1] if "betas" in settings else None
    return Made(live(model, optimizer), f"{package}.{name}", "plain torch", beta2, file="optimizer.pt", more=more)


def trainer(out: Path, optim: str, wide: bool = False, dequantized: Any = None, **more: Any) -> Made:
    """Train with the Hugging Face Trainer, which saves the last step."""
    from transformers import Trainer, TrainingArguments

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # otherwise the Trainer would join a distributed run
        del os.environ[name]
    model = tiny(wide, layers=1 if wide else 2)
    data = [{"input_ids": row, "labels": row} for ids in batches() for row in ids]
    settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "adam_beta2": BETAS[1], "save_steps": STEPS}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1}
    run = Trainer(
        model, TrainingArguments(str(out / "run"), optim=optim, **settings, **quiet, **more), train_dataset=data
    )
    run.train()
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    for path in (out / "run" / f"checkpoint-{STEPS}").iterdir():
        if path.name not in ("training_args.bin", "rng_state.pth", "generation_config.json", "scheduler.pt"):
            path.rename(out / path.name)
    shutil.rmtree(out / "run")
    truth = dequantized(model, inner) if dequantized else live(model, inner)
    kind = f"{type(inner).__module__}.{type(inner).__name__}"
    return Made(truth, kind, "transformers.Trainer", file="optimizer.pt", more={"optim": optim})


def bundle(out: Path, as_list: bool = False, inside: bool = False) -> Made:
    """Save the state dicts of Muon (matrices) and AdamW (the rest) in one file."""
    model = tiny(layers=2)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in model.parameters() if not any(p is other for other in matrices)]
    muon, other = torch.optim.Muon(matrices, lr=1e-3), adamw(rest)
    for ids in batches():
        loss_of(model, ids).backward()
        for one in (muon, other):
            one.step()
            one.zero_grad()
    saved: Any = (
        [muon.state_dict(), other.state_dict()] if as_list else {"muon": muon.state_dict(), "adamw": other.state_dict()}
    )
    torch.save({"model": model.state_dict(), "optimizers": saved} if inside else saved, out / "optimizers.pt")
    keep_weights(out, model.config, model.state_dict())
    return Made(live(model, other), "torch.optim.Muon with torch.optim.AdamW", "plain torch", file="optimizers.pt")


def sparse(out: Path) -> Made:
    """Save the state dicts of SparseAdam (embeddings) and AdamW (the rest) as a list."""
    model = tiny(layers=1, tie_word_embeddings=False)
    embedding = model.model.embed_tokens
    embedding.sparse = True
    rest = [p for p in model.parameters() if p is not embedding.weight]
    both = [torch.optim.SparseAdam([embedding.weight], lr=1e-3, betas=BETAS), adamw(rest)]
    for ids in batches():
        loss_of(model, ids).backward()
        for one in both:
            one.step()
            one.zero_grad()
    torch.save([one.state_dict() for one in both], out / "optimizers.pt")
    model.save_pretrained(out)
    (out / "generation_config.json").unlink()
    truth = {**live(model, both[0]), **live(model, both[1])}
    return Made(truth, "torch.optim.SparseAdam with torch.optim.AdamW", "plain torch", file="optimizers.pt")


def ivon(out: Path) -> Made:
    """Save IVON, whose Hessian is one flat tensor in its group."""
    from ivon import IVON

    model = tiny(layers=2)
    optimizer = IVON(model.parameters(), lr=1e-2, ess=100.0, hess_init=0.1, beta2=BETAS[1])
    for ids in batches():
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(model, ids).backward()
        optimizer.step()
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    flat, begin, truth = optimizer.param_groups[0]["hess"], 0, {}
    names = {id(p): name for name, p in model.named_parameters()}
    for p in optimizer.param_groups[0]["params"]:
        truth[names[id(p)]] = flat[begin : begin + p.numel()].reshape(p.shape)
        begin += p.numel()
    return Made(truth, "ivon.IVON", "plain torch", step=None, file="optimizer.pt")


def projected(out: Path, package: str, name: str, **settings: Any) -> Made:
    """Save an optimizer whose moments of matrices belong to a projected gradient."""
    model = tiny(layers=2)
    matrices = [p for name_, p in model.named_parameters() if "_proj" in name_]
    rest = [p for p in model.parameters() if not any(p is other for other in matrices)]
    groups = [{"params": rest}, {"params": matrices, "rank": 2, "update_proj_gap": 2, "scale": 1.0, **settings}]
    optimizer = built(package, name, groups, {"lr": 1e-3})
    train(model, optimizer)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    return Made(optimizer=f"{package}.{name}", trainer="plain torch", beta2=None, file="optimizer.pt")


def adalomo(out: Path) -> Made:
    """Save AdaLomo, which steps inside the backward pass; its calls of cuda() do nothing here."""
    from lomo_optim import AdaLomo

    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    model = tiny(layers=2)
    optimizer = AdaLomo(model)
    for ids in batches():
        optimizer.fused_backward(loss_of(model, ids), 1e-3)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    keep_weights(out, model.config, model.state_dict())
    return Made(optimizer="lomo_optim.AdaLomo", trainer="plain torch", beta2=None, file="optimizer.pt")


def _of(package: str, name: str, library: str, **options: Any) -> Case:
    return Case(single, {"package": package, "name": name, **options}, libraries=(library,))


def _refuse(make: Any, why: str, library: str, **options: Any) -> Case:
    return Case(make, options, refuse=REFUSED, why=why, libraries=(library,))


def _wrong(name: str, why: str) -> Case:
    """Return a case of pytorch_optimizer that a reader must refuse."""
    return _refuse(single, why, "pytorch_optimizer", package="pytorch_optimizer", name=name, trial=False)


_TARGETS = {"optim_target_modules": [r".*attn.*", r".*mlp.*"]}
_SCHEDULEFREE = {"package": "schedulefree", "library": "schedulefree"}
_OTHERS = {"package": "pytorch_optimizer", "library": "pytorch_optimizer"}

CASES = {
    "schedulefree_eval": _of(name="AdamWScheduleFree", mode="eval", **_SCHEDULEFREE),
    "schedulefree_train": _of(name="AdamWScheduleFree", mode="train", **_SCHEDULEFREE),
    "schedulefree_radam": _of(name="RAdamScheduleFree", mode="eval", **_SCHEDULEFREE),
    "schedulefree_sgd": _refuse(
        single,
        "no second moment",
        package="schedulefree",
        library="schedulefree",
        name="SGDScheduleFree",
        trial=False,
        mode="eval",
        betas=None,
    ),
    "optimi_adamw": _of("optimi", "AdamW", "torch-optimi"),
    "optimi_stableadamw": _of("optimi", "StableAdamW", "torch-optimi", two=True),
    "other_ademamix": _of(name="AdEMAMix", betas=(*BETAS, 0.9999), **_OTHERS),
    "other_lamb": _of(name="Lamb", **_OTHERS),
    "other_lamb_two": _of(name="Lamb", two=True, **_OTHERS),
    "other_adamp": _of(name="AdamP", **_OTHERS),
    "other_qhadam": _of(name="QHAdam", **_OTHERS),
    "other_stableadamw": _of(name="StableAdamW", **_OTHERS),
    "other_adamw_schedulefree": _of(name="ScheduleFreeAdamW", mode="eval", **_OTHERS),
    "other_adopt": _wrong("ADOPT", "v is no moving average from 0"),
    "other_yogi": _wrong("Yogi", "v is no moving average"),
    "other_adabelief": _wrong("AdaBelief", "variance, not the second moment"),
    "other_lion": _wrong("Lion", "no second moment"),
    "ivon": Case(ivon, libraries=("ivon-opt",)),
    "sparse_adam": Case(sparse),
    "muon_dict": Case(bundle),
    "muon_list": Case(bundle, {"as_list": True}),
    "muon_beside_model": Case(bundle, {"inside": True}),
    "galore": _refuse(
        projected, "projected", "galore-torch", package="galore_torch", name="GaLoreAdamW", proj_type="std"
    ),
    "apollo": _refuse(
        projected,
        "projected",
        "apollo-torch",
        package="apollo_torch",
        name="APOLLOAdamW",
        proj="random",
        proj_type="std",
        scale_type="channel",
    ),
    "adalomo": _refuse(adalomo, "nothing in its state", "lomo-optim"),
    "trainer_galore": _refuse(trainer, "projected", "galore-torch", optim="galore_adamw", **_TARGETS),
    "trainer_galore_layerwise": _refuse(
        trainer, "layer-wise dummy", "galore-torch", optim="galore_adamw_layerwise", **_TARGETS
    ),
    "trainer_apollo": _refuse(trainer, "projected", "apollo-torch", optim="apollo_adamw", **_TARGETS),
    "trainer_schedulefree": Case(trainer, {"optim": "schedule_free_adamw"}, libraries=("schedulefree",)),
    "trainer_stableadamw": Case(trainer, {"optim": "stable_adamw"}, libraries=("torch-optimi",)),
}
