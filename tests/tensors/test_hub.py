"""Ids of models on the Hub."""

from types import SimpleNamespace

import pytest

from squisher_mergekit.errors import ConfigError, NotFoundError, RefusedError
from squisher_mergekit.tensors.hub import download_model, explained, refuse_offline, split_revision


@pytest.mark.parametrize(
    ("source", "parts"), [("a/b", ("a/b", None)), ("a/b@c", ("a/b", "c")), ("a/b@refs/pr/1", ("a/b", "refs/pr/1"))]
)
def test_split(source, parts):
    """An id is split into name and revision, which may contain slashes."""
    assert split_revision(source) == parts


@pytest.mark.parametrize("source", ["name", "a/b/c", "/abs/path", "./here", "~/home"])
def test_a_path_is_no_model_on_the_hub(source):
    """A text that is not org/name[@revision] is refused with the name of the option before the Hub is asked."""
    with pytest.raises(NotFoundError, match=f"--base must be a folder or a Hub id .* there is no {source}"):
        download_model(source, "--base")


def test_offline_work_that_needs_the_hub_is_refused(monkeypatch):
    """The error names HF_HUB_OFFLINE and the work that it forbids."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="an upload needs the Hub, but HF_HUB_OFFLINE is set"):
        refuse_offline("an upload")


@pytest.mark.parametrize(
    ("status", "words"),
    [(301, "moved or renamed"), (403, "token with the right"), (429, "too many requests"), (503, "fails with 503")],
)
def test_each_answer_of_the_hub_has_its_own_cause(status, words):
    """A moved repository, a missing right, too many requests and a failing server are told apart in one line."""
    error = RuntimeError("no")
    error.response = SimpleNamespace(status_code=status)
    with pytest.raises(RefusedError, match=words), explained("a push", "org/name"):
        raise error
