"""Tasks that follow from a config, and targets of batches without labels."""

import peft
import pytest
import torch
import transformers
from torch import nn

from squisher_mergekit import estimate_fisher
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.tasks import infer_task


def _bert(**options):
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 7}
    config = transformers.BertConfig(**sizes, vocab_size=17, max_position_embeddings=11, **options)
    return transformers.BertForSequenceClassification(config)


def _llama():
    torch.manual_seed(2)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 7}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=13))


class LlavaForConditionalGeneration(nn.Module):
    """Model with the ending of encoder-decoders in its name."""

    def __init__(self, is_encoder_decoder):
        super().__init__()
        self.config = transformers.PretrainedConfig(is_encoder_decoder=is_encoder_decoder)


def test_a_classifier_with_one_output_is_a_regression():
    """One output has the probability 1, and a Fisher of zeros: it is a regression, as in the loss of transformers."""
    ids, values = torch.randint(1, 17, (3, 5)), torch.tensor([0.5, 1.0, 2.0])
    model = _bert(num_labels=1)
    assert infer_task("auto", model, {}) == "regression"
    fisher = estimate_fisher(model, [{"input_ids": ids, "labels": values}], labels="sampled")
    assert float(fisher["classifier.weight"].min()) > 0
    with pytest.raises(ConfigError, match="two classes or more"):
        estimate_fisher(model, [{"input_ids": ids}], labels="sampled", task="classification")


def test_several_labels_at_once_are_refused():
    """A classifier of several labels at once is refused by name; numbers as classes are refused as well."""
    ids = torch.randint(1, 17, (3, 5))
    several = _bert(num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ConfigError, match="multi_label_classification"):
        estimate_fisher(several, [{"input_ids": ids, "labels": torch.ones(3, 3)}])
    with pytest.raises(ConfigError, match="whole numbers of shape"):
        estimate_fisher(_bert(num_labels=3), [{"input_ids": ids, "labels": torch.ones(3)}])


@pytest.mark.parametrize(("is_encoder_decoder", "task"), [(False, "causal-lm"), (True, "seq2seq")])
def test_a_decoder_for_conditional_generation_is_a_causal_language_model(is_encoder_decoder, task):
    """LlavaForConditionalGeneration and others are decoders, whose output at a token predicts the next one."""
    assert infer_task("auto", LlavaForConditionalGeneration(is_encoder_decoder), {}) == task


def test_padding_has_no_drawn_label():
    """Without labels, the attention mask tells tokens from padding: a padded batch has the Fisher of its rows alone."""
    model, ids = _llama(), torch.randint(1, 13, (1, 4))
    padded = {"input_ids": torch.cat([ids, ids.new_zeros(1, 7)], 1)}
    padded["attention_mask"] = torch.cat([torch.ones(1, 4), torch.zeros(1, 7)], 1).long()
    fisher = estimate_fisher(model, [padded], labels="predicted")
    expected = estimate_fisher(model, [{"input_ids": ids}], labels="predicted")
    for name in expected:
        torch.testing.assert_close(fisher[name], expected[name], rtol=1e-4, atol=1e-9)
    tokens = estimate_fisher(model, [padded], labels="predicted", datum="token")
    assert tokens.config.num_examples == 3
    with pytest.raises(ConfigError, match="labels true needs the labels"):
        estimate_fisher(model, [padded])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_inputs_that_require_gradients_change_nothing():
    """A LoRA has the same Fisher after enable_input_require_grads, and runs without a cache."""
    model = peft.get_peft_model(_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    batch = {"input_ids": torch.randint(1, 13, (3, 5))}
    batch["labels"] = batch["input_ids"]
    caches = []
    model.base_model.model.register_forward_hook(lambda module, given, out: caches.append(out.past_key_values))
    expected = estimate_fisher(model, [batch], task="causal-lm")
    model.enable_input_require_grads()
    fisher = estimate_fisher(model, [batch], task="causal-lm")
    assert len(expected) == 4
    for name in expected:
        torch.testing.assert_close(fisher[name], expected[name])
    assert set(caches) == {None}
