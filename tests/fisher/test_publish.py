"""Publishing to a stand-in for the Hub: uploaded files, kept files, and measured cost."""

import pytest
import torch

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.fisher import hub, model_card, publish
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests import hub_server

# huggingface_hub's own LFS upload warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

REPO = "org/name"
OURS = ("fisher.safetensors", "fisher_config.json")
README = b"---\nlicense: mit\n---\n# Mine\n\ntext \xe2\x80\x94 more\r\n"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return an empty stand-in for the Hub that this process uses, with a token that may write."""
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch)
        yield served


def _fisher(seed=0, count=3, **config):
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"w{i}": 10 ** (torch.randn(67, 31, generator=generator) - 6) for i in range(count)}
    tensors["w0"][:5] = 0
    known = {"estimator": "squisher", "statistic": "mean"}
    return Fisher(MemoryStore(tensors), FisherConfig.model_validate(known | config))


def _prepared(tmp_path, seed=0, **arguments):
    write_fisher(_fisher(seed), tmp_path / f"f{seed}", **arguments)
    return publish.prepare(read_fisher(tmp_path / f"f{seed}"), tmp_path / "unused", "none")


def test_a_push_comes_back_by_pull(server, tmp_path):
    """A new repository gets a branch with the Fisher's files and a card. A pull returns the same bits."""
    done = publish.publish(_prepared(tmp_path), REPO, "fisher")
    there = server.files(REPO, "fisher")
    assert done.files == (*OURS, "README.md")
    assert set(there) == {".gitattributes", *done.files}
    assert done.commit == server.repositories[REPO].branches["fisher"]
    assert done.url == f"{server.endpoint}/{REPO}/commit/{done.commit}"
    assert there["README.md"].decode().startswith(model_card.HEADER)
    assert f"fisher: {REPO}@fisher" in there["README.md"].decode()
    assert set(server.files(REPO, "main")) == {".gitattributes"}
    pulled = hub.pull(f"{REPO}@fisher", tmp_path / "pulled")
    for name, tensor in _fisher().items():
        assert torch.equal(pulled[name], tensor)


def test_a_push_is_one_commit(server, tmp_path):
    """Files, card and removals are one commit with the given message."""
    publish.publish(_prepared(tmp_path), REPO, "fisher", "mine")
    assert server.repositories[REPO].messages == ["", "mine"]
    assert [path for _, path in server.requests if "/commit/" in path] == [f"/api/models/{REPO}/commit/fisher"]


def test_an_existing_readme_keeps_its_text(server, tmp_path):
    """The card of the model keeps every byte, header included. A second push replaces only our section."""
    server.add(REPO, {"README.md": README, "model.safetensors": b"weights"})
    for seed in range(2):
        publish.publish(_prepared(tmp_path, seed), REPO, "fisher")
        there = server.files(REPO, "fisher")
        assert there["README.md"].startswith(README)
        assert (
            there["README.md"].count(model_card.BEGIN.encode())
            == there["README.md"].count(model_card.END.encode())
            == 1
        )
        assert there["model.safetensors"] == b"weights"
    assert server.files(REPO, "main") == {"README.md": README, "model.safetensors": b"weights"}


def test_main_and_its_source(server, tmp_path):
    """A push to main makes no branch, and the example names the repository alone."""
    publish.publish(_prepared(tmp_path), REPO, "main")
    assert set(server.repositories[REPO].branches) == {"main"}
    assert f"fisher: {REPO}\n" in server.files(REPO, "main")["README.md"].decode()


def test_files_of_an_earlier_fisher_go(server, tmp_path):
    """A smaller Fisher removes shards and index of a larger one, which would be read otherwise."""
    publish.publish(_prepared(tmp_path, shard_bytes=10_000), REPO, "fisher")
    assert "fisher.safetensors.index.json" in server.files(REPO, "fisher")
    assert len(server.files(REPO, "fisher")) == 7
    publish.publish(_prepared(tmp_path, seed=1), REPO, "fisher")
    assert set(server.files(REPO, "fisher")) == {".gitattributes", *OURS, "README.md"}
    pulled = hub.pull(f"{REPO}@fisher", tmp_path / "pulled")
    assert torch.equal(pulled["w1"], _fisher(1)["w1"])


def test_private_is_private(server, tmp_path):
    """A new repository is private. A public one is refused, and nothing is uploaded."""
    publish.publish(_prepared(tmp_path), REPO, "fisher", private=True)
    assert server.repositories[REPO].private
    publish.publish(_prepared(tmp_path, 1), REPO, "fisher", private=True)
    server.add("org/public", {})
    with pytest.raises(ConfigError, match="org/public is public"):
        publish.publish(_prepared(tmp_path, 2), "org/public", "fisher", private=True)
    assert set(server.repositories["org/public"].branches) == {"main"}


def test_a_change_in_between_is_refused(server, tmp_path, monkeypatch):
    """A commit by another user during the upload is not overwritten."""
    server.add(REPO, {"README.md": README}, "fisher")
    real = publish._text
    later = {"README.md": b"changed"}
    monkeypatch.setattr(publish, "_text", lambda *given: (real(*given), server.add(REPO, later, "fisher"))[0])
    with pytest.raises(ConfigError, match="412"):
        publish.publish(_prepared(tmp_path), REPO, "fisher")
    assert server.files(REPO, "fisher") == later


def test_an_upload_that_breaks_off_names_its_cause(server, tmp_path, monkeypatch):
    """A refusal by the storage of the Hub is reported with its status, and the branch stays unchanged."""
    prepared = _prepared(tmp_path)
    monkeypatch.setattr(server, "storage_is_broken", True)
    with pytest.raises(ConfigError, match="answers 403"):
        publish.publish(prepared, REPO, "fisher")
    assert set(server.files(REPO, "fisher")) == {".gitattributes"}


@pytest.mark.parametrize(
    ("token", "status"), [(hub_server.READER, "answers 403"), ("hf_unknown", "answers 401"), (None, "found none")]
)
def test_without_the_right_to_write_nothing_goes_up(server, tmp_path, monkeypatch, token, status):
    """A missing token, an unknown one and one without write access are refused in one line with the cure."""
    server.add(REPO, {})
    hub_server.point_at(server, tmp_path / "home", monkeypatch, token)
    with pytest.raises(ConfigError, match=status) as caught:
        publish.publish(_prepared(tmp_path), REPO, "fisher")
    assert "token" in str(caught.value)
    assert token is None or token not in str(caught.value)
    assert set(server.repositories[REPO].branches) == {"main"}


def test_a_repository_that_cannot_be_made_is_one_line(server, tmp_path, monkeypatch):
    """A token that may not create a repository is refused in one line."""
    hub_server.point_at(server, tmp_path / "home", monkeypatch, hub_server.READER)
    with pytest.raises(ConfigError, match="403"):
        publish.publish(_prepared(tmp_path), "org/new", "fisher")
    assert server.repositories == {}


def test_a_revision_that_cannot_be_a_branch_is_not_found(server, tmp_path):
    """A pull request that does not exist is refused in one line with the status 404."""
    server.add(REPO, {})
    with pytest.raises(NotFoundError, match="answers 404: no such revision"):
        publish.publish(_prepared(tmp_path), REPO, "refs/pr/9")


def test_a_broken_hub_and_none_at_all(server, tmp_path, monkeypatch):
    """A status 500 and a refused connection give one line each."""
    prepared = _prepared(tmp_path)
    server.broken = 500
    with pytest.raises(ConfigError, match="answers 500") as caught:
        publish.publish(prepared, REPO, "fisher")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NotFoundError, match="cannot be reached") as caught:
        publish.publish(prepared, REPO, "fisher")
    assert "\n" not in str(caught.value)


def test_offline_and_bad_ids_are_refused_at_once(server, monkeypatch):
    """HF_HUB_OFFLINE or an invalid id sends no request to the Hub."""
    for repo in ("name", "a/b/c", "org/name@fisher", "org/--", ""):
        with pytest.raises(ConfigError, match="Hub id org/name"):
            publish.check_repository(repo)
    publish.check_repository(REPO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        publish.check_repository(REPO)
    assert server.requests == []


def test_no_path_of_this_machine_goes_up(server, tmp_path):
    """Neither the card nor the metadata name a folder or a host."""
    publish.publish(_prepared(tmp_path), REPO, "fisher")
    there = server.files(REPO, "fisher")
    for name in ("README.md", "fisher_config.json"):
        assert str(tmp_path).encode() not in there[name]
        assert b"127.0.0.1" not in there[name]


def test_publishing_without_compression_costs_nothing(tmp_path):
    """A portable Fisher with none is published from its folder. Other state is written as float32."""
    prepared = _prepared(tmp_path)
    assert prepared.folder == tmp_path / "f0"
    assert not (tmp_path / "unused").exists()
    assert prepared.agreement is None
    assert prepared.after == sum((prepared.folder / name).stat().st_size for name in OURS)
    written = publish.prepare(_fisher(), tmp_path / "out", "none")
    assert written.folder == tmp_path / "out"
    assert torch.equal(read_fisher(written.folder)["w0"], _fisher()["w0"])


@pytest.mark.parametrize("compress", [None, "rank1", "log8", "log4"])
def test_the_cost_of_compression_is_measured(tmp_path, compress):
    """Rank 1 is the default. The size falls, and the cost is that of the decoded tensors, against float64."""
    fisher = _fisher()
    prepared = publish.prepare(fisher, tmp_path / "out", compress)
    assert publish.is_compressed(prepared.config)
    assert prepared.before == sum(tensor.numel() * 4 for tensor in fisher.values())
    assert prepared.after < prepared.before * (0.6 if compress in ("log8", "log4") else 0.3)
    published = read_fisher(prepared.folder)
    a, b = (torch.cat([each[name].flatten() for name in fisher]).double() for each in (fisher, published))
    both = (a > 0) & (b > 0)
    apart = (a[both].log() - b[both].log()).abs().median().exp().item()
    assert prepared.agreement.factor == pytest.approx(apart, rel=1e-5)
    assert prepared.agreement.entries == prepared.sample == a.numel()
    assert prepared.agreement.zeros_b == (b == 0).double().mean().item()


def test_the_cost_of_a_sum_is_without_its_start(tmp_path):
    """Adagrad's start is no part of F. The log8 code of such a sum stays within its 4 % of F, and the cost agrees."""
    known = {"statistic": "sum", "steps": 3, "optimizer": {"initial_accumulator_value": 0.1}}
    tensors = {name: tensor + 0.1 for name, tensor in _fisher(statistic="mean").items()}
    fisher = Fisher(MemoryStore(tensors), FisherConfig.model_validate({"estimator": "squisher"} | known))
    prepared = publish.prepare(fisher, tmp_path / "out", "log8")
    assert 1 < prepared.agreement.factor < 1.04
    assert prepared.agreement.ratio == pytest.approx(1, abs=0.04)


def test_a_compact_fisher_is_not_encoded_again(tmp_path):
    """A compact Fisher is encoded again only on request."""
    write_fisher(_fisher(), tmp_path / "f", compress="log8")
    compact = read_fisher(tmp_path / "f")
    assert publish.prepare(compact, tmp_path / "unused").folder == tmp_path / "f"
    again = publish.prepare(compact, tmp_path / "out", "rank1")
    assert again.folder == tmp_path / "out"
    assert "rank1" in again.config.encoding.values()
