"""Tensors of whole merges move to a device and back by way of pinned buffers, Fishers in log8 too."""

import json

import pytest
import torch
from click.testing import CliRunner
from mergekit.graph import Executor
from mergekit.scripts.run_yaml import main as run_yaml

from squisher_mergekit import load_fisher
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.encoded import RankOneStore
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.merging.mergekit import transfers
from squisher_mergekit.merging.mergekit.tasks import FisherRequest
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.devices import transfer
from tests.merging.models import entry, models_with_fishers


def _config(folder, count, method="squisher"):
    config = {"merge_method": method, "models": [entry(folder, i) for i in range(count)], "dtype": "float32"}
    return config | ({"base_model": str(folder / "m0")} if method == "ubgm_squisher" else {})


def _run(folder, config, out, *flags):
    file = folder / f"{out}.yml"
    file.write_text(json.dumps(config))
    found = CliRunner().invoke(run_yaml, [str(file), str(folder / out), *flags], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    weights = Weights(folder / out)
    return {name: weights.read(name) for name in weights.infos}


@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
@pytest.mark.parametrize("compress", [None, "log8"])
def test_a_merge_on_the_device_agrees_with_one_on_the_cpu(tmp_path, device, monkeypatch, method, compress):
    """All tensors of a merge are moved in pieces, and the result is that of the CPU."""
    monkeypatch.setattr(transfer, "LEAST", 1)
    models_with_fishers(tmp_path, 3)
    if compress is not None:
        for i in range(3):
            load_fisher(tmp_path / f"m{i}").save(tmp_path / f"small{i}", compress=compress)
    config = _config(tmp_path, 3, method)
    for i, model in enumerate(config["models"]):
        if compress is not None:
            model["parameters"] = {**model.get("parameters", {}), "fisher": str(tmp_path / f"small{i}")}
    expected = _run(tmp_path, config, "cpu")
    flags = ["--cuda"] if device.type == "cuda" else []
    found = _run(tmp_path, config, "device", *flags)
    assert not transfers.RUNNING
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6 * float(tensor.abs().max()))
    used = transfer.lanes_of.cache_info().currsize
    assert (used > 0) == (device.type == "cuda")


@pytest.mark.parametrize("compress", ["log8", "log4", "rank1"])
def test_compact_fishers_are_decoded_on_the_device(tmp_path, device, compress):
    """A compact tensor reaches the device in its parts, and decodes to what the CPU decodes."""
    models_with_fishers(tmp_path, 1)
    load_fisher(tmp_path / "m0").save(tmp_path / "small", compress=compress)
    fisher = load_fisher(tmp_path / "small")
    there = fisher.on(device)
    for name in fisher:
        assert there[name].device.type == device.type
        torch.testing.assert_close(there[name].cpu(), fisher[name], rtol=1e-6, atol=0)
    assert there.moments() == fisher.moments()


def test_a_lifted_fisher_is_computed_on_the_device(device):
    """A tensor that is known by its means is multiplied out where the merge runs."""
    means = {"w": (torch.rand(13), torch.rand(7))}
    whole = {"b": torch.rand(5)}
    fisher = Fisher(RankOneStore(means, whole, "memory"), FisherConfig(statistic="mean"))
    there = fisher.on(device)
    for name in ("w", "b"):
        assert there[name].device.type == device.type
        torch.testing.assert_close(there[name].cpu(), fisher[name], rtol=1e-6, atol=0)


def test_mergekit_moves_tensors_itself_in_other_merges(monkeypatch):
    """Outside a merge of ours the executor's own move runs; inside it, ours, for tensors and in containers."""
    seen = []
    monkeypatch.setattr(transfers, "moved", lambda tensor, device: seen.append(tensor) or tensor)
    executor, tensor = Executor([], math_device="cpu", storage_device="cpu"), torch.ones(3)
    executor._move_tensors({"a": [tensor]}, torch.device("cpu"))
    assert not seen
    with transfers.RUNNING.merge():
        moved = executor._move_tensors({"a": [tensor], "b": 3}, torch.device("cpu"))
    assert (len(seen), moved["b"]) == (1, 3)
    with pytest.raises(ZeroDivisionError), transfers.RUNNING.merge():
        _ = 1 / 0
    assert not transfers.RUNNING


def test_a_request_without_a_fisher_needs_no_device():
    """F = 0 is no tensor."""
    request = FisherRequest.model_construct(model=None, opened=None, name="w")
    assert request.load(torch.device("meta")).tensor is None
