"""Small models, tokenizers and settings for the tests of several rooms."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import Dataset

LENGTH = 11  # tokens of a row
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "a", "mat", "dog", "ran", "far"]
SMALL = {"vocab_size": 14, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 19}


def word_tokenizer():
    """Return a tokenizer of the 14 words, with BERT's special tokens."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


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
    # The kernel that multiplies packed experts requires rows of a multiple of 16 bytes: 12 and 20 floats.
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


class Tokens(Dataset):
    """Random token ids: 24 rows with labels."""

    def __init__(self, name):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, 53, (24, LENGTH), generator=generator)
        self.labels = torch.randint(0, 5, (24,), generator=generator) if name == "bert" else self.ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}
