"""Runs of SOAP and Shampoo of pytorch_optimizer; ``python -m tests.optimizers.preconditioners.runs`` writes fixtures.

Each run leaves ``optimizer.pt``, and in ``truth.safetensors`` the live factors (``NAME.rows``, ``NAME.columns``) and
the sums of squared gradients per row and per column that the diagonal must have (``NAME.row_sums``,
``NAME.column_sums``).
"""

import itertools
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

FIXTURES = Path(__file__).parents[2] / "fixtures" / "preconditioners"
STEPS, BETA2 = 7, 0.9
NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
KINDS = {
    "soap": ("SOAP", {"betas": (0.9, BETA2), "precondition_frequency": 2}),
    "soap_one_side": ("SOAP", {"betas": (0.9, BETA2), "max_precondition_dim": 8}),
    "soap_vectors": ("SOAP", {"betas": (0.9, BETA2), "precondition_1d": True, "shampoo_beta": 0.8}),
    "shampoo": ("Shampoo", {"matrix_eps": 1e-3}),
    "scalable": ("ScalableShampoo", {"betas": (0.9, BETA2), "block_size": 5, "matrix_eps": 1e-3}),
    "scalable_rmsprop": ("ScalableShampoo", {"betas": (0.9, BETA2), "block_size": 8, "graft_type": 3}),
    "scalable_adagrad": (
        "ScalableShampoo",
        {"betas": (0.9, BETA2), "block_size": 64, "graft_type": 2, "shape_interpretation": False},
    ),
}


def model_of() -> nn.Module:
    """Return a model with matrices of [7, 13] and [11, 7]."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 7), nn.Tanh(), nn.Linear(7, 11))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> dict[str, list[torch.Tensor]]:
    """Train, and return name -> gradients."""
    gradients: dict[str, list[torch.Tensor]] = {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        (3 * model(torch.randn(5, 13, generator=generator))).square().mean().backward()
        for name, parameter in model.named_parameters():
            gradients.setdefault(name, []).append(parameter.grad.clone())
        optimizer.step()
    return gradients


def live_factors(state: Any) -> list[torch.Tensor]:
    """Return the factors over rows and columns of a matrix from the state in memory, ``[n, n]`` or in blocks."""
    if "pre_conditioner" not in state:
        return list(state["GG"] if "GG" in state else [state["pre_cond_0"], state["pre_cond_1"]])
    kept = state["pre_conditioner"]
    shape, width = kept.original_shape, max(len(each) for each in kept.statistics)
    blocks = [-(-size // width) for size in shape]
    found = [torch.zeros(count, min(width, size), min(width, size)) for count, size in zip(blocks, shape, strict=True)]
    tiles = iter(kept.statistics)
    for block in itertools.product(*map(range, blocks)):
        for _ in range(kept.rank - 2):
            next(tiles)  # the factor over an axis of size 1
        for place, factor in zip(block, found, strict=True):
            tile = next(tiles)
            factor[place, : len(tile), : len(tile)] += tile
    return found


def write(kind: str, out: Path) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Run an optimizer of pytorch_optimizer and save its state and the truth."""
    import pytorch_optimizer

    name, settings = KINDS[kind]
    model = model_of()
    optimizer = getattr(pytorch_optimizer, name)(model.parameters(), lr=1e-3, **settings)
    gradients = train(model, optimizer)
    out.mkdir(parents=True, exist_ok=True)
    torch.save(optimizer.state_dict(), out / "optimizer.pt")
    truth = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            for side, factor in zip(("rows", "columns"), live_factors(optimizer.state[parameter]), strict=True):
                if len(factor):
                    truth[f"{parameter_name}.{side}"] = factor.clone()
        decay = None if kind in ("shampoo", "scalable_adagrad") else settings.get("shampoo_beta", BETA2)
        total = torch.zeros_like(parameter, dtype=torch.float64)
        for gradient in gradients[parameter_name]:
            square = gradient.double().square()
            total = total + square if decay is None else decay * total + (1 - decay) * square
        axes = parameter.ndim == 2
        truth[f"{parameter_name}.row_sums"] = total.sum(1) if axes else total
        if axes:
            truth[f"{parameter_name}.column_sums"] = total.sum(0)
    save_file(truth, out / "truth.safetensors")
    return model, optimizer


if __name__ == "__main__":
    for each in KINDS:
        write(each, FIXTURES / each)
