"""Fishers on the Hub, from a cache made here: the Hub itself is never asked."""

from pathlib import Path

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import MemoryStore, has_fisher, read_fisher, write_fisher
from squisher_mergekit.fisher.mapping import Fisher

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache, and no way to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def _snapshot(cache, repo, revision):
    """Return the folder of one revision in the cache, as huggingface_hub lays it out."""
    root = cache / f"models--{repo.replace('/', '--')}"
    commit = f"{len(list(root.glob('snapshots/*'))):040x}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    folder = root / "snapshots" / commit
    folder.mkdir(parents=True)
    return folder


def _write(folder, value):
    store = MemoryStore({"w": torch.full((3,), float(value))})
    write_fisher(Fisher(store, FisherConfig(estimator="empirical", statistic="mean")), folder)


def _value(folder):
    return read_fisher(folder)["w"][0].item()


def test_a_fisher_is_found_by_its_id_and_revision(cache):
    """Without a revision main is taken, with one that one."""
    _write(_snapshot(cache, "org/name", "main"), 1)
    _write(_snapshot(cache, "org/name", "v2"), 2)
    assert _value(hub.resolve("org/name")) == 1
    assert _value(hub.resolve("org/name@v2")) == 2
    assert load_fisher("org/name@v2")["w"].tolist() == [2.0] * 3


def test_a_cache_of_ones_own_is_used(tmp_path_factory):
    """cache_dir says where to look."""
    other = tmp_path_factory.mktemp("other")
    _write(_snapshot(other, "org/name", "main"), 3)
    assert _value(hub.resolve("org/name", str(other))) == 3
    with pytest.raises(NotFoundError):
        hub.resolve("org/name")


def test_optimizer_state_is_found_where_it_is_asked_for_by_name(cache):
    """A repository with optimizer state alone opens as a checkpoint does."""
    folder = _snapshot(cache, "org/run", "main")
    for name in ("optimizer.pt", "config.json"):
        (folder / name).write_bytes((STATES / "plain_adam" / name).read_bytes())
    fisher = load_fisher("org/run")
    assert len(fisher) == 12
    assert fisher.config.source.layout == "torch"


def test_what_is_in_no_cache_and_out_of_reach_is_refused(cache):
    """Nothing there is one line that names the id."""
    with pytest.raises(NotFoundError, match="org/nothing") as caught:
        hub.resolve("org/nothing")
    assert "\n" not in str(caught.value)
    folder = _snapshot(cache, "org/model", "main")
    (folder / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match="no optimizer state at org/model"):
        hub.resolve("org/model")


@pytest.mark.parametrize("source", ["name", "a/b/c", "/abs/path", "./here/there", "../up", "~/home", "", "@rev"])
def test_what_is_no_id_is_taken_for_a_missing_path(source):
    """Only org/name[@revision] goes to the Hub; all else is a path that is not there."""
    with pytest.raises(NotFoundError, match="there is no"):
        hub.resolve(source)


def test_beside_a_model_its_own_revision_comes_before_the_branch_fisher(cache):
    """Our files at the model's revision, then at revision fisher, else None."""
    assert hub.find_beside("org/model", None) is None
    (_snapshot(cache, "org/model", "main") / "config.json").write_text("{}")
    assert hub.find_beside("org/model", None) is None
    _write(_snapshot(cache, "org/model", "fisher"), 5)
    assert _value(hub.find_beside("org/model", None)) == 5
    _write(_snapshot(cache, "org/model", "v2"), 6)
    assert _value(hub.find_beside("org/model", "v2")) == 6
    assert _value(hub.find_beside("org/model", "v3")) == 5


def test_optimizer_state_beside_a_model_is_not_fetched_unasked(cache, monkeypatch):
    """What lies beside a model is looked for among our own files alone; a checkpoint needs its own name."""
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda repo, allow_patterns, **_: asked.append(allow_patterns) or str(cache / "none"),
    )
    hub.find_beside("org/model", None)
    assert len(asked) == 2
    for patterns in asked:
        assert all(pattern.startswith("fisher") for pattern in patterns)
    with pytest.raises(NotFoundError):
        hub.resolve("org/model")
    assert "optimizer.pt" in asked[-1]
    assert not {"training_args.bin", "*", "*.bin", "*.pt"} & {pattern for some in asked for pattern in some}


@pytest.mark.parametrize(
    ("source", "parts"), [("a/b", ("a/b", None)), ("a/b@c", ("a/b", "c")), ("a/b@refs/pr/1", ("a/b", "refs/pr/1"))]
)
def test_split(source, parts):
    """An id and its revision, which may hold slashes of its own."""
    assert hub.split(source) == parts


def test_the_helper_makes_what_the_library_reads(cache):
    """The cache made here is one that huggingface_hub reads: a check of this file's own ground."""
    from huggingface_hub import snapshot_download

    folder = _snapshot(cache, "org/name", "main")
    _write(folder, 1)
    assert Path(snapshot_download("org/name")) == folder
    assert has_fisher(folder)
