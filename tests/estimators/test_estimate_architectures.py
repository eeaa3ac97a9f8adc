"""Every architecture in float32, with padding, within 1e-5 of the largest entry of the float64 oracle."""

import pytest
import torch

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.estimators.tasks import Outputs
from tests.estimators import oracle
from tests.estimators.models import MODELS, assert_close, batch_of, loss_of, make, task_of

CLASSIFIERS = [name for name in MODELS if task_of(name) == "classification"]
SEQUENCES = [name for name in MODELS if name not in CLASSIFIERS]


def _check(name, labels, grouping):
    torch.manual_seed(1)
    model, task = make(name), task_of(name)
    kind = MODELS[name][0]
    batches = [batch_of(kind), batch_of(kind, 2, seed=3)]
    fisher = estimate_fisher(model, batches, labels, grouping, statistic="sum", task=task)
    expected = oracle.fisher(model, batches, loss_of(kind, labels), grouping)
    assert_close(fisher, expected, model=model)


@pytest.mark.parametrize("labels", ["true", "predicted"])
@pytest.mark.parametrize("name", MODELS)
def test_given_labels_per_example(name, labels):
    """The Fisher of true and of most likely labels equals the oracle's, also with ties, relative biases and experts."""
    _check(name, labels, "example")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_expectation_over_classes(name):
    """The Fisher of exact labels is the oracle's sum over classes weighted by probability."""
    _check(name, "exact", "example")


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_expectation_over_tokens_is_refused(name):
    """Exact labels of tokens raise an error, because they would need one pass per token of the vocabulary."""
    with pytest.raises(ConfigError, match="take labels sampled"):
        estimate_fisher(make(name), [batch_of(MODELS[name][0])], "exact", task=task_of(name))


@pytest.mark.parametrize("name", MODELS)
def test_the_joint_form_of_given_labels(name):
    """The joint form sums over two batches the square of the summed gradient of a batch."""
    _check(name, "true", "batch")


@pytest.mark.parametrize("grouping", ["example", "batch"])
@pytest.mark.parametrize("name", MODELS)
def test_drawn_labels_are_used_as_true_ones_are(name, grouping, monkeypatch):
    """The oracle gives the same Fisher with the drawn labels as true ones. Ignored targets draw no label."""
    torch.manual_seed(1)
    model, task, batch = make(name), task_of(name), batch_of(MODELS[name][0])
    seen = []
    original = Outputs.output_gradients

    def watched(self, *args):
        found = list(original(self, *args))
        seen.append((self, found))
        return iter(found)

    monkeypatch.setattr(Outputs, "output_gradients", watched)
    fisher = estimate_fisher(model, [batch], "sampled", grouping, statistic="sum", task=task, seed=5)
    [(outputs, [column])] = seen
    drawn = (outputs.values.detach().softmax(-1) - column).argmax(-1).masked_fill(outputs.targets < 0, -100)
    assert (drawn != outputs.targets).any()
    if task == "causal-lm":  # a token predicts the next one
        drawn = torch.cat([torch.full_like(drawn[:, :1], -100), drawn], 1)
    given = batch if task == "seq2seq" else batch | {"labels": drawn}
    if task == "seq2seq":  # the inputs of the decoder stay the same
        given = batch | {"decoder_input_ids": oracle.shifted(model, batch["labels"]), "labels": drawn}
    assert_close(fisher, oracle.fisher(model, [given], loss_of(MODELS[name][0], "true"), grouping), model=model)
