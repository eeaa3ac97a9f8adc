"""Metadata of a Fisher: scalings by hand, and the keys on disk."""

import json

import pytest

from squisher_mergekit.errors import ConfigError, CorruptFileError
from squisher_mergekit.fisher.config import FisherConfig, of_parameter, per_parameter

KEYS = {
    "format_version", "estimator", "statistic", "parameters", "optimizer", "steps", "bias_corrected",
    "examples_per_step", "tokens_per_step", "clipped_share", "loss_reduction", "datum", "num_examples", "mean", "norm",
    "encoding", "source", "coverage", "weights_fingerprint",
}  # fmt: skip


def _squisher(**changes):
    return FisherConfig.model_validate(
        {"estimator": "squisher", "statistic": "ema", "steps": 3, "optimizer": {"beta2": 0.9}} | changes
    )


def test_every_key_is_written_and_unknown_is_null(tmp_path):
    """The file has all keys of the format, and unknown values are null."""
    data = json.loads(FisherConfig().to_json())
    assert set(data) == KEYS
    known = {"format_version": 1, "parameters": "model", "encoding": {"default": "float32"}}
    assert {key: data[key] for key in known} == known
    assert all(data[key] is None for key in KEYS - set(known) - {"source", "coverage"})


def test_a_config_comes_back_unchanged(tmp_path):
    """A full config is equal after writing and reading. Aliases such as class and with are kept."""
    config = FisherConfig.model_validate(
        {
            "estimator": "squisher",
            "statistic": "sum",
            "parameters": "adapter",
            "optimizer": {"class": "torch.optim.Adagrad", "initial_accumulator_value": 0.5, "max_grad_norm": 1.0},
            "steps": {"default": 7, "a.weight": 5},
            "bias_corrected": False,
            "examples_per_step": 32,
            "mean": 1e-300,
            "norm": 3e38,
            "source": {"layout": "torch", "files": ["optimizer.pt"], "versions": {"torch": "2.13"}, "model": "a/b"},
            "coverage": {"with": 3, "without": {"b": "tied to a"}},
            "weights_fingerprint": "fp1:0-1",
        }
    )
    file = tmp_path / "fisher_config.json"
    file.write_text(config.to_json())
    assert FisherConfig.from_file(file) == config
    data = json.loads(file.read_text())
    assert data["optimizer"]["class"] == "torch.optim.Adagrad"
    assert data["coverage"] == {"with": 3, "without": {"b": "tied to a"}}


def test_adagrads_start_is_written_only_where_there_is_one():
    """Only Adagrad has the key initial_accumulator_value."""
    assert "initial_accumulator_value" not in json.loads(_squisher().to_json())["optimizer"]


def test_a_config_cannot_be_changed():
    """A config is frozen, so the scale of a Fisher cannot change."""
    with pytest.raises(ValueError, match="frozen"):
        _squisher().steps = 4


@pytest.mark.parametrize(
    ("changes", "debiased"),
    [
        ({}, 1 / (1 - 0.9**3)),  # = 1 / 0.271
        ({"steps": 1}, 10.0),
        ({"bias_corrected": True}, 1.0),
        ({"steps": {"default": 3, "w": 1}}, 10.0),
        ({"optimizer": {"beta2": {"default": 0.9, "w": 0.5}}}, 1 / 0.875),
        ({"statistic": "sum", "steps": 4}, 0.25),
        ({"statistic": "mean"}, 1.0),
        ({"estimator": "empirical", "statistic": "sum", "num_examples": 8}, 0.125),
        ({"estimator": "empirical", "statistic": "mean", "num_examples": 8}, 1.0),
        ({"steps": 10**6}, 1.0),
    ],
)
def test_the_debiased_scale_by_hand(changes, debiased):
    """The factor is 1 / (1 - beta2^t) for a moving average, 1 / t or 1 / n for a sum, and else 1."""
    config = _squisher(**changes)
    assert config.factor("w", "debiased") == pytest.approx(debiased, rel=1e-14)
    assert config.factor("w", "raw") == 1.0


def test_the_scale_per_example_by_hand():
    """The per-example scale of an optimizer state is the debiased scale times the batch size.

    Otherwise it is the debiased scale.
    """
    assert _squisher(examples_per_step=32).factor("w", "per_example") == pytest.approx(32 / 0.271, rel=1e-14)
    assert _squisher(statistic="sum", steps=4, examples_per_step=2.5).factor("w", "per_example") == 2.5 / 4
    computed = FisherConfig(estimator="sampled", statistic="sum", num_examples=8, examples_per_step=32)
    assert computed.factor("w", "per_example") == 1 / 8
    average = _squisher(estimator="ema_empirical", examples_per_step=32)
    assert average.factor("w", "per_example") == pytest.approx(32 / 0.271, rel=1e-14)


@pytest.mark.parametrize(
    ("config", "scaling", "words"),
    [
        (_squisher(steps=None), "debiased", "steps of w"),
        (_squisher(optimizer=None), "debiased", "beta2 of w"),
        (_squisher(steps={"a": 3}), "debiased", "steps of w"),
        (_squisher(), "per_example", "examples_per_step.*--examples-per-step N"),
        (_squisher(statistic="sum", steps=None), "debiased", "needs steps"),
        (FisherConfig(estimator="exact", statistic="sum"), "debiased", "needs num_examples"),
    ],
)
def test_a_scale_that_needs_an_unknown_number_is_refused(config, scaling, words):
    """The error says which number is missing. The raw scale always works."""
    with pytest.raises(ConfigError, match=words):
        config.factor("w", scaling)
    assert config.factor("w", "raw") == 1.0


def test_adagrads_start_is_subtracted_from_every_scale_but_raw():
    """The initial value of a sum is subtracted before the scale is applied."""
    config = _squisher(statistic="sum", optimizer={"initial_accumulator_value": 0.5})
    assert [config.offset(scaling) for scaling in ("raw", "debiased", "per_example")] == [0.0, 0.5, 0.5]
    assert _squisher().offset("debiased") == 0.0


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("{", CorruptFileError, "must be JSON"),
        ("[]", ConfigError, "format_version of at most 1, found None"),
        ("{}", ConfigError, "format_version of at most 1, found None"),
        ('{"format_version": 2}', ConfigError, "found 2; upgrade"),
        ('{"format_version": 1, "statistics": "ema"}', ConfigError, "statistics: "),
        ('{"format_version": 1, "statistic": "median"}', ConfigError, "statistic: .*found 'median'"),
        ('{"format_version": 1, "optimizer": {"beta2": "high"}}', ConfigError, r"optimizer\.beta2.*found 'high'"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, error, words):
    """Damage, a later version, a misspelt key and a wrong value are refused with the file name."""
    file = tmp_path / "fisher_config.json"
    file.write_text(text)
    with pytest.raises(error, match=words) as caught:
        FisherConfig.from_file(file)
    assert str(file) in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    """A missing file raises an error instead of giving an empty config."""
    with pytest.raises(CorruptFileError):
        FisherConfig.from_file(tmp_path / "fisher_config.json")


@pytest.mark.parametrize("values", [{}, {"a": 1}, {"a": 1, "b": 1}, {"a": 1, "b": 2, "c": 2}, {"a": 1, "b": 2}])
def test_the_short_form_of_values_is_equal(values):
    """The short form of per-parameter values gives each parameter its own value."""
    short = per_parameter(values)
    assert {name: of_parameter(short, name) for name in values} == values
    assert of_parameter(per_parameter({"a": 4, "b": 4}), "anything") == 4


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"steps": "1200"}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": {"default": 3, "head.weight": True}}, "steps.head.weight"),
        ({"steps": {"default": -3}}, "steps.default"),
        ({"optimizer": {"beta2": "0.999"}}, "optimizer.beta2"),
        ({"optimizer": {"beta2": {"w": 1.0}}}, "optimizer.beta2.w"),
        ({"mean": True}, "mean"),
        ({"bias_corrected": "false"}, "bias_corrected"),
        ({"optimizer": {"amsgrad": 1}}, "optimizer.amsgrad"),
    ],
)
def test_flags_and_texts_are_no_numbers(tmp_path, changes, place):
    """A value of another type is not converted, and the message names the innermost place."""
    given = json.loads(_squisher().to_json())
    optimizer = given["optimizer"] | changes.get("optimizer", {})
    file = tmp_path / "fisher_config.json"
    file.write_text(json.dumps(given | changes | {"optimizer": optimizer}))
    with pytest.raises(ConfigError, match=rf"but {place}: .*extract it again"):
        FisherConfig.from_file(file)
