"""Detection of prunable units."""

import pytest
from torch import nn

from squisher_mergekit.applications.pruning.structured import choose_units
from squisher_mergekit.applications.pruning.units import chain_units, ffn_units, head_units
from squisher_mergekit.errors import ConfigError
from tests.applications.pruning.networks import cnn, transformer


class _Functional(nn.Module):
    """Network that applies activations and the flattening as functions."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU())
        self.fc1, self.fc2 = nn.Linear(45, 7), nn.Linear(7, 2)

    def forward(self, x):
        return self.fc2(self.fc1(self.features(x).flatten(1)).relu())


def test_a_chain_is_declared_where_the_forward_pass_is_a_function():
    """A chain is declared if the forward pass is a function.

    Nested sequences are expanded, and sizes describe the flattening.
    """
    found = chain_units(_Functional(), ["features", "fc1", "fc2"])
    assert [(layer.name, layer.count, layer.read[0].tensor, layer.read[0].width) for layer in found] == [
        ("features.0", 5, "fc1.weight", 9),
        ("fc1", 7, "fc2.weight", 1),
    ]
    with pytest.raises(ConfigError, match=r"must be an nn.Sequential .* _Functional; name its modules"):
        chain_units(_Functional())
    with pytest.raises(ConfigError, match="'fc9' is none of _Functional's"):
        chain_units(_Functional(), ["features", "fc9"])
    with pytest.raises(ConfigError, match="one is in it twice"):
        chain_units(_Functional(), ["fc1", "fc1"])


def test_batchnorm_goes_with_the_channels_before_it():
    """The scale and shift of BatchNorm belong to the unit before it, and its running statistics follow."""
    found = {layer.name: layer for layer in chain_units(cnn())}
    assert [one.tensor for one in found["1.0"].made] == ["1.0.weight", "1.2.weight", "1.2.bias"]
    assert [one.tensor for one in found["1.0"].buffers] == ["1.2.running_mean", "1.2.running_var"]


@pytest.mark.parametrize(
    "between",
    [
        (nn.Sigmoid(),),  # puts out 0.5 at 0
        (nn.LayerNorm(6),),  # mixes channels
        (nn.BatchNorm1d(6, affine=False),),  # shifts 0
        (nn.Linear(6, 12), nn.GLU()),  # halves the channels
        (nn.Softmax(1),),
    ],
)
def test_a_layer_that_moves_zero_ends_the_chain(between):
    """A layer that does not map 0 to 0 ends the chain. The layer before it stays whole; later units are found."""
    first = nn.Linear(3, 6)
    model = nn.Sequential(first, *between, nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    names = [layer.name for layer in chain_units(model)]
    assert names[-1] == str(len(model) - 3)
    assert names in ([names[-1]], ["0", names[-1]] if len(between) == 2 else [])


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(3, 4)),
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)),
        nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Linear(6, 2)),  # reads the last axis of an image
        nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(20, 2)),  # positions come before channels
    ],
)
def test_no_unit_is_guessed(model):
    """No unit is found in a single layer, in grouped convolutions, or before a reader of other axes."""
    with pytest.raises(ConfigError, match="none that is known; name one by chain="):
        chain_units(model)


def test_transformers_without_known_layers_are_refused():
    """Transformers without known layers are refused in one line. Heads that share all keys cannot be chosen from."""
    for find, message in ((ffn_units, "feed-forward parts"), (head_units, "attention must be of layers")):
        with pytest.raises(ConfigError, match=message) as error:
            find(nn.Linear(2, 2))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="share one head of keys and values"):
        head_units(transformer("qwen2"))
    with pytest.raises(ConfigError, match="feed-forward parts"):
        ffn_units(transformer("mixtral"))


def test_fused_attention_is_cut_in_three():
    """GPT-2 has queries, keys and values of a head in one matrix, 12 columns apart; a head has all three parts."""
    layer = head_units(transformer("gpt2"))[0]
    assert layer.count == 3
    starts = [(one.tensor.rpartition(".")[2], one.axis, one.width, one.start) for one in layer.made]
    assert starts == [part for start in (0, 12, 24) for part in (("weight", 1, 4, start), ("bias", 0, 4, start))]


@pytest.mark.parametrize("flatten", [nn.Flatten(2), nn.Flatten(0), nn.Flatten(1, 2)])
def test_a_flattening_of_other_axes_joins_no_channels_to_inputs(flatten):
    """A linear layer reads the channels only after a flattening of all axes but the first."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), flatten, nn.Linear(36, 2), nn.ReLU(), nn.Linear(2, 5))
    assert [layer.name for layer in chain_units(model)] == ["2"]


def test_channels_stay_an_axis_after_a_flattening_of_the_others():
    """A convolution over the flattened positions reads the channels."""
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.Flatten(2), nn.Conv1d(5, 3, 1))
    assert [(layer.name, layer.read[0].tensor, layer.read[0].width) for layer in chain_units(model)] == [
        ("0", "2.weight", 1)
    ]


class _Attention(nn.Module):
    """Attention whose queries have a gate beside them, as in Qwen3-Next."""

    def __init__(self):
        super().__init__()
        self.head_dim = 3
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(7, 24), nn.Linear(7, 6), nn.Linear(7, 6)
        self.o_proj = nn.Linear(12, 7)


def test_heads_of_an_attention_module_itself_are_found():
    """Names have no path; the output reads what its own width says, not that of queries with gates."""
    (found,) = head_units(_Attention())
    assert [(one.tensor, one.width) for one in found.made if one.tensor.endswith("weight")] == [
        ("q_proj.weight", 12),
        ("k_proj.weight", 3),
        ("v_proj.weight", 3),
    ]
    assert [(one.tensor, one.width) for one in found.read] == [("o_proj.weight", 6)]
    assert choose_units(_Attention(), [found], sparsity=0.5, score="magnitude").widths == {found.name: 1}
