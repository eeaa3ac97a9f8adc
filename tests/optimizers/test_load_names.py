"""Names of parameters in checkpoints of many trainers: frozen positions, groups by axes, prefixes, adapters."""

import argparse

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from squisher_mergekit import extract, load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, UnsupportedStateError
from squisher_mergekit.optimizers.slot_names import read_names


def _step(parameters, groups):
    """Step AdamW three times with random gradients; return the optimizer and the accumulators by name."""
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return optimizer, {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in parameters.items()}


def _trainer_groups(parameters):
    """Split as the Trainer does: no weight decay for biases and norms."""
    plain = [p for name, p in parameters.items() if "norm" in name.lower() or "bias" in name]
    ids = {id(p) for p in plain}
    return [{"params": [p for p in parameters.values() if id(p) not in ids]}, {"params": plain, "weight_decay": 0.0}]


def _assert_fisher(source, truth, **options):
    fisher = load_fisher(source, **options)
    assert set(fisher) == set(truth)
    assert all(torch.equal(fisher[name], tensor) for name, tensor in truth.items())


def _pegasus():
    return transformers.PegasusForConditionalGeneration(
        transformers.PegasusConfig(
            vocab_size=37, d_model=12, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=20, decoder_ffn_dim=20,
            encoder_attention_heads=3, decoder_attention_heads=3, max_position_embeddings=19,
        )
    )  # fmt: skip


def _vit_mae():
    return transformers.ViTMAEForPreTraining(
        transformers.ViTMAEConfig(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, image_size=8,
            patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
            decoder_intermediate_size=24,
        )
    )  # fmt: skip


@pytest.mark.parametrize("build", [_pegasus, _vit_mae])
@pytest.mark.parametrize("frozen", [True, False])
def test_positions_that_the_constructor_freezes_are_named_trained_or_not(build, frozen, tmp_path):
    """from_pretrained of transformers 5 trains sinusoidal positions, earlier releases did not."""
    model = build()
    assert not all(p.requires_grad for p in model.parameters())
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad or not frozen}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer, truth = _step(parameters, _trainer_groups(parameters))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    for name, parameter in parameters.items():
        parameter.data.copy_(truth[name])
    model.save_pretrained(tmp_path / "truth")
    saved = load_file(tmp_path / "truth" / "model.safetensors")
    fisher = load_fisher(tmp_path)
    assert len(fisher) == len(parameters)
    assert all(torch.equal(fisher[name], saved[name]) for name in fisher)


class _Patches(nn.Module):
    """Vision transformer in small: a class token, positions, a convolution, a norm and a head."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 6))
        self.pos_embed = nn.Parameter(torch.zeros(1, 9, 6))
        self.proj = nn.Conv2d(3, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)


class _Recurrent(nn.Module):
    """Recurrent network: an embedding, a GRU and a head without bias."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 6)
        self.rnn = nn.GRU(6, 6)
        self.out = nn.Linear(6, 7, bias=False)


@pytest.mark.parametrize("build", [_Patches, _Recurrent])
@pytest.mark.parametrize("first", ["matrices", "vectors"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_groups_by_axes_follow_from_the_model_in_the_file(build, first, prefix, tmp_path):
    """The split by number of axes is found whichever group is first, without the prefixes of torch.compile and DDP."""
    model = build()
    parameters = dict(model.named_parameters())
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": group} for group in ((matrices, vectors) if first == "matrices" else (vectors, matrices))]
    optimizer, truth = _step(parameters, groups)
    saved = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": saved, "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    _assert_fisher(tmp_path / "ckpt.pt", truth)


def _wrapped(attribute, more, tmp_path):
    """Save the optimizer of a LightningModule with a Llama and further modules; return the model's accumulators."""
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=12
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    parameters = {f"{attribute}.{name}": p for name, p in model.named_parameters()}
    parameters |= {name: nn.Parameter(torch.randn(shape)) for name, shape in more.items()}
    optimizer, truth = _step(parameters, [{"params": list(parameters.values())}])
    content = {"pytorch-lightning_version": "2.6.0", "state_dict": {n: p.detach() for n, p in parameters.items()}}
    torch.save({**content, "optimizer_states": [optimizer.state_dict()]}, tmp_path / "last.ckpt")
    inside = {name: tensor for name, tensor in truth.items() if name.startswith(attribute)}
    return {name.removeprefix(f"{attribute}."): tensor for name, tensor in inside.items()}


@pytest.mark.parametrize("attribute", ["model", "net.backbone"])
def test_modules_beside_the_model_are_left_out(attribute, tmp_path, caplog):
    """A probe with the shape of a layer is no part of the model, and the warning names it."""
    truth = _wrapped(attribute, {"probe.weight": (12, 12), "probe.bias": (12,)}, tmp_path)
    _assert_fisher(tmp_path / "last.ckpt", truth, model=tmp_path / "model")
    assert f"the model is {attribute} of the module that was trained; left out: probe.weight and 1 more" in caplog.text


def _by_scale(shapes, groups, file):
    """Save an optimizer whose groups have scales; return the accumulators."""
    parameters = {f"p{k}": nn.Parameter(torch.randn(shape)) for k, shape in enumerate(shapes)}
    stepped = {f"p{k}": parameters[f"p{k}"] for group in groups for k in group}
    settings = [{"params": [parameters[f"p{k}"] for k in g], "lr_scale": 0.5 + n} for n, g in enumerate(groups)]
    optimizer, truth = _step(stepped, settings)
    weights = {name: p.detach() for name, p in parameters.items()}
    torch.save({"state_dict": weights, "optimizer": optimizer.state_dict()}, file)
    return truth


def test_layers_in_another_order_are_left_to_the_general_rules(tmp_path):
    """Shapes contradict the scales, and one division alone fits them."""
    truth = _by_scale([3, 4, 3, 4], [[1, 2], [0, 3]], tmp_path / "a.pth")
    _assert_fisher(tmp_path / "a.pth", truth)


def test_a_frozen_parameter_leaves_the_borders_of_layers_unknown(tmp_path):
    """The scales tell nothing where a layer may have more parameters than its groups."""
    _by_scale([3, 4, 3, 4, 3], [[0, 1], [2, 3]], tmp_path / "a.pth")
    with pytest.raises(NamingError, match="in one way only"):
        load_fisher(tmp_path / "a.pth")


def test_two_copies_of_a_model_in_a_module_are_refused(tmp_path):
    """Teacher and student have the same names: neither is taken."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=23, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=12
        )
    )
    _wrapped("student", {f"teacher.{name}": p.shape for name, p in model.named_parameters()}, tmp_path)
    with pytest.raises(MismatchError, match=r"student\.model\.embed_tokens\.weight is not among them"):
        load_fisher(tmp_path / "last.ckpt", model=tmp_path / "model")


_WIDTH = 5


def _vision_shapes(layers=3):
    """Return name -> shape, in the order of a vision transformer, with the class token first."""
    shapes = {"cls_token": (1, 1, _WIDTH), "patch.weight": (_WIDTH, 3), "patch.bias": (_WIDTH,)}
    for k in range(layers):
        shapes |= {f"blocks.{k}.norm.weight": (_WIDTH,), f"blocks.{k}.norm.bias": (_WIDTH,)}
        shapes |= {f"blocks.{k}.fc.weight": (_WIDTH, _WIDTH), f"blocks.{k}.fc.bias": (_WIDTH,)}
    return shapes | {"norm.weight": (_WIDTH,), "head.weight": (2, _WIDTH), "head.bias": (2,)}


def _groups_of_timm(shapes, vectors=()):
    """Return timm's groups, in the order in which the parameters open them: (layer, without decay) -> names."""
    groups = {}
    for name, shape in shapes.items():
        layer = (
            int(name.split(".")[1]) + 1 if name.startswith("blocks") else 0 if "patch" in name or "cls" in name else 9
        )
        groups.setdefault((layer, len(shape) < 2 or name in vectors), []).append(name)
    return groups


@pytest.mark.parametrize("vectors", [(), ("cls_token",)])
def test_the_groups_of_each_layer_follow_the_order_of_the_model(vectors, tmp_path):
    """Equal shapes in all layers fit in many ways without the scales; the model may exempt matrices from decay."""
    shapes = _vision_shapes()
    groups = _groups_of_timm(shapes, vectors)
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer, truth = _step(parameters, [{"params": [parameters[n] for n in names]} for names in groups.values()])
    state, weights = optimizer.state_dict(), {name: p.detach() for name, p in parameters.items()}
    file = tmp_path / "last.pth.tar"
    torch.save({"state_dict": weights, "optimizer": state, "arch": "vit"}, file)
    with pytest.raises(NamingError, match="that no known rule makes"):
        load_fisher(file)
    for group, (layer, _) in zip(state["param_groups"], groups, strict=True):
        group["lr_scale"] = 0.75 ** (10 - layer)
    torch.save({"state_dict": weights, "optimizer": state, "arch": "vit"}, file)
    _assert_fisher(file, truth)


def test_groups_of_an_unknown_rule_are_named_where_one_division_fits(tmp_path):
    """Timm's no_weight_decay puts positions and the class token into the group of the vectors."""
    model = _Patches()
    parameters = dict(model.named_parameters())
    plain = [p for name, p in parameters.items() if p.ndim < 2 or name in ("cls_token", "pos_embed")]
    ids = {id(p) for p in plain}
    groups = [{"params": plain}, {"params": [p for p in parameters.values() if id(p) not in ids]}]
    optimizer, truth = _step(parameters, groups)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "ckpt.pt")
    _assert_fisher(tmp_path / "ckpt.pt", truth)


def test_a_run_folder_of_timm_gives_its_last_checkpoint(tmp_path, caplog):
    """last.pth.tar, with the settings of the run in it, is found among other checkpoints, and a warning says so."""
    model = _Patches()
    parameters = dict(model.named_parameters())
    optimizer, truth = _step(parameters, [{"params": list(parameters.values())}])
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1, opt="adamw"),
        "epoch": 3,
    }
    torch.save(content, tmp_path / "last.pth.tar")
    _assert_fisher(tmp_path, truth)
    torch.save(content, tmp_path / "model_best.pth.tar")
    _assert_fisher(tmp_path, truth)
    assert "taking last.pth.tar" in caplog.text


def test_names_copied_from_a_compiled_model_lose_the_prefix(tmp_path):
    """--names may have the prefix of torch.compile."""
    model = _Recurrent()
    parameters = dict(model.named_parameters())
    optimizer, truth = _step(parameters, [{"params": list(parameters.values())}])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    _assert_fisher(tmp_path / "state.pt", truth, names=[f"_orig_mod.{name}" for name in parameters])


def _bert():
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=31, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
        )
    )


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=31, d_model=12, d_kv=4, d_ff=20, num_layers=2, num_heads=3)
    )


def _adapted(model, config, folder):
    """Save a checkpoint of an adapter; return its accumulators under the names of named_parameters."""
    model.save_pretrained(folder / "base")
    adapted = peft.get_peft_model(model, config)
    parameters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    optimizer, truth = _step(parameters, _trainer_groups(parameters))
    adapted.save_pretrained(folder / "adapter")
    torch.save(optimizer.state_dict(), folder / "adapter" / "optimizer.pt")
    return truth


# peft calls a deprecated function of transformers.
PEFT_WARNS = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

ADAPTERS = {
    "classifier by prompt tuning": (_bert, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
    "seq2seq by prefix tuning": (_t5, peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
    "seq2seq by prompt tuning": (_t5, peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)),
}


@PEFT_WARNS
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_prompt_has_the_fisher_of_its_embeddings(kind, tmp_path):
    """The Fisher of a prompt has the tensors of adapter_model.safetensors, heads saved with it included."""
    build, config = ADAPTERS[kind]
    truth = _adapted(build(), config, tmp_path)
    fisher = load_fisher(tmp_path / "adapter", base=tmp_path / "base")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name: fisher[name].shape for name in fisher} == {name: tensor.shape for name, tensor in saved.items()}
    (embedding,) = [tensor for name, tensor in truth.items() if "prompt_encoder" in name]
    assert torch.equal(fisher["prompt_embeddings"], embedding)


@PEFT_WARNS
@pytest.mark.parametrize(
    "config",
    [
        peft.PromptEncoderConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, encoder_hidden_size=8),
        peft.PrefixTuningConfig(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
        ),
    ],
    ids=["P-tuning", "prefix projection"],
)
def test_a_prompt_computed_by_an_encoder_is_refused(config, tmp_path):
    """No second moment belongs to a saved tensor that several parameters give; nothing is written."""
    _adapted(_t5(), config, tmp_path)
    with pytest.raises(UnsupportedStateError, match="saved as a tensor of its own"):
        extract(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("build", [_t5, _bert])
def test_embeddings_resized_after_training_are_refused_with_the_cure(build, tmp_path):
    """The message names the rows before and after, and the extraction from the trained weights."""
    model = build()
    parameters = dict(model.named_parameters())
    optimizer, _ = _step(parameters, _trainer_groups(parameters))
    model.resize_token_embeddings(40)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(MismatchError, match=r"has 40 rows in the model, but 31 in .*resized after training"):
        load_fisher(tmp_path)


@pytest.mark.parametrize("name", ["optim_rank0.pt", "optimizer-00001-of-00002.pt"])
def test_one_ranks_file_alone_is_refused(name, tmp_path):
    """Names alone do not show that a tensor is whole; a config does."""
    model = _recurrent_halves()
    torch.save(model[0], tmp_path / name)
    with pytest.raises(NamingError, match="several ranks or shards"):
        extract(tmp_path / name, tmp_path / "out", names=model[1])
    assert not (tmp_path / "out").exists()


def test_one_ranks_part_of_deepspeed_is_refused_under_any_name(tmp_path):
    """A renamed ZeRO file holds a piece of flat buffers."""
    flat = {"state": {0: {"exp_avg_sq": torch.ones(5), "step": 3}}, "param_groups": [{"params": [0], "lr": 1.0}]}
    content = {"optimizer_state_dict": {"zero_stage": 2, "base_optimizer_state": flat}, "ds_version": "0.15"}
    torch.save(content, tmp_path / "mine.pt")
    with pytest.raises(UnsupportedStateError, match="one rank's part of DeepSpeed's"):
        extract(tmp_path / "mine.pt", tmp_path / "out", names=["weight"])


def _recurrent_halves():
    """Return the state of one of two ranks, each with half of the rows, and the names."""
    model = _Recurrent()
    halves = {name: nn.Parameter(p.detach()[: len(p) // 2].clone()) for name, p in model.named_parameters()}
    optimizer, _ = _step(halves, [{"params": list(halves.values())}])
    return optimizer.state_dict(), list(halves)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_names_can_begin_with_a_byte_order_mark(encoding, tmp_path):
    """Editors of Windows write the mark, which is no part of the first name."""
    (tmp_path / "names.txt").write_text("wte.weight\r\nln.bias\r\n", encoding=encoding, newline="")
    assert read_names(tmp_path / "names.txt") == ["wte.weight", "ln.bias"]
