"""Runs of LoRA adapters on small models: base, adapter and optimizer state on disk, and the truth from memory."""

import peft
import torch

from tests.small_models import MODELS

LORA = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam": lambda parameters, lr: torch.optim.Adam(parameters, lr=lr, betas=(0.8, 0.97)),
    "Adagrad": lambda parameters, lr: torch.optim.Adagrad(parameters, lr=lr, initial_accumulator_value=0.5),
    "RMSprop": torch.optim.RMSprop,
}


def train(folder, name="llama", steps=3, seed=0, *, base=None, frozen=None, optimizer="AdamW", dtype=None, **lora):
    """Train a LoRA for some steps and save base, adapter and optimizer state as the Trainer does.

    Returns:
        The adapted model, and name in memory -> second moment without bias, in float64.
    """
    torch.manual_seed(11)
    model = MODELS[name]() if base is None else base()
    model = model if dtype is None else model.to(dtype)
    model.save_pretrained(folder / "base")
    torch.manual_seed(100 + seed)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(LORA | lora)))
    for key, parameter in adapted.named_parameters():
        if frozen is not None and frozen in key:
            parameter.requires_grad_(False)
            parameter.data.normal_()
    named = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    optimizer = OPTIMIZERS[optimizer](named.values(), lr=1e-3)
    for step in range(steps):
        torch.manual_seed(1000 * seed + step)
        ids = torch.randint(3, 50, (4, 9))
        labels = torch.randint(0, 5, (4,)) if name == "bert" else ids
        optimizer.zero_grad()
        adapted(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
    adapted.save_pretrained(folder / "adapter")
    torch.save(optimizer.state_dict(), folder / "adapter" / "optimizer.pt")
    truth = {key: _mean_square(optimizer, optimizer.state[p]) for key, p in named.items() if p in optimizer.state}
    return adapted, truth


def _mean_square(optimizer, state):
    """Return the mean square per step, in float64."""
    steps, defaults = float(state["step"]), optimizer.defaults
    if "sum" in state:
        start = torch.tensor(defaults["initial_accumulator_value"]).double()
        return (state["sum"].double() - start) / steps
    if "square_avg" in state:
        return state["square_avg"].double() / (1 - defaults["alpha"] ** steps)
    return state["exp_avg_sq"].double() / (1 - defaults["betas"][1] ** steps)


def save_merged(adapted, folder):
    """Save the merged model, by peft and transformers themselves."""
    adapted.merge_and_unload().save_pretrained(folder)
    return folder
