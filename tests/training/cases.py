"""Runs of the real Trainer, small enough for a test."""

import torch
import transformers

from tests.small_models import MODELS, Tokens

STEPS = 3


def make(name, dtype=torch.float32):
    """Return a model with the same weights at each call."""
    transformers.set_seed(3)
    return MODELS[name]().to(dtype)


def trainer(name, folder, callbacks, model=None, optimizers=(None, None), **settings):
    """Return a Trainer that is ready to run, with 4 examples per step."""
    usual = {
        "max_steps": STEPS, "save_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        "dataloader_pin_memory": False, "logging_strategy": "no",
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **usual | settings)
    return transformers.Trainer(
        model=make(name) if model is None else model,
        args=arguments,
        train_dataset=Tokens(name),
        eval_dataset=Tokens(name),
        callbacks=callbacks,
        optimizers=optimizers,
    )


def accumulators(model, optimizer):
    """Return a mapping from names in memory to accumulators, by the live parameter objects."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {name: state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters() if p in state}
