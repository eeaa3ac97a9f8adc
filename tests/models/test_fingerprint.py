"""Fingerprint of weights: independent of the file layout, different for different weights."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit.models.fingerprint import difference, fingerprint
from squisher_mergekit.models.weights import Weights


def _weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (53, 31), "norm.weight": (31,), "scale": (), "empty": (0, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _print(folder, weights, name="model"):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / f"{name}.safetensors")
    return fingerprint(folder, name)


def _print_shards(folder, weights):
    """Return the fingerprint of weights in one file a tensor."""
    folder.mkdir()
    names = {name: f"model-{i}.safetensors" for i, name in enumerate(weights)}
    for name, file in names.items():
        save_file({name: weights[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return fingerprint(folder)


def test_the_format_of_a_fingerprint(tmp_path):
    """A fingerprint is fp1 with a digest of 6 bytes of the structure and one of 12 bytes of the content."""
    structure, content = _print(tmp_path, _weights()).removeprefix("fp1:").split("-")
    assert (len(bytes.fromhex(structure)), len(bytes.fromhex(content))) == (6, 12)


def test_a_fingerprint_does_not_depend_on_the_file_layout(tmp_path):
    """A single file, shards in any order and another order in the file have the same fingerprint."""
    weights = _weights()
    one = _print(tmp_path / "one", weights)
    assert _print(tmp_path / "turned", dict(reversed(weights.items()))) == one
    assert _print_shards(tmp_path / "shards", weights) == one
    assert fingerprint(tmp_path / "one" / "model.safetensors") == one


@pytest.mark.parametrize("size", [1, 31, 33, 127, 128, 129, 255, 256, 257, 1000])
def test_a_tensor_is_read_without_its_neighbour(tmp_path, size):
    """Tensors between two blocks and eight have the fingerprint of their own bytes, whatever comes behind them."""
    weights = {"a.norm": torch.arange(float(size)), "b.bias": torch.ones(97)}
    one = _print(tmp_path / "one", weights)
    assert _print(tmp_path / "turned", dict(reversed(weights.items()))) == one
    assert _print_shards(tmp_path / "shards", weights) == one


def _old_print(weights):
    """Return the fingerprint of 0.1.0 of a single file with these tensors in the order of their names."""
    everything = b"".join(weights[name].numpy().tobytes() for name in sorted(weights))
    structure, content = hashlib.blake2b(digest_size=6), hashlib.blake2b(digest_size=12)
    begin = 0
    for name in sorted(weights):
        size = weights[name].numel() * 4
        places = range(0, size, 128) if size <= 1024 else [i * (size - 128) // 7 for i in range(8)]
        sample = b"".join(everything[begin + at : begin + at + min(128, size)] for at in places)
        structure.update(f"{name}\0{list(weights[name].shape)}\0F32\0".encode())
        content.update(name.encode() + b"\0" + sample)
        begin += size
    return f"fp1:{structure.hexdigest()}-{content.hexdigest()}"


def test_a_fingerprint_of_the_first_release_is_still_compared(tmp_path):
    """A fingerprint of 0.1.0 agrees with the same weights, and other values and names are told apart as before."""
    weights = {"a": torch.randn(53), "b": torch.randn(7, 59), "c": torch.randn(61)}
    _print(tmp_path / "same", weights)
    assert Weights(tmp_path / "same").difference_from(_old_print(weights)) is None
    _print(tmp_path / "other", weights | {"a": torch.zeros(53)})
    assert (Weights(tmp_path / "other").difference_from(_old_print(weights)) or "").startswith("same names")
    _print(tmp_path / "more", weights | {"d": torch.zeros(3)})
    assert (Weights(tmp_path / "more").difference_from(_old_print(weights)) or "").startswith("names, shapes or dtypes")


@pytest.mark.parametrize("place", [(0, 0), (52, 30)])
def test_a_changed_value_at_an_end_of_a_large_tensor_changes_the_fingerprint(tmp_path, place):
    """The sample includes the first and the last block of every tensor."""
    weights = _weights()
    before = _print(tmp_path / "a", weights)
    weights["embed.weight"][place] += 1
    after = _print(tmp_path / "b", weights)
    assert after != before
    assert after.split("-")[0] == before.split("-")[0]
    assert difference(before, after).startswith("same names, shapes and dtypes, but other values")


@pytest.mark.parametrize("index", range(31))
def test_any_changed_value_of_a_small_tensor_changes_the_fingerprint(tmp_path, index):
    """A tensor of at most 1024 bytes is read whole."""
    weights = _weights()
    before = _print(tmp_path / "a", weights)
    weights["norm.weight"][index] = 7
    assert _print(tmp_path / "b", weights) != before


def test_all_bytes_of_a_tensor_at_the_limit_are_in_the_sample(tmp_path):
    """Every value of a tensor of 256 floats, which are 1024 bytes, changes the fingerprint."""
    weights = {"w": torch.zeros(256)}
    prints = {_print(tmp_path, weights)}
    for index in range(256):
        prints.add(_print(tmp_path, {"w": torch.zeros(256).index_fill(0, torch.tensor(index), 1.0)}))
    assert len(prints) == 257


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w | {"scale": w["scale"].double()},
        lambda w: w | {"norm.weight": w["norm.weight"].reshape(31, 1)},
        lambda w: w | {"more": torch.ones(2)},
        lambda w: {("norm.bias" if name == "norm.weight" else name): tensor for name, tensor in w.items()},
        lambda w: {name: tensor.bfloat16() for name, tensor in w.items()},
        lambda w: w | {"empty": torch.zeros(5, 0)},
    ],
)
def test_another_name_shape_or_dtype_changes_the_structure(tmp_path, change):
    """The first digest covers names, shapes and dtypes, and the difference names them."""
    before = _print(tmp_path / "a", _weights())
    after = _print(tmp_path / "b", change(_weights()))
    assert after.split("-")[0] != before.split("-")[0]
    assert difference(before, after).startswith("names, shapes or dtypes of the weights differ")


def test_swapped_tensors_change_the_fingerprint(tmp_path):
    """Two swapped tensors of equal shape change the fingerprint."""
    weights = {"a": torch.zeros(3), "b": torch.ones(3)}
    assert _print(tmp_path / "a", weights) != _print(tmp_path / "b", {"a": weights["b"], "b": weights["a"]})


def test_no_weights_have_no_fingerprint(tmp_path):
    """A folder without safetensors weights has no fingerprint.

    The comparison with a missing fingerprint gives no difference.
    """
    assert fingerprint(tmp_path) is None
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert fingerprint(tmp_path) is None
    assert fingerprint(tmp_path / "pytorch_model.bin") is None
    assert difference(None, "fp1:a-b") is None
    assert difference("fp1:a-b", None) is None
    assert difference("fp1:a-b", "fp1:a-b") is None


def test_an_adapter_has_its_own_fingerprint(tmp_path):
    """The weights of an adapter are read from their own file."""
    assert _print(tmp_path, _weights(), "adapter_model").startswith("fp1:")
    assert fingerprint(tmp_path) is None


def test_the_cost_does_not_grow_with_the_tensor(tmp_path, monkeypatch):
    """A tensor of 4 MB is read in eight blocks of 128 bytes, in addition to the header."""
    import io

    save_file({"w": torch.zeros(1 << 20)}, tmp_path / "model.safetensors")
    read = []
    original = io.BufferedReader.read

    class Spy(io.BufferedReader):
        def read(self, size=-1):
            read.append(size)
            return original(self, size)

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: Spy(io.FileIO(self, "r")))
    fingerprint(tmp_path)
    assert read.count(128) == 8
    assert sum(read) < 2000
