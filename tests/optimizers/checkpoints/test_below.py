"""The one checkpoint below a folder that holds none itself."""

import logging

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError, NotFoundError
from squisher_mergekit.optimizers.checkpoints.below import checkpoint_below
from tests.other_trainers import SHAPES, World, adam, assert_moments


def _lightning(file, world, step=30):
    """Write Lightning's file of a module that keeps the model as ``model``."""
    file.parent.mkdir(parents=True)
    state = adam(world.moments, steps=step, numbered=True)
    weights = {f"model.{name}": tensor for name, tensor in world.weights.items()}
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": weights, "optimizer_states": [state]}, file)


@pytest.mark.parametrize("place", ["checkpoints", "lightning_logs/version_0/checkpoints"])
def test_files_of_lightning_are_found_from_the_run(place, tmp_path, caplog):
    """The model's folder beside has no state; the warning names the folder that is taken."""
    world = World(tmp_path / "run" / "base", tie_word_embeddings=False, **SHAPES[0])
    _lightning(tmp_path / "run" / place / "epoch=0-step=30.ckpt", world)
    with caplog.at_level(logging.WARNING):
        fisher = load_fisher(tmp_path / "run", world.folder)
    assert_moments(fisher, world.moments)
    assert f"taking that in {place}" in caplog.text


def test_the_newest_step_of_a_run_below_is_taken(tmp_path):
    """Checkpoints of a distributed trainer are a level deeper than the run's folder."""
    world = World(tmp_path / "base", tie_word_embeddings=False, **SHAPES[0])
    for step in (10, 30):
        folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        world.bare(folder)
        torch.save(adam(world.moments, steps=step, numbered=True), folder / "optimizer.pt")
    assert_moments(load_fisher(tmp_path / "run", world.folder), world.moments)


def test_several_places_are_refused_by_name(tmp_path):
    """None of two versions is taken."""
    world = World(tmp_path / "base", **SHAPES[0])
    for version in (0, 1):
        _lightning(tmp_path / "run" / f"version_{version}" / "last.ckpt", world)
    with pytest.raises(NamingError, match=r"found those in version_0, version_1; give the one"):
        load_fisher(tmp_path / "run", world.folder)


def test_a_link_to_the_same_folder_counts_once(tmp_path):
    """OLMo links ``latest`` to a step."""
    (tmp_path / "kept").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "kept")
    found = checkpoint_below(tmp_path, lambda folder: folder != tmp_path)
    assert found is not None
    assert found.resolve() == (tmp_path / "kept").resolve()


def test_files_of_known_names_come_before_others(tmp_path):
    """A file of weights in another folder is no second checkpoint."""
    for name in ("weights/a.pth", "state/optimizer.pt"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = checkpoint_below(tmp_path, lambda folder: (folder / "optimizer.pt").is_file())
    assert found == tmp_path / "state"


def test_hidden_and_deeper_folders_are_left_alone(tmp_path):
    """Caches are hidden; four levels below the run is another tree."""
    for name in (".cache/a", "a/b/c/d"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.ckpt").touch()
    assert checkpoint_below(tmp_path, lambda _: False) is None
    with pytest.raises(NotFoundError, match="no optimizer state in"):
        load_fisher(tmp_path)
