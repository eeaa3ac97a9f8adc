"""Batches of all tasks and of sequence-to-sequence models."""

import copy

import pytest
import transformers
from tokenizers import normalizers

from squisher_mergekit.errors import ConfigError
from tests.estimators.dataset.makers import (
    CHAT,
    assert_batch,
    batch_maker,
    bert_tokenizer,
    byte_tokenizer,
    chat_maker,
    completion_maker,
    piece_tokenizer,
    same_batches,
)


@pytest.mark.parametrize("side", ["right", "left"])
def test_targets_are_padded_and_truncated_labels(side):
    """Targets are padded on the right to the longest target and truncated like texts."""
    rows = [{"text": "a cat", "target": "mat"}, {"text": "dog", "target": "the dog ran far"}]
    assert_batch(
        batch_maker("seq2seq", bert_tokenizer(padding_side=side), max_length=5)(rows, 0),
        input_ids=[[2, 9, 6, 3], [2, 11, 3, 0]],
        attention_mask=[[1, 1, 1, 1], [1, 1, 1, 0]],
        labels=[[2, 10, 3, -100, -100], [2, 5, 11, 12, 3]],
    )


def test_targets_are_tokenized_as_targets():
    """MBart's tokenizer ends a text with the source language and a target with the target language."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "▁cat", "▁dog"]
    vocab = [(name, float(-i)) for i, name in enumerate(names)]
    tokenizer = transformers.MBartTokenizer(vocab=vocab, src_lang="en_XX", tgt_lang="ro_RO")
    batch = batch_maker("seq2seq", tokenizer)([{"text": "cat dog", "target": "cat"}], 0)
    english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
    assert_batch(batch, input_ids=[[4, 5, 2, english]], attention_mask=[[1] * 4], labels=[[4, 2, romanian]])


def test_a_tokenizer_in_python_serves_as_well():
    """ByT5's tokenizer, which is written in Python, serves sequence-to-sequence models."""
    batch = batch_maker("seq2seq", transformers.ByT5Tokenizer())([{"text": "ab", "target": "c"}], 0)
    assert_batch(batch, input_ids=[[100, 101, 1]], attention_mask=[[1, 1, 1]], labels=[[102, 1]])


# All tasks


FULL = [
    {"text": "the cat sat", "prompt": "cat ", "completion": "sat", "messages": CHAT, "target": "a dog ran", "label": 2,
     "tokens": ["cat", "a"], "tags": [1, 2]},
    {"text": "a mat", "prompt": "sat cat ", "completion": "sat cat cat", "messages": CHAT[2:], "target": "far",
     "label": 0, "tokens": ["a", "cat", "cat", "sat"], "tags": [0, 0, 1, 2]},
    {"text": "far on a cat", "prompt": "cat", "completion": " cat cat", "messages": CHAT[:2], "target": "a cat",
     "label": 1, "tokens": ["sat"], "tags": [2]},
]  # fmt: skip
MAKERS = {
    "causal-lm": lambda: batch_maker("causal-lm"),
    "completions": lambda: completion_maker(byte_tokenizer()),
    "chats": lambda: chat_maker(byte_tokenizer()),
    "seq2seq": lambda: batch_maker("seq2seq"),
    "classification": lambda: batch_maker("classification"),
    "regression": lambda: batch_maker("regression", label_ids={}),
    "token-classification": lambda: batch_maker("token-classification", piece_tokenizer()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_padding_changes_nothing(name):
    """A batch equals its single rows, padded with 0 in the mask and -100 in the labels."""
    make = MAKERS[name]()
    batch = make(FULL, 0)
    assert same_batches(make(copy.deepcopy(FULL), 0), batch)
    for i, row in enumerate(FULL):
        for key, alone in make([row], 0).items():
            value = batch[key][i]
            if value.ndim:
                assert value[: len(alone[0])].tolist() == alone[0].tolist(), key
                filling = value[len(alone[0]) :].tolist()
                assert key == "input_ids" or filling == [{"attention_mask": 0, "labels": -100}[key]] * len(filling)
            else:
                assert value == alone[0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "has no value in column {}; fill it in, or remove the row"),
        (3, "has 3, which is no text, in column {}; fill it in, or remove the row"),
        (["cat"], r"has \['cat'\], which is no text, in column {}; "),
        ("", "is empty in column {}; remove the row"),
        (" \n", "is empty in column {}; remove the row"),
    ],
)
@pytest.mark.parametrize(
    ("task", "columns", "column"),
    [
        ("causal-lm", {"text": "text"}, "text"),
        ("causal-lm", {"text": "prompt", "target": "completion"}, "prompt"),
        ("causal-lm", {"text": "prompt", "target": "completion"}, "completion"),
        ("masked-lm", {"text": "text"}, "text"),
        ("seq2seq", {"text": "text", "target": "target"}, "text"),
        ("seq2seq", {"text": "text", "target": "target"}, "target"),
        ("classification", {"text": "text", "pair": "target", "label": "label"}, "text"),
        ("classification", {"text": "text", "pair": "target", "label": "label"}, "target"),
        ("regression", {"text": "text", "label": "label"}, "text"),
    ],
)
def test_a_value_that_is_no_text_is_refused(task, columns, column, value, words):
    """The error names the column and the row, counted over all batches."""
    row = {"text": "cat", "prompt": "cat", "completion": "sat", "target": "cat", "label": 0}
    with pytest.raises(ConfigError, match=f"^row 11 {words.format(column)}"):
        batch_maker(task, columns=columns, label_ids={})([row, row | {column: value}], 2)


NOTHING = "has fewer than two tokens, and nothing to predict; remove it, or"
NO_LABEL = "has no word with a label within 19 tokens"
GONE = "\N{ZERO WIDTH SPACE}"  # a character that the tokenizers of the next test drop


@pytest.mark.parametrize(
    ("task", "tokenizer", "row", "words"),
    [
        ("causal-lm", byte_tokenizer, {"text": "cat"}, NOTHING),
        ("causal-lm", byte_tokenizer, {"text": GONE}, NOTHING),
        ("masked-lm", bert_tokenizer, {"text": GONE}, "has no token that could be masked; remove it"),
        ("seq2seq", byte_tokenizer, {"text": "cat", "target": GONE}, "has no token in its target; remove it, or"),
        ("seq2seq", byte_tokenizer, {"text": GONE, "target": "cat"}, "has no token in its text; remove it"),
        ("classification", byte_tokenizer, {"text": GONE, "label": 0}, "has no token in its text; remove it"),
        ("token-classification", piece_tokenizer, {"tokens": [GONE], "tags": [0]}, NO_LABEL),
    ],
)
def test_a_row_without_a_loss_is_refused(task, tokenizer, row, words):
    """A row without a predicted token raises an error."""
    tokenizer = tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(GONE, "")
    with pytest.raises(ConfigError, match=f"^row 0 {words}"):
        batch_maker(task, tokenizer)([row], 0)


NO_PADDING = "a pad or an eos token, found neither; set its pad_"
NO_ROOM = "--max-length must leave room for text beside 2 special tokens"


@pytest.mark.parametrize(
    ("task", "columns", "tokenizer", "options", "words"),
    [
        ("causal-lm", None, lambda: byte_tokenizer(eos_token=None), {}, NO_PADDING),
        ("masked-lm", None, lambda: bert_tokenizer(mask_token=None), {}, "a mask token for masked-lm, found none"),
        ("causal-lm", {"messages": "m"}, byte_tokenizer, {}, "a chat template for the column of messages, found none"),
        ("causal-lm", {"messages": "m"}, transformers.ByT5Tokenizer, {}, "ByT5Tokenizer cannot; take a fast one"),
        ("causal-lm", {"text": "p", "target": "c"}, transformers.ByT5Tokenizer, {}, "take a fast one"),
        ("token-classification", None, transformers.ByT5Tokenizer, {}, "take a fast one"),
        ("causal-lm", None, bert_tokenizer, {"max_length": 2}, NO_ROOM),
        (
            "classification", {"text": "a", "pair": "b", "label": "c"}, bert_tokenizer, {"max_length": 3},
            "room for text beside 3 special tokens, found 3; take a larger one",
        ),
    ],
)  # fmt: skip
def test_tokenizers_that_do_not_fit_the_task_are_refused(task, columns, tokenizer, options, words):
    """A tokenizer that lacks a feature raises an error before any row is read."""
    with pytest.raises(ConfigError, match=words):
        batch_maker(task, tokenizer(), columns, **options)


def test_rows_of_different_lengths_need_a_mask():
    """Rows of different lengths without attention_mask raise an error, because padding would count as text."""
    make = batch_maker("masked-lm", bert_tokenizer(model_input_names=["input_ids"]))
    assert set(make([{"text": "cat"}, {"text": "dog"}], 0)) == {"input_ids", "labels"}
    with pytest.raises(ConfigError, match=r"the tokenizer makes no attention_mask; take --batch-size 1"):
        make([{"text": "cat"}, {"text": "a dog"}], 0)
