"""Optimizer state of real training runs on disk, compared with the accumulators in memory."""

import builtins
import io
import json
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from squisher_mergekit import extract, load_fisher
from squisher_mergekit.errors import (
    ConfigError,
    MismatchError,
    NamingError,
    NotFoundError,
    UnsafeFileError,
    ValuesError,
)
from squisher_mergekit.models import fingerprint, weights
from squisher_mergekit.optimizers.load import find_state
from squisher_mergekit.tensors import safetensors

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


def _open(name):
    needed = {"trainer_gpt2_tied_frozen": "base", "trainer_lora_llama": "base_config"}
    return load_fisher(STATES / name, base=STATES / name / needed[name] if name in needed else None)


def _copy(name, to):
    return Path(shutil.copytree(STATES / name, to / name))


def test_parameters_without_a_second_moment_are_listed_with_reasons():
    """Parameters frozen before, frozen within a group, and tied are listed with different reasons.

    Ties are resolved.
    """
    frozen = _open("plain_frozen_in_group").config.coverage.without
    assert set(frozen.values()) == {"never stepped (frozen or unused)"}
    fisher = _open("trainer_gpt2_tied_frozen")
    without = fisher.config.coverage.without
    tied = {name: why for name, why in without.items() if why.startswith("tied to ")}
    assert tied == {"lm_head.weight": "tied to transformer.wte.weight"}
    assert without["transformer.wpe.weight"] == "not given to the optimizer (frozen)"
    assert {name for name in without if ".h.0." in name}
    assert torch.equal(fisher["lm_head.weight"], fisher["transformer.wte.weight"])
    weights = set(load_file(STATES / "trainer_gpt2_tied_frozen" / "model.safetensors"))
    assert set(fisher) | (set(without) - set(tied)) == weights


def test_untied_weights_that_look_tied_have_their_own_accumulator():
    """Llama without tied embeddings has a separate Fisher of lm_head.weight, and lists nothing as tied."""
    fisher = _open("trainer_llama_decay")
    assert not torch.equal(fisher["lm_head.weight"], fisher["model.embed_tokens.weight"])
    assert fisher.config.coverage.without == {}


def test_the_debiased_scale_follows_from_the_steps():
    """The debiased scale divides the accumulator by 1 - beta2^t, by hand for 5 steps at 0.99."""
    fisher = _open("trainer_llama_decay")
    name = "model.norm.weight"
    expected = fisher[name].double() / (1 - 0.99**5)
    assert torch.equal(fisher.scaled(name), expected.float())


def test_an_accumulator_of_zeros_alone_is_refused(tmp_path):
    """A state of zeros is refused without leftovers, because it has no information."""
    folder = _copy("plain_adam", tmp_path)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    for entry in state["state"].values():
        entry["exp_avg_sq"].zero_()
    torch.save(state, folder / "optimizer.pt")
    with pytest.raises(ValuesError, match="are 0; take a checkpoint"):
        extract(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_malicious_pickle_runs_no_code(tmp_path, monkeypatch):
    """A file that would make SQUISHER_MARKER when loaded makes it neither here nor next to the checkpoint."""
    folder = _copy("bad_malicious_pickle", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert b"SQUISHER_MARKER" in (folder / "optimizer.pt").read_bytes()
    for call in (load_fisher, lambda source: extract(source, tmp_path / "out")):
        with pytest.raises(UnsafeFileError):
            call(folder)
    assert not list(tmp_path.rglob("SQUISHER_MARKER"))
    assert not Path("/tmp/SQUISHER_MARKER").exists()


@pytest.mark.parametrize("name", ["trainer_llama_decay", "trainer_lora_llama"])
def test_other_pickles_of_the_trainer_are_never_opened(name, tmp_path, monkeypatch):
    """training_args.bin, scheduler.pt and rng_state.pth are pickles that run code, and are never opened."""
    folder = _copy(name, tmp_path)
    traps = [folder / trap for trap in ("training_args.bin", "scheduler.pt", "rng_state.pth")]
    for trap in traps:
        trap.write_bytes(b"no pickle")
    opened = []

    def spy(original):
        def opening(file, *args, **kwargs):
            opened.append(Path(str(file)).name)
            return original(file, *args, **kwargs)

        return opening

    monkeypatch.setattr(builtins, "open", spy(builtins.open))
    monkeypatch.setattr(io, "open", spy(io.open))
    monkeypatch.setattr(torch, "load", spy(torch.load))
    base = folder / "base_config" if name == "trainer_lora_llama" else None
    extract(folder, tmp_path / "out", base=base)
    assert "optimizer.pt" in opened  # the spy records opened files
    assert not {trap.name for trap in traps} & set(opened)


def test_bad_values_open_but_are_not_extracted(tmp_path):
    """NaN, infinite and negative entries are found when read. They are named and leave no output."""
    fisher = load_fisher(STATES / "bad_nan")
    assert len(fisher) == 12
    with pytest.raises(ValuesError, match=r"has 1 (NaN|infinite|negative) of \d+ entries"):
        extract(STATES / "bad_nan", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_last_of_several_checkpoints_is_used_and_logged(tmp_path, caplog):
    """A run folder stands for its checkpoint of the highest number, not of the last name. One line says so."""
    for step, name in ((9, "plain_amsgrad"), (10, "plain_adam"), (2, "plain_adagrad")):
        shutil.copytree(STATES / name, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-11").mkdir()  # a model without optimizer state
    (tmp_path / "checkpoint-12-old").mkdir()
    with caplog.at_level(logging.WARNING, logger="squisher_mergekit"):
        fisher = load_fisher(tmp_path)
    expected = load_file(STATES / "plain_adam" / "expected.safetensors")
    assert all(torch.equal(fisher[name], tensor) for name, tensor in expected.items())
    assert "taking the last with optimizer state, 10" in caplog.text


def test_a_single_file_finds_the_model_in_its_folder():
    """The optimizer's file itself stands for the checkpoint in its folder."""
    by_file, by_folder = (load_fisher(STATES / "plain_adam" / end) for end in ("optimizer.pt", ""))
    assert list(by_file) == list(by_folder)
    assert by_file.config == by_folder.config


def test_a_lora_checkpoint_needs_its_base():
    """A LoRA without its base model is refused with the cure --base, because its parameters have no order."""
    with pytest.raises(NotFoundError, match=r"LoRA .*base model; give --base DIR"):
        load_fisher(STATES / "trainer_lora_llama")


def test_a_lightning_module_may_hold_more_than_its_model(tmp_path, caplog):
    """Parameters of the module beside the model are left out with a warning."""
    case = _copy("lightning_ckpt", tmp_path)
    saved = torch.load(case / "last.ckpt", weights_only=True)
    saved["state_dict"] = {"extra.scale": torch.ones(3), **saved["state_dict"]}
    torch.save(saved, case / "last.ckpt")
    expected = load_file(STATES / "lightning_ckpt" / "expected.safetensors")

    def assert_expected():
        fisher = load_fisher(case)
        assert set(fisher) == set(expected)
        assert all(torch.equal(fisher[name], tensor) for name, tensor in expected.items())

    assert_expected()
    (state,) = saved["optimizer_states"]
    state["param_groups"][0]["params"].append(99)
    state["state"][99] = {key: torch.ones(3) if key != "step" else value for key, value in state["state"][0].items()}
    saved["state_dict"]["extra.scale"] = saved["state_dict"].pop("extra.scale")  # the last parameter
    torch.save(saved, case / "last.ckpt")
    assert_expected()
    assert "left out: extra.scale" in caplog.text


def test_a_loras_state_is_refused_for_full_weights():
    """A LoRA's state is no Fisher of full weights, and the refusal does not suggest --base."""
    with pytest.raises(MismatchError, match=r"holds full weights, but .* is the state of a LoRA"):
        load_fisher(STATES / "trainer_lora_llama", model=STATES / "trainer_llama_decay")


def test_frozen_layers_without_the_base_are_refused():
    """Several possible choices of frozen layers are refused, and the error asks for the base model."""
    with pytest.raises(NamingError, match=r"one way only.*--base DIR"):
        load_fisher(STATES / "trainer_gpt2_tied_frozen")


def test_a_folder_without_optimizer_state_is_refused(tmp_path):
    """The final model of a run has no optimizer state. The error has the expected files and the folder to name."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no optimizer state in .*optimizer\.pt.*checkpoint-N"):
        load_fisher(tmp_path)
    assert find_state(tmp_path) is None


def test_a_missing_source_is_refused():
    """A text that is neither a path nor a Hub id is refused as missing, without a request to the Hub."""
    with pytest.raises(NotFoundError, match=r"there is no nowhere"):
        load_fisher("nowhere")


def test_numbered_parameters_without_a_config_are_refused(tmp_path):
    """An optimizer's file alone has numbers and no names. The error offers --model and --names."""
    shutil.copy(STATES / "plain_adam" / "optimizer.pt", tmp_path)
    with pytest.raises(NamingError, match=r"config\.json.*--model DIR, or --names FILE"):
        load_fisher(tmp_path)


def test_model_gives_the_missing_order(tmp_path):
    """An optimizer's file with --model gives the same Fisher."""
    shutil.copy(STATES / "trainer_bert_cls" / "optimizer.pt", tmp_path)
    fisher = load_fisher(tmp_path, model=STATES / "trainer_bert_cls")
    expected = load_file(STATES / "trainer_bert_cls" / "expected.safetensors")
    assert set(fisher) == set(expected)
    assert all(torch.equal(fisher[name], tensor) for name, tensor in expected.items())


def test_names_settle_the_order(tmp_path):
    """Line i of a text file names parameter i. Blank lines are skipped."""
    expected = load_file(STATES / "plain_adam" / "expected.safetensors")
    names = list(load_fisher(STATES / "plain_adam"))
    shutil.copy(STATES / "plain_adam" / "optimizer.pt", tmp_path)
    (tmp_path / "names.txt").write_text("\n".join([*names[:3], "", *names[3:]]) + "\n\n")
    for given in (tmp_path / "names.txt", str(tmp_path / "names.txt"), names):
        fisher = load_fisher(tmp_path, names=given)
        assert set(fisher) == set(expected)
        assert all(torch.equal(fisher[name], tensor) for name, tensor in expected.items())


def test_names_that_do_not_fit_are_refused(tmp_path):
    """Too few names, a missing file, an unknown name and two swapped names of different shapes are refused."""
    folder, names = STATES / "plain_adam", list(load_fisher(STATES / "plain_adam"))
    with pytest.raises(NamingError, match=r"each of the 12 parameters .* found 11"):
        load_fisher(folder, names=names[:-1])
    with pytest.raises(NotFoundError, match=r"there is no .*none\.txt"):
        load_fisher(folder, names=tmp_path / "none.txt")
    with pytest.raises(MismatchError, match=r"model\.other\.weight"):
        load_fisher(folder, names=["model.other.weight", *names[1:]])
    shapes = [load_fisher(folder).info(name).shape for name in names]
    other = next(i for i, shape in enumerate(shapes) if shape != shapes[0])
    swapped = list(names)
    swapped[0], swapped[other] = swapped[other], swapped[0]
    with pytest.raises(MismatchError, match="shape"):
        load_fisher(folder, names=swapped)


def test_another_model_is_refused():
    """A model of another shape given with --model is refused."""
    with pytest.raises((NamingError, MismatchError)):
        load_fisher(STATES / "plain_adam", model=STATES / "trainer_llama_decay")


@pytest.mark.parametrize("name", ["trainer_llama_decay", "trainer_mixtral_packed"])
def test_bfloat16_is_the_nearest(name, tmp_path):
    """No bfloat16 entry is off by more than half a unit in its last place (2^-9 of its power of two)."""
    original = _open(name)
    again = extract(STATES / name, tmp_path / "out", dtype=torch.bfloat16)
    assert again.config.encoding == {"default": "bfloat16"}
    for key in original:
        exact, found = original[key].double(), again[key]
        assert found.dtype == torch.bfloat16
        _, exponent = torch.frexp(exact)
        half = torch.ldexp(torch.full_like(exact, 0.5), (exponent - 8).clamp(min=-133))
        assert bool(((found.double() - exact).abs() <= half).all()), key


def test_batch_sizes_are_recorded(tmp_path):
    """Batch sizes given by the user are in the metadata, and give the scale per example."""
    fisher = extract(STATES / "plain_adam", tmp_path / "out", examples_per_step=4, tokens_per_step=28)
    assert (fisher.config.examples_per_step, fisher.config.tokens_per_step) == (4, 28)
    assert fisher.factor("model.norm.weight", "per_example") == 4 * fisher.factor("model.norm.weight", "debiased")


def test_an_output_that_holds_a_fisher_is_not_overwritten(tmp_path):
    """A second extraction into the same folder is refused and changes nothing. An unknown compact form is refused."""
    extract(STATES / "plain_adam", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(ConfigError, match="must not hold a Fisher yet"):
        extract(STATES / "plain_amsgrad", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match="compress must be None or one of"):
        extract(STATES / "plain_adam", tmp_path / "other", compress="log2")


def test_a_fisher_of_other_shapes_than_the_model_is_refused(tmp_path):
    """A portable Fisher opened with a model of another name or shape is refused."""
    extract(STATES / "plain_adam", tmp_path / "out")
    with pytest.raises(MismatchError, match=r"must be those of the weights|must have the weight's shape"):
        load_fisher(tmp_path / "out", model=STATES / "trainer_llama_decay")
    assert len(load_fisher(tmp_path / "out", model=STATES / "plain_adam")) == 12


def test_more_steps_than_the_trainer_recorded_give_a_warning(tmp_path, caplog):
    """optimizer.pt and trainer_state.json of different checkpoints give a warning."""
    folder = _copy("trainer_llama_decay", tmp_path)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 3}))
    with caplog.at_level(logging.WARNING, logger="squisher_mergekit"):
        load_fisher(folder)
    assert "has seen 5 steps, but trainer_state.json says 3" in caplog.text


@pytest.mark.parametrize(
    ("name", "base"),
    [("trainer_llama_decay", None), ("trainer_gpt2_tied_frozen", "base"), ("trainer_lora_llama", "base_config")],
)
def test_each_header_is_parsed_once(name, base, tmp_path, monkeypatch):
    """Every safetensors file is parsed once, for the Trainer, the Trainer with a base, and LoRA with its base."""
    parsed, parse = Counter(), safetensors.read_header

    def count(file):
        parsed[file.resolve()] += 1
        return parse(file)

    for module in (safetensors, weights, fingerprint):
        monkeypatch.setattr(module, "read_header", count)
    folder = _copy(name, tmp_path)
    (folder / "expected.safetensors").unlink()
    files = {file.resolve() for file in folder.rglob("*.safetensors")}
    assert len(files) == (2 if base == "base" else 1)
    for model in (None, folder):
        parsed.clear()
        load_fisher(folder, model=model, base=None if base is None else folder / base)
        assert parsed == Counter(files)


@pytest.mark.parametrize("base", ["trainer_bert_cls", "config alone"])
def test_a_base_of_another_architecture_is_refused_where_none_is_needed(base, tmp_path):
    """A base that the names do not need is compared all the same, by its weights or by its config."""
    folder = STATES / "trainer_bert_cls"
    if base == "config alone":
        shutil.copy(folder / "config.json", tmp_path)
        folder = tmp_path
    with pytest.raises(MismatchError, match="the base must be the model before training, but no tensor of"):
        load_fisher(STATES / "trainer_llama_decay", base=folder)


@pytest.mark.parametrize("option", ["model", "base"])
@pytest.mark.parametrize("kind", ["empty folder", "text file"])
def test_a_folder_without_a_model_is_refused(kind, option, tmp_path):
    """An empty folder is a mistake, not a model without weights, and a text file does not stand for its folder."""
    if kind == "text file":
        shutil.copy(STATES / "trainer_llama_decay" / "config.json", tmp_path)
        (tmp_path / "notes.txt").touch()
        tmp_path /= "notes.txt"
    with pytest.raises(NotFoundError, match=f"--{option} must be a folder with weights or their config.json, but"):
        load_fisher(STATES / "trainer_llama_decay", **{option: tmp_path})


def test_names_for_a_fisher_with_names_are_refused(tmp_path):
    """A portable Fisher would ignore them."""
    extract(STATES / "trainer_llama_decay", tmp_path / "fisher")
    with pytest.raises(ConfigError, match="--names is for optimizer states that number their parameters, but"):
        load_fisher(tmp_path / "fisher", names=["a"])
