"""Folders and Python names of the examples in README.md files, as small as possible.

``World.prepare`` makes the folders that a text names: ``runs/NAME`` (a model), ``runs/NAME/checkpoint-N`` (a real
checkpoint of the Trainer with its optimizer state), ``adapters/NAME/checkpoint-N`` (the same of a LoRA over ``base``),
``models/NAME`` (weights alone) and ``fishers/NAME`` (unless the text makes it). It also makes ``base``, ``math``,
``code`` and ``bert-base``, and data files ``NAME.jsonl``. A NAME in ``CLASSIFIERS`` is a BERT with three classes, any
other name a Llama.
"""

import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

CLASSIFIERS = {"movies", "products", "news", "reviews", "1", "2", "3"}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "one",
    "two",
    "three",
    "plus",
    "is",
    "good",
    "bad",
    "def",
    "return",
]
SIZES = {"vocab_size": len(WORDS), "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS, LENGTH, BATCH = 3, 7, 4


def tokenizer() -> Any:
    """Return a tokenizer of a few words."""
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


def rows(kind: str, seed: int) -> list[dict[str, Any]]:
    """Return examples in the format of the Trainer: token ids and the labels of a task."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, len(WORDS), (BATCH * STEPS, LENGTH), generator=generator)
    labels = ids if kind == "llama" else ids.sum(1) % 3
    return [{"input_ids": one, "labels": label} for one, label in zip(ids, labels, strict=True)]


def fresh(kind: str) -> Any:
    """Return an untrained model."""
    transformers.set_seed(3)
    if kind == "llama":
        config = transformers.LlamaConfig(**SIZES, intermediate_size=40, num_key_value_heads=2, use_cache=False)
        return transformers.LlamaForCausalLM(config)
    config = transformers.BertConfig(**SIZES, intermediate_size=40, num_labels=3, max_position_embeddings=32)
    return transformers.BertForSequenceClassification(config)


def arguments(folder: Path) -> Any:
    """Return the arguments of a short run of the Trainer."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
    )


def _train_adapter(base: Path, folder: Path, seed: int) -> None:
    """Train a LoRA over a base; its config names the base as the folder ``base``."""
    import peft

    transformers.set_seed(seed)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # peft's call
        model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained(base), lora)
    transformers.Trainer(model, arguments(folder), train_dataset=rows("llama", seed)).train()
    config = folder / f"checkpoint-{STEPS}" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "base"}))


@dataclass(frozen=True)
class World:
    """Trained runs in ``root/KIND-NUMBER``; the folders of an example are copies of them."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "World":
        """Train three models of each kind from one base."""
        for kind in ("llama", "bert"):
            base = root / f"{kind}-base"
            fresh(kind).save_pretrained(base)
            tokenizer().save_pretrained(base)
            for seed in range(3):
                run = transformers.Trainer(
                    type(fresh(kind)).from_pretrained(base),
                    arguments(root / f"{kind}-{seed}"),
                    train_dataset=rows(kind, seed),
                    processing_class=tokenizer(),
                )
                run.train()
                run.save_model()
        for seed in range(2):
            _train_adapter(root / "llama-base", root / f"lora-{seed}", seed)
        return cls(root)

    def prepare(self, folder: Path, text: str) -> None:
        """Make the folders that a text names, and its data."""
        numbers: dict[str, int] = {}
        for name, step in re.findall(r"\bruns/([\w-]+)(?:/checkpoint-(\d+))?", text):
            self._copy(self._run(name, numbers), folder / "runs" / name, weights_only=True)
            if step:
                self._copy(
                    self._run(name, numbers) / f"checkpoint-{STEPS}", folder / "runs" / name / f"checkpoint-{step}"
                )
        for number, name in enumerate(dict.fromkeys(re.findall(r"\badapters/([\w-]+)", text))):
            for step in re.findall(rf"\badapters/{name}/checkpoint-(\d+)", text):
                source = self.root / f"lora-{number % 2}" / f"checkpoint-{STEPS}"
                self._copy(source, folder / "adapters" / name / f"checkpoint-{step}")
        for name in re.findall(r"\bmodels/([\w-]+)", text):
            self._copy(self._run(name, numbers), folder / "models" / name, weights_only=True)
        made = re.findall(r"(?:-o |extract\([^)\n]*, |\.save\()[\"']?fishers/([\w-]+)", text)
        named = re.findall(r"\bfishers/([\w-]+)", text) + (
            ["movies", "products", "news"] if "fishers/{" in text else []
        )
        for name in set(named) - set(made):
            self._fisher(self._run(name, numbers), folder / "fishers" / name)
        for name in ("math", "code"):
            self._copy(self._run(name, numbers) / f"checkpoint-{STEPS}", folder / name)
        for name, base in {"base": "llama-base", "bert-base": "bert-base"}.items():
            self._copy(self.root / base, folder / name)
        for name in {"math", "code", *re.findall(r"\b([\w-]+)\.jsonl\b", text)}:
            texts: list[dict[str, object]] = [{"text": "one plus two is three"}, {"text": "def two return good"}]
            labels = [{"label": number} if name in CLASSIFIERS else {} for number in (0, 2)]
            lines = [json.dumps(row | label) + "\n" for row, label in zip(texts, labels, strict=True)]
            (folder / f"{name}.jsonl").write_text("".join(lines))

    def _run(self, name: str, numbers: dict[str, int]) -> Path:
        """Return the run for a name; the names of a kind use the three runs in turn."""
        kind = "bert" if name in CLASSIFIERS else "llama"
        number = numbers.setdefault(name, sum((other in CLASSIFIERS) == (kind == "bert") for other in numbers))
        return self.root / f"{kind}-{number % 3}"

    @staticmethod
    def _copy(source: Path, target: Path, weights_only: bool = False) -> None:
        hidden = shutil.ignore_patterns("checkpoint-*", "training_args.bin") if weights_only else None
        shutil.copytree(source, target, ignore=hidden, dirs_exist_ok=True)

    @staticmethod
    def _fisher(run: Path, target: Path) -> None:
        from squisher_mergekit import extract

        extract(run / f"checkpoint-{STEPS}", target)

    def names(self, folder: Path) -> dict[str, Any]:
        """Return fresh Python names for an example, see the docstring of ``tests/test_readme.py``."""
        from safetensors.torch import load_file

        from squisher_mergekit import load_fisher

        runs = [self.root / f"llama-{seed}" / f"checkpoint-{STEPS}" for seed in range(2)]
        model = transformers.LlamaForCausalLM.from_pretrained(runs[0])
        data = rows("llama", 0)
        stacked = {key: torch.stack([row[key] for row in data]) for key in data[0]}
        batches = [{key: part[start : start + 4] for key, part in stacked.items()} for start in range(0, 12, 4)]

        def loss_of(model: Any, batch: Any) -> torch.Tensor:
            return model(**batch).loss

        def train() -> None:
            loss_of(model, batches[0]).backward()

        return {
            "model": model,
            "base": transformers.LlamaForCausalLM.from_pretrained(self.root / "llama-base"),
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
            "tokenizer": tokenizer(),
            "data": data,
            "batches": batches,
            "batch": batches[0],
            "tasks": [batches, batches[:2]],
            "loss_of": loss_of,
            "train": train,
            "args": arguments(folder / "trained"),
            "Trainer": transformers.Trainer,
            "torch": torch,
            "fisher": load_fisher(runs[0]),
            "a": load_file(runs[0] / "model.safetensors"),
            "b": load_file(runs[1] / "model.safetensors"),
            "theta_0": load_file(self.root / "llama-base" / "model.safetensors"),
            "fisher_a": load_fisher(runs[0]),
            "fisher_b": load_fisher(runs[1]),
        }
