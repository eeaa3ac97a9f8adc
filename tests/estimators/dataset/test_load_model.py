"""Models that an estimate refuses to load: weights drawn at random, code of their own."""

import json

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit.errors import MismatchError, NotFoundError, UnsupportedStateError, ValuesError
from squisher_mergekit.estimators.dataset.load_model import load_model
from tests.estimators.dataset.makers import bert_tokenizer

SIZES = {"vocab_size": 14, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 20}


def _saved(model, folder):
    model.save_pretrained(folder)
    bert_tokenizer().save_pretrained(folder)
    return str(folder)


def _headless_roberta():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES, max_position_embeddings=40))


def _headless_qwen():
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_key_value_heads=3))


@pytest.mark.parametrize("build", [_headless_roberta, _headless_qwen])
def test_a_head_drawn_at_random_is_refused(build, tmp_path):
    """A language model has no classifier: its Fisher would be that of a random head."""
    folder = _saved(build(), tmp_path / "model")
    with pytest.raises(MismatchError, match=r"newly initialised at random: (classifier|score)"):
        load_model(folder, "classification", False)


def test_a_model_with_all_its_weights_is_loaded(tmp_path):
    """Tied weights and heads in the files are no missing weights."""
    folder = _saved(_headless_roberta(), tmp_path / "model")
    model, _ = load_model(folder, "masked-lm", False)
    assert isinstance(model, transformers.RobertaForMaskedLM)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_a_head_saved_with_an_adapter_is_not_random(tmp_path):
    """The adapter of a classifier brings the head that its base model lacks."""
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))
    base.bert.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    bert_tokenizer().save_pretrained(tmp_path / "adapter")
    model, _ = load_model(str(tmp_path / "adapter"), "classification", False)
    assert any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("build", "task"), [(_headless_roberta, "masked-lm"), (_headless_qwen, "causal-lm")])
def test_code_of_a_model_is_neither_run_nor_offered(build, task, tmp_path, monkeypatch):
    """A folder with code of its own is refused in one line, without a question to the terminal."""
    folder = tmp_path / "model"
    _saved(build(), folder)
    content = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    content["auto_map"] = {
        "AutoConfig": "own.OwnConfig", "AutoModelForMaskedLM": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked a question"))
    with pytest.raises(NotFoundError, match="needs code of its own, which is never run"):
        load_model(str(folder), task, False)
    assert not (tmp_path / "ran").exists()


def _bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


@pytest.mark.parametrize("build", [_headless_roberta, _bert])
def test_an_encoder_is_no_causal_language_model(build, tmp_path):
    """An encoder sees the tokens that it would predict; the same model as a decoder is loaded."""
    model = build()
    folder = _saved(model, tmp_path / "encoder")
    with pytest.raises(MismatchError, match=r"is an encoder .*--task masked-lm"):
        load_model(folder, "causal-lm", False)
    model.config.is_decoder = True
    assert load_model(_saved(model, tmp_path / "decoder"), "causal-lm", False)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), UnsupportedStateError, "stored as float8"),
        (lambda t: t.to(torch.int8), UnsupportedStateError, "stored as int8"),
        (lambda t: t * float("nan"), ValuesError, "q_proj.weight of .* has 144 NaN"),
    ],
)
def test_weights_without_a_gradient_are_refused(change, kind, words, tmp_path):
    """Quantised and not finite weights have no Fisher; transformers would load them without a word."""
    folder = _saved(_headless_qwen(), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = {n: change(t) if n.endswith("q_proj.weight") else t for n, t in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(kind, match=words):
        load_model(folder, "causal-lm", False)
