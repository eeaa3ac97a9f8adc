"""Lifted Fishers of real adapters: against a reference from memory, metadata, files, refusals."""

import json
import re

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit import extract, load_fisher
from squisher_mergekit.errors import ConfigError, MismatchError, NotFoundError, RefusedError, UnsupportedStateError
from squisher_mergekit.models.weights import Weights
from tests.adapters import save_merged, train
from tests.optimizers.lifting.reference import reference

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call

# Name of a model, settings of the LoRA, and the scale of its wrapped layers by a part of their names.
RUNS = {
    "linear": ("llama", {}, {"": 2.0}),
    "rank pattern": (
        "llama", {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 9}}, {"q_proj": 3.0, "down_proj": 1.2}
    ),
    "rsLoRA": ("qwen2", {"use_rslora": True, "r": 4}, {"": 3.0}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}, {"": 2.0}),
    "rsLoRA of Conv1D": (
        "gpt2", {"target_modules": ["c_fc"], "fan_in_fan_out": True, "use_rslora": True, "r": 9}, {"": 2.0}
    ),
    "classifier": (
        "bert", {"target_modules": ["query", "output.dense"], "modules_to_save": ["classifier"]}, {"": 2.0}
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}, {"": 2.0}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}, {"": 2.0}),
}  # fmt: skip
EXACT = {"classifier": {"classifier.weight", "classifier.bias"}}


def _lifted(tmp_path, **options):
    return load_fisher(tmp_path / "adapter", base=tmp_path / "base", lift=True, **options)


@pytest.mark.parametrize("run", RUNS)
def test_a_lifted_fisher_equals_the_reference(run, tmp_path):
    """F of each wrapped weight equals the formula on A, B and the moments in memory, at the scale of its layer."""
    name, lora, scales = RUNS[run]
    adapted, truth = train(tmp_path, name, **lora)
    parameters = dict(adapted.named_parameters())
    fisher = _lifted(tmp_path)
    wrapped = {key.removesuffix(".lora_A.default.weight") for key in truth if ".lora_A." in key}
    for module in wrapped:
        keys = [f"{module}.{part}.default.weight" for part in ("lora_A", "lora_B")]
        scale = next(value for part, value in scales.items() if part in module)
        # The factors after training: those that the checkpoint holds.
        a, b = (parameters[key].detach() for key in keys)
        expected = reference(a, b, *(truth[key] for key in keys), scale)
        expected = expected.T if lora.get("fan_in_fan_out") else expected
        found = fisher[f"{module.removeprefix('base_model.model.')}.weight"].double()
        assert torch.allclose(found, expected, rtol=3e-7, atol=0), module


@pytest.mark.parametrize("run", ["classifier", "biases"])
def test_weights_held_whole_keep_their_own_moments(run, tmp_path):
    """``modules_to_save`` and ``bias`` have the exact second moment of each entry."""
    name, lora, _ = RUNS[run]
    _, truth = train(tmp_path, name, **lora)
    fisher = _lifted(tmp_path)
    whole = {key: moment for key, moment in truth.items() if ".lora_" not in key}
    assert whole
    for key, moment in whole.items():
        stored = key.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        found = fisher[stored.replace(".base_layer", "")]
        assert torch.allclose(found.double(), moment, rtol=2e-7, atol=0), key


@pytest.mark.parametrize("run", ["linear", "Conv1D", "classifier", "rank pattern"])
def test_the_fingerprint_is_that_of_the_merged_model(run, tmp_path):
    """The fingerprint is that of the files that peft's own merge writes."""
    name, lora, _ = RUNS[run]
    adapted, _ = train(tmp_path, name, **lora)
    found = _lifted(tmp_path).config.weights_fingerprint
    assert found == Weights(save_merged(adapted, tmp_path / "merged")).fingerprint


@pytest.mark.parametrize("run", ["Conv1D", "classifier"])
def test_the_file_has_the_row_means_and_column_means(run, tmp_path):
    """Wrapped weights are written as rank1 and read back bit for bit; the exact ones stay whole."""
    name, lora, _ = RUNS[run]
    train(tmp_path, name, **lora)
    fisher = _lifted(tmp_path)
    written = extract(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", lift=True)
    assert set(written) == set(fisher)
    assert all(torch.equal(written[key], fisher[key]) for key in fisher)
    exact = EXACT.get(run, set())
    assert written.config.encoding == {"default": "rank1"} | dict.fromkeys(exact, "float32")
    stored = load_file(tmp_path / "out" / "fisher.safetensors")
    assert set(stored) == exact | {key + end for key in set(fisher) - exact for end in (".row", ".col")}


@pytest.mark.parametrize("code", ["log8", "log4", "rank1"])
def test_a_compact_form_leaves_the_lifted_weights_as_they_are(code, tmp_path):
    """``compress`` is for the weights held whole: the lifted ones are exact in their own form."""
    train(tmp_path, "bert", **RUNS["classifier"][1])
    fisher = _lifted(tmp_path)
    written = extract(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", lift=True, compress=code)
    lifted = set(fisher) - EXACT["classifier"]
    assert all(torch.equal(written[key], fisher[key]) for key in lifted)


def test_the_metadata_are_those_of_full_weights(tmp_path):
    """The config says model, lifted_lora, without bias, and the steps of the adapter's run."""
    train(tmp_path, steps=4)
    config = _lifted(tmp_path).config
    found = (config.parameters, config.estimator, config.statistic, config.bias_corrected, config.steps)
    assert found == ("model", "lifted_lora", "ema", True, 4)
    assert config.coverage.with_ == 6
    assert config.coverage.without["model.norm.weight"] == "not adapted, kept as in the base"
    assert not any("lora" in name for name in config.coverage.without)


def test_without_lift_the_fisher_is_that_of_the_adapter(tmp_path):
    """The default stays the Fisher of A and B."""
    train(tmp_path)
    fisher = load_fisher(tmp_path / "adapter", base=tmp_path / "base")
    assert fisher.config.parameters == "adapter"
    assert all(".lora_" in name for name in fisher)


@pytest.mark.parametrize("code", [None, "log8"])
def test_a_portable_fisher_of_an_adapter_is_lifted_too(code, tmp_path):
    """The Fisher of A and B, extracted before, needs no optimizer state; the adapter is given as the model."""
    train(tmp_path)
    extract(tmp_path / "adapter", tmp_path / "of_adapter", base=tmp_path / "base", compress=code)
    folders = {"model": tmp_path / "adapter", "base": tmp_path / "base"}
    found, wanted = load_fisher(tmp_path / "of_adapter", **folders, lift=True), _lifted(tmp_path)
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], rtol=1e-6 if code is None else 0.05, atol=0)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_leaves_one_side_flat(frozen, tmp_path):
    """With A frozen (LoRA-FA) the rows alone are lifted, with B frozen the columns alone."""
    _, truth = train(tmp_path, frozen=frozen)
    assert all(frozen not in key for key in truth)
    fisher = _lifted(tmp_path)
    assert len(fisher) == 6
    for name in fisher:
        flat = fisher[name][0] if frozen == "lora_A" else fisher[name][:, 0]
        assert torch.allclose(flat, flat[0].expand(len(flat)), rtol=1e-6)


def test_one_step_from_zero_lifts_the_rows(tmp_path):
    """After one step the gradient of A is 0, because B began at 0."""
    _, truth = train(tmp_path, steps=1)
    assert not any(moment.any() for key, moment in truth.items() if "lora_A" in key)
    fisher = _lifted(tmp_path)
    assert all(torch.equal(fisher[name], fisher[name][:, :1].expand_as(fisher[name])) for name in fisher)


def test_a_base_of_a_config_alone_suffices(tmp_path):
    """Without the base's weights the entries are equal, and the fingerprint is unknown."""
    train(tmp_path)
    wanted = _lifted(tmp_path)
    (tmp_path / "base" / "model.safetensors").unlink()
    fisher = _lifted(tmp_path)
    assert fisher.config.weights_fingerprint is None
    assert all(torch.equal(fisher[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "eva"},
        {"peft_type": "VERA"},
        {"peft_type": "LOHA"},
        {"peft_type": "LOKR"},
        {"peft_type": "IA3"},
        {"peft_type": "ADALORA"},
        {"peft_type": "OFT"},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [3, 5]},
        {"use_qalora": True},
    ],
    ids=str,
)
def test_another_kind_of_adapter_is_refused_in_one_line(change, tmp_path):
    """The message names the folder, the kind and the cure, and nothing is written."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UnsupportedStateError) as raised:
        extract(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", lift=True)
    message = str(raised.value)
    assert re.search(r"must be a plain LoRA|must begin as a random draw", message)
    assert str(tmp_path / "adapter") in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()


def _speech():
    """Return a small model with convolutions."""
    config = transformers.WhisperConfig(
        vocab_size=53, d_model=12, encoder_layers=1, decoder_layers=1, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=10,
        max_target_positions=17, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("name", "lora", "reason"),
    [
        ("llama", {"target_modules": ["embed_tokens"]}, "wraps model.embed_tokens, of class Embedding"),
        ("gpt2", {"target_modules": ["wpe"]}, "wraps transformer.wpe, of class Embedding"),
        ("qwen2", {"target_modules": ["lm_head"]}, "which is tied to"),
        ("mixtral", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}, "packed experts"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about embeddings and tied weights
def test_a_layer_that_is_not_linear_is_refused_in_one_line(name, lora, reason, tmp_path):
    """Embeddings, tied weights and packed experts are named with the reason."""
    train(tmp_path, name, steps=2, **lora)
    with pytest.raises(UnsupportedStateError, match=reason) as raised:
        _lifted(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_convolution_is_refused_in_one_line(tmp_path):
    """A LoRA of a convolution has no A of one matrix."""
    model = _speech()
    model.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["conv1"]))
    adapted.save_pretrained(tmp_path / "adapter")
    named = {key: p for key, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values())
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "adapter" / "optimizer.pt")
    with pytest.raises(UnsupportedStateError, match="of class Conv1d"):
        _lifted(tmp_path)


def test_a_base_of_other_shapes_is_refused_in_one_line(tmp_path):
    """The message names the tensors, both shapes and the cure."""
    train(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    config.intermediate_size, config.head_dim = 23, 6
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(RefusedError, match=r"trained on") as raised:
        load_fisher(tmp_path / "adapter", base=tmp_path / "other", lift=True)
    assert "\n" not in str(raised.value)


def test_a_portable_fisher_with_a_base_of_other_shapes_is_refused_in_one_line(tmp_path):
    """A and B are compared with the base's weight where no optimizer state is read."""
    train(tmp_path)
    extract(tmp_path / "adapter", tmp_path / "of_adapter", base=tmp_path / "base")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    config.intermediate_size = 23
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match=r"a LoRA must fit its base, .*give the base that it was trained on"):
        load_fisher(tmp_path / "of_adapter", model=tmp_path / "adapter", base=tmp_path / "other", lift=True)


def test_no_base_is_refused_with_the_option(tmp_path):
    """The message asks for --base."""
    train(tmp_path)
    with pytest.raises(NotFoundError, match="give --base DIR"):
        load_fisher(tmp_path / "adapter", lift=True)


def test_full_weights_are_refused(tmp_path):
    """A full fine-tuning has nothing to lift."""
    train(tmp_path)
    with pytest.raises(ConfigError, match="leave out --lift"):
        load_fisher(tmp_path / "base", base=tmp_path / "base", lift=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_an_invalid_moment_is_refused(bad, tmp_path):
    """NaN, infinite and negative entries are found before anything is written."""
    train(tmp_path)
    file = tmp_path / "adapter" / "optimizer.pt"
    state = torch.load(file, weights_only=True)
    state["state"][0]["exp_avg_sq"][0, 0] = bad
    torch.save(state, file)
    with pytest.raises(RefusedError, match="finite and not negative"):
        extract(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base", lift=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_without_a_factor_is_refused(tmp_path):
    """The missing tensor is named."""
    train(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    with pytest.raises(RefusedError, match=re.escape(name)):
        _lifted(tmp_path)


@pytest.mark.parametrize("optimizer", ["Adagrad", "RMSprop", "Adam"])
def test_other_optimizers_are_debiased_by_their_own_rule(optimizer, tmp_path):
    """Sums are divided by their steps, averages by their decay; Adagrad's start is subtracted."""
    _, truth = train(tmp_path, optimizer=optimizer)
    fisher = _lifted(tmp_path)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "base_model.model.model.layers.1.mlp.down_proj"
    a, b = (stored[f"{module}.{part}.weight"] for part in ("lora_A", "lora_B"))
    moments = (truth[f"{module}.{part}.default.weight"] for part in ("lora_A", "lora_B"))
    expected = reference(a, b, *moments, 2.0)
    assert torch.allclose(fisher["model.layers.1.mlp.down_proj.weight"].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("step", ["checkpoint-3", "step_12"])
def test_the_adapter_above_a_checkpoint_is_not_taken_for_its_own(step, tmp_path):
    """FSDP in shards leaves a checkpoint without an adapter: that of the run may be of another step, until named."""
    train(tmp_path)
    run = tmp_path / "adapter"
    wanted = _lifted(tmp_path)
    (run / step).mkdir()
    (run / "optimizer.pt").rename(run / step / "optimizer.pt")
    with pytest.raises(ConfigError, match=r"lift needs a LoRA, but .* give the adapter's folder as --model"):
        load_fisher(run / step, base=tmp_path / "base", lift=True)
    found = load_fisher(run / step, model=run, base=tmp_path / "base", lift=True)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_base_in_another_folder_than_at_training_is_no_warning(tmp_path, recwarn):
    """The base has moved since: its shapes decide, and peft's remark about its name does not reach the user."""
    train(tmp_path, "llama")
    file = tmp_path / "adapter" / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}
    file.write_text(json.dumps(settings))
    (tmp_path / "base").rename(tmp_path / "moved")
    fisher = load_fisher(tmp_path / "adapter", base=tmp_path / "moved", lift=True)
    assert len(fisher)
    assert not [str(one.message) for one in recwarn if "base_model_name_or_path" in str(one.message)]
