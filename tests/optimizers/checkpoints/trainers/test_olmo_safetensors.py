"""OLMo's ``optim.safetensors``: keys that are pickles, read by an unpickler without classes."""

import base64
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, UnsafeFileError
from tests.other_trainers import Opens, World, adam, assert_moments, to_olmo

OLMO = [("olmo", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 31}),
        ("olmo2", {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16,
                   "vocab_size": 9})]  # fmt: skip


def _key(path, pickled):
    return base64.urlsafe_b64encode(pickle.dumps((path, pickled))).decode()


def _flat(value, path=()):
    """Yield the entries of a nested state, as AI2's encoder does: tensors as they are, anything else pickled."""
    if isinstance(value, torch.Tensor):
        yield _key(path, False), value
    elif isinstance(value, dict) and value and path != ("param_groups",):
        for key, inner in value.items():
            yield from _flat(inner, (*path, key))
    else:
        yield _key(path, True), torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _write(folder, world, change=lambda state: state, numbered=False):
    folder.mkdir(parents=True)
    own = to_olmo(world, world.moments)
    names = sorted(own)  # OLMo sorts them
    state = adam({name: own[name] for name in names}, numbered=numbered)
    state["param_groups"][0]["param_names"] = names
    save_file(dict(_flat(change(state))), folder / "optim.safetensors")
    torch.save({"epoch": 0, "global_step": 30}, folder / "train.pt")
    (folder / "config.yaml").write_text("model:\n  d_model: 8\n")


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize(("kind", "shape"), OLMO)
def test_a_step_is_read_at_every_level(kind, shape, numbered, tmp_path):
    """The run, the step and the file are accepted."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    _write(tmp_path / "run" / "step30-unsharded", world, numbered=numbered)
    for source in ("run", "run/step30-unsharded", "run/step30-unsharded/optim.safetensors"):
        fisher = load_fisher(tmp_path / source, world.folder)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "olmo"


@pytest.mark.parametrize("encoded", [True, False])
@pytest.mark.parametrize(("kind", "shape"), OLMO)
def test_weights_beside_with_names_of_olmo_are_not_those_of_the_model(kind, shape, encoded, tmp_path):
    """AI2 publishes model.safetensors beside, its names pickled as well; --model may be a config alone, or beside."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **shape)
    step = tmp_path / "run" / "step30-unsharded"
    _write(step, world)
    own = to_olmo(world, world.weights)
    save_file({_key((n,), False) if encoded else n: t for n, t in own.items()}, step / "model.safetensors")
    for model in (world.folder, world.bare(tmp_path / "config")):
        fisher = load_fisher(step, model)
        assert_moments(fisher, world.moments)
        assert fisher.config.weights_fingerprint is None  # that of OLMo's names would fit no merge
    world.bare(step)
    assert_moments(load_fisher(step), world.moments)


def test_holes_in_place_of_the_other_tensors_change_nothing(tmp_path):
    """A partial download, by range, needs the header, the settings, the steps and the second moments."""
    world = World(tmp_path / "model", "olmo", tie_word_embeddings=False, **OLMO[0][1])
    _write(tmp_path / "step30-unsharded", world)
    file = tmp_path / "step30-unsharded" / "optim.safetensors"
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for key, entry in json.loads(data[8:start]).items():
        if key != "__metadata__" and pickle.loads(base64.urlsafe_b64decode(key))[0][-1] == "exp_avg":
            begin, end = (start + offset for offset in entry["data_offsets"])
            data[begin:end] = bytes(end - begin)
    file.write_bytes(data)
    assert_moments(load_fisher(tmp_path / "step30-unsharded", world.folder), world.moments)


def test_a_key_that_would_run_code_is_refused(tmp_path):
    """A pickle in the header that calls a function is named and not run."""
    world = World(tmp_path / "model", "olmo", tie_word_embeddings=False, **OLMO[0][1])
    _write(tmp_path / "step30-unsharded", world)
    evil = base64.urlsafe_b64encode(pickle.dumps((Opens(tmp_path / "marker"), False))).decode()
    save_file({evil: torch.ones(2)}, tmp_path / "step30-unsharded" / "optim.safetensors")
    with pytest.raises(UnsafeFileError, match=r"asks for \w+\.open; nothing of it was run"):
        load_fisher(tmp_path / "step30-unsharded", world.folder)
    assert not (tmp_path / "marker").exists()


class _Runs:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_settings_that_would_run_code_are_refused(tmp_path):
    """The pickle of the settings is read by the same unpickler."""
    world = World(tmp_path / "model", "olmo", tie_word_embeddings=False, **OLMO[0][1])

    def change(state):
        state["param_groups"][0]["extra"] = _Runs(tmp_path / "marker")
        return state

    _write(tmp_path / "step30-unsharded", world, change)
    with pytest.raises(UnsafeFileError, match=r"mkdir; nothing of it was run"):
        load_fisher(tmp_path / "step30-unsharded", world.folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("key", ["weight", "AAAA", base64.urlsafe_b64encode(pickle.dumps(("a", 1))).decode()])
def test_other_keys_are_refused(key, tmp_path):
    """A file of that name with other keys is not OLMo's."""
    save_file({key: torch.ones(2)}, tmp_path / "optim.safetensors")
    with pytest.raises(CorruptFileError, match="that OLMo wrote"):
        load_fisher(tmp_path / "optim.safetensors")


def test_a_file_without_settings_is_refused(tmp_path):
    """Steps and betas are needed as in any state."""
    save_file({_key(("state", "a", "exp_avg_sq"), False): torch.ones(2)}, tmp_path / "optim.safetensors")
    with pytest.raises(CorruptFileError, match="param_groups"):
        load_fisher(tmp_path / "optim.safetensors")


def test_the_trainers_state_beside_is_never_opened(tmp_path):
    """A pickle in ``train.pt`` that would open a file is not read."""
    world = World(tmp_path / "model", "olmo", tie_word_embeddings=False, **OLMO[0][1])
    _write(tmp_path / "step30-unsharded", world)
    torch.save({"global_step": Opens(tmp_path / "marker")}, tmp_path / "step30-unsharded" / "train.pt")
    assert_moments(load_fisher(tmp_path / "step30-unsharded", world.folder), world.moments)
    assert not (tmp_path / "marker").exists()
