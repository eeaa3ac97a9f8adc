"""Names on disk without weights, against the files of save_pretrained."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit.errors import CorruptFileError, NamingError, UnsupportedStateError
from squisher_mergekit.models.checkpoint_names import LAYER_NORM, checkpoint_names, of_model

_TEXT = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
    "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 12,
}
_SEQ2SEQ = {
    "vocab_size": 37,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
_T5 = {"vocab_size": 37, "d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4}
_VISION = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 4}
_VISION |= {"image_size": 8, "patch_size": 4}

# architecture -> settings; ties, packed experts, Conv1D, encoders, decoders, both, vision, nested models
FAST = {
    "BertForMaskedLM": _TEXT,
    "GPT2LMHeadModel": {"vocab_size": 37, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "LlamaForCausalLM": _TEXT | {"tie_word_embeddings": True},
    "T5ForConditionalGeneration": _T5,
    "MixtralForCausalLM": _TEXT | {"num_local_experts": 3},
    "Qwen3MoeForCausalLM": _TEXT | _EXPERTS,
}
SLOW = {
    "AlbertForMaskedLM": _TEXT | {"embedding_size": 8},
    "BartForConditionalGeneration": _SEQ2SEQ,
    "BertForPreTraining": _TEXT,
    "DebertaV2ForMaskedLM": _TEXT,
    "DeepseekV3ForCausalLM": _TEXT | _EXPERTS | _LATENT | {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
    "FalconForCausalLM": _TEXT,
    "Gemma2ForCausalLM": _TEXT | {"head_dim": 4},
    "GptOssForCausalLM": _TEXT | {"num_local_experts": 4, "head_dim": 4},
    "GraniteMoeForCausalLM": _TEXT | {"num_local_experts": 4},
    "JambaForCausalLM": _TEXT | {"num_experts": 4, "mamba_d_state": 4, "mamba_dt_rank": 2, "use_mamba_kernels": False},
    "LlavaForConditionalGeneration": {
        "text_config": _TEXT | {"model_type": "llama"},
        "vision_config": _VISION | {"model_type": "clip_vision_model"},
    },
    "OlmoeForCausalLM": _TEXT | _EXPERTS,
    "Phi3ForCausalLM": _TEXT,
    "Qwen2MoeForCausalLM": _TEXT | _EXPERTS,
    "RobertaForMaskedLM": _TEXT,
    "SwitchTransformersForConditionalGeneration": _T5 | {"num_experts": 4},
    "ViTForImageClassification": _VISION,
}


def _saved(architecture, folder, settings):
    model_class = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter))
    model.save_pretrained(folder)
    return model


def _assert_moves_as_saved(architecture, folder, settings):
    model = _saved(architecture, folder, settings)
    bones = checkpoint_names(folder)
    live = dict(model.named_parameters())
    assert checkpoint_names(folder, load_file(folder / "model.safetensors").keys()).sources == bones.sources
    assert [p.name for p in bones.parameters] == list(live)
    assert [p.shape for p in bones.parameters] == [tuple(p.shape) for p in live.values()]
    assert [p.trainable for p in bones.parameters] == [p.requires_grad for p in live.values()]
    saved = load_file(folder / "model.safetensors")
    for name, sources in bones.sources.items():
        made = bones.convert({source: live[source].detach() for source in sources})[name]
        assert torch.equal(made, saved[name]), name
        assert bones.shapes[name] == tuple(saved[name].shape)
    buffers = set(saved) - set(bones.sources)
    assert buffers <= {name for name, _ in model.named_buffers()}
    assert not set(bones.aliases) & set(saved)
    assert set(bones.aliases.values()) <= set(saved)


@pytest.mark.parametrize("architecture", FAST)
def test_parameters_become_the_tensors_on_disk(architecture, tmp_path):
    """Order, shapes and ties are those of the live model. Converted parameters equal the saved ones bit for bit."""
    _assert_moves_as_saved(architecture, tmp_path, FAST[architecture])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SLOW)
def test_parameters_of_more_models_become_the_tensors_on_disk(architecture, tmp_path):
    """Many more families of models satisfy the same claims."""
    _assert_moves_as_saved(architecture, tmp_path, SLOW[architecture])


def _reloaded(architecture, folder, settings, rename):
    """Save a model under other names, load it and save it again; transformers keeps the loaded names."""
    model = _saved(architecture, folder / "first", settings)
    tensors = rename(dict(model.state_dict()))
    save_file(
        {name: t.clone() for name, t in tensors.items()}, folder / "first" / "model.safetensors", {"format": "pt"}
    )
    again = type(model).from_pretrained(folder / "first")
    again.save_pretrained(folder / "again")
    return again, set(load_file(folder / "again" / "model.safetensors"))


def _old_layer_norms(state):
    del state["cls.predictions.decoder.weight"], state["cls.predictions.decoder.bias"]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, name in old.items():
        state = {key.replace(new, name): tensor for key, tensor in state.items()}
    return state


@pytest.mark.parametrize(
    ("architecture", "rename", "seen"),
    [
        ("BertForMaskedLM", _old_layer_norms, "bert.embeddings.LayerNorm.gamma"),
        ("MixtralForCausalLM", lambda state: state, "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_names_that_a_model_was_loaded_from_are_kept(architecture, rename, seen, tmp_path):
    """BERT's old LayerNorm names and experts packed on disk stay in saved weights and in the Fisher."""
    model, stored = _reloaded(architecture, tmp_path, FAST[architecture], rename)
    assert seen in stored
    bones = checkpoint_names(tmp_path / "again", stored)
    assert set(bones.sources) == stored
    live, saved = dict(model.named_parameters()), load_file(tmp_path / "again" / "model.safetensors")
    for name, sources in bones.sources.items():
        assert torch.equal(bones.convert({source: live[source].detach() for source in sources})[name], saved[name])


def test_an_expert_is_read_from_one_packed_tensor():
    """Each expert on disk is made from its packed tensor alone, so reading it loads no other tensor."""
    config = transformers.MixtralConfig(**_TEXT, num_local_experts=3)
    with torch.device("meta"):
        bones = of_model(transformers.MixtralForCausalLM(config))
    sources = bones.sources["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    assert sources == ("model.layers.1.mlp.experts.gate_up_proj",)
    assert all(len(needed) == 1 for needed in bones.sources.values())


def test_tied_names_lead_to_the_one_that_is_kept():
    """A tied parameter has all its names in memory, and on disk the one that save_pretrained keeps."""
    config = transformers.BertConfig(**_TEXT)
    with torch.device("meta"):
        bones = of_model(transformers.BertForMaskedLM(config))
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert bones.first["cls.predictions.decoder.weight"] == bones.first[embeddings] == embeddings
    assert bones.aliases["cls.predictions.decoder.weight"] == embeddings
    assert bones.aliases["cls.predictions.decoder.bias"] == "cls.predictions.bias"


def test_types_are_those_of_every_module_around():
    """A parameter has the classes of all modules around it, bases included and the root excepted."""
    config = transformers.GPT2Config(vocab_size=37, n_embd=16, n_layer=1, n_head=4)
    with torch.device("meta"):
        types = {p.name: p.types for p in of_model(transformers.GPT2LMHeadModel(config)).parameters}
    assert {"GPT2Block", "Conv1D", "Module"} <= types["transformer.h.0.attn.c_attn.weight"]
    assert LAYER_NORM in types["transformer.h.0.ln_1.weight"]
    assert LAYER_NORM not in types["transformer.wte.weight"]
    assert not any("GPT2LMHeadModel" in some for some in types.values())


def test_a_changed_config_is_read_again(tmp_path):
    """A model is built once per config.json, and again after a change of the file."""
    _saved("LlamaForCausalLM", tmp_path, _TEXT)
    first = checkpoint_names(tmp_path)
    assert checkpoint_names(tmp_path) is first
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert len(checkpoint_names(tmp_path).parameters) == len(first.parameters) + 9


@pytest.mark.parametrize(("content", "words"), [("{", "must be JSON"), ("[]", "must be a mapping in JSON")])
def test_a_config_that_is_no_mapping_is_refused(content, words, tmp_path):
    """The message names the file."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=rf"config\.json {words}"):
        checkpoint_names(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"model_type": "bert"}', "it names no architectures"),
        ('{"model_type": "llama", "architectures": ["SomethingElse"]}', "has no architecture SomethingElse;"),
        ('{"model_type": "unheard of", "architectures": ["LlamaForCausalLM"]}', "must describe a model"),
        ('{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": "x"}', "must describe a model"),
    ],
)
def test_a_config_of_no_known_model_is_refused(content, words, tmp_path):
    """A config of a model that transformers does not have is refused, with --names as the cure."""
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptFileError, match=words) as caught:
        checkpoint_names(tmp_path)
    assert "--names FILE" in str(caught.value)


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "qwen3"])
def test_a_decoder_without_architectures_is_a_language_model(kind, tmp_path, caplog):
    """The names are those of the config that names the class, and a warning says which was taken."""
    config = transformers.AutoConfig.for_model(kind, **_TEXT)
    config.architectures = [transformers.AutoModelForCausalLM.from_config(config).__class__.__name__]
    config.save_pretrained(tmp_path / "named")
    named = checkpoint_names(tmp_path / "named")
    config.architectures = None
    config.save_pretrained(tmp_path / "bare")
    assert checkpoint_names(tmp_path / "bare").parameters == named.parameters
    assert f"the config of a {kind} names no architectures" in caplog.text


@pytest.mark.parametrize("kind", ["bert", "t5", "vit", "whisper"])
def test_other_models_without_architectures_are_refused_with_the_cure(kind, tmp_path):
    """An encoder has heads for many tasks, whose parameters follow it in the model's order."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(CorruptFileError, match=rf"{kind} has more than one kind of model; add \"architectures\""):
        checkpoint_names(tmp_path)


def test_a_models_own_code_is_not_run(tmp_path):
    """Code next to the config is not run, for any auto_map."""
    marker = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass OwnModel: pass\n")
    own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "own", "architectures": ["OwnModel"], "auto_map": own})
    )
    with pytest.raises(CorruptFileError):
        checkpoint_names(tmp_path)
    assert not marker.exists()


def test_a_missing_config_is_refused(tmp_path):
    """A folder without config.json is refused, because order and names are unknown."""
    with pytest.raises(NamingError, match=r"config\.json"):
        checkpoint_names(tmp_path)


def test_conversions_that_do_more_than_move_elements_are_refused(monkeypatch):
    """A conversion outside of transformers' moves of elements could change values, and is refused by name."""
    from transformers import conversion_mapping, core_model_loading

    class Doubled(core_model_loading.ConversionOps):
        def convert(self, input_dict, **_):
            return {name: 2 * tensor for name, tensor in input_dict.items()}

        @property
        def reverse_op(self):
            return self

    step = core_model_loading.WeightConverter("q_proj.weight", "q_proj.weight", operations=[Doubled()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda *_, **__: [step])
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**_TEXT))
    with pytest.raises(UnsupportedStateError, match="Doubled"):
        of_model(model)
