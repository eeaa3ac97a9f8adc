"""Fishers on the Hub: from a local cache, and from a stand-in for the Hub on loopback."""

import os
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError
from squisher_mergekit.fisher import hub
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import has_fisher, write_fisher
from squisher_mergekit.optimizers import load
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests import hub_server
from tests.merging.reference import assert_within, give_fisher, largest, llama, merge, merged, squisher_reference

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Return an empty cache without access to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def _snapshot(cache, repo, revision):
    """Return the folder of one revision in the cache, in the layout of huggingface_hub."""
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
    """The revision main is the default, and a given revision is used."""
    _write(_snapshot(cache, "org/name", "main"), 1)
    _write(_snapshot(cache, "org/name", "v2"), 2)
    assert _value(hub.download_fisher("org/name")) == 1
    assert _value(hub.download_fisher("org/name@v2")) == 2
    assert load_fisher("org/name@v2")["w"].tolist() == [2.0] * 3


def test_a_given_cache_folder_is_used(tmp_path_factory):
    """The Fisher comes from the cache folder cache_dir."""
    other = tmp_path_factory.mktemp("other")
    _write(_snapshot(other, "org/name", "main"), 3)
    assert _value(hub.download_fisher("org/name", str(other))) == 3
    with pytest.raises(NotFoundError):
        hub.download_fisher("org/name")


def test_optimizer_state_is_found_where_it_is_asked_for_by_name(cache):
    """A repository with optimizer state alone opens like a checkpoint."""
    folder = _snapshot(cache, "org/run", "main")
    for name in ("optimizer.pt", "config.json"):
        (folder / name).write_bytes((STATES / "plain_adam" / name).read_bytes())
    fisher = load_fisher("org/run")
    assert len(fisher) == 12
    assert fisher.config.source.layout == "torch"


def test_an_uncached_repository_is_refused_offline(cache):
    """A repository outside of the cache is refused offline in one line with its id."""
    with pytest.raises(NotFoundError, match="org/nothing") as caught:
        hub.download_fisher("org/nothing")
    assert "\n" not in str(caught.value)
    folder = _snapshot(cache, "org/model", "main")
    (folder / "config.json").write_text("{}")
    with pytest.raises(NotFoundError, match="no optimizer state at org/model"):
        load.download("org/model")


@pytest.mark.parametrize("source", ["name", "a/b/c", "/abs/path", "./here/there", "../up", "~/home", "", "@rev"])
def test_an_invalid_id_is_a_missing_path(source):
    """Only org/name[@revision] is looked up on the Hub. Any other text is a missing path."""
    with pytest.raises(NotFoundError, match="there is no"):
        hub.download_fisher(source)


def test_the_revision_of_a_model_comes_before_the_branch_fisher(cache):
    """A Fisher at the revision of the model comes first, then one at revision fisher, else None."""
    assert "not in the cache, and HF_HUB_OFFLINE is set" in hub.find_fisher("org/model", None)
    (_snapshot(cache, "org/model", "main") / "config.json").write_text("{}")
    assert "at revision main, no fisher.safetensors there" in hub.find_fisher("org/model", None)
    _write(_snapshot(cache, "org/model", "fisher"), 5)
    assert _value(hub.find_fisher("org/model", None)) == 5
    _write(_snapshot(cache, "org/model", "v2"), 6)
    assert _value(hub.find_fisher("org/model", "v2")) == 6
    assert _value(hub.find_fisher("org/model", "v3")) == 5


def test_without_a_revision_the_branch_fisher_comes_next(cache):
    """The id org/name is looked up at main, then at fisher. A given revision is the only one."""
    (_snapshot(cache, "org/model", "main") / "config.json").write_text("{}")
    _write(_snapshot(cache, "org/model", "fisher"), 5)
    assert _value(hub.download_fisher("org/model")) == 5
    with pytest.raises(NotFoundError, match=r"at revision main, no fisher\.safetensors there"):
        hub.download_fisher("org/model@main")


def test_huggingface_hub_reads_the_cache_of_the_tests(cache):
    """huggingface_hub reads the cache that this file makes."""
    from huggingface_hub import snapshot_download

    folder = _snapshot(cache, "org/name", "main")
    _write(folder, 1)
    assert Path(snapshot_download("org/name")) == folder
    assert has_fisher(folder)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return an empty stand-in for the Hub that this process uses."""
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch, token=None)
        yield served


def _models(root, served):
    """Write two models, put their Fishers on the server next to other files, and return all tensors."""
    weights, fishers = [], []
    for i in range(2):
        weights.append(llama(root / f"m{i}", i))
        fishers.append(give_fisher(root / f"m{i}", weights[i], i, root / f"f{i}"))
        others = {
            "optimizer.pt": b"large",
            "training_args.bin": b"code",
            "model.safetensors": b"large",
            "a.py": b"code",
        }
        served.add(f"org/m{i}", hub_server.read(root / f"f{i}") | others, "fisher")
    return weights, fishers


def _config(root, revision="@fisher"):
    entries = [{"model": str(root / f"m{i}"), "parameters": {"fisher": f"org/m{i}{revision}"}} for i in range(2)]
    return {"merge_method": "squisher", "models": entries}


def _assert_squisher(result, weights, fishers):
    for name, tensor in result.items():
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [model[name] for model in fishers], (1.0, 1.0))
        assert_within(tensor, reference, largest(thetas))


OURS = ["fisher.safetensors", "fisher_config.json"]


def test_a_merge_fetches_our_files_alone_and_once(server, tmp_path):
    """Stock mergekit accepts fisher: org/name@fisher. A merge fetches the Fisher's files once and no other files."""
    weights, fishers = _models(tmp_path, server)
    _assert_squisher(merged(_config(tmp_path), tmp_path / "out"), weights, fishers)
    assert server.fetched() == OURS
    assert (tmp_path / "home" / "hub" / "models--org--m0").is_dir()
    server.requests.clear()
    _assert_squisher(merged(_config(tmp_path), tmp_path / "again"), weights, fishers)
    assert server.fetched() == []
    assert {method for method, _ in server.requests} == {"GET"}


def test_a_merge_keeps_fishers_where_mergekit_keeps_models(server, tmp_path, monkeypatch):
    """The Fishers are in the folder of --transformers-cache. An offline merge reads them there and sends no request."""
    weights, fishers = _models(tmp_path, server)
    flags = ("--transformers-cache", str(tmp_path / "cache"))
    _assert_squisher(merged(_config(tmp_path), tmp_path / "out", *flags), weights, fishers)
    assert (tmp_path / "cache" / "models--org--m0").is_dir()
    assert not (tmp_path / "home" / "hub" / "models--org--m0").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    server.requests.clear()
    _assert_squisher(merged(_config(tmp_path), tmp_path / "offline", *flags), weights, fishers)
    assert server.requests == []
    result = merge(_config(tmp_path), tmp_path / "no", "--transformers-cache", str(tmp_path / "empty"))
    assert result.exit_code == 1
    assert "HF_HUB_OFFLINE is set" in result.output
    assert server.requests == []


def _program(root, served, config, out, **variables):
    """Run the command mergekit-yaml in its own process, with the server as the Hub."""
    (root / "merge.yml").write_text(yaml.safe_dump(config))
    environment = os.environ | hub_server.variables(served, root / "home", token=None) | variables
    program = Path(sysconfig.get_path("scripts")) / "mergekit-yaml"
    command = [program, "merge.yml", out, "--no-copy-tokenizer", "--transformers-cache", "cache", "--quiet"]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_stock_mergekit_as_a_program_of_its_own(server, tmp_path):
    """mergekit-yaml accepts fisher: org/name with a Fisher at revision fisher, also offline without requests."""
    weights, fishers = _models(tmp_path, server)
    for out, offline in (("out", "0"), ("offline", "1")):
        server.requests.clear()
        done = _program(tmp_path, server, _config(tmp_path, ""), out, HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
        _assert_squisher(load_file(tmp_path / out / "model.safetensors"), weights, fishers)
        assert server.fetched() == ([] if offline == "1" else OURS)
    assert server.requests == []


@pytest.mark.slow
def test_the_fisher_of_a_hub_model_is_found_automatically(server, tmp_path):
    """A Hub model with fisher: auto gets the Fisher at its revision, else at fisher.

    Its optimizer.pt is never fetched.
    """
    weights, fishers = _models(tmp_path, server)
    for i in range(2):
        files = hub_server.read(tmp_path / f"m{i}") | {"optimizer.pt": b"not ours", "training_args.bin": b"not ours"}
        server.add(f"org/m{i}", files | (hub_server.read(tmp_path / "f1") if i else {}))
    config = {"merge_method": "squisher", "models": [{"model": "org/m0"}, {"model": "org/m1"}]}
    done = _program(tmp_path, server, config, "out")
    assert done.returncode == 0, done.stderr
    _assert_squisher(load_file(tmp_path / "out" / "model.safetensors"), weights, fishers)
    server.repositories["org/m0"].branches.pop("fisher")
    (tmp_path / "cache" / "models--org--m0" / "refs" / "fisher").unlink()
    done = _program(tmp_path, server, config, "no")
    assert done.returncode == 1
    assert "at revision main, no fisher.safetensors there; at revision fisher, no such revision" in done.stderr
    assert not (tmp_path / "no").exists()
    assert not {"optimizer.pt", "training_args.bin"} & set(server.fetched())


def test_a_merge_names_the_repository_and_its_commit(server, tmp_path):
    """Plan and model card name org/name@commit for a Fisher from the Hub, not a cache folder."""
    _models(tmp_path, server)
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(_config(tmp_path)))
    commit = server.repositories["org/m0"].branches["fisher"]
    for verb, arguments in (("plan", []), ("merge", [str(tmp_path / "out"), "--no-copy-tokenizer", "--quiet"])):
        result = CliRunner().invoke(main, [verb, str(tmp_path / "merge.yml"), *arguments])
        assert result.exit_code == 0, result.output
        if verb == "plan":
            assert f"org/m0@{commit}" in result.output
            assert str(tmp_path / "home") not in result.output
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"m0@{commit}" in card
    assert str(tmp_path / "home") not in card


def test_a_merge_never_fetches_optimizer_state(server, tmp_path):
    """A merge refuses a repository with optimizer state alone and names the command to run.

    Extract fetches the state.
    """
    files = {name: (STATES / "plain_adam" / name).read_bytes() for name in ("optimizer.pt", "config.json")}
    server.add("org/m0", files | {"training_args.bin": b"code"})
    llama(tmp_path / "m0", 0)
    config = _config(tmp_path, "")
    result = merge(config | {"models": config["models"][:1]}, tmp_path / "out")
    assert result.exit_code == 1
    assert "squisher extract org/m0 -o OUT" in result.output
    assert not (tmp_path / "out").exists()
    assert server.fetched() == []
    assert (load.download("org/m0") / "optimizer.pt").read_bytes() == files["optimizer.pt"]
    assert server.fetched() == ["config.json", "optimizer.pt"]


@pytest.mark.parametrize("private", [False, True])
def test_a_missing_repository_is_one_line(server, tmp_path, private):
    """A missing or private repository and a missing revision are refused in one line."""
    server.add("org/other", {}).private = private
    with pytest.raises(NotFoundError, match="no such repository" if private else "no such revision"):
        hub.download_fisher("org/other@v9")
    server.broken = 500
    with pytest.raises(NotFoundError, match="not in the cache, and the Hub cannot be reached"):
        hub.download_fisher("org/other@v9")


def test_pull_makes_a_plain_folder_of_our_files(server, tmp_path):
    """A pull downloads the Fisher's files alone, bit for bit, as plain files."""
    _, fishers = _models(tmp_path, server)
    fisher = hub.pull("org/m1@fisher", tmp_path / "made" / "out")
    assert sorted(path.name for path in (tmp_path / "made" / "out").iterdir()) == OURS
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["out"]
    assert not any(path.is_symlink() for path in (tmp_path / "made" / "out").iterdir())
    assert set(fisher) == set(fishers[1])
    assert all(torch.equal(fisher[name], tensor) for name, tensor in fishers[1].items())
    assert server.fetched() == OURS


def test_pull_keeps_existing_files(server, tmp_path):
    """A folder with a Fisher, or a file, is refused before any request. Other files in a folder stay."""
    _models(tmp_path, server)
    (tmp_path / "file").write_text("mine")
    for taken in ("f0", "file"):
        with pytest.raises(ConfigError, match="must not hold a Fisher yet"):
            hub.pull("org/m1@fisher", tmp_path / taken)
    assert server.requests == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    hub.pull("org/m1@fisher", tmp_path / "other")
    assert (tmp_path / "other" / "notes").read_text() == "mine"


def test_pull_of_a_local_folder_names_the_other_commands(server, tmp_path):
    """A folder on this machine is no Hub id; the refusal does not claim that there is no such folder."""
    _models(tmp_path, server)
    with pytest.raises(ConfigError, match=r"takes a Hub id.*f0 is on this machine; copy it"):
        hub.pull(str(tmp_path / "f0"), tmp_path / "out")
    assert server.requests == []


def test_pull_of_half_a_fisher_leaves_nothing(server, tmp_path):
    """A file that is truncated on the server never appears under the final name."""
    _models(tmp_path, server)
    files = hub_server.read(tmp_path / "f0")
    server.add("org/half", {name: data[: len(data) // 2] for name, data in files.items()})
    with pytest.raises(CorruptFileError):
        hub.pull("org/half", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_fetched_whole(server, tmp_path):
    """A sharded Fisher is fetched with its index and all shards."""
    store = MemoryStore({f"w{i}": torch.full((13,), float(i)) for i in range(3)})
    write_fisher(Fisher(store, FisherConfig(statistic="mean")), tmp_path / "f", shard_bytes=52)
    server.add("org/shards", hub_server.read(tmp_path / "f"))
    fisher = hub.pull("org/shards", tmp_path / "out")
    assert [fisher[f"w{i}"][0].item() for i in range(3)] == [0, 1, 2]
    assert len(server.fetched()) == 5
