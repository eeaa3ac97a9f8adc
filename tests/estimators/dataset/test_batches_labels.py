"""Batches with classes, numbers and labels of words."""

import pytest
import torch

from squisher_mergekit.errors import ConfigError
from tests.estimators.dataset.makers import LABELS, assert_batch, batch_maker, bert_tokenizer, piece_tokenizer


@pytest.mark.parametrize("label", [2, "yes", 2.0])
def test_a_class_is_a_number_or_a_name(label):
    """A class name is looked up in label2id, and a float with a whole value is a class."""
    rows = [{"text": "cat", "label": label}, {"text": "the cat sat", "label": True}]
    batch = batch_maker("classification")(rows, 0)
    assert_batch(
        batch,
        input_ids=[[2, 6, 3, 0, 0], [2, 5, 6, 7, 3]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[2, 1],
    )
    assert batch["labels"].dtype == torch.int64


def test_a_number_needs_no_names():
    """A model without label2id accepts any class."""
    assert batch_maker("classification", label_ids={})([{"text": "cat", "label": 5}], 0)["labels"].tolist() == [5]


@pytest.mark.parametrize("length", [7, 19])
def test_pairs_are_cut_and_joined_as_the_tokenizer_does(length):
    """The tokenizer truncates the longer text of a pair first. Token types are passed on."""
    tokenizer = bert_tokenizer(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    columns = {"text": "text", "pair": "pair", "label": "label"}
    rows = [{"text": "the cat sat on", "pair": "a mat", "label": 0}]
    batch = batch_maker("classification", tokenizer, columns, max_length=length)(rows, 0)
    first = [5, 6] if length == 7 else [5, 6, 7, 8]
    assert_batch(
        batch,
        input_ids=[[2, *first, 3, 9, 10, 3]],
        token_type_ids=[[0] * (len(first) + 2) + [1] * 3],
        attention_mask=[[1] * (len(first) + 5)],
        labels=[0],
    )


MANY = {f"class{i}": i for i in range(11)}


@pytest.mark.parametrize(
    ("label", "label_ids", "words"),
    [
        (-1, LABELS, "row 23 has label -1: no label; take another split"),
        (-1, {}, "row 23 has label -1: no label; take another split"),
        (3, LABELS, "row 23 has label 3, but the model has classes 0 to 2; take data with its classes"),
        (-2, {}, "row 23 has label -2, but the model has classes from 0 on; "),
        ("si", LABELS, "row 23 has label 'si', which the model's label2id lacks; it has no, maybe, yes"),
        ("si", {}, "row 23 has label 'si', which the model's label2id lacks; it has none"),
        ("si", MANY, "it has class0, class1, .*, class9, ... "),
        (None, LABELS, "row 23 has no label, but a class is a whole number or a name of the model's label2id"),
        (0.5, LABELS, "row 23 has label 0.5, but a class is a whole number"),
        (float("nan"), LABELS, "row 23 has label nan, but a class is a whole number"),
        ([0, 1], LABELS, r"row 23 has label \[0, 1\], but a class is a whole number"),
    ],
)
def test_labels_that_are_not_the_models_are_refused(label, label_ids, words):
    """The error has the row number over all batches, the label, and the classes of the model."""
    rows = [{"text": "cat", "label": 0}] * 3 + [{"text": "cat", "label": label}]
    with pytest.raises(ConfigError, match=words) as caught:
        batch_maker("classification", label_ids=label_ids)(rows, 4)
    assert str(caught.value).endswith("(rows count from 0)")


def test_a_regression_has_numbers():
    """A regression label is a number, or a list with one number per output of the model."""
    rows = [{"text": "cat", "label": 3}, {"text": "mat", "label": -0.25}]
    labels = batch_maker("regression", label_ids={"LABEL_0": 0})(rows, 0)["labels"]
    torch.testing.assert_close(labels, torch.tensor([3.0, -0.25]), rtol=0, atol=0)
    rows = [{"text": "cat", "label": [1, 2, 3]}, {"text": "mat", "label": [0.5, 0, -1]}]
    labels = batch_maker("regression")(rows, 0)["labels"]
    torch.testing.assert_close(labels, torch.tensor([[1.0, 2, 3], [0.5, 0, -1]]), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("3", "row 0 has label '3', but a regression needs a finite number"),
        (None, "row 0 has label None, but"),
        (float("nan"), "row 0 has label nan, but"),
        (float("inf"), "row 0 has label inf, but"),
        ([], r"row 0 has label \[\], but"),
        ([1.0, None], r"row 0 has label \[1.0, None\], but"),
        ([1.0, 2.0], "row 0 has 2 numbers as its label, but the model has 1"),
    ],
)
def test_an_invalid_number_is_refused(label, words):
    """Text, missing values and infinite numbers raise an error."""
    with pytest.raises(ConfigError, match=words):
        batch_maker("regression", label_ids={"LABEL_0": 0})([{"text": "cat", "label": label}], 0)


def test_a_words_label_is_at_its_first_token():
    """The first token of a word has its label, and all other tokens have -100. Names are looked up."""
    rows = [
        {"tokens": ["cat", "a"], "tags": [1, "yes"]},
        {"tokens": ["a", "cat", "cat", "sa"], "tags": [0, -100, 2, 1]},
    ]
    assert_batch(
        batch_maker("token-classification", piece_tokenizer())(rows, 0),
        input_ids=[[1, 2, 3, 5, 1, 0, 0, 0], [1, 5, 2, 3, 2, 3, 4, 1]],
        attention_mask=[[1] * 5 + [0] * 3, [1] * 8],
        labels=[[-100, 1, -100, 2, -100, -100, -100, -100], [-100, 0, -100, -100, 2, -100, 1, -100]],
    )


def test_labels_are_padded_on_the_side_of_the_tokens():
    """Labels are padded on the side of the tokens."""
    tokenizer = piece_tokenizer()
    tokenizer.padding_side = "left"
    rows = [{"tokens": ["a"], "tags": [1]}, {"tokens": ["cat"], "tags": [2]}]
    assert_batch(
        batch_maker("token-classification", tokenizer)(rows, 0),
        input_ids=[[0, 1, 5, 1], [1, 2, 3, 1]],
        attention_mask=[[0, 1, 1, 1], [1, 1, 1, 1]],
        labels=[[-100, -100, 1, -100], [-100, 2, -100, -100]],
    )


@pytest.mark.parametrize(
    ("tokens", "tags", "words"),
    [
        (["a", "cat"], [1], "must have a label for each word, found 2 words and 1 labels"),
        ("a cat", [1, 1], "must have a list of words in column tokens, found 'a cat'; fill it in"),
        (["a", None], [1, 1], r"must have a list of words in column tokens, found \['a', None\]"),
        ([], [], r"must have a list of words in column tokens, found \[\]"),
        (["a"], None, "must have a list of labels in column tags, found None"),
        (["a"], [3], "has label 3, but the model has classes 0 to 2"),
        (["a"], [-1], "has label -1: no label"),
        (["a"], ["B"], "has label 'B', which the model's label2id lacks"),
        (["cat", "a"], [-100, 2], "has no word with a label within 4 tokens; remove it, or take a longer --max-length"),
    ],
)
def test_words_without_fitting_labels_are_refused(tokens, tags, words):
    """Lists of different lengths, gaps, unknown classes and truncated labels raise an error."""
    with pytest.raises(ConfigError, match=f"^row 0 {words}"):
        batch_maker("token-classification", piece_tokenizer(), max_length=4)([{"tokens": tokens, "tags": tags}], 0)
