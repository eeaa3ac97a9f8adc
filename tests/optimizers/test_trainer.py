"""Checkpoints that the real Trainer writes here and now; the truth is the optimizer's own state, by live parameter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch.utils.data import Dataset

from squisher_mergekit import load_fisher

STEPS, LENGTH = 3, 11


def _bert():
    config = transformers.BertConfig(
        vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=12,
        max_position_embeddings=17, num_labels=5,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=12, n_layer=3, n_head=3, n_positions=17, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=12, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=19, max_position_embeddings=17,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def _qwen2():
    config = transformers.Qwen2Config(
        vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=19, max_position_embeddings=17, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.Qwen2ForCausalLM(config)


def _t5():
    config = transformers.T5Config(
        vocab_size=53, d_model=12, d_kv=4, d_ff=19, num_layers=2, num_decoder_layers=2, num_heads=3,
        decoder_start_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _mixtral():
    # The kernel that multiplies packed experts wants rows of whole 16 bytes: 12 and 20 floats.
    config = transformers.MixtralConfig(
        vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1,
        intermediate_size=20, max_position_embeddings=17, num_local_experts=3, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config)


MODELS = {"bert": _bert, "gpt2": _gpt2, "llama": _llama, "qwen2": _qwen2, "t5": _t5, "mixtral": _mixtral}
FROZEN = {
    "gpt2": ("transformer.wpe.", "transformer.h.0.", "transformer.h.2.mlp."),
    "llama": ("model.embed_tokens.", "model.layers.1."),
}
RUNS = [*((name, False) for name in MODELS), *((name, True) for name in FROZEN)]


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


@dataclass
class Run:
    checkpoint: Path
    base: Path
    model: Any
    optimizer: Any

    def accumulators(self):
        """Name in memory -> accumulator, by the live parameter object."""
        parameters = dict(self.model.named_parameters())
        return {n: self.optimizer.state[p]["exp_avg_sq"] for n, p in parameters.items() if p in self.optimizer.state}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return a function that trains one architecture, once, with the real Trainer."""
    runs = {}

    def train(name, frozen):
        if (name, frozen) not in runs:
            runs[name, frozen] = _train(name, frozen, tmp_path_factory.mktemp(name))
        return runs[name, frozen]

    return train


def _train(name, frozen, folder):
    transformers.set_seed(3)
    model = MODELS[name]()
    model.save_pretrained(folder / "base")
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(not (frozen and key.startswith(FROZEN[name])))
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "run"), max_steps=STEPS, save_steps=STEPS, per_device_train_batch_size=2,
        learning_rate=1e-2, weight_decay=0.01, use_cpu=True, report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens(name))
    trainer.train()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    return Run(folder / "run" / f"checkpoint-{STEPS}", folder / "base", model, optimizer)


def _on_disk(accumulators):
    """Name the accumulators as the checkpoint does: Mixtral's packed experts one by one, all others as they are."""
    named = {}
    for name, tensor in accumulators.items():
        if name.endswith(".experts.gate_up_proj"):
            width = tensor.shape[1] // 2
            block = name.removesuffix(".mlp.experts.gate_up_proj") + ".block_sparse_moe.experts"
            for k in range(len(tensor)):
                named[f"{block}.{k}.w1.weight"] = tensor[k, :width]
                named[f"{block}.{k}.w3.weight"] = tensor[k, width:]
        elif name.endswith(".experts.down_proj"):
            block = name.removesuffix(".mlp.experts.down_proj") + ".block_sparse_moe.experts"
            named.update({f"{block}.{k}.w2.weight": tensor[k] for k in range(len(tensor))})
        else:
            named[name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")] = tensor
    return named


@pytest.mark.parametrize(("name", "frozen"), RUNS)
def test_every_accumulator_of_a_real_run_gets_its_name(trained, name, frozen):
    """What the live optimizer holds for a parameter is what the Fisher has under that parameter's name."""
    run = trained(name, frozen)
    expected = _on_disk(run.accumulators())
    fisher = load_fisher(run.checkpoint, base=run.base if frozen else None)
    assert set(fisher) == set(expected)
    assert all(torch.equal(fisher[key], tensor) for key, tensor in expected.items())
    assert len({tensor.double().sum().item() for tensor in expected.values()}) == len(expected)  # all can be told apart
    assert fisher.config.steps == STEPS
    assert fisher.config.optimizer.class_ == "torch.optim.AdamW"
    assert set(fisher) | set(fisher.config.coverage.without) >= {*expected, *_weights(run)}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_layers_of_a_real_run_are_listed(trained, name):
    """The frozen parameters, and they alone, are listed as not given to the optimizer."""
    run = trained(name, True)
    without = load_fisher(run.checkpoint, base=run.base).config.coverage.without
    frozen = {key for key in _weights(run) if key.startswith(FROZEN[name])}
    assert {key for key, why in without.items() if why == "not given to the optimizer (frozen)"} == frozen


def _weights(run):
    with safe_open(run.checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "t5"])
def test_tied_embeddings_share_one_accumulator(trained, name):
    """The other names of a tied embedding find the same Fisher, and are listed as tied."""
    run = trained(name, False)
    fisher = load_fisher(run.checkpoint)
    tied = {key: why for key, why in fisher.config.coverage.without.items() if why.startswith("tied to ")}
    assert "lm_head.weight" in tied
    shared = run.accumulators()["shared.weight" if name == "t5" else next(iter(run.accumulators()))]
    assert all(torch.equal(fisher[key], shared) for key in tied)


def test_numbering_named_parameters_is_wrong_for_all_of_them(trained):
    """Index i is not the i-th of named_parameters(); for every architecture some shapes agree, and no check notices."""
    wrong, unnoticed = set(), set()
    for name in MODELS:
        run = trained(name, False)
        state = torch.load(run.checkpoint / "optimizer.pt", weights_only=True)["state"]
        truth = run.accumulators()
        for index, (key, parameter) in zip(sorted(state), run.model.named_parameters(), strict=True):
            found = state[index]["exp_avg_sq"]
            if found.shape != parameter.shape or not torch.equal(found, truth[key]):
                wrong.add(name)
                if found.shape == parameter.shape:
                    unnoticed.add(name)
    assert wrong == set(MODELS)
    assert unnoticed == set(MODELS)
