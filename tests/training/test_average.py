"""The moving average of the per-example Fisher, in real runs of the Trainer."""

import copy

import pytest
import torch
import transformers as tf

from squisher_mergekit import FisherAverage, estimate_fisher, load_fisher
from squisher_mergekit.errors import ConfigError


class _Watch(tf.TrainerCallback):
    """Keeps a copy of the model and its batch at each step."""

    def __init__(self):
        self.seen = []
        self.batch = None

    def on_train_begin(self, args, state, control, model=None, **_):
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if module.training:
            self.batch = {key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.seen.append((copy.deepcopy(model), self.batch))


def _train(folder, *callbacks, **settings):
    torch.manual_seed(4)
    model = tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=29,
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=19,
            num_labels=3,
        )
    )
    rows = [{"input_ids": torch.randint(3, 29, (7,)), "labels": torch.tensor(i % 3)} for i in range(24)]
    args = tf.TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, use_cpu=True, report_to=[],
        disable_tqdm=True, learning_rate=1e-2, **settings,
    )  # fmt: skip
    tf.Trainer(model, args, train_dataset=rows, callbacks=list(callbacks)).train()
    return model


def test_it_is_the_average_of_the_batches_looked_at(tmp_path):
    """Every second step the Fisher of its batch at its weights, averaged with the decay; debiased by the count."""
    watch, average = _Watch(), FisherAverage(beta=0.7, share=0.5)
    _train(tmp_path, watch, average)
    expected = {}
    for model, batch in watch.seen[::2]:
        for name, tensor in estimate_fisher(model, [batch]).items():
            expected[name] = 0.7 * expected.get(name, 0.0) + 0.3 * tensor.double()
    found = load_fisher(tmp_path / "fisher_average")
    assert set(found) == set(expected)
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-4, atol=1e-10 * largest)
        torch.testing.assert_close(found.scaled(name), found[name] / (1 - 0.7**3))
    assert (found.config.estimator, found.config.statistic, found.config.steps) == ("empirical", "ema", 3)


def test_each_checkpoint_has_its_own(tmp_path):
    """After three steps one or two batches have been seen; the fingerprint is that of the checkpoint's weights."""
    _train(tmp_path, FisherAverage(beta=0.7, share=0.5))
    steps = [load_fisher(tmp_path / f"checkpoint-{n}" / "fisher_average").config for n in (3, 6)]
    assert [config.steps for config in steps] == [2, 3]
    assert steps[0].weights_fingerprint != steps[1].weights_fingerprint
    assert all(config.weights_fingerprint.startswith("fp1:") for config in steps)


def test_training_goes_on_as_without_it(tmp_path):
    """The same weights come out, to the bit: neither gradients nor random numbers are touched."""
    with_it = _train(tmp_path / "a", FisherAverage(share=1.0, labels="sampled"))
    without = _train(tmp_path / "b")
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], tensor), name


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": 0.0}, {"share": 0.0}, {"share": 1.5}])
def test_arguments_out_of_range_are_refused(wrong):
    """Before training begins."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FisherAverage(**wrong)
