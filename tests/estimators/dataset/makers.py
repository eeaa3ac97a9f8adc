"""Small tokenizers and batch makers for all tasks."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from squisher_mergekit.estimators.dataset.batches import BatchMaker

#         0        1        2        3        4         5      6      7      8     9    10     11     12     13
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far"]
#         0        1    2    3    4    5    6    7    8    9     10     11      12    13     14      15
PIECES = ["<eos>", "Ġ", "Ċ", "<", ">", "a", "c", "s", "t", "ca", "cat", "Ġcat", "sa", "sat", "Ġsat", "catsat"]
MERGES = [("c", "a"), ("ca", "t"), ("Ġ", "cat"), ("s", "a"), ("sa", "t"), ("Ġ", "sat"), ("cat", "sat")]
# One character per role. The assistant's content is marked, with a space before it and a line break after it.
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


def bert_tokenizer(**options):
    """Return a tokenizer of words that puts [CLS] and [SEP] around and between texts."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **(names | {"mask_token": "[MASK]"} | options))


def byte_tokenizer(trim_offsets=False, **options):
    """Return a tokenizer of bytes without padding token, which adds no special tokens."""
    inner = Tokenizer(models.BPE({piece: i for i, piece in enumerate(PIECES)}, MERGES))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **({"eos_token": "<eos>"} | options))


def piece_tokenizer():
    """Return a tokenizer of sub-words of at most two letters."""
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


def batch_maker(task, tokenizer=None, columns=None, label_ids=None, **options):
    """Return a batch maker of a task, by default with words and three classes."""
    tokenizer = bert_tokenizer() if tokenizer is None else tokenizer
    found = {"max_length": 19, "seed": 7, "batch_size": 5} | options
    columns = COLUMNS[task] if columns is None else columns
    return BatchMaker(tokenizer, task, columns=columns, label_ids=LABELS if label_ids is None else label_ids, **found)


def completion_maker(tokenizer, **options):
    """Return a batch maker of prompts and completions."""
    return batch_maker("causal-lm", tokenizer, {"text": "prompt", "target": "completion"}, **options)


def chat_maker(tokenizer, template=MARKED, **options):
    """Return a batch maker of conversations."""
    tokenizer.chat_template = template
    return batch_maker("causal-lm", tokenizer, {"messages": "messages"}, **options)


def assert_batch(batch, **expected):
    """Assert that a batch has these keys and these numbers."""
    assert {key: value.tolist() for key, value in batch.items()} == expected


def same_batches(one, other):
    """Return True if two batches are equal."""
    return all(torch.equal(one[key], other[key]) for key in one)
