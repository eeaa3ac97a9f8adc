"""Fisher from a file: names in memory and on disk, neighbouring files, and log lines."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, NamingError, NotFoundError
from squisher_mergekit.optimizers.checkpoints import layouts
from squisher_mergekit.optimizers.slots import parse

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


def _llama(**settings):
    config = transformers.LlamaConfig(
        vocab_size=29, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
        intermediate_size=19, max_position_embeddings=17, **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def _train(model, make=torch.optim.AdamW, steps=2, parameters=None):
    """Step an optimizer, and return it with a mapping from names in memory to accumulators."""
    optimizer = make(parameters or list(model.parameters()))
    for step in range(steps):
        ids = torch.randint(0, 29, (3, 7), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return optimizer, {name: next(v for k, v in s.items() if k in KEYS) for name, s in states.items()}


KEYS = ("exp_avg_sq", "square_avg", "sum")


def _assert_same(fisher, truth):
    assert set(fisher) == set(truth)
    for name, tensor in truth.items():
        assert torch.equal(fisher[name], tensor), name


def test_wrappers_are_removed_from_the_names_of_a_bundle(tmp_path):
    """Order and names come from the model in the file, without wrappers."""
    model = _llama()
    optimizer, truth = _train(model)
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"model": wrapped, "optimizer": optimizer.state_dict(), "step": 2}, tmp_path / "last.ckpt")
    _assert_same(load_fisher(tmp_path / "last.ckpt"), truth)
    _assert_same(load_fisher(tmp_path), truth)


def test_a_model_of_the_users_own_needs_no_config(tmp_path):
    """A bundle gives the order of a model unknown to transformers, unless a buffer could be a parameter."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(7), torch.nn.Linear(5, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    truth = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    _assert_same(load_fisher(tmp_path / "a.pt"), truth)
    model[1].register_buffer("centre", torch.zeros(7))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "b.pt")
    with pytest.raises(NamingError, match=r"can be 1\.weight or 1\.bias|can be 1\.bias or 1\.centre"):
        load_fisher(tmp_path / "b.pt")


def test_groups_of_a_bundle_without_a_config_are_not_guessed(tmp_path):
    """A user's split into groups does not follow from the order of the parameters, so it is refused."""
    model = _llama()
    parameters = list(model.parameters())
    optimizer, _ = _train(model, parameters=[{"params": parameters[::2]}, {"params": parameters[1::2]}])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "last.pt")
    with pytest.raises(NamingError, match="several groups"):
        load_fisher(tmp_path / "last.pt")


def test_names_in_the_file_need_no_known_model(tmp_path):
    """Names that torch wrote suffice for a config.json of an unknown architecture."""
    model = _llama()
    optimizer, truth = _train(model, parameters=list(model.named_parameters()))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    (tmp_path / "config.json").write_text('{"model_type": "own"}')
    _assert_same(load_fisher(tmp_path), truth)


def test_packed_experts_are_unpacked_whoever_names_them(tmp_path):
    """Names in memory, from --names or from torch, become those on disk."""
    case = STATES / "trainer_mixtral_packed"
    shutil.copytree(case, tmp_path, dirs_exist_ok=True)
    state = torch.load(case / "optimizer.pt", weights_only=True)
    config = transformers.AutoConfig.from_pretrained(case)
    with torch.device("meta"):
        in_memory = [name for name, _ in transformers.MixtralForCausalLM(config).named_parameters()]
    decayed = [name for name in in_memory if "norm" not in name]
    names = decayed + [name for name in in_memory if "norm" in name]
    expected = load_file(case / "expected.safetensors")
    _assert_same(load_fisher(tmp_path, names=names), expected)
    first, second = state["param_groups"]
    first["param_names"], second["param_names"] = names[: len(decayed)], names[len(decayed) :]
    torch.save(state, tmp_path / "optimizer.pt")
    _assert_same(load_fisher(tmp_path), expected)


def test_the_other_name_of_a_tied_tensor_finds_it(tmp_path):
    """Weights that another program saved under lm_head.weight alone have their Fisher there, and under both names."""
    model = _llama(tie_word_embeddings=True)
    optimizer, truth = _train(model)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    model.save_pretrained(tmp_path)
    usual = load_fisher(tmp_path)
    _assert_same(usual, truth)
    assert torch.equal(usual["lm_head.weight"], truth["model.embed_tokens.weight"])
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fisher = load_fisher(tmp_path)
    truth["lm_head.weight"] = truth.pop("model.embed_tokens.weight")
    _assert_same(fisher, truth)
    assert fisher.config.coverage.without == {"model.embed_tokens.weight": "tied to lm_head.weight"}
    assert torch.equal(fisher["model.embed_tokens.weight"], truth["lm_head.weight"])


@pytest.mark.parametrize("name", ["embed_tokens", "norm"])
def test_weights_must_have_the_names_and_shapes_of_the_state(tmp_path, name):
    """A tensor that is missing in the weights, or has another shape there, is refused with both shapes."""
    shutil.copytree(STATES / "plain_adam", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    if name == "norm":
        weights["model.norm.weight"] = torch.zeros(5)
    else:
        del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(MismatchError) as caught:
        load_fisher(tmp_path)
    assert f"model.{name}.weight" in str(caught.value)
    if name == "norm":
        assert "[5]" in str(caught.value)
        assert "[8]" in str(caught.value)


def test_linked_files_are_read_by_the_name_of_the_link(tmp_path):
    """Links to files of other names, as in Hugging Face's cache, are read in the folder of the link."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, file in enumerate((STATES / "trainer_llama_decay").iterdir()):
        shutil.copy(file, tmp_path / "blobs" / str(number))
        (tmp_path / "snapshot" / file.name).symlink_to(tmp_path / "blobs" / str(number))
    truth = load_file(STATES / "trainer_llama_decay" / "expected.safetensors")
    _assert_same(load_fisher(tmp_path / "snapshot"), truth)


@pytest.mark.parametrize(
    "name", ["plain_adamw_named", "fsdp1_full", "fsdp1_sharded", "fsdp2_sharded_nodcp", "ds_zero2"]
)
def test_a_file_that_names_its_parameters_is_not_overruled(name):
    """Names of the user in another order than those in the file are refused. In the same order they are accepted."""
    own = [slot.name for slot in parse(_read(STATES / name)).slots]
    assert set(load_fisher(STATES / name, names=own)) == set(load_fisher(STATES / name))
    gate, up = (next(i for i, one in enumerate(own) if part in one) for part in ("gate_proj", "up_proj"))
    own[gate], own[up] = own[up], own[gate]
    with pytest.raises(NamingError, match="which names its parameters itself"):
        load_fisher(STATES / name, names=own)


def _read(folder):
    layout, place = layouts.find(folder)
    return layout.read(place, True)


def test_the_same_name_twice_is_refused():
    """A name given to two parameters, or by two of its tied names, is refused, because one would be lost."""
    names = list(load_fisher(STATES / "plain_adam"))
    with pytest.raises(NamingError, match="given twice"):
        load_fisher(STATES / "plain_adam", names=[names[1], *names[1:]])


def test_names_of_an_adapter_are_turned_into_those_on_disk():
    """Names in memory of an adapter need the base. Names on disk do not."""
    case = STATES / "trainer_lora_llama"
    fisher = load_fisher(case, base=case / "base_config")
    on_disk = list(fisher)
    in_memory = [name.removesuffix(".weight") + ".default.weight" for name in on_disk if "lora_" in name]
    in_memory.append("base_model.model.lm_head.modules_to_save.default.weight")
    assert len(in_memory) == len(on_disk)
    again = load_fisher(case, base=case / "base_config", names=in_memory)
    without_base = load_fisher(case, names=on_disk)
    for name in on_disk:
        assert torch.equal(fisher[name], again[name])
        assert torch.equal(fisher[name], without_base[name])
    with pytest.raises(NotFoundError, match="--base DIR"):
        load_fisher(case, names=in_memory)


def test_base_and_model_must_be_there(tmp_path):
    """A missing folder of an option is refused and not ignored."""
    for option in ("base", "model"):
        with pytest.raises(NotFoundError, match=f"--{option} must be a local folder"):
            load_fisher(STATES / "plain_adam", **{option: tmp_path / "nowhere"})
    with pytest.raises(NotFoundError, match=r"--base must be a folder with weights or their config\.json"):
        load_fisher(STATES / "trainer_lora_llama", base=tmp_path)


def test_options_may_name_the_config_itself():
    """--base .../config.json stands for its folder."""
    case = STATES / "trainer_lora_llama"
    fisher = load_fisher(case, base=case / "base_config" / "config.json")
    assert fisher.config.parameters == "adapter"


def _frozen_run(folder, tuned_dtype, base_dtype):
    model = _llama()
    model.to(base_dtype).save_pretrained(folder / "base")
    model = model.float()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers.1." in name)
    # A step large enough to change every weight in bfloat16.
    optimizer, truth = _train(
        model, lambda p: torch.optim.AdamW(p, lr=0.1), parameters=[p for p in model.parameters() if p.requires_grad]
    )
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    model.to(tuned_dtype).save_pretrained(folder)
    return truth


@pytest.mark.parametrize(
    ("tuned", "base"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
def test_the_base_identifies_frozen_layers_in_any_dtype(tmp_path, tuned, base):
    """Frozen weights equal the base after the same cast, whichever was saved in the narrower dtype."""
    truth = _frozen_run(tmp_path, tuned, base)
    with pytest.raises(NamingError, match="--base DIR"):
        load_fisher(tmp_path)
    fisher = load_fisher(tmp_path, base=tmp_path / "base")
    _assert_same(fisher, truth)
    reasons = fisher.config.coverage.without
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "not given to the optimizer (frozen)"
    assert len(reasons) == len(list(_llama().named_parameters())) - len(truth)


def test_a_base_of_config_alone_does_not_tell_frozen_layers(tmp_path):
    """Without the weights of the base, the refusal asks for them."""
    _frozen_run(tmp_path, torch.float32, torch.float32)
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(NamingError, match="--base DIR, the weights before training"):
        load_fisher(tmp_path, base=tmp_path / "base")


def _warnings(caplog, folder, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "squisher_mergekit"):
        load_fisher(folder, **options)
    return [record.getMessage() for record in caplog.records]


def test_narrow_accumulators_are_warned_of(tmp_path, caplog):
    """bfloat16 with beta2 > 0.95 cannot decay and gives a warning. With 0.95 there is none."""
    for beta2, expected in ((0.999, 1), (0.95, 0)):
        folder = tmp_path / str(beta2)
        model = _llama().bfloat16()
        optimizer, truth = _train(model, lambda p, b=beta2: torch.optim.AdamW(p, betas=(0.9, b)))
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        _assert_same(load_fisher(folder), truth)
        assert load_fisher(folder).config.encoding == {"default": "bfloat16"}
        assert sum("stored as bfloat16" in line for line in _warnings(caplog, folder)) == expected


def test_four_bits_are_warned_of(caplog):
    """Torchao's 4-bit state loses small entries, so a warning advises against merging by it. 8 bits give none."""
    load_fisher(STATES / "torchao_4bit_few")
    assert "in 4 bits, where small ones are lost" in caplog.text
    caplog.clear()
    load_fisher(STATES / "trainer_torchao8bit")
    assert "small ones are lost" not in caplog.text


def test_coupled_weight_decay_is_warned_of(tmp_path, caplog):
    """Adam's weight decay enters the gradient and gives a warning. AdamW's does not."""
    for make, expected in ((torch.optim.Adam, 1), (torch.optim.AdamW, 0)):
        folder = tmp_path / make.__name__
        model = _llama()
        optimizer, _ = _train(model, lambda p, make=make: make(p, weight_decay=0.1))
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        assert sum("weight decay" in line for line in _warnings(caplog, folder)) == expected


def test_few_steps_are_warned_of(caplog):
    """Steps below a tenth of the memory of the moving average give a warning."""
    assert any("only 4 steps" in line for line in _warnings(caplog, STATES / "plain_adam"))
    assert not any("steps" in line for line in _warnings(caplog, STATES / "plain_adagrad"))


@pytest.mark.parametrize(("steps", "warned"), [(19, True), (20, False), (45, False)])
def test_enough_steps_are_not_warned_of(caplog, tmp_path, steps, warned):
    """From 20 steps on, a merge is as good as by a whole run, whatever the moving average remembers."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(STATES / "plain_adam", folder)
    (folder / "trainer_state.json").unlink(missing_ok=True)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        entry["step"] = torch.tensor(float(steps))
    torch.save(state, folder / "optimizer.pt")
    assert any("have seen only" in line for line in _warnings(caplog, folder)) == warned


@pytest.mark.parametrize(("recorded", "scaler", "said"), [(5, False, 0), (4, False, 1), (9, False, 1), (9, True, 0)])
def test_another_step_count_in_the_trainers_state_is_warned_of(tmp_path, caplog, recorded, scaler, said):
    """global_step must equal the accumulators' steps, except with a gradient scaler, which skips steps."""
    shutil.copytree(STATES / "trainer_llama_decay", tmp_path, dirs_exist_ok=True)
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    (tmp_path / "trainer_state.json").write_text(json.dumps(state | {"global_step": recorded}))
    if scaler:
        (tmp_path / "scaler.pt").write_bytes(b"")
    assert sum("trainer_state.json says" in line for line in _warnings(caplog, tmp_path)) == said


@pytest.mark.parametrize(
    ("entry", "words"),
    [("mp_rank_00/distrib_optim.pt", "Megatron-LM"), ("layer_01-model_00-model_states.pt", "of pipeline parallelism")],
)
def test_layouts_that_are_not_read_are_named(tmp_path, entry, words):
    """A folder in an unsupported layout is refused with the name of the layout."""
    (tmp_path / entry).parent.mkdir(exist_ok=True)
    (tmp_path / entry).touch()
    with pytest.raises(NotFoundError, match=f"{Path(entry).name} is {words}"):
        load_fisher(tmp_path)


def test_several_unknown_files_are_refused(tmp_path):
    """Two files that could both be an optimizer are refused by name, and none is opened."""
    for name in ("a.pt", "b.pt", "training_args.bin", "rng_state.pth", "scheduler.pt"):
        (tmp_path / name).write_bytes(b"not to be opened")
    with pytest.raises(NotFoundError, match=r"give the one of a\.pt, b\.pt that holds it"):
        load_fisher(tmp_path)


def test_experts_trained_one_by_one_are_refused(tmp_path):
    """A mixture's checkpoint from before transformers 5 is refused.

    It has more accumulators than the packed model has parameters.
    """
    shutil.copytree(STATES / "trainer_mixtral_packed", tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(tensor.clone()) for tensor in weights.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(NamingError, match="there are more of them"):
        load_fisher(tmp_path)


def test_more_groups_than_a_trainer_makes_are_refused(tmp_path):
    """Three groups are a user's own split and need names."""
    model = _llama()
    parameters = list(model.parameters())
    groups = [{"params": parameters[:4]}, {"params": parameters[4:9]}, {"params": parameters[9:]}]
    optimizer, truth = _train(model, parameters=groups)
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(NamingError, match="they are in 3 groups"):
        load_fisher(tmp_path)
    _assert_same(load_fisher(tmp_path, names=[name for name, _ in model.named_parameters()]), truth)


def test_an_empty_second_group_is_no_second_group(tmp_path):
    """A split with all parameters in the first group keeps the order of the model."""
    model = _llama()
    optimizer, truth = _train(model, parameters=[{"params": list(model.parameters())}, {"params": []}])
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    _assert_same(load_fisher(tmp_path), truth)
