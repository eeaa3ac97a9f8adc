"""Heat maps: places of tensors, means over entries, and the maps that a report has."""

import pytest

from squisher_mergekit.merging.reports.heat_maps import ALONE, heat_map, place_of, share_maps
from tests.merging.reports.made import made_report


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj.weight", ("model.layers.11", "self_attn.q_proj")),
        ("transformer.h.0.attn.c_attn.bias", ("transformer.h.0", "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.w1.weight", ("model.layers.2", "mlp.experts.w1")),
        ("lm_head.weight", ("lm_head", ALONE)),
        ("model.norm.weight", ("model.norm", ALONE)),
    ],
)
def test_a_tensor_has_a_layer_and_a_kind(name, place):
    """Numbered layers have kinds, other tensors stand alone, experts share a kind."""
    assert place_of(name) == place


def test_rows_are_in_the_order_of_their_numbers():
    """Layer 10 comes after layer 9, and a weighted mean joins weight and bias."""
    tensors = {f"h.{i}.mlp.{part}": {"entries": n, "x": n} for i in (10, 9) for part, n in (("weight", 3), ("bias", 1))}
    found = heat_map("x", tensors, lambda each: each["x"])
    assert found.rows == ["h.9", "h.10"]
    assert found.values["h.9", "mlp"] == (3 * 3 + 1) / 4


def test_a_report_has_a_map_for_each_model_and_what_occurs():
    """Abstentions and entries without signal have a map only if there are any."""
    plain = share_maps(made_report(2, 1))
    assert [found.title[0] for found in plain] == ["A", "B"]
    report = made_report(3, 2, fell_back=0.25, abstained=0.5)
    assert [found.title for found in share_maps(report)][3:] == [
        "A without a vote", "B without a vote", "C without a vote", "no signal in any model",
    ]  # fmt: skip
    assert set(share_maps(report)[-1].values.values()) == {0.25}
