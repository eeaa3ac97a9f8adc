"""Batches of causal language models: texts, completions and conversations, with expected tensors written by hand."""

import pytest

from squisher_mergekit.errors import ConfigError
from tests.estimators.dataset.makers import (
    CHAT,
    MARKED,
    UNMARKED,
    assert_batch,
    batch_maker,
    bert_tokenizer,
    byte_tokenizer,
    chat_maker,
    completion_maker,
)


def test_every_token_of_a_text_has_a_label_and_padding_has_none():
    """An end-of-text token inside a text keeps its label, although the same token pads the shorter row."""
    tokenizer = byte_tokenizer()
    batch = batch_maker("causal-lm", tokenizer)([{"text": "cat sat<eos>"}, {"text": "a<eos> cat cat<eos>"}], 0)
    assert_batch(
        batch,
        input_ids=[[10, 14, 0, 0, 0], [5, 0, 11, 11, 0]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[10, 14, 0, -100, -100], [5, 0, 11, 11, 0]],
    )
    assert tokenizer.pad_token is None  # the mapping of the caller is unchanged


def test_rows_of_decoders_are_padded_on_the_right():
    """Rows are padded on the right for any tokenizer setting, because positions count from the first column."""
    batch = batch_maker("causal-lm", bert_tokenizer(padding_side="left"))([{"text": "cat"}, {"text": "a cat sat"}], 0)
    assert_batch(
        batch,
        input_ids=[[2, 6, 3, 0, 0], [2, 9, 6, 7, 3]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[2, 6, 3, -100, -100], [2, 9, 6, 7, 3]],
    )


@pytest.mark.parametrize(("side", "kept"), [("right", [2, 5, 6, 3]), ("left", [2, 10, 9, 3])])
def test_long_texts_are_cut_between_the_special_tokens(side, kept):
    """A long text is truncated on the tokenizer's side, between the special tokens."""
    batch = batch_maker("causal-lm", bert_tokenizer(truncation_side=side), max_length=4)(
        [{"text": "the cat on mat a"}], 0
    )
    assert_batch(batch, input_ids=[kept], attention_mask=[[1] * 4], labels=[kept])


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "labels"),
    [
        ("cat sat", " cat", [10, 14, 11], [-100, -100, 11]),
        ("cat ", "sat a", [10, 14, 1, 5], [-100, 14, 1, 5]),  # " sat" is one token
        ("cat", "sat", [15], None),  # the whole text is one token, at the first position, which nothing predicts
        ("cat", "\n", None, None),  # blank
        ("cat\n", "\n<eos>", [10, 2, 2, 0], [-100, -100, 2, 0]),
        ("cat<eos>", "<eos>", [10, 0, 0], [-100, -100, 0]),
    ],
)
def test_the_loss_of_a_completion_begins_behind_the_prompt(prompt, completion, ids, labels, trim):
    """Prompt and completion are tokenized as one text. A token across the border belongs to the completion."""
    make = completion_maker(byte_tokenizer(trim_offsets=trim))
    rows = [{"prompt": prompt, "completion": completion}]
    if labels is None:
        with pytest.raises(ConfigError, match=r"row 0 (has nothing of its completion|is empty in column compl)"):
            make(rows, 0)
    else:
        assert_batch(make(rows, 0), input_ids=[ids], attention_mask=[[1] * len(ids)], labels=[labels])


def test_special_tokens_behind_a_completion_have_labels():
    """The end token has a label; the start token and padding have none."""
    rows = [{"prompt": "the cat ", "completion": "sat"}, {"prompt": "a", "completion": " mat on mat"}]
    assert_batch(
        completion_maker(bert_tokenizer())(rows, 0),
        input_ids=[[2, 5, 6, 7, 3, 0], [2, 9, 10, 8, 10, 3]],
        attention_mask=[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        labels=[[-100, -100, -100, 7, 3, -100], [-100, -100, 10, 8, 10, 3]],
    )


def test_a_completion_is_cut_at_its_end_and_must_not_vanish():
    """A completion is truncated at its end, even if the tokenizer truncates on the left. The end token stays."""
    make = completion_maker(bert_tokenizer(truncation_side="left"), max_length=5)
    rows = [{"prompt": "the cat ", "completion": "sat on a mat"}, {"prompt": "the cat sat ", "completion": "on a mat"}]
    assert_batch(make(rows[:1], 0), input_ids=[[2, 5, 6, 7, 3]], attention_mask=[[1] * 5], labels=[[-100] * 3 + [7, 3]])
    with pytest.raises(ConfigError, match="row 1 has nothing of its completion within 5 tokens; remove it, or take a"):
        make(rows, 0)


@pytest.mark.parametrize("trim", [False, True])
def test_all_turns_of_the_assistant_have_labels(trim):
    """Marked tokens have labels, including a leading space that some tokenizers exclude from the offsets of a token."""
    batch = chat_maker(byte_tokenizer(trim_offsets=trim))([{"messages": CHAT}, {"messages": CHAT[:2]}], 0)
    assert_batch(
        batch,
        input_ids=[[4, 10, 3, 14, 2, 4, 13, 3, 11, 11, 2], [4, 10, 3, 14, 2, 0, 0, 0, 0, 0, 0]],
        attention_mask=[[1] * 11, [1] * 5 + [0] * 6],
        labels=[
            [-100, -100, -100, 14, 2, -100, -100, -100, 11, 11, 2],
            [-100, -100, -100, 14, 2, -100, -100, -100, -100, -100, -100],
        ],
    )


def test_a_token_that_a_mark_cuts_has_a_label():
    """A token has a label if the mark begins inside it."""
    template = MARKED.replace("{% generation %}{{ ' ' + ", " {% generation %}{{ ")
    assert_batch(
        chat_maker(byte_tokenizer(), template)([{"messages": CHAT[:2]}], 0),
        input_ids=[[4, 10, 3, 14, 2]], attention_mask=[[1] * 5], labels=[[-100, -100, -100, 14, 2]],
    )  # fmt: skip


def test_without_marks_every_token_of_a_conversation_has_a_label():
    """Every token has a label if the template has no marks."""
    batch = chat_maker(byte_tokenizer(), UNMARKED)([{"messages": CHAT[:2]}], 0)
    assert_batch(batch, input_ids=[[4, 10, 3, 14, 2]], attention_mask=[[1] * 5], labels=[[4, 10, 3, 14, 2]])


def test_a_template_sees_special_tokens_and_no_keys_that_a_row_lacks():
    """A template sees the special tokens, but no keys that a message lacks."""
    template = (
        "{% for message in messages %}{{ 'a' if message.tool_calls is defined else message.content }}{% endfor %}"
        "{{ eos_token }}"
    )
    messages = [{"role": "user", "content": "cat", "tool_calls": None}]
    assert_batch(
        chat_maker(byte_tokenizer(), template)([{"messages": messages}], 0),
        input_ids=[[10, 0]], attention_mask=[[1, 1]], labels=[[10, 0]],
    )  # fmt: skip


def test_special_tokens_of_a_conversation_come_from_the_template():
    """Special tokens of a conversation come from the template alone."""
    batch = chat_maker(bert_tokenizer(), "{{ '[CLS] ' + messages[0].content }}")([{"messages": CHAT}], 0)
    assert_batch(batch, input_ids=[[2, 6]], attention_mask=[[1, 1]], labels=[[2, 6]])


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (CHAT[:1], "has no turn of the assistant within 7 tokens; remove it, or take a longer --max-length"),
        ([{"role": "user", "content": "cat cat cat cat cat cat cat"}, *CHAT[1:2]], "has no turn of the assistant"),
        ([{"role": "tool", "content": "a"}], "does not fit the chat template: no role tool"),
        ([], r"must have a list of messages, dicts of role and content, in column messages, found \[\]"),
        (None, "found None; fill it in"),
        ("cat", "found 'cat'; fill it in"),
        (["cat"], r"found \['cat'\]; fill it in"),
    ],
)
def test_conversations_without_assistant_text_are_refused(messages, words):
    """Missing or truncated assistant turns, template errors and values of other types raise an error."""
    with pytest.raises(ConfigError, match=f"^row 1 .*{words}"):
        chat_maker(byte_tokenizer(), max_length=7)([{"messages": CHAT}, {"messages": messages}], 0)
