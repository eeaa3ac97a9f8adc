"""Worker process that fine-tunes and scores: it reads jobs as JSON lines from stdin and writes events to stdout."""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

LENGTH, BATCH, LEARNING_RATE, CLIP = 40, 16, 1e-4, 1.0
HEAD = ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
"""Parameters of a task's head. The encoder was trained on means of tokens, so its pooler starts unused; fine-tuning
makes it the first layer of each task's head, although its name begins with ``bert.``."""
Report = Callable[[float], None]
"""Function that takes the share of the job since its last call."""


def train(start: str, data: str, out: str, labels: int, seed: int, report: Report) -> dict[str, Any]:
    """Fine-tune all weights for one pass over the training texts with AdamW, keeping the optimizer state.

    Args:
        start: Folder of the model to start from.
        data: JSON file with ``train``: pairs of text and class.
        out: Folder in which the Trainer writes ``checkpoint-N`` with model, tokenizer and ``optimizer.pt``.
        labels: Width of the head.
        seed: Seed of head, dropout and order.
        report: Function to call after each step.

    Returns:
        ``checkpoint``: folder of the checkpoint; ``steps``: number of steps; ``clipped``: share of clipped steps.
    """
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, num_labels=labels)
    rows = json.loads(Path(data).read_text(encoding="utf8"))["train"]
    examples = [{**_encode(tokenizer, text), "labels": label} for text, label in rows]
    steps = len(examples) // BATCH

    class Steps(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            report(1 / steps)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=out,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=CLIP,
            optim="adamw_torch",
            save_strategy="steps",
            save_steps=steps,
            logging_steps=1,
            seed=seed,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    clipped = sum(norm > CLIP for norm in norms) / len(norms)
    return {"checkpoint": str(Path(out) / f"checkpoint-{steps}"), "steps": steps, "clipped": clipped}


def score(model: str, tasks: list[dict[str, Any]], report: Report) -> dict[str, float]:
    """Return the accuracy of a model on the held-out texts of each task.

    Args:
        model: Folder of the model.
        tasks: For each task its ``name``, ``data`` (JSON file with ``test``) and ``head`` (folder of the model whose
            pooler and classifier replace those of ``model``, or null).
        report: Function to call after each batch.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    net = AutoModelForSequenceClassification.from_pretrained(model).eval()
    found = {}
    for task in tasks:
        if task["head"]:
            _take_head(net, Path(task["head"]))
        rows = json.loads(Path(task["data"]).read_text(encoding="utf8"))["test"]
        rows.sort(key=lambda row: len(row[0]))
        right = 0
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            inputs = tokenizer.pad([_encode(tokenizer, text) for text, _ in batch], return_tensors="pt")
            with torch.inference_mode():
                guess = net(**inputs).logits.argmax(-1).tolist()
            right += sum(one == label for one, (_, label) in zip(guess, batch, strict=True))
            report(len(batch) / len(rows) / len(tasks))
        found[task["name"]] = right / len(rows)
    return found


def _encode(tokenizer: Any, text: str) -> dict[str, list[int]]:
    return dict(tokenizer(text, truncation=True, max_length=LENGTH))


def _take_head(net: Any, folder: Path) -> None:
    own = dict(net.named_parameters())
    with safe_open(folder / "model.safetensors", framework="pt") as file, torch.no_grad():
        for name in HEAD:
            own[name].copy_(file.get_tensor(name))


JOBS: dict[str, Callable[..., Any]] = {"train": train, "score": score}


def main() -> None:
    """Answer each job with progress events, and then with its result or its exception."""
    events = os.fdopen(os.dup(1), "w", encoding="utf8", buffering=1)
    os.dup2(2, 1)  # keeps the output of libraries out of the events
    torch.set_num_threads(1)

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    send(ready=True)
    for line in sys.stdin:
        job = json.loads(line)
        started, cpu = time.perf_counter(), time.process_time()
        try:
            result = JOBS[job.pop("do")](**job, report=lambda share: send(share=share))
        except Exception as error:
            traceback.print_exc()
            send(error=f"{type(error).__name__}: {error}")
        else:
            send(result=result, seconds=time.perf_counter() - started, cpu=time.process_time() - cpu)


if __name__ == "__main__":
    main()
