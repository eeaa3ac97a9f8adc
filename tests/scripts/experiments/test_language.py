"""Generative model in two parts, its fine-tuning and scores, on a Llama of random weights."""

import pytest
import torch
import transformers

from scripts.experiments import language, structure_language
from squisher_mergekit import load_fisher

PROMPTS = [(1, 5, 9, 3), (2, 4), (7, 7, 7, 8, 6)]


@pytest.fixture
def llama():
    """Return a Llama of three layers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=31,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).eval()


def _logits(whole, prompt):
    with torch.no_grad():
        return whole(input_ids=torch.tensor([prompt])).logits[0]


def test_two_parts_are_the_whole(llama):
    """The last layers over the states of the first ones give the whole model's outputs, with and without padding."""
    wanted = [_logits(llama, prompt) for prompt in PROMPTS]
    bottom, top = language.divide(llama, 2)
    part = language.states(bottom, PROMPTS, [0, 0, 0])
    with torch.no_grad():
        found = top.lm_head(language.last(top, part))
        alone = top.lm_head(language.last(top, part.of([1])))
    for row, logits in enumerate(wanted):
        torch.testing.assert_close(found[row], logits[-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0], wanted[1][-1], rtol=1e-4, atol=1e-5)
    assert part.of([1]).hidden.shape[1] == 2


def test_the_loss_is_that_of_the_whole_model(llama):
    """The loss is the mean over tokens of all texts, not over texts, and counts no padding."""
    lines = [
        torch.nn.functional.cross_entropy(_logits(llama, p)[:-1], torch.tensor(p[1:]), reduction="sum") for p in PROMPTS
    ]
    bottom, top = language.divide(llama, 1)
    found = language.loss(top, language.states(bottom, PROMPTS, None))
    assert found == pytest.approx(float(sum(lines)) / sum(len(p) - 1 for p in PROMPTS), rel=1e-4)


def test_the_answer_is_the_likeliest_of_the_choices(llama):
    """Only the first tokens of the answers compete."""
    choices = (3, 8, 20)
    likeliest = [choices[int(_logits(llama, p)[-1][list(choices)].argmax())] for p in PROMPTS]
    bottom, top = language.divide(llama, 1)
    part = language.states(bottom, PROMPTS, likeliest)
    assert language.accuracy(top, part, choices) == 100
    wrong = [next(one for one in choices if one != right) for right in likeliest]
    assert language.accuracy(
        top, language.states(bottom, PROMPTS, [*likeliest[:2], wrong[2]]), choices
    ) == pytest.approx(200 / 3)


def test_only_the_last_layers_are_trained(llama, tmp_path):
    """Fine-tuning changes the last layers alone, lowers the loss, and keeps weights and second moments of these."""
    bottom, top = language.divide(llama, 2)
    given = language.states(bottom, PROMPTS, [3, 8, 20])
    start, frozen = language.layers_of(top), top.model.norm.weight.clone()
    recipe = language.Recipe("x", 0, steps=15, train=3, batch=2, lr=1e-2)
    folder = language.fine_tune(recipe, top, start, given, tmp_path)
    kept = structure_language.load_file(folder / "model.safetensors")
    assert set(kept) == set(start) == set(load_fisher(folder))
    assert all(not torch.equal(kept[name], start[name]) for name in start if "proj" in name)
    assert torch.equal(top.model.norm.weight, frozen)
    losses = structure_language.json.loads((folder / "log.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    assert language.fine_tune(recipe, top, start, given, tmp_path) == folder


def test_losses_stand_apart_from_accuracies():
    """The base is a row, and no loss counts as a task."""
    result = {"test": {"kron": {"a": 80.0, "loss": 3.5}}, "chosen": {}}
    found = structure_language.separated(result, {"a": 50.0, "loss": 3.0})
    assert found["test"] == {"kron": {"a": 80.0}, "base": {"a": 50.0}}
    assert found["loss"] == {"kron": 3.5, "base": 3.0}


def test_prompts_end_with_the_question(monkeypatch):
    """A long text is cut so that the question stays, and the target is the first token of the class's answer."""
    monkeypatch.setattr(
        language, "_tokenizer", lambda work: lambda text: {"input_ids": [ord(letter) for letter in text]}
    )
    recipe = language.Recipe("spam", 0, length=20)
    prompts, targets = language.prompts_of(recipe, [("abcdefgh", 1), ("x", 0)], None)
    assert ["".join(map(chr, prompt)) for prompt in prompts] == ["abcdef\nKind of mail:", "x\nKind of mail:"]
    assert targets == [ord(" "), ord(" ")]


def test_questions_are_of_the_text_sets():
    """Every task has an answer for each class."""
    for task, (_, words) in language.PROMPTS.items():
        assert len(set(words)) == len(words)
        assert task in language.texts.SETS
