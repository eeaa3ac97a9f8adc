"""Folders in which several files could be meant: runs with many checkpoints, files twice, another run's state."""

import logging
import shutil

import pytest
import torch
import transformers
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.load import find_source


def _gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=41, n_embd=12, n_layer=1, n_head=3, n_positions=16)
    )


def _llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=41, hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20
        )
    )


def _run(build, folder, seed=1):
    """Train for six steps with a checkpoint after each two, as the Trainer lays them out; return the accumulators."""
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(folder.parent / "base")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    truth = {}
    for step in range(1, 7):
        ids = torch.randint(20 * (seed - 1), 20 * seed, (4, 9), generator=draw)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2 == 0:
            target = folder / f"checkpoint-{step}"
            model.save_pretrained(target)
            torch.save(optimizer.state_dict(), target / "optimizer.pt")
            (target / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
            truth[step] = {name: optimizer.state[p]["exp_avg_sq"].clone() for name, p in model.named_parameters()}
    return truth


def _assert_step(fisher, truth):
    assert all(torch.equal(fisher[name], truth[name]) for name in fisher)


@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_the_checkpoint_of_the_best_model_is_the_one_with_its_weights(build, tmp_path, caplog):
    """load_best_model_at_end leaves an earlier checkpoint's weights in the run's folder."""
    run = tmp_path / "run"
    truth = _run(build, run)
    for name in ("model.safetensors", "config.json"):
        shutil.copy(run / "checkpoint-2" / name, run)
    assert find_source(Weights(run)) == run / "checkpoint-2"
    _assert_step(load_fisher(run), truth[2])
    assert "taking checkpoint-2, which has the weights of" in caplog.text


def test_a_named_model_decides_which_checkpoint_of_a_run_is_taken(tmp_path):
    """The Fisher of a run, for the weights of its second checkpoint."""
    truth = _run(_llama, tmp_path / "run")
    _assert_step(load_fisher(tmp_path / "run", model=tmp_path / "run" / "checkpoint-4"), truth[4])
    _assert_step(load_fisher(tmp_path / "run"), truth[6])


def test_weights_of_no_checkpoint_have_no_source(tmp_path):
    """A run's folder with other weights is not given the Fisher of a checkpoint unasked."""
    run = tmp_path / "run"
    _run(_llama, run)
    _llama().save_pretrained(run)
    assert find_source(Weights(run)) is None


def test_a_newest_checkpoint_without_optimizer_is_named(tmp_path, caplog):
    """The last checkpoint with a state is taken, and the warning names the newer one."""
    truth = _run(_gpt2, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-6" / "optimizer.pt").unlink()
    _assert_step(load_fisher(tmp_path / "run"), truth[4])
    assert "the last with optimizer state, 4; checkpoint-6 has none" in caplog.text


def test_two_names_of_an_optimizers_state_are_told_or_refused(tmp_path, caplog):
    """A Trainer reads optimizer.pt; in a folder of no Trainer nothing tells."""
    truth = _run(_gpt2, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint-6"
    shutil.copy(tmp_path / "run" / "checkpoint-2" / "optimizer.pt", folder / "optimizer.bin")
    _assert_step(load_fisher(folder), truth[6])
    assert "holds both optimizer.pt and optimizer.bin" in caplog.text
    (folder / "trainer_state.json").unlink()
    with pytest.raises(NamingError, match=r"found optimizer\.pt and optimizer\.bin"):
        load_fisher(folder)


@pytest.mark.parametrize("build", [_gpt2, _llama])
def test_the_state_of_another_run_is_noticed(build, tmp_path, caplog):
    """Weights that changed without a gradient, or in another direction, are not of the run that kept the state."""
    _run(build, tmp_path / "one")
    _run(build, tmp_path / "two", seed=2)
    mixed = tmp_path / "one" / "checkpoint-6"
    load_fisher(mixed)
    load_fisher(mixed, base=tmp_path / "base")
    assert "another run" not in caplog.text
    shutil.copy(tmp_path / "two" / "checkpoint-6" / "optimizer.pt", mixed)
    load_fisher(mixed)
    assert "it seems to be of another run than the weights" in caplog.text
    caplog.clear()
    shutil.move(mixed, tmp_path / "alone")
    load_fisher(tmp_path / "alone", base=tmp_path / "base")
    assert "did not change in the direction of this state" in caplog.text


@pytest.mark.parametrize("basename", ["model", "adapter_model"])
def test_a_single_file_comes_before_an_index_as_in_transformers(basename, tmp_path, caplog):
    """The index of older shards beside a new file is reported once, and not copied with it."""
    caplog.set_level(logging.WARNING)
    save_file({"w": torch.zeros(3)}, tmp_path / f"{basename}-00001-of-00001.safetensors")
    index = f'{{"weight_map": {{"w": "{basename}-00001-of-00001.safetensors"}}}}'
    (tmp_path / f"{basename}.safetensors.index.json").write_text(index)
    assert not Weights(tmp_path, basename).read("w").any()
    save_file({"w": torch.ones(3)}, tmp_path / f"{basename}.safetensors")
    assert Weights(tmp_path, basename).read("w").all()
    assert Weights(tmp_path, basename).fingerprint is not None
    assert caplog.text.count("holds both") == 1


def test_steps_that_the_optimizer_did_not_count_are_the_trainers(tmp_path):
    """Trained second moments with step 0 take the count of ``trainer_state.json``, by which they are debiased."""
    moment = torch.rand(3, 5)
    state = {0: {"step": torch.tensor(0.0), "exp_avg": torch.zeros(3, 5), "exp_avg_sq": moment}}
    group = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    torch.save({"state": state, "param_groups": [group]}, tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 7}')
    fisher = load_fisher(tmp_path, names=["w"])
    assert fisher.config.steps == 7
    assert torch.allclose(fisher.scaled("w"), moment / (1 - 0.99**7))


def test_a_file_with_its_step_in_the_name_is_found(tmp_path):
    """``optimizer_1.bin`` is accelerate's second optimizer; ``optimizer_1000.pt`` is the file of a script."""
    model = _gpt2()
    model.save_pretrained(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(9)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer_1000.pt")
    truth = {name: optimizer.state[p]["exp_avg_sq"] for name, p in model.named_parameters()}
    _assert_step(load_fisher(tmp_path), truth)
