"""Tensors that a merge loses, told from names alone."""

import pytest
import transformers

from squisher_mergekit.models.loading import loadable
from squisher_mergekit.models.whole import Gaps, ReadFiles, find_gaps, missing_parts


def _model():
    config = transformers.OlmoeConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, num_experts=3,
        num_experts_per_tok=1, architectures=["OlmoeForCausalLM"],
    )  # fmt: skip
    found = loadable(config)
    assert found is not None
    return found


EXPERTS = [f"model.layers.0.mlp.experts.{i}.{p}_proj.weight" for i in range(3) for p in ("gate", "up", "down")]
PACKED = ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"]


def test_packed_experts_lose_nothing():
    """Single experts that are read are in the packed tensors that are written."""
    model = _model()
    rest = [key for key in model.needed() if key not in PACKED]
    files = ReadFiles("a", frozenset([*rest, *EXPERTS]), frozenset(rest))
    assert not find_gaps([files], [*rest, *PACKED], [], model)


def test_an_expert_that_is_not_written():
    """A part that is not written is lost where experts keep their own names."""
    model = _model()
    rest = [key for key in model.needed() if key not in PACKED]
    files = ReadFiles("a", frozenset([*rest, *EXPERTS]), frozenset([*rest, *EXPERTS[:-1]]))
    assert find_gaps([files], [*rest, *EXPERTS[:-1]], [], model).dropped == {"a": (EXPERTS[-1],)}


def test_an_expert_that_one_model_lacks():
    """The model without the part is named."""
    files = [ReadFiles("a", frozenset(EXPERTS), frozenset()), ReadFiles("b", frozenset(EXPERTS[1:]), frozenset())]
    assert missing_parts(files, _model()) == [("b", EXPERTS[0])]


@pytest.mark.parametrize("lost", [[EXPERTS[5]], EXPERTS[6:]])
def test_an_expert_that_all_models_lack(lost):
    """The first axis of the packed tensor tells the number of its parts."""
    left = frozenset(EXPERTS) - set(lost)
    files = [ReadFiles(label, left, frozenset()) for label in "ab"]
    assert sorted(missing_parts(files, _model())) == sorted((label, name) for label in "ab" for name in lost)


def test_without_a_class_the_files_decide():
    """A tensor that is neither read nor converted is lost."""
    files = ReadFiles("a", frozenset("xyz"), frozenset("x"), converts=lambda name: name == "y")
    gaps = find_gaps([files], ["x"], ["q"], None)
    assert (gaps.dropped, gaps.absent, gaps.class_name) == ({"a": ("z",)}, ("q",), None)


def test_the_message_is_one_line_with_number_and_names():
    """Models that lose the same share a part of the line; the first names and the number of the others are given."""
    names = tuple("uvwxy")
    message = Gaps("Net", {"a": names, "b": names}, {"a": 9, "b": 9}).message()
    assert (
        "5 of the 9 tensors in the files of a and of b go into no tensor of the result (u, v, w and 2 more)" in message
    )
