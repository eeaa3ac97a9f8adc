"""LoRA over a base: merged weights against peft's own merge, names, scales, what it changes, refusals."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit.errors import MismatchError, NotFoundError, UnsupportedStateError
from squisher_mergekit.models.lora.pairs import AdaptedWeights, read_lora, replaced_on_disk
from squisher_mergekit.models.parameters import describe
from squisher_mergekit.models.weights import Weights
from tests.adapters import save_merged, train

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call

RUNS = {
    "patterns": ("llama", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 20}}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_rslora": True}),
    "head and biases": (
        "bert", {"target_modules": ["key", "intermediate.dense"], "modules_to_save": ["classifier"], "bias": "all"}
    ),
}  # fmt: skip


def _read(folder):
    return read_lora(Weights(folder / "adapter", "adapter_model"), Weights(folder / "base"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("run", RUNS)
def test_merged_weights_are_those_of_peft_bit_for_bit(run, dtype, tmp_path):
    """W0 + s B A equals what ``merge_and_unload`` writes, and so does the fingerprint."""
    name, lora = RUNS[run]
    adapted, _ = train(tmp_path, name, dtype=dtype, **lora)
    weights, merged = AdaptedWeights(_read(tmp_path)), Weights(save_merged(adapted, tmp_path / "merged"))
    assert set(weights.infos) == set(merged.infos)
    for key in merged.infos:
        assert torch.equal(weights.read(key), merged.read(key)), key
    assert weights.fingerprint == merged.fingerprint


@pytest.mark.parametrize("run", RUNS)
def test_the_touched_weights_are_those_that_differ_from_the_base(run, tmp_path):
    """``touched`` has every weight that training changed, and ``shape`` its shape."""
    name, lora = RUNS[run]
    adapted, _ = train(tmp_path, name, **lora)
    found, base = _read(tmp_path), Weights(tmp_path / "base")
    merged = Weights(save_merged(adapted, tmp_path / "merged"))
    differing = {key for key in base.infos if not torch.equal(base.read(key), merged.read(key))}
    assert differing <= found.touched <= set(base.infos)
    assert {key: found.shape(key) for key in found.touched} == {key: base.infos[key].shape for key in found.touched}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning")  # of the training itself
@pytest.mark.parametrize(("name", "given"), [("gpt2", False), ("llama", True)])
def test_the_order_of_axes_is_that_of_the_layer(name, given, tmp_path):
    """A fan_in_fan_out that does not fit the layer is corrected, as by peft."""
    targets = ["c_attn"] if name == "gpt2" else ["down_proj"]
    train(tmp_path, name, target_modules=targets, fan_in_fan_out=given)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": given}))
    assert {pair.transposed for pair in _read(tmp_path).pairs.values()} == {name == "gpt2"}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
def test_a_quantised_base_is_refused_with_the_cure(dtype, tmp_path):
    """W0 is needed as real numbers: the model before it was quantised."""
    train(tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(dtype)
    save_file(tensors, file)
    with pytest.raises(UnsupportedStateError, match="take the model before it was quantised"):
        _read(tmp_path)


def test_the_base_is_not_written_to(tmp_path):
    """A merged tensor is a new one."""
    train(tmp_path)
    found, before = _read(tmp_path), torch.zeros(12, 12)
    found.merged("model.layers.0.self_attn.q_proj.weight", before)
    assert not before.any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_an_adapter_in_half_precision_is_multiplied_in_float32(half, tmp_path):
    """A and B of half precision are as exact as they are stored."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    narrow = {key: tensor.to(half) for key, tensor in load_file(file).items()}
    save_file(narrow, file)
    prefix = "base_model.model.model.layers.2.mlp.down_proj"
    delta = narrow[f"{prefix}.lora_B.weight"].float() @ narrow[f"{prefix}.lora_A.weight"].float() * 2.0
    assert torch.equal(_read(tmp_path).merged("model.layers.2.mlp.down_proj.weight", torch.zeros(12, 19)), delta)


def test_a_scale_of_zero_is_refused(tmp_path):
    """Alpha 0 leaves nothing to divide by."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 0}))
    with pytest.raises(UnsupportedStateError, match=r"a scale other than 0, but lora_alpha of model\.layers\.0"):
        _read(tmp_path)


@pytest.mark.parametrize("change", [{"target_modules": ["q_proj"]}, {"layers_to_transform": [0, 2]}], ids=str)
def test_a_tensor_that_the_config_does_not_explain_is_refused(change, tmp_path):
    """A config of fewer layers than the file's is another adapter's."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(MismatchError, match="the tensors of an adapter must be those of its adapter_config"):
        _read(tmp_path)


def test_a_base_of_another_width_is_refused_with_both_shapes(tmp_path):
    """The message has the shapes of A, of B and of the weight."""
    train(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    config.intermediate_size = 31
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(MismatchError, match=r"\[3, 19\] and \[12, 3\], and .*down_proj.weight .* is \[12, 31\]"):
        _read(tmp_path)


def test_pickled_adapters_are_refused_with_the_cure(tmp_path):
    """adapter_model.bin alone is not read."""
    train(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(NotFoundError, match=r"adapter_model\.safetensors, but .* has none; save it by save_pretrained"):
        _read(tmp_path)


def test_a_module_whose_name_begins_as_pefts_keeps_its_name():
    """Whole parts of a name alone are peft's: base_layer, and modules_to_save of the one adapter."""
    model = torch.nn.ModuleDict({"base_layer_norm": torch.nn.LayerNorm(3), "up": torch.nn.Linear(3, 5)})
    names = describe(torch.nn.ModuleDict({"block": model})).checkpoint_names
    for held, stored in (
        ("block.base_layer_norm.weight", "block.base_layer_norm.weight"),
        ("block.up.base_layer.bias", "block.up.bias"),
        ("block.up.modules_to_save.a.weight", "block.up.weight"),
    ):
        assert replaced_on_disk(f"base_model.model.{held}", "a", names, "base", "adapter") == stored
    with pytest.raises(UnsupportedStateError):
        replaced_on_disk("base_model.model.block.up.modules_to_save.ab.weight", "a", names, "base", "adapter")
