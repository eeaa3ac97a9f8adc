"""``squisher push`` and ``pull`` as commands, against a stand-in for the Hub."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.files import read_fisher
from tests import hub_server

# huggingface_hub's own LFS upload warns.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"
CHECKPOINT = STATES / "trainer_sharded_index"
REPO = "org/name"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return an empty stand-in for the Hub that this process uses, with a token that may write."""
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch)
        yield served


def _run(verb, *arguments):
    return CliRunner().invoke(main, [verb, *map(str, arguments)])


def test_a_checkpoint_goes_up_small_and_comes_back(server, tmp_path):
    """Optimizer state is published at rank 1 by default.

    The size and the measured cost are printed before the upload.
    """
    result = _run("push", CHECKPOINT, REPO, "--quiet", "--json", tmp_path / "push.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "push.json").read_text())
    order = [
        result.output.index(word) for word in ("size ", "cost ", "rank correlation", "uploaded ", "commit ", "use ")
    ]
    assert order == sorted(order)
    assert f"fisher: {REPO}@fisher" in result.output
    assert "rank1" in report["encoding"].values()
    assert report["bytes_before"] == sum(t.numel() * 4 for t in load_fisher(CHECKPOINT).values())
    assert 0 < report["cost"]["spearman"] < 1 < report["cost"]["factor"]
    assert report["commit"] == server.repositories[REPO].branches["fisher"]

    result = _run("pull", f"{REPO}@fisher", "-o", tmp_path / "out", "--quiet", "--json", tmp_path / "pull.json")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "pull.json").read_text())["bytes"] == report["bytes_after"]
    pulled, original = read_fisher(tmp_path / "out"), load_fisher(CHECKPOINT)
    assert set(pulled) == set(original)
    assert pulled.config.weights_fingerprint == original.config.weights_fingerprint is not None
    result = _run("compare", CHECKPOINT, tmp_path / "out", "--quiet", "--json", tmp_path / "compare.json")
    over_all = json.loads((tmp_path / "compare.json").read_text())["over_all"]
    assert over_all["spearman"] == pytest.approx(report["cost"]["spearman"], abs=1e-12)


def test_none_publishes_every_bit(server, tmp_path):
    """--compress none keeps the values and reports no loss."""
    result = _run("push", CHECKPOINT, REPO, "--compress", "none", "--revision", "main", "--message", "mine", "--quiet")
    assert result.exit_code == 0, result.output
    assert "none: every entry is published as it is" in result.output
    assert server.repositories[REPO].messages[-1] == "mine"
    assert _run("pull", REPO, "-o", tmp_path / "out", "--quiet").exit_code == 0
    pulled = read_fisher(tmp_path / "out")
    assert all(torch.equal(pulled[name], tensor) for name, tensor in load_fisher(CHECKPOINT).items())


def test_an_extracted_fisher_is_not_written_again(server, tmp_path):
    """A portable Fisher is uploaded with the bytes of its files."""
    assert _run("extract", CHECKPOINT, "-o", tmp_path / "f", "--quiet").exit_code == 0
    result = _run("push", tmp_path / "f", REPO, "--compress", "none", "--quiet")
    assert result.exit_code == 0, result.output
    there = server.files(REPO, "fisher")
    for name, data in hub_server.read(tmp_path / "f").items():
        assert there[name] == data


def test_refusals_are_one_line_and_exit_1(server, tmp_path, monkeypatch):
    """Missing rights, a missing repository, no network and offline mode exit with 1 and one line, without leftovers."""
    server.add(REPO, {})
    hub_server.point_at(server, tmp_path / "home", monkeypatch, hub_server.READER)
    results = [_run("push", CHECKPOINT, REPO, "--compress", "none", "--quiet", "--json", tmp_path / "no.json")]
    assert "answers 403" in results[0].output
    results.append(_run("pull", "org/nothing@fisher", "-o", tmp_path / "no", "--quiet"))
    assert "no such repository" in results[-1].output
    server.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    results.append(_run("push", tmp_path / "nowhere", REPO, "--quiet"))
    assert "HF_HUB_OFFLINE is set" in results[-1].output
    results.append(_run("pull", f"{REPO}@fisher", "-o", tmp_path / "no", "--quiet"))
    assert "HF_HUB_OFFLINE is set" in results[-1].output
    assert server.requests == []
    for result in results:
        assert result.exit_code == 1
        errors = [line for line in result.output.splitlines() if line.startswith("Error: ")]
        assert errors == [result.output.strip().splitlines()[-1]]
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "no.json").exists()


def test_pull_takes_the_branch_fisher_and_the_cache(server, tmp_path, monkeypatch):
    """Without a revision, pull finds the branch fisher. Offline it uses the cache and sends no request."""
    assert _run("push", CHECKPOINT, REPO, "--compress", "none", "--quiet").exit_code == 0
    assert _run("pull", REPO, "-o", tmp_path / "a", "--quiet").exit_code == 0
    server.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = _run("pull", REPO, "-o", tmp_path / "b", "--quiet")
    assert result.exit_code == 0, result.output
    assert hub_server.read(tmp_path / "a") == hub_server.read(tmp_path / "b")
    assert server.requests == []
    assert "must not hold a Fisher yet" in _run("pull", REPO, "-o", tmp_path / "b").output
