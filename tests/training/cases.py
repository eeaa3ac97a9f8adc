"""Runs of the real Trainer, small enough for a test."""

import torch
import transformers
from torch.utils.data import Dataset

from tests.optimizers.test_trainer import MODELS

STEPS, LENGTH = 3, 11


class Tokens(Dataset):
    """Random token ids: 24 rows, of labels too."""

    def __init__(self, name):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 53, (24, LENGTH), generator=generator)
        self.labels = torch.randint(0, 5, (24,), generator=generator) if name == "bert" else self.ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def make(name, dtype=torch.float32):
    """Return a model, the same at each call."""
    transformers.set_seed(3)
    return MODELS[name]().to(dtype)


def trainer(name, folder, callbacks, model=None, optimizers=(None, None), **settings):
    """Return a Trainer that is ready to run, 4 examples a step."""
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
    """Return name in memory -> accumulator, by the live parameter object."""
    state = getattr(optimizer, "optimizer", optimizer).state
    return {name: state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters() if p in state}
