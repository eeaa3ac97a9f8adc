"""Moving average of the per-example Fisher in real runs of the Trainer."""

import copy
import shutil
import types

import pytest
import torch
import transformers as tf

from squisher_mergekit import estimate_fisher, load_fisher
from squisher_mergekit.errors import ConfigError
from squisher_mergekit.training import FisherAverageCallback, average
from tests import processes


class _Watch(tf.TrainerCallback):
    """Callback that copies the model and its batch at each step."""

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


def _train(folder, *callbacks, resume=None, **settings):
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
    tf.Trainer(model, args, train_dataset=rows, callbacks=list(callbacks)).train(resume)
    return model


def test_the_average_is_over_the_sampled_batches(tmp_path):
    """The average of every second step has the Fisher of its batch at its weights, debiased by the count."""
    watch, average = _Watch(), FisherAverageCallback(beta=0.7, share=0.5)
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


def test_each_checkpoint_has_its_own_average(tmp_path):
    """The average of each checkpoint has one or two batches after three steps.

    Its fingerprint is that of the checkpoint's weights.
    """
    _train(tmp_path, FisherAverageCallback(beta=0.7, share=0.5))
    steps = [load_fisher(tmp_path / f"checkpoint-{n}" / "fisher_average").config for n in (3, 6)]
    assert [config.steps for config in steps] == [2, 3]
    assert steps[0].weights_fingerprint != steps[1].weights_fingerprint
    assert all(config.weights_fingerprint.startswith("fp1:") for config in steps)


def test_the_average_does_not_change_training(tmp_path):
    """The average changes no bit of the trained weights, because it touches neither gradients nor random numbers."""
    with_it = _train(tmp_path / "a", FisherAverageCallback(share=1.0, labels="sampled"))
    without = _train(tmp_path / "b")
    for name, tensor in without.state_dict().items():
        assert torch.equal(with_it.state_dict()[name], tensor), name


@pytest.mark.parametrize("wrong", [{"beta": 1.0}, {"beta": 0.0}, {"share": 0.0}, {"share": 1.5}])
def test_arguments_out_of_range_are_refused(wrong):
    """An argument out of range is refused before training."""
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        FisherAverageCallback(**wrong)


def test_a_resumed_run_continues_the_average(tmp_path):
    """A run that stops after three steps and resumes gives the average of an uninterrupted run."""
    _train(tmp_path / "whole", FisherAverageCallback(beta=0.7, share=1.0))
    _train(tmp_path / "parts", FisherAverageCallback(beta=0.7, share=1.0))
    shutil.rmtree(tmp_path / "parts" / "fisher_average")
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    _train(
        tmp_path / "parts", FisherAverageCallback(beta=0.7, share=1.0), resume=str(tmp_path / "parts" / "checkpoint-3")
    )
    whole, parts = (load_fisher(tmp_path / part / "fisher_average") for part in ("whole", "parts"))
    assert parts.config.steps == whole.config.steps == 6
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_an_average_of_another_decay_is_not_resumed(tmp_path, caplog):
    """A kept average with another decay is not resumed. A line says so, and the average starts again."""
    _train(tmp_path, FisherAverageCallback(beta=0.7, share=1.0))
    _train(tmp_path, FisherAverageCallback(beta=0.6, share=1.0), resume=str(tmp_path / "checkpoint-3"))
    assert "must be one with beta 0.6, found 0.7" in caplog.text
    assert load_fisher(tmp_path / "fisher_average").config.steps == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_average_both_parts(tmp_path, kind):
    """Two processes, replicated or sharded, give the average of one process over the whole batches."""
    files = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        codes, said = processes.run("tests.training.average_worker", kind, folder, world)
        assert not any(codes), said
        files[world] = load_fisher(folder / "fisher_average")
    assert set(files[1]) == set(files[2])
    largest = max(float(files[1][name].max()) for name in files[1])
    for name in files[1]:
        torch.testing.assert_close(files[2][name], files[1][name], rtol=1e-4, atol=1e-7 * largest)


def test_a_batch_moves_to_the_model():
    """DataParallel gives its copies their parts of a batch on GPUs of their own; those of a spread model stay."""
    weights = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in ("meta", "cpu")]
    for parameters, expected in ((weights[:1], "meta"), (weights[1:], "cpu"), (weights, "cpu")):
        accumulator = types.SimpleNamespace(accumulators=dict.fromkeys(parameters))
        assert average._beside(accumulator, {"x": torch.ones(3)})["x"].device.type == expected
