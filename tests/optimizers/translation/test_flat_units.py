"""Modules that FSDP1 wraps: the root with everything outside of the layers, then each layer; parameters of adapters."""

import shutil

import pytest
import torch
import transformers

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError, NotFoundError
from squisher_mergekit.optimizers.translation.flat_units import units_of
from tests.adapters import train


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 5}),
        ("gpt2", {"n_embd": 8, "n_head": 2, "n_positions": 4, "vocab_size": 5}),
    ],
)
def test_every_parameter_is_in_one_unit(kind, sizes):
    """Positions count through the model's order, and a layer's parameters are in no other unit."""
    with torch.device("meta"):
        config = transformers.AutoConfig.for_model(kind, num_hidden_layers=3, **sizes)
        model = transformers.AutoModelForCausalLM.from_config(config)
    units = units_of(model)
    order = [name for name, _ in model.named_parameters()]
    assert len(units) == 4
    assert sorted(number for unit in units for number, _ in unit) == list(range(len(order)))
    assert all(order[number] == info.name for unit in units for number, info in unit)
    for k, unit in enumerate(units):
        assert all(
            (f".{k - 1}." in info.name) if k else all(f".{n}." not in info.name for n in range(3)) for _, info in unit
        )


def _rank_files(adapter, folder, ranks=2):
    """Write the flat parts of each rank, as FSDP1 keeps them: an odd cut, and ranks with nothing of a parameter."""
    state = torch.load(adapter / "optimizer.pt", weights_only=True)
    folder.mkdir()
    for rank in range(ranks):
        parts = {}
        for number, entry in state["state"].items():
            length = entry["exp_avg_sq"].numel()
            cut = length if number % 3 == 0 else length // 2 + 1
            piece = slice(0, cut) if rank == 0 else slice(cut, length)
            flat = {key: entry[key].flatten()[piece].clone() for key in ("exp_avg", "exp_avg_sq")}
            parts[number] = {"step": entry["step"], **flat}
        torch.save(state | {"state": parts}, folder / f"optim_world_size_{ranks}_rank_{rank}.pt")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder / name)
    return folder


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("lift", [False, True])
def test_flat_parameters_of_an_adapter(tmp_path, lift):
    """The files of all ranks give the Fisher of the whole state; each trained parameter is a flat one."""
    train(tmp_path)
    whole = load_fisher(tmp_path / "adapter", base=tmp_path / "base", lift=lift)
    found = load_fisher(_rank_files(tmp_path / "adapter", tmp_path / "ranks"), base=tmp_path / "base", lift=lift)
    assert set(found) == set(whole)
    assert len(whole) == (3 if lift else 6) * 2
    assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_flat_parameters_of_another_number_are_refused(tmp_path):
    """Flat parameters of whole modules cannot be cut into those of an adapter."""
    train(tmp_path)
    folder = _rank_files(tmp_path / "adapter", tmp_path / "ranks")
    for file in folder.glob("*.pt"):
        state = torch.load(file, weights_only=True)
        state["param_groups"][0]["params"] = [0]
        torch.save(state | {"state": {0: state["state"][0]}}, file)
    with pytest.raises(NamingError, match=r"for each of the 12 trained parameters.* found 1; save with a full state"):
        load_fisher(folder, base=tmp_path / "base")
    with pytest.raises(NotFoundError, match="give --base DIR"):
        load_fisher(folder)
