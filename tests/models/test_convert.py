"""Second moments with names on disk, converted when they are read."""

import torch
import transformers

from squisher_mergekit.models.checkpoint_names import of_model
from squisher_mergekit.models.convert import store_moments


def _mixtral():
    config = transformers.MixtralConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=7, max_position_embeddings=17, num_local_experts=5,
    )  # fmt: skip
    with torch.device("meta"):
        bones = of_model(transformers.MixtralForCausalLM(config))
    generator = torch.Generator().manual_seed(0)
    return bones, {p.name: torch.rand(p.shape, generator=generator) for p in bones.parameters}


def test_experts_are_cut_out_of_their_packed_tensor():
    """w1 and w3 are the halves of gate_up_proj, and w2 is down_proj, per expert.

    The shapes are known before reading.
    """
    bones, moments = _mixtral()
    store = store_moments("here", moments, bones, ())
    gate_up, down = (moments[f"model.layers.0.mlp.experts.{name}"] for name in ("gate_up_proj", "down_proj"))
    for k in range(5):
        base = f"model.layers.0.block_sparse_moe.experts.{k}"
        for name, part in (("w1", gate_up[k, :7]), ("w3", gate_up[k, 7:]), ("w2", down[k])):
            assert torch.equal(store.read(f"{base}.{name}.weight"), part)
            assert store.infos[f"{base}.{name}.weight"].shape == tuple(part.shape)
            assert store.infos[f"{base}.{name}.weight"].nbytes == part.numel() * 4


def test_a_packed_tensor_is_converted_once_for_all_its_experts():
    """Reading the tensors in the order of the store converts each parameter once."""
    bones, moments = _mixtral()
    calls = []

    def convert(tensors):
        calls.extend(tensors)
        return bones.convert(tensors)

    counted = type(bones)(bones.parameters, bones.first, bones.sources, bones.shapes, bones.aliases, convert)
    store = store_moments("here", moments, counted, ())
    for name in store.infos:
        store.read(name)
    assert sorted(calls) == sorted(moments)


def test_a_tensor_needs_all_its_parts():
    """A tensor with a missing part has no recipe. Names on disk need none."""
    bones, moments = _mixtral()
    del moments["model.layers.0.mlp.experts.down_proj"]
    store = store_moments("here", moments, bones, ())
    assert not any(name.endswith("w2.weight") for name in store.infos)
    assert sum(name.endswith("w1.weight") for name in store.infos) == 5
    plain = store_moments("here", {"x": torch.ones(3, dtype=torch.bfloat16)}, None, ())
    assert (plain.infos["x"].shape, plain.infos["x"].nbytes) == ((3,), 6)
