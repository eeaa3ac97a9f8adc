"""Adapters of peft from changed weights: factors, ranks, files."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from squisher_mergekit.errors import MismatchError
from squisher_mergekit.models.lora.low_rank import factorised, ranks_of, write_adapter
from squisher_mergekit.models.lora.pairs import read_lora
from squisher_mergekit.models.weights import Weights
from tests.adapters import train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call


def _loras(folder, name, *settings):
    found = []
    for i, lora in enumerate(settings):
        train(folder / f"l{i}", name, seed=i, **lora)
        adapter = Weights(folder / f"l{i}" / "adapter", "adapter_model")
        found.append(read_lora(adapter, Weights(folder / "l0" / "base")))
    return found


@pytest.mark.parametrize("shape", [(7, 4), (5, 12)])
@pytest.mark.parametrize("rank", [1, 3])
def test_the_discarded_energy_is_that_of_the_difference(shape, rank):
    """The squared norm of the difference is the discarded energy, and no matrix of the rank is nearer."""
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    a, b, discarded, whole = factorised(delta, rank)
    assert (a.shape, b.shape) == ((rank, shape[1]), (shape[0], rank))
    assert (delta - b @ a).double().square().sum().item() == pytest.approx(discarded, rel=1e-4)
    assert delta.double().square().sum().item() == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("shape", [(4, 4), (3, 9)])
def test_a_matrix_of_zeros_has_factors_of_zeros(shape):
    """A change of 0 gives no NaN."""
    a, b, discarded, whole = factorised(torch.zeros(shape), 2)
    assert (discarded, whole) == (0, 0)
    assert not (b @ a).any()


def test_the_rank_is_the_sum_or_a_given_one_within_the_shape(tmp_path):
    """Each weight has the sum of the ranks of the LoRAs that wrap it, at most the shorter side."""
    loras = _loras(
        tmp_path, "llama", {"r": 5, "target_modules": ["q_proj", "k_proj"]}, {"r": 9, "target_modules": ["q_proj"]}
    )
    query, key = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
    assert {name: ranks_of(loras, None)[name] for name in (query, key)} == {query: 12, key: 5}
    assert set(ranks_of(loras, 4).values()) == {4}
    assert set(ranks_of(loras, 40).values()) == {12}


CASES = {
    "llama": ("llama", {}, {"r": 2, "target_modules": ["q_proj", "down_proj", "o_proj"]}),
    "Conv1D": ("gpt2", *[{"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}] * 2),
    "a head": ("bert", *[{"target_modules": ["query"], "modules_to_save": ["classifier"], "bias": "lora_only"}] * 2),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_loads_the_adapter_and_merges_to_the_given_weights(case, tmp_path):
    """At full rank the adapter over the base gives the merged weights; heads and biases are held whole."""
    name, *settings = CASES[case]
    loras = _loras(tmp_path, name, *settings)
    base = loras[0].base
    wanted = {key: base.read(key) for key in base.infos}
    for key in sorted({key for lora in loras for key in lora.touched}):
        wanted[key] = sum(lora.merged(key, base.read(key)) for lora in loras) / len(loras)
    (tmp_path / "out").mkdir()
    report = write_adapter(tmp_path / "out", loras, 100, str(base.folder), wanted.__getitem__)
    assert report["discarded"] < 1e-9
    architecture = getattr(transformers, base.config["architectures"][0])
    model = peft.PeftModel.from_pretrained(architecture.from_pretrained(base.folder), tmp_path / "out")
    model.merge_and_unload().save_pretrained(tmp_path / "full")
    found = load_file(tmp_path / "full" / "model.safetensors")
    for key, tensor in found.items():
        assert torch.allclose(tensor, wanted[key], rtol=0, atol=2e-6), key


@pytest.mark.parametrize("biases", [("none", "all"), ("lora_only", "none")])
def test_different_kinds_of_biases_are_refused(biases, tmp_path):
    """One adapter has one kind of biases: a full model is the cure."""
    loras = _loras(
        tmp_path, "gpt2", *({"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": b} for b in biases)
    )
    (tmp_path / "out").mkdir()
    with pytest.raises(MismatchError, match="must train one kind of biases"):
        write_adapter(tmp_path / "out", loras, None, "base", loras[0].base.read)
