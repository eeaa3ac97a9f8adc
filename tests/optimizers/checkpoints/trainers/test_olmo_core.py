"""OLMo-core's distributed checkpoint: its metadata class, its steps, and the place of its norms."""

import pickle
import sys
import types

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import MismatchError, UnsafeFileError, ValuesError
from tests.checkpoints import flip
from tests.other_trainers import Opens, World, adam, assert_moments, save_distributed, to_olmo_core, write_json

OLMO2 = [{"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": 31},
         {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 16, "vocab_size": 9}]  # fmt: skip
MODULE = "olmo_core.distributed.checkpoint.filesystem"


class Info:
    """Position of a piece, as OLMo-core's own class has it."""

    def __init__(self, old):
        self.relative_path, self.offset, self.length = old.relative_path, old.offset, old.length


def _write(folder, world, steps=30, block="reordered_norm", flattened=False, monkeypatch=None):
    """Write stepN as OLMo-core does, with the class of its own in the index."""
    own = to_olmo_core(world, world.moments)
    state = adam(own, steps)
    if flattened:
        settings = {
            n: {k: v for k, v in g.items() if k != "params"} for g in state["param_groups"] for n in g["params"]
        }
        state = {"state": state["state"], "param_groups": settings}
    saved = {"model": to_olmo_core(world, world.weights), "optim": state}
    save_distributed(saved, folder / "model_and_optim")
    write_json(folder / "config.json", {"model": {"block": {"name": block}, "d_model": 8}, "train_module": {}})
    file = folder / "model_and_optim" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    module = types.ModuleType(MODULE)
    module._StorageInfo = type("_StorageInfo", (Info,), {"__module__": MODULE, "__qualname__": "_StorageInfo"})
    monkeypatch.setitem(sys.modules, MODULE, module)
    for parent in ("olmo_core", "olmo_core.distributed", "olmo_core.distributed.checkpoint"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    metadata.storage_data = {key: module._StorageInfo(old) for key, old in metadata.storage_data.items()}
    file.write_bytes(pickle.dumps(metadata))
    for name in [name for name in sys.modules if name.startswith("olmo_core")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("flattened", [False, True])
@pytest.mark.parametrize("shape", OLMO2)
def test_a_step_is_read_at_every_level(shape, flattened, tmp_path, monkeypatch):
    """The run, the step and the folder of the state are accepted, with nested and with flattened settings."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **shape)
    _write(tmp_path / "run" / "step30", world, flattened=flattened, monkeypatch=monkeypatch)
    for source in ("run", "run/step30", "run/step30/model_and_optim"):
        fisher = load_fisher(tmp_path / source, world.folder)
        assert_moments(fisher, world.moments)
        assert fisher.config.source.layout == "olmo-core"


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("shape", OLMO2)
def test_trained_moments_of_step_0_have_the_recorded_steps(shape, recorded, tmp_path, monkeypatch, caplog):
    """The steps come from the trainer's state, else from the folder's name."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **shape)
    folder = tmp_path / ("renamed" if recorded else "step41")
    _write(folder, world, steps=0, monkeypatch=monkeypatch)
    if recorded:
        (folder / "train").mkdir()
        torch.save({"global_step": 41}, folder / "train" / "rank0.pt")
    assert_moments(load_fisher(folder, world.folder), world.moments, steps=41)
    assert "did not count its steps; taking step 41" in caplog.text


def test_untrained_moments_of_step_0_are_refused(tmp_path, monkeypatch):
    """Moments that are all 0 are those of an optimizer that has not stepped."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **OLMO2[1])
    world.moments = {name: torch.zeros_like(tensor) for name, tensor in world.moments.items()}
    _write(tmp_path / "step7", world, steps=0, monkeypatch=monkeypatch)
    with pytest.raises(ValuesError, match=r"all entries of .* are 0"):
        load_fisher(tmp_path / "step7", world.folder)


@pytest.mark.parametrize(("kind", "block"), [("llama", "reordered_norm"), ("olmo2", "default")])
def test_norms_at_another_place_are_refused(kind, block, tmp_path, monkeypatch):
    """Both kinds of model have norms of equal shapes; the trainer's own config contradicts the wrong one."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, **OLMO2[0])
    _write(tmp_path / "step30", world, block=block, monkeypatch=monkeypatch)
    with pytest.raises(MismatchError, match=f"by its own config, but the config in .* is of {kind}"):
        load_fisher(tmp_path / "step30", world.folder)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_before_attention_and_mlp(kind, tmp_path, monkeypatch):
    """A Llama or a Qwen3 that OLMo-core trained has them in the places of these models."""
    world = World(tmp_path / "model", kind, tie_word_embeddings=False, head_dim=8, **OLMO2[0])
    _write(tmp_path / "step30", world, block="default", monkeypatch=monkeypatch)
    assert_moments(load_fisher(tmp_path / "step30", world.folder), world.moments)


def test_without_a_hugging_face_config_the_names_are_kept(tmp_path, monkeypatch, caplog):
    """The config of the experiment, beside the state, is not taken for one of Hugging Face."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **OLMO2[0])
    _write(tmp_path / "step30", world, monkeypatch=monkeypatch)
    assert_moments(load_fisher(tmp_path / "step30"), to_olmo_core(world, world.moments))
    assert "but those of OLMo-core" in caplog.text


@pytest.mark.parametrize("name", ["model_and_optim/.metadata", "train/rank0.pt"])
def test_a_malicious_pickle_runs_nothing(name, tmp_path, monkeypatch):
    """Neither the index nor the trainer's state opens a file."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **OLMO2[1])
    _write(tmp_path / "step30", world, steps=0, monkeypatch=monkeypatch)
    file = tmp_path / "step30" / name
    file.parent.mkdir(exist_ok=True)
    if name.endswith(".pt"):
        torch.save({"global_step": Opens(tmp_path / "marker")}, file)
        assert_moments(load_fisher(tmp_path / "step30", world.folder), world.moments)
    else:
        file.write_bytes(pickle.dumps(Opens(tmp_path / "marker")))
        with pytest.raises(UnsafeFileError, match="nothing of it was run"):
            load_fisher(tmp_path / "step30", world.folder)
    assert not (tmp_path / "marker").exists()


def test_a_flipped_bit_is_found(tmp_path, monkeypatch):
    """The checksums of the pieces are verified."""
    world = World(tmp_path / "model", "olmo2", tie_word_embeddings=False, **OLMO2[0])
    _write(tmp_path / "step30", world, monkeypatch=monkeypatch)
    (data,) = (tmp_path / "step30" / "model_and_optim").glob("*.distcp")
    target = world.moments["model.embed_tokens.weight"].numpy().tobytes()
    flip(data, data.read_bytes().index(target) + 5)
    with pytest.raises(Exception, match="checksum"):
        load_fisher(tmp_path / "step30", world.folder)["model.embed_tokens.weight"]
