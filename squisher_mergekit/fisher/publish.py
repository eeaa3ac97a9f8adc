"""Publish a Fisher on the Hugging Face Hub: made small, with what that costs, in one commit with its card."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher import model_card
from squisher_mergekit.fisher.compare import Agreement, common_scaling, compare
from squisher_mergekit.fisher.config import CONFIG_NAME, FisherConfig
from squisher_mergekit.fisher.files import BASENAME, has_fisher, read_fisher, write_fisher
from squisher_mergekit.fisher.hub import is_ours
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import human_bytes
from squisher_mergekit.tensors.hub import explained, refuse_offline

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

COMPRESS = "rank1"
README = "README.md"
_PLAIN = ("float32", "float64", "bfloat16")
_SAMPLE = 1_000_000


@dataclass(frozen=True)
class Prepared:
    """A portable Fisher that is ready to be published, and what its size costs.

    ``before``, ``after``: bytes of the tensors as they were, and of the files. ``agreement``: of the Fisher as it was
    (A) with what is published (B); None where nothing was changed. ``sample``: over how many entries its rank
    correlation and factor are.
    """

    folder: Path
    config: FisherConfig
    before: int
    after: int
    agreement: Agreement | None
    sample: int


@dataclass(frozen=True)
class Published:
    """A commit on the Hub and the files of ours that are at its revision now."""

    repo: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]


def check(repo: str) -> None:
    """Refuse at once what no upload can come of.

    Args:
        repo: Where to publish, ``org/name``.

    Raises:
        ConfigError: It is no Hub id, HF_HUB_OFFLINE is set, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    refuse_offline("push")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"push needs a Hub id org/name, found {repo!r}: {error}") from error
    if repo.count("/") != 1:
        raise ConfigError(f"push needs a Hub id org/name, found {repo!r}; name the user or organization as well")
    if get_token() is None:
        raise ConfigError(f"push needs a token with the right to write to {repo}, found none; run hf auth login")


def is_compressed(config: FisherConfig) -> bool:
    """Return whether a Fisher is kept in a compact code.

    Example:
        >>> is_compressed(FisherConfig()), is_compressed(FisherConfig(encoding={"default": "rank1"}))
        (False, True)
    """
    return any(code not in _PLAIN for code in config.encoding.values())


def prepare(fisher: Fisher, out: Path, compress: str | None = None, progress: Iterable[str] | None = None) -> Prepared:
    """Make the files to publish, and measure what their size costs.

    Args:
        fisher: What to publish.
        out: A folder to write to, if anything has to be written.
        compress: ``rank1``, ``log8``, ``log4`` or ``none``; None for rank1 where the Fisher is not compact yet.
        progress: The names of ``fisher``, wrapped in a progress bar.

    Returns:
        The folder with the files, which is the Fisher's own where nothing has to be changed.

    Raises:
        ConfigError: ``compress`` is unknown.
        ValuesError: An entry is NaN, infinite or negative.
    """
    before = sum(fisher.info(name).nbytes for name in fisher)
    code = compress or ("none" if is_compressed(fisher.config) else COMPRESS)
    own = _own_folder(fisher)
    if code == "none" and own is not None:
        return Prepared(own, fisher.config, before, _size(own), None, 0)
    write_fisher(fisher, out, torch.float32, progress, compress=None if code == "none" else code)
    written = read_fisher(out)
    if code == "none":
        return Prepared(out, written.config, before, _size(out), None, 0)
    # Not raw: a compact Fisher is kept without Adagrad's start.
    scaling = common_scaling(fisher, written)
    comparison = compare(fisher, written, scaling=scaling, sample=_SAMPLE, whole=False)
    return Prepared(out, written.config, before, _size(out), comparison.over_all, comparison.sample)


def publish(
    prepared: Prepared, repo: str, revision: str, message: str | None = None, private: bool = False
) -> Published:
    """Upload a portable Fisher and the section on it in ``README.md``, in one commit.

    The repository and the branch are made where they are missing. Files of an earlier Fisher at that revision that the
    new one does not have are removed; no other file is touched.

    Args:
        prepared: What :func:`prepare` gave.
        repo: ``org/name``.
        revision: The branch.
        message: Of the commit.
        private: Make the repository private if it does not exist yet.

    Returns:
        The commit.

    Raises:
        ConfigError: The Hub refuses it, or ``private`` is asked of a repository that is public.
        NotFoundError: The Hub cannot be reached, or has no such revision.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check(repo)
    files = {path.name: path for path in sorted(prepared.folder.iterdir()) if is_ours(path.name)}
    with explained(f"push to {repo}", repo):
        api = HfApi(library_name="squisher-mergekit")
        head = _branch(api, repo, revision, private)
        there = {sibling.rfilename for sibling in head.siblings or ()}
        readme = model_card.insert(
            _text(api, repo, str(head.sha)) if README in there else None, _section(prepared, repo, revision)
        )
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                CommitOperationAdd(README, readme.encode()),
                *(CommitOperationDelete(name) for name in sorted(there) if is_ours(name) and name not in files),
            ],
            commit_message=message or f"Fisher for merging ({prepared.config.estimator or 'unknown estimator'})",
            revision=revision,
            parent_commit=head.sha,
        )
    return Published(repo, revision, done.oid, done.commit_url, (*files, README))


def _branch(api: HfApi, repo: str, revision: str, private: bool) -> ModelInfo:
    """Make the repository and the branch where they are missing; return what is at the branch."""
    api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise ConfigError(
            f"--private is for a new repository or a private one, but {repo} is public; make it private first, or "
            "choose another"
        )
    if revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)
    return api.model_info(repo, revision=revision)


def _text(api: HfApi, repo: str, commit: str) -> str:
    """Return the README at a commit, with its line ends as they are."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(api.hf_hub_download(repo, README, revision=commit, cache_dir=folder))
        return path.read_bytes().decode("utf-8")


def _section(prepared: Prepared, repo: str, revision: str) -> str:
    source = repo if revision == "main" else f"{repo}@{revision}"
    config = prepared.config
    return model_card.section(config, source, config.source.model or repo, human_bytes(prepared.after))


def _own_folder(fisher: Fisher) -> Path | None:
    """Return the folder of a portable Fisher that is open whole; None for any other."""
    path = Path(fisher.location)
    if path.name == f"{BASENAME}.safetensors":
        path = path.parent
    return path if path.is_dir() and has_fisher(path) and (path / CONFIG_NAME).is_file() else None


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if is_ours(path.name))
