"""Batches of a model from rows of text, by its tokenizer and transformers' collators."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.output_gradients import batch_seed
from squisher_mergekit.estimators.tasks import IGNORED, DataTask

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SHOWN = 10


@dataclass(frozen=True)
class BatchMaker:
    """Tokenizer and collator of a task: batches of truncated and padded rows, with labels.

    ========================  ===================================================  ===============================
    task                      columns                                              ``labels``
    ========================  ===================================================  ===============================
    ``causal-lm``             ``text``                                             every token, ``(N, T)``
    ``causal-lm``             ``text``, ``target``: a prompt and its completion    the completion's tokens
    ``causal-lm``             ``messages``: dicts of role and content              the assistant's tokens
    ``masked-lm``             ``text``                                             the masked tokens
    ``seq2seq``               ``text``, ``target``                                 the target's tokens, ``(N, U)``
    ``classification``        ``text``, ``pair`` if any, ``label``                 a class, ``(N)``
    ``regression``            ``text``, ``pair`` if any, ``label``                 a number, ``(N)``, or ``(N, D)``
    ``token-classification``  ``text``: words, ``label``: as many classes          a class at a word's first token
    ========================  ===================================================  ===============================

    Tokens without a label, such as padding, have label -100. The label of a causal language model is the token itself;
    the model shifts it. Only the tokenizer adds special tokens: no end of text is appended.

    * A prompt and its completion are tokenized as one text. A token across their border belongs to the completion. The
      end of a completion that is too long is truncated.
    * The assistant's tokens of a conversation are those that the tokenizer's chat template marks as generated. A
      template without such marks gives every token a label.
    * Masking selects 15 % of the tokens, as in training: it replaces 80 % of these by the mask token, 10 % by a random
      token, and keeps 10 %. Masks depend on ``seed`` and the number of the batch alone, not on torch's global
      generator, so that a batch is the same in any process and after any interruption. A short row may have no masked
      token, and then no loss.

    A row that can have no loss is an error, because it would count as an example. Rows count from 0 in messages.

    Args:
        tokenizer: The model's tokenizer. It is copied. If it has no padding token, its end of text pads.
        task: Task of the model.
        max_length: Largest number of tokens of a row, special ones included, and of a target.
        columns: See :func:`~squisher_mergekit.estimators.dataset.rows.columns_of`.
        label_ids: The model config's ``label2id``; empty if unknown.
        seed: Seed of the masks.
        batch_size: Rows of a batch; the last one may have fewer.

    Raises:
        ConfigError: The tokenizer lacks a token that the task needs, or ``max_length`` leaves no room for text.

    Example:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> inner = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "cat": 2, "sat": 3}))
        >>> inner.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
        >>> make = BatchMaker(tokenizer, "causal-lm", 16, {"text": "text"}, {}, seed=0, batch_size=2)
        >>> make([{"text": "a cat"}, {"text": "a cat sat"}], 0)["labels"]
        tensor([[   1,    2, -100],
                [   1,    2,    3]])
    """

    tokenizer: Any
    task: DataTask
    max_length: int
    columns: Mapping[str, str]
    label_ids: Mapping[str, int]
    seed: int
    batch_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokenizer", _prepared(self.tokenizer, self.task, self.columns, self.max_length))

    def __call__(self, rows: Sequence[Mapping[str, Any]], number: int) -> dict[str, Tensor]:
        """Return the batch of rows ``number * batch_size`` and following.

        Args:
            rows: One to ``batch_size`` rows.
            number: Number of the batch, from 0.

        Returns:
            The model's arguments and ``labels``, batch axis first.

        Raises:
            ConfigError: A value is missing or is no text, the model lacks a label, or a row can have no loss.
        """
        first = number * self.batch_size
        examples = [self._example(_Row(values, first + i)) for i, values in enumerate(rows)]
        batch = self._collator(number)(examples)
        if "attention_mask" not in batch and len({len(example["input_ids"]) for example in examples}) > 1:
            raise ConfigError(
                "rows of a batch must have one length, as the tokenizer makes no attention_mask; take --batch-size 1"
            )
        return {key: value for key, value in batch.items() if isinstance(value, Tensor)}

    def check(self, rows: Sequence[Mapping[str, Any]], first: int = 0) -> None:
        """Refuse a row that no batch could hold, before a long pass reaches it.

        Args:
            rows: All rows.
            first: Number of the first row to check.

        Raises:
            ConfigError: A value is missing or is no text, the model lacks a label, or a row can have no loss.
        """
        for number in range(first, len(rows)):
            self._example(_Row(rows[number], number))

    def tokenize(self, *texts: Any, **options: Any) -> Any:
        """Return the tokenizer's encoding of one row, truncated to ``max_length``."""
        return self.tokenizer(*texts, truncation=True, max_length=self.max_length, **options)

    def _example(self, row: _Row) -> dict[str, Any]:
        """Return the encoding and labels of a row."""
        example = _ENCODERS[self.task](self, row)
        if not example["input_ids"]:
            raise row.refused("has no token in its text; remove it")
        return example

    def _collator(self, number: int) -> Any:
        """Return the collator that pads and masks the rows of one batch."""
        import transformers

        if self.task in ("classification", "regression"):
            return transformers.DataCollatorWithPadding(self.tokenizer)
        if self.task == "seq2seq":
            return transformers.DataCollatorForSeq2Seq(self.tokenizer, label_pad_token_id=IGNORED)
        if self.task == "masked-lm":
            collator = transformers.DataCollatorForLanguageModeling(self.tokenizer, mlm=True)
            # With a seed, it would make a generator of its own, which exists only in a main process.
            collator.generator = torch.Generator().manual_seed(batch_seed(self.seed, number))
            return collator
        # DataCollatorForLanguageModeling would remove the label of every end of text if that token also pads.
        return transformers.DataCollatorForTokenClassification(self.tokenizer, label_pad_token_id=IGNORED)


@dataclass(frozen=True)
class _Row:
    """Row of the data with its number, for messages."""

    values: Mapping[str, Any]
    number: int

    def refused(self, what: str) -> ConfigError:
        """Return the error for this row."""
        return ConfigError(f"row {self.number} {what} (rows count from 0)")

    def text(self, column: str) -> str:
        """Return the text of a column, or raise if it is missing or blank."""
        value = self.values.get(column)
        if not isinstance(value, str):
            found = "no value" if value is None else f"{_short(value)}, which is no text,"
            raise self.refused(f"has {found} in column {column}; fill it in, or remove the row")
        if not value.strip():
            raise self.refused(f"is empty in column {column}; remove the row")
        return value

    def items(self, column: str, kind: type, what: str) -> list[Any]:
        """Return the list of a column, or raise if it is empty or has items of another type."""
        value = self.values.get(column)
        if not isinstance(value, list) or not value or not all(isinstance(item, kind) for item in value):
            raise self.refused(f"must have a list of {what} in column {column}, found {_short(value)}; fill it in")
        return value

    def need(self, labels: Sequence[int], what: str) -> None:
        """Raise if all labels are ignored."""
        if all(label == IGNORED for label in labels):
            raise self.refused(f"has {what}; remove it, or take a longer --max-length")


def _prepared(tokenizer: Any, task: DataTask, columns: Mapping[str, str], max_length: int) -> Any:
    """Return a copy of a tokenizer, set up for padding and truncation."""
    if max_length <= (special := tokenizer.num_special_tokens_to_add("pair" in columns)):
        raise ConfigError(
            f"--max-length must leave room for text beside {special} special tokens, found {max_length}; take a "
            "larger one"
        )
    aligned = task == "token-classification" or (task == "causal-lm" and {"target", "messages"} & set(columns))
    if aligned and not tokenizer.is_fast:
        raise ConfigError(
            f"a tokenizer must return the offsets of its tokens, for {task} with these columns, but "
            f"{type(tokenizer).__name__} cannot; take a fast one"
        )
    if "messages" in columns:
        _template(tokenizer)
    if task == "masked-lm" and tokenizer.mask_token is None:
        raise ConfigError("a tokenizer must have a mask token for masked-lm, found none; take the task causal-lm")
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError("a tokenizer must have a pad or an eos token, found neither; set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    if task in ("causal-lm", "seq2seq"):
        # Decoders count positions from the first column on: padding on the left would shift them.
        tokenizer.padding_side = "right"
    if task == "causal-lm" and "target" in columns:
        tokenizer.truncation_side = "right"
    return tokenizer


def _template(tokenizer: Any) -> str:
    """Return the chat template."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:  # no template, or several without a default
        raise ConfigError(
            "a tokenizer must have a chat template for the column of messages, found none; add one, or name a column "
            "of text by --text-column"
        ) from error


def _causal(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a text with a label for every token, or a completion, or a conversation."""
    if "messages" in maker.columns:
        return _conversation(maker, row)
    if "target" in maker.columns:
        return _completion(maker, row)
    encoded = maker.tokenize(row.text(maker.columns["text"]))
    labels = list(encoded["input_ids"])
    row.need(labels[1:], "fewer than two tokens, and nothing to predict")
    return {**encoded, "labels": labels}


def _completion(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a prompt and its completion, with labels from the first token on that ends behind the prompt."""
    prompt, completion = (row.text(maker.columns[key]) for key in ("text", "target"))
    encoded = maker.tokenize(prompt + completion, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded.pop("offset_mapping")
    start = next((i for i, (_, end) in enumerate(offsets) if end > len(prompt)), len(tokens))
    labels = [IGNORED] * start + tokens[start:]
    row.need(labels[1:], f"nothing of its completion within {maker.max_length} tokens")
    return {**encoded, "labels": labels}


def _conversation(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a conversation, with labels for the tokens that the chat template marks, or for all."""
    # apply_chat_template looks up the token at the first marked character. A tokenizer that trims its offsets has none
    # at a space, and the assistant's tokens would silently lose their labels.
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = row.items(maker.columns["messages"], Mapping, "messages, dicts of role and content,")
    # datasets gives every dict of a column all keys, with None for missing ones.
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    template = _template(maker.tokenizer)
    marked = _MARK.search(template) is not None
    try:
        (text,), spans = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            **maker.tokenizer.special_tokens_map,
        )
    except Exception as error:  # templates raise their own errors
        raise row.refused(f"does not fit the chat template: {error or type(error).__name__}") from error
    encoded = maker.tokenize(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets, labels = encoded.pop("offset_mapping"), list(encoded["input_ids"])
    if marked:
        inside = [any(start < high and end > low for low, high in spans[0]) for start, end in offsets]
        labels = [label if found else IGNORED for label, found in zip(labels, inside, strict=True)]
    row.need(labels[1:], f"no turn of the assistant within {maker.max_length} tokens")
    return {**encoded, "labels": labels}


def _masked(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a text for masking."""
    encoded = maker.tokenize(row.text(maker.columns["text"]), return_special_tokens_mask=True)
    if all(encoded["special_tokens_mask"]):
        raise row.refused("has no token that could be masked; remove it")
    return dict(encoded)


def _seq2seq(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a text and its target."""
    source, target = (row.text(maker.columns[key]) for key in ("text", "target"))
    labels = maker.tokenize(text_target=target)["input_ids"]
    row.need(labels, "no token in its target")
    return {**maker.tokenize(source), "labels": labels}


def _labelled(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode a text or a pair of texts, with a class or a number."""
    value = row.values.get(maker.columns["label"])
    label = _class(row, value, maker.label_ids) if maker.task != "regression" else _numbers(row, value, maker.label_ids)
    texts = [row.text(maker.columns[key]) for key in ("text", "pair") if key in maker.columns]
    return {**maker.tokenize(*texts), "label": label}


def _words(maker: BatchMaker, row: _Row) -> dict[str, Any]:
    """Encode words and their classes, with the label at each word's first token."""
    words = row.items(maker.columns["text"], str, "words")
    tags = row.items(maker.columns["label"], object, "labels")
    if len(words) != len(tags):
        raise row.refused(f"must have a label for each word, found {len(words)} words and {len(tags)} labels")
    classes = [tag if tag == IGNORED else _class(row, tag, maker.label_ids) for tag in tags]
    encoded = maker.tokenize(words, is_split_into_words=True)
    word_ids = encoded.word_ids()
    labels = [
        IGNORED if word is None or word == before else classes[word]
        for before, word in zip([None, *word_ids[:-1]], word_ids, strict=True)
    ]
    row.need(labels, f"no word with a label within {maker.max_length} tokens")
    return {**encoded, "labels": labels}


_ENCODERS: dict[DataTask, Callable[[BatchMaker, _Row], dict[str, Any]]] = {
    "causal-lm": _causal,
    "masked-lm": _masked,
    "seq2seq": _seq2seq,
    "classification": _labelled,
    "regression": _labelled,
    "token-classification": _words,
}


def _class(row: _Row, value: Any, label_ids: Mapping[str, int]) -> int:
    """Return the number of a class, from its number or its name."""
    if isinstance(value, str):
        if value in label_ids:
            return label_ids[value]
        names = ", ".join([*label_ids][:_SHOWN]) + (", ..." if len(label_ids) > _SHOWN else "")
        raise row.refused(f"has label {_short(value)}, which the model's label2id lacks; it has {names or 'none'}")
    number = float(value) if isinstance(value, Real) else math.nan
    if not number.is_integer():
        found = "no label" if value is None else f"label {_short(value)}"
        raise row.refused(f"has {found}, but a class is a whole number or a name of the model's label2id")
    if number == -1:
        raise row.refused("has label -1: no label; take another split")
    if not 0 <= number < (len(label_ids) or math.inf):
        known = f"classes 0 to {len(label_ids) - 1}" if label_ids else "classes from 0 on"
        raise row.refused(f"has label {int(number)}, but the model has {known}; take data with its classes")
    return int(number)


def _numbers(row: _Row, value: Any, label_ids: Mapping[str, int]) -> float | list[float]:
    """Return the targets of a regression: a number, or a list of numbers."""
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(number, Real) and math.isfinite(number) for number in values):
        raise row.refused(f"has label {_short(value)}, but a regression needs a finite number; fix or remove the row")
    if label_ids and len(values) != len(label_ids):
        raise row.refused(
            f"has {len(values)} numbers as its label, but the model has {len(label_ids)} outputs; fix or remove the row"
        )
    return [float(number) for number in values] if isinstance(value, list) else float(value)


def _short(value: Any) -> str:
    """Return the repr of a value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
