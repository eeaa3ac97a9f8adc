"""Rows as batches: every expected tensor is written by hand."""

import copy
import multiprocessing

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.dataset.batches import BatchMaker

#         0        1        2        3        4         5      6      7      8     9    10     11     12     13
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far"]
#         0        1    2    3    4    5    6    7    8    9     10     11      12    13     14      15
PIECES = ["<eos>", "Ġ", "Ċ", "<", ">", "a", "c", "s", "t", "ca", "cat", "Ġcat", "sa", "sat", "Ġsat", "catsat"]
MERGES = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("s", "a"), ("sa", "t"), ("Ġ", "sat"), ("cat", "sat")]
# Who speaks is one character; what the assistant says, a space before and a line break behind it, is marked.
MARKED = (
    "{% for message in messages %}{% if message.role == 'assistant' %}"
    "<{% generation %}{{ ' ' + message.content + '\n' }}{% endgeneration %}"
    "{% elif message.role == 'user' %}>{{ message.content }}"
    "{% else %}{{ raise_exception('no role ' + message.role) }}{% endif %}{% endfor %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
CHAT = [
    {"role": "user", "content": "cat"}, {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "sat"}, {"role": "assistant", "content": "cat cat"},
]  # fmt: skip


def _bert(**options):
    """Words; [CLS] and [SEP] around and between texts."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **(names | {"mask_token": "[MASK]"} | options))


def _gpt(trim_offsets=False, **options):
    """Pieces of bytes; no token for padding, and none added."""
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": "<eos>"} | options))


def _pieces():
    """Words in pieces of two letters at most, as a tokenizer of sub-words does it."""
    inner = Tokenizer(models.WordPiece({"[PAD]": 0, "[UNK]": 1, "ca": 2, "##t": 3, "sa": 4, "a": 5}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="[UNK] $A [UNK]", special_tokens=[("[UNK]", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]")


COLUMNS = {
    "causal-lm": {"text": "text"},
    "masked-lm": {"text": "text"},
    "seq2seq": {"text": "text", "target": "target"},
    "classification": {"text": "text", "label": "label"},
    "regression": {"text": "text", "label": "label"},
    "token-classification": {"text": "tokens", "label": "tags"},
}
LABELS = {"no": 0, "maybe": 1, "yes": 2}


def _maker(task, tokenizer=None, columns=None, label_ids=None, **options):
    tokenizer = _bert() if tokenizer is None else tokenizer
    found = {"max_length": 19, "seed": 7, "batch_size": 5} | options
    columns = COLUMNS[task] if columns is None else columns
    return BatchMaker(tokenizer, task, columns=columns, label_ids=LABELS if label_ids is None else label_ids, **found)


def _completions(tokenizer, **options):
    return _maker("causal-lm", tokenizer, {"text": "prompt", "target": "completion"}, **options)


def _chats(tokenizer, template=MARKED, **options):
    tokenizer.chat_template = template
    return _maker("causal-lm", tokenizer, {"messages": "messages"}, **options)


def _equal(batch, **expected):
    """Hold a batch against lists: these keys, these numbers."""
    assert {key: value.tolist() for key, value in batch.items()} == expected


# Causal language models


def test_every_token_of_a_text_has_a_label_and_padding_has_none():
    """An end of text in the text keeps its label, although the same token fills the shorter row."""
    tokenizer = _gpt()
    batch = _maker("causal-lm", tokenizer)([{"text": "cat sat<eos>"}, {"text": "a<eos> cat cat<eos>"}], 0)
    _equal(
        batch,
        input_ids=[[10, 14, 0, 0, 0], [5, 0, 11, 11, 0]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[10, 14, 0, -100, -100], [5, 0, 11, 11, 0]],
    )
    assert tokenizer.pad_token is None  # the caller's is not changed


def test_rows_of_decoders_are_filled_on_the_right():
    """Whatever the tokenizer is set to for generation: absolute positions count from the first column on."""
    batch = _maker("causal-lm", _bert(padding_side="left"))([{"text": "cat"}, {"text": "a cat sat"}], 0)
    _equal(
        batch,
        input_ids=[[2, 6, 3, 0, 0], [2, 9, 6, 7, 3]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[[2, 6, 3, -100, -100], [2, 9, 6, 7, 3]],
    )


@pytest.mark.parametrize(("side", "kept"), [("right", [2, 5, 6, 3]), ("left", [2, 10, 9, 3])])
def test_long_texts_are_cut_between_the_special_tokens(side, kept):
    """On the side that the tokenizer is set to."""
    batch = _maker("causal-lm", _bert(truncation_side=side), max_length=4)([{"text": "the cat on mat a"}], 0)
    _equal(batch, input_ids=[kept], attention_mask=[[1] * 4], labels=[kept])


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion", "ids", "labels"),
    [
        ("cat sat", " cat", [10, 14, 11], [-100, -100, 11]),
        ("cat ", "sat a", [10, 14, 1, 5], [-100, 14, 1, 5]),  # " sat" is one token
        ("cat", "sat", [15], None),  # all of it is one token, at the first place, which nothing predicts
        ("cat", "\n", None, None),  # blank
        ("cat\n", "\n<eos>", [10, 2, 2, 0], [-100, -100, 2, 0]),
        ("cat<eos>", "<eos>", [10, 0, 0], [-100, -100, 0]),
    ],
)
def test_the_loss_of_a_completion_begins_behind_the_prompt(prompt, completion, ids, labels, trim):
    """Both are tokenized as one text; a token that reaches into the completion is the completion's."""
    make = _completions(_gpt(trim_offsets=trim))
    rows = [{"prompt": prompt, "completion": completion}]
    if labels is None:
        with pytest.raises(ConfigError, match=r"row 0 (has nothing of its completion|is empty in column compl)"):
            make(rows, 0)
    else:
        _equal(make(rows, 0), input_ids=[ids], attention_mask=[[1] * len(ids)], labels=[labels])


def test_special_tokens_behind_a_completion_have_labels():
    """An end that the tokenizer adds is to be predicted; the start, and padding, are not."""
    rows = [{"prompt": "the cat ", "completion": "sat"}, {"prompt": "a", "completion": " mat on mat"}]
    _equal(
        _completions(_bert())(rows, 0),
        input_ids=[[2, 5, 6, 7, 3, 0], [2, 9, 10, 8, 10, 3]],
        attention_mask=[[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        labels=[[-100, -100, -100, 7, 3, -100], [-100, -100, 10, 8, 10, 3]],
    )


def test_a_completion_is_cut_at_its_end_and_must_not_vanish():
    """Even where the tokenizer cuts on the left; the end token stays."""
    make = _completions(_bert(truncation_side="left"), max_length=5)
    rows = [{"prompt": "the cat ", "completion": "sat on a mat"}, {"prompt": "the cat sat ", "completion": "on a mat"}]
    _equal(make(rows[:1], 0), input_ids=[[2, 5, 6, 7, 3]], attention_mask=[[1] * 5], labels=[[-100] * 3 + [7, 3]])
    with pytest.raises(ConfigError, match="row 1 has nothing of its completion within 5 tokens; remove it, or take a"):
        make(rows, 0)


@pytest.mark.parametrize("trim", [False, True])
def test_all_turns_of_the_assistant_have_labels(trim):
    """As the template marks them, from the space on that some tokenizers leave out of a token's place."""
    batch = _chats(_gpt(trim_offsets=trim))([{"messages": CHAT}, {"messages": CHAT[:2]}], 0)
    _equal(
        batch,
        input_ids=[[4, 10, 3, 14, 2, 4, 13, 3, 11, 11, 2], [4, 10, 3, 14, 2, 0, 0, 0, 0, 0, 0]],
        attention_mask=[[1] * 11, [1] * 5 + [0] * 6],
        labels=[
            [-100, -100, -100, 14, 2, -100, -100, -100, 11, 11, 2],
            [-100, -100, -100, 14, 2, -100, -100, -100, -100, -100, -100],
        ],
    )


def test_a_token_that_a_mark_cuts_has_a_label():
    """What is marked begins behind the space that belongs to its first token."""
    template = MARKED.replace("{% generation %}{{ ' ' + ", " {% generation %}{{ ")
    _equal(
        _chats(_gpt(), template)([{"messages": CHAT[:2]}], 0),
        input_ids=[[4, 10, 3, 14, 2]], attention_mask=[[1] * 5], labels=[[-100, -100, -100, 14, 2]],
    )  # fmt: skip


def test_without_marks_every_token_of_a_conversation_has_a_label():
    """The template does not say which are the assistant's."""
    batch = _chats(_gpt(), UNMARKED)([{"messages": CHAT[:2]}], 0)
    _equal(batch, input_ids=[[4, 10, 3, 14, 2]], attention_mask=[[1] * 5], labels=[[4, 10, 3, 14, 2]])


def test_a_template_sees_special_tokens_and_no_keys_that_a_row_lacks():
    """Columns of dicts have None where a message has no such key; a template asks whether it is defined."""
    template = (
        "{% for message in messages %}{{ 'a' if message.tool_calls is defined else message.content }}{% endfor %}"
        "{{ eos_token }}"
    )
    messages = [{"role": "user", "content": "cat", "tool_calls": None}]
    _equal(
        _chats(_gpt(), template)([{"messages": messages}], 0),
        input_ids=[[10, 0]], attention_mask=[[1, 1]], labels=[[10, 0]],
    )  # fmt: skip


def test_a_conversation_adds_no_special_tokens_beside_its_template():
    """The template has written those that the model knows."""
    batch = _chats(_bert(), "{{ '[CLS] ' + messages[0].content }}")([{"messages": CHAT}], 0)
    _equal(batch, input_ids=[[2, 6]], attention_mask=[[1, 1]], labels=[[2, 6]])


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
def test_conversations_that_say_nothing_are_refused(messages, words):
    """No turn of the assistant, or none left of it, what the template refuses, and what is no conversation."""
    with pytest.raises(ConfigError, match=f"^row 1 .*{words}"):
        _chats(_gpt(), max_length=7)([{"messages": CHAT}, {"messages": messages}], 0)


# Classes and numbers


@pytest.mark.parametrize("label", [2, "yes", 2.0])
def test_a_class_is_a_number_or_a_name(label):
    """A name is looked up; a whole number may have come as a float, of a csv column with gaps."""
    rows = [{"text": "cat", "label": label}, {"text": "the cat sat", "label": True}]
    batch = _maker("classification")(rows, 0)
    _equal(
        batch,
        input_ids=[[2, 6, 3, 0, 0], [2, 5, 6, 7, 3]],
        attention_mask=[[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        labels=[2, 1],
    )
    assert batch["labels"].dtype == torch.int64


def test_a_number_needs_no_names():
    """A model without label2id takes any class."""
    assert _maker("classification", label_ids={})([{"text": "cat", "label": 5}], 0)["labels"].tolist() == [5]


@pytest.mark.parametrize("length", [7, 19])
def test_pairs_are_cut_and_joined_as_the_tokenizer_does(length):
    """The longer text first; the types of tokens come along where the tokenizer gives them."""
    tokenizer = _bert(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    columns = {"text": "text", "pair": "pair", "label": "label"}
    rows = [{"text": "the cat sat on", "pair": "a mat", "label": 0}]
    batch = _maker("classification", tokenizer, columns, max_length=length)(rows, 0)
    first = [5, 6] if length == 7 else [5, 6, 7, 8]
    _equal(
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
    """The message names the row, counted over all batches, what it has, and what the model knows."""
    rows = [{"text": "cat", "label": 0}] * 3 + [{"text": "cat", "label": label}]
    with pytest.raises(ConfigError, match=words) as caught:
        _maker("classification", label_ids=label_ids)(rows, 4)
    assert str(caught.value).endswith("(rows count from 0)")


def test_a_regression_has_numbers():
    """Whole ones too; one for a row, or a list of as many as the model gives."""
    rows = [{"text": "cat", "label": 3}, {"text": "mat", "label": -0.25}]
    labels = _maker("regression", label_ids={"LABEL_0": 0})(rows, 0)["labels"]
    torch.testing.assert_close(labels, torch.tensor([3.0, -0.25]), rtol=0, atol=0)
    rows = [{"text": "cat", "label": [1, 2, 3]}, {"text": "mat", "label": [0.5, 0, -1]}]
    labels = _maker("regression")(rows, 0)["labels"]
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
def test_what_is_no_number_is_refused(label, words):
    """Text, gaps and numbers that are none."""
    with pytest.raises(ConfigError, match=words):
        _maker("regression", label_ids={"LABEL_0": 0})([{"text": "cat", "label": label}], 0)


def test_a_words_label_lies_at_its_first_token():
    """Further tokens of the word, special tokens and padding have none; names are looked up; -100 stays."""
    rows = [
        {"tokens": ["cat", "a"], "tags": [1, "yes"]},
        {"tokens": ["a", "cat", "cat", "sa"], "tags": [0, -100, 2, 1]},
    ]
    _equal(
        _maker("token-classification", _pieces())(rows, 0),
        input_ids=[[1, 2, 3, 5, 1, 0, 0, 0], [1, 5, 2, 3, 2, 3, 4, 1]],
        attention_mask=[[1] * 5 + [0] * 3, [1] * 8],
        labels=[[-100, 1, -100, 2, -100, -100, -100, -100], [-100, 0, -100, -100, 2, -100, 1, -100]],
    )


def test_encoders_keep_the_side_that_they_are_filled_on():
    """Labels are filled on the same side as tokens."""
    tokenizer = _pieces()
    tokenizer.padding_side = "left"
    rows = [{"tokens": ["a"], "tags": [1]}, {"tokens": ["cat"], "tags": [2]}]
    _equal(
        _maker("token-classification", tokenizer)(rows, 0),
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
    """Lists that do not fit each other, gaps, unknown classes, and rows whose labels are cut off."""
    with pytest.raises(ConfigError, match=f"^row 0 {words}"):
        _maker("token-classification", _pieces(), max_length=4)([{"tokens": tokens, "tags": tags}], 0)


# Sequence to sequence


@pytest.mark.parametrize("side", ["right", "left"])
def test_targets_are_labels_filled_on_their_own(side):
    """To the longest target, on the right; targets are cut as texts are."""
    rows = [{"text": "a cat", "target": "mat"}, {"text": "dog", "target": "the dog ran far"}]
    _equal(
        _maker("seq2seq", _bert(padding_side=side), max_length=5)(rows, 0),
        input_ids=[[2, 9, 6, 3], [2, 11, 3, 0]],
        attention_mask=[[1, 1, 1, 1], [1, 1, 1, 0]],
        labels=[[2, 10, 3, -100, -100], [2, 5, 11, 12, 3]],
    )


def test_targets_are_tokenized_as_targets():
    """MBart's tokenizer ends a text by the language of the source, and a target by that of the target."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "▁cat", "▁dog"]
    vocab = [(name, float(-i)) for i, name in enumerate(names)]
    tokenizer = transformers.MBartTokenizer(vocab=vocab, src_lang="en_XX", tgt_lang="ro_RO")
    batch = _maker("seq2seq", tokenizer)([{"text": "cat dog", "target": "cat"}], 0)
    english, romanian = tokenizer.convert_tokens_to_ids(["en_XX", "ro_RO"])
    _equal(batch, input_ids=[[4, 5, 2, english]], attention_mask=[[1] * 4], labels=[[4, 2, romanian]])


def test_a_tokenizer_in_python_serves_as_well():
    """ByT5's: bytes and an end."""
    batch = _maker("seq2seq", transformers.ByT5Tokenizer())([{"text": "ab", "target": "c"}], 0)
    _equal(batch, input_ids=[[100, 101, 1]], attention_mask=[[1, 1, 1]], labels=[[102, 1]])


# Masks

TEXTS = [{"text": "the cat sat on the mat " * 3}, {"text": "a dog ran far"}, {"text": "far " * 16}]


def _same(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


def _make_elsewhere(maker, number, results):
    torch.manual_seed(number)
    results.put({key: value.tolist() for key, value in maker(TEXTS, number).items()})


def test_masks_depend_on_seed_and_number_alone():
    """Not on the batches before, nor on torch's generator, which is left as it was."""
    maker = _maker("masked-lm")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = maker(TEXTS, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    maker(TEXTS, 0)
    assert _same(maker(TEXTS, 3), first)
    assert _same(_maker("masked-lm")(TEXTS, 3), first)
    others = [maker(TEXTS, 4), _maker("masked-lm", seed=8)(TEXTS, 3), _maker("masked-lm", seed=3)(TEXTS, 7)]
    for i, batch in enumerate(others):
        assert not any(torch.equal(batch["labels"], other["labels"]) for other in [first, *others[:i]])


def test_masks_are_the_same_in_another_process():
    """A run is dealt out over processes that share no state."""
    maker = _maker("masked-lm")
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    process = context.Process(target=_make_elsewhere, args=(maker, 3, results))
    process.start()
    found = results.get()
    process.join()
    _equal(maker(TEXTS, 3), **found)


def test_masks_are_those_of_training():
    """15 % of the tokens that are not special have labels, their own; 80 % of these are hidden, 10 % others."""
    whole = _maker("causal-lm")(TEXTS * 40, 0)
    batch = _maker("masked-lm", batch_size=120)(TEXTS * 40, 0)
    ordinary = whole["input_ids"] > 4
    chosen = batch["labels"] != -100
    assert torch.equal(batch["attention_mask"], whole["attention_mask"])
    assert not (chosen & ~ordinary).any()
    assert torch.equal(batch["labels"][chosen], whole["input_ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], whole["input_ids"][~chosen])
    # Five standard deviations of a share p of n draws: 5 (p (1 - p) / n)^1/2.
    draws, count = int(ordinary.sum()), int(chosen.sum())
    assert abs(count / draws - 0.15) < 5 * (0.15 * 0.85 / draws) ** 0.5
    hidden = (batch["input_ids"] == 4)[chosen].float().mean()
    kept = (batch["input_ids"] == whole["input_ids"])[chosen].float().mean()
    # A token drawn at random is [MASK], or the one that was there, once in 14.
    for found, share in ((hidden, 0.8 + 0.1 / 14), (kept, 0.1 + 0.1 / 14)):
        assert abs(float(found) - share) < 5 * (share * (1 - share) / count) ** 0.5


# What holds for every task

FULL = [
    {"text": "the cat sat", "prompt": "cat ", "completion": "sat", "messages": CHAT, "target": "a dog ran", "label": 2,
     "tokens": ["cat", "a"], "tags": [1, 2]},
    {"text": "a mat", "prompt": "sat cat ", "completion": "sat cat cat", "messages": CHAT[2:], "target": "far",
     "label": 0, "tokens": ["a", "cat", "cat", "sat"], "tags": [0, 0, 1, 2]},
    {"text": "far on a cat", "prompt": "cat", "completion": " cat cat", "messages": CHAT[:2], "target": "a cat",
     "label": 1, "tokens": ["sat"], "tags": [2]},
]  # fmt: skip
MAKERS = {
    "causal-lm": lambda: _maker("causal-lm"),
    "completions": lambda: _completions(_gpt()),
    "chats": lambda: _chats(_gpt()),
    "seq2seq": lambda: _maker("seq2seq"),
    "classification": lambda: _maker("classification"),
    "regression": lambda: _maker("regression", label_ids={}),
    "token-classification": lambda: _maker("token-classification", _pieces()),
}


@pytest.mark.parametrize("name", MAKERS)
def test_padding_changes_nothing(name):
    """A batch is its rows one by one, filled with 0 in the mask and -100 in the labels; and is the same again."""
    make = MAKERS[name]()
    batch = make(FULL, 0)
    assert _same(make(copy.deepcopy(FULL), 0), batch)
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
    """The row, counted over all batches, and the column are named."""
    row = {"text": "cat", "prompt": "cat", "completion": "sat", "target": "cat", "label": 0}
    with pytest.raises(ConfigError, match=f"^row 11 {words.format(column)}"):
        _maker(task, columns=columns, label_ids={})([row, row | {column: value}], 2)


GONE = "\N{ZERO WIDTH SPACE}"  # a character that the tokenizers of the next test drop


@pytest.mark.parametrize(
    ("task", "tokenizer", "row", "words"),
    [
        ("causal-lm", _gpt, {"text": "cat"}, "has fewer than two tokens, and nothing to predict; remove it, or"),
        ("causal-lm", _gpt, {"text": GONE}, "has fewer than two tokens, and nothing to predict; remove it, or"),
        ("masked-lm", _bert, {"text": GONE}, "has no token that could be masked; remove it"),
        ("seq2seq", _gpt, {"text": "cat", "target": GONE}, "has no token in its target; remove it, or"),
        ("seq2seq", _gpt, {"text": GONE, "target": "cat"}, "has no token in its text; remove it"),
        ("classification", _gpt, {"text": GONE, "label": 0}, "has no token in its text; remove it"),
        ("token-classification", _pieces, {"tokens": [GONE], "tags": [0]}, "has no word with a label within 19 tokens"),
    ],
)
def test_a_row_without_a_loss_is_refused(task, tokenizer, row, words):
    """Nothing is predicted of one token, or of none."""
    tokenizer = tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(GONE, "")
    with pytest.raises(ConfigError, match=f"^row 0 {words}"):
        _maker(task, tokenizer)([row], 0)


@pytest.mark.parametrize(
    ("task", "columns", "tokenizer", "options", "words"),
    [
        ("causal-lm", None, lambda: _gpt(eos_token=None), {}, "a pad or an eos token, found neither; set its pad_"),
        ("masked-lm", None, lambda: _bert(mask_token=None), {}, "a mask token for masked-lm, found none"),
        ("causal-lm", {"messages": "m"}, _gpt, {}, "a chat template for the column of messages, found none"),
        ("causal-lm", {"messages": "m"}, transformers.ByT5Tokenizer, {}, "ByT5Tokenizer cannot; take a fast one"),
        ("causal-lm", {"text": "p", "target": "c"}, transformers.ByT5Tokenizer, {}, "take a fast one"),
        ("token-classification", None, transformers.ByT5Tokenizer, {}, "take a fast one"),
        ("causal-lm", None, _bert, {"max_length": 2}, "--max-length must leave room for text beside 2 special tokens"),
        (
            "classification", {"text": "a", "pair": "b", "label": "c"}, _bert, {"max_length": 3},
            "room for text beside 3 special tokens, found 3; take a larger one",
        ),
    ],
)  # fmt: skip
def test_tokenizers_that_do_not_fit_the_task_are_refused(task, columns, tokenizer, options, words):
    """Before any row is read."""
    with pytest.raises(ConfigError, match=words):
        _maker(task, tokenizer(), columns, **options)


def test_rows_of_different_lengths_need_a_mask():
    """A tokenizer that makes none belongs to a model that takes none: filled rows would be taken as they are."""
    make = _maker("masked-lm", _bert(model_input_names=["input_ids"]))
    assert set(make([{"text": "cat"}, {"text": "dog"}], 0)) == {"input_ids", "labels"}
    with pytest.raises(ConfigError, match=r"the tokenizer makes no attention_mask; take --batch-size 1"):
        make([{"text": "cat"}, {"text": "a dog"}], 0)
