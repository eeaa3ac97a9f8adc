"""Training and saving with other trainers: ``live_runs.py TRAINER FOLDER`` writes a checkpoint and its reference.

The reference is ``expected.safetensors`` with the accumulators that the optimizer had in memory. Each trainer runs in
its own process, because it keeps global state.
"""

import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

STEPS = 3


def llama():
    """Return a small Llama whose sizes all differ."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=19, max_position_embeddings=17, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def batches():
    """Return random token sequences."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 29, (3, 7), generator=generator) for _ in range(STEPS)]


def write_truth(folder, model, optimizer):
    """Save the state of the optimizer under the names of the model."""
    truth = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
    save_file(truth, folder / "expected.safetensors")


def accelerate(folder):
    """Run accelerate's save_state with the two usual groups."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = llama()
    decays = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98)))
    for ids in batches():
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    inner = accelerator.unwrap_model(model)
    inner.save_pretrained(folder)
    write_truth(folder, inner, optimizer.optimizer)


def lightning(folder):
    """Run Lightning's Trainer with the model as an attribute and two batches per step."""
    import lightning as L
    from torch.utils.data import DataLoader

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = llama()

        def training_step(self, ids, _):
            return self.net(input_ids=ids, labels=ids).loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.98))

    module = Module()
    trainer = L.Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.cat(batches() * 2), batch_size=3))
    trainer.save_checkpoint(folder / "last.ckpt")
    module.net.save_pretrained(folder)
    write_truth(folder, module.net, trainer.optimizers[0])


def fabric(folder):
    """Run Lightning Fabric, and save with keys of the user's choice."""
    import lightning as L

    fabric = L.Fabric(accelerator="cpu", devices=1)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    wrapped, stepping = fabric.setup(model, optimizer)
    for ids in batches():
        fabric.backward(wrapped(input_ids=ids, labels=ids).loss)
        stepping.step()
        stepping.zero_grad()
    fabric.save(folder / "state.ckpt", {"network": wrapped, "opt": stepping, "step": STEPS})
    model.save_pretrained(folder)
    write_truth(folder, model, optimizer)


if __name__ == "__main__":
    target = Path(sys.argv[2])
    target.mkdir(parents=True)
    {"accelerate": accelerate, "lightning": lightning, "fabric": fabric}[sys.argv[1]](target)
