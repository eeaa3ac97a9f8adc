"""Smaller networks with the outputs of the network with zeroed units."""

import copy

import pytest
import torch
from torch import nn

from squisher_mergekit.applications.pruning.shrinking import shrink
from squisher_mergekit.applications.pruning.structured import choose_units, mask_units, unit_masks
from squisher_mergekit.applications.pruning.units import chain_units, ffn_units, head_units
from squisher_mergekit.errors import UnsupportedStateError
from tests.applications.pruning.networks import cnn, fisher, llama_gqa, mlp, outputs, transformer


def _zeroed(model, choice):
    zeroed = copy.deepcopy(model)
    for name, mask in unit_masks(model, choice).items():
        zeroed.get_parameter(name).data.mul_(mask)
    return zeroed


@pytest.mark.parametrize(("make", "shape"), [(cnn, (4, 2, 12, 12)), (mlp, (4, 5))])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.6])
def test_a_chain_gets_smaller_and_puts_out_the_same(make, shape, sparsity):
    """A smaller chain of filters, BatchNorm, pools, a flattening and neurons has the same outputs.

    Its layers report the new sizes.
    """
    model = make()
    choice = choose_units(model, chain_units(model), fisher(model), sparsity)
    small = shrink(model, choice)
    inputs = torch.randn(shape)
    torch.testing.assert_close(small(inputs), _zeroed(model, choice)(inputs), rtol=1e-5, atol=1e-5)
    for name, width in choice.widths.items():
        layer = small.get_submodule(name)
        assert layer.weight.shape[0] == width == getattr(layer, "out_channels", getattr(layer, "out_features", None))
    count = sum(p.numel() for p in small.parameters())
    assert (count < sum(p.numel() for p in model.parameters())) == (sparsity > 0)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), make().parameters(), strict=True))


def test_a_small_network_trains_and_keeps_frozen_parameters():
    """A small network runs in train mode: gradients arrive, and running statistics move.

    Frozen parameters stay frozen.
    """
    model = cnn()
    model[0][0].weight.requires_grad_(False)
    small = shrink(model, choose_units(model, chain_units(model), fisher(model), 0.5)).train()
    before = small[0][1].running_mean.clone()
    small(torch.randn(8, 2, 12, 12)).square().sum().backward()
    assert small[0][0].weight.grad is None
    assert small[1][0].weight.grad.shape == small[1][0].weight.shape
    assert not torch.equal(small[0][1].running_mean, before)


def test_a_masked_network_shrinks_without_its_masks():
    """After mask_units and a training step, the smaller copy has plain parameters. The model keeps its masks."""
    model = cnn()
    choice = choose_units(model, chain_units(model), fisher(model), 0.5)
    mask_units(model, choice)
    model(torch.randn(4, 2, 12, 12)).square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    small = shrink(model, choice)
    assert {name for name, _ in small.named_parameters()} == {name for name, _ in cnn().named_parameters()}
    assert not any(name.endswith("_mask") for name, _ in small.named_buffers())
    inputs = torch.randn(4, 2, 12, 12)
    torch.testing.assert_close(small(inputs), model(inputs), rtol=1e-5, atol=1e-5)
    assert "0.0.weight_mask" in dict(model.named_buffers())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "gqa"])
def test_feed_forward_neurons_leave_a_transformer(tmp_path, name):
    """Removed feed-forward neurons shrink the width in the config.

    The outputs equal those with zeroed neurons, also after saving and loading.
    """
    model = llama_gqa() if name == "gqa" else transformer(name)
    choice = choose_units(model, ffn_units(model), fisher(model), 0.4, scope="layer")
    _same(model, shrink(model, choice), choice, tmp_path)


def test_heads_leave_a_transformer_with_their_queries(tmp_path):
    """A removed key-value head takes its two queries with it. The width of a head stays."""
    model = llama_gqa()
    choice = choose_units(model, head_units(model), fisher(model), 0.5, scope="layer")
    small = shrink(model, choice)
    config = small.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 4)
    _same(model, small, choice, tmp_path)


def _same(model, small, choice, folder):
    with torch.no_grad():
        wanted, dense = outputs(_zeroed(model, choice)), outputs(model)
        torch.testing.assert_close(outputs(small), wanted, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(wanted, dense, rtol=1e-3, atol=1e-3)
        small.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
        assert torch.equal(outputs(loaded), outputs(small))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_dtype_device_and_mode_are_kept():
    """A bfloat16 model in train mode stays so."""
    model = transformer("llama").to(torch.bfloat16).train()
    small = shrink(model, choose_units(model, ffn_units(model), None, 0.4, score="magnitude", scope="layer"))
    assert small.dtype == torch.bfloat16
    assert small.training


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_heads_without_a_place_in_the_config_are_refused_and_can_be_masked(name):
    """BERT's config has only the number of heads, so removal is refused. Masked heads put out 0."""
    model = transformer(name)
    choice = choose_units(model, head_units(model), fisher(model), 0.3, scope="layer")
    with pytest.raises(UnsupportedStateError, match="mask_units makes the units 0") as error:
        shrink(model, choice)
    assert "\n" not in str(error.value)
    wanted = _zeroed(model, choice)
    mask_units(model, choice)
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(wanted))


def test_a_number_of_heads_that_would_not_load_is_refused():
    """A head count that does not divide the hidden size is refused, because Llama could not load it."""
    model = llama_gqa()
    choice = choose_units(model, head_units(model), fisher(model), 0.3, scope="layer")
    with pytest.raises(
        UnsupportedStateError, match=r"'num_attention_heads': 8, .* is refused: .*not a multiple"
    ) as error:
        shrink(model, choice)
    assert "\n" not in str(error.value)


def test_layers_of_different_widths_are_refused():
    """Layers of different widths are refused, because a config has one width."""
    model = transformer("llama")
    choice = choose_units(model, ffn_units(model), fisher(model), 0.5, scope="global")
    assert len(set(choice.widths.values())) > 1
    with pytest.raises(UnsupportedStateError, match='choose with scope="layer"'):
        shrink(model, choice)


def test_a_declared_chain_shrinks():
    """A declared chain shrinks although its forward pass uses functions."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc1, self.fc2 = nn.Conv1d(1, 5, 3), nn.Linear(45, 7), nn.Linear(7, 2)

        def forward(self, x):
            return self.fc2(self.fc1(self.conv(x).relu().flatten(1)).relu())

    torch.manual_seed(0)
    model = Network().eval()
    choice = choose_units(model, chain_units(model, ["conv", "fc1", "fc2"]), fisher(model), 0.5)
    inputs = torch.randn(3, 1, 11)
    torch.testing.assert_close(shrink(model, choice)(inputs), _zeroed(model, choice)(inputs), rtol=1e-5, atol=1e-5)


def test_compiled_layers_shrink_as_plain_ones():
    """A transformer with a layer that was compiled by itself has the units of the plain one, and shrinks alike."""
    model = transformer("llama")
    plain = ffn_units(model) + head_units(model)
    choice = choose_units(model, ffn_units(model), sparsity=0.5, score="magnitude", scope="layer")
    small = shrink(model, choice).state_dict()
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert ffn_units(model) + head_units(model) == plain
    again = choose_units(model, ffn_units(model), sparsity=0.5, score="magnitude", scope="layer")
    found = shrink(model, again).state_dict()
    assert list(found) == list(small)
    assert all(torch.equal(tensor, small[name]) for name, tensor in found.items())
