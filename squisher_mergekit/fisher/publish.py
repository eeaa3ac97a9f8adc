"""Upload of a Fisher to the Hugging Face Hub: compressed, with its measured error, in one commit with its card."""

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
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.hub import is_ours
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import human_bytes
from squisher_mergekit.fisher.write import BASENAME, has_fisher, write_fisher
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
    """Portable Fisher that is ready for upload, with its size and error.

    Args:
        folder: The folder of the files.
        config: The metadata in the files.
        before: Bytes of the tensors before compression, factors included.
        after: Bytes of the files.
        agreement: The agreement of the original (A) with the compressed Fisher (B); None if nothing changed.
        sample: Number of entries behind the agreement's rank correlation and factor.
        factors: Bytes of the factors before and after compression; None without factors.
    """

    folder: Path
    config: FisherConfig
    before: int
    after: int
    agreement: Agreement | None
    sample: int
    factors: tuple[int, int] | None = None


@dataclass(frozen=True)
class Published:
    """Commit of a Fisher on the Hub.

    Args:
        repo: ``org/name``.
        revision: The branch.
        commit: Hash of the commit.
        url: Address of the commit.
        files: Names of the uploaded files.
    """

    repo: str
    revision: str
    commit: str
    url: str
    files: tuple[str, ...]


def check_repository(repo: str) -> None:
    """Raise if an upload to a repository cannot succeed.

    Args:
        repo: The repository, ``org/name``.

    Raises:
        ConfigError: ``repo`` is not a Hub id, HF_HUB_OFFLINE is set, or no token is stored.
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
    """Return True if a tensor of a Fisher is in a compact form.

    Example:
        >>> is_compressed(FisherConfig()), is_compressed(FisherConfig(encoding={"default": "rank1"}))
        (False, True)
    """
    return any(code not in _PLAIN for code in config.encoding.values())


def prepare(fisher: Fisher, out: Path, compress: str | None = None, progress: Iterable[str] | None = None) -> Prepared:
    """Make the files for an upload, and measure the error of their compression.

    Args:
        fisher: The Fisher.
        out: Folder for new files.
        compress: ``rank1``, ``log8``, ``log4`` or ``none``; by default ``rank1``, or ``none`` for a compact Fisher.
        progress: The names of ``fisher``, wrapped in a progress bar.

    Returns:
        The files, in ``out``, or in the Fisher's own folder if nothing has to change.

    Raises:
        ConfigError: ``compress`` is unknown.
        ValuesError: An entry is NaN, infinite or negative.
    """
    before = sum(fisher.info(name).nbytes for name in fisher) + fisher.factors.nbytes
    code = compress or ("none" if is_compressed(fisher.config) else COMPRESS)
    source = _portable_folder(fisher)
    if code == "none" and source is not None:
        return Prepared(source, fisher.config, before, _size(source), None, 0, _factor_bytes(fisher, fisher))
    write_fisher(fisher, out, torch.float32, progress, compress=None if code == "none" else code)
    written = read_fisher(out)
    factors = _factor_bytes(fisher, written)
    if code == "none":
        return Prepared(out, written.config, before, _size(out), None, 0, factors)
    # Not raw: the compact Fisher lacks Adagrad's initial value.
    scaling = common_scaling(fisher, written)
    comparison = compare(fisher, written, scaling=scaling, sample=_SAMPLE, whole=False)
    return Prepared(out, written.config, before, _size(out), comparison.over_all, comparison.sample, factors)


def _factor_bytes(before: Fisher, after: Fisher) -> tuple[int, int] | None:
    """Return the bytes of the factors of two Fishers; None without factors."""
    return (before.factors.nbytes, after.factors.nbytes) if before.factors else None


def publish(
    prepared: Prepared, repo: str, revision: str, message: str | None = None, private: bool = False
) -> Published:
    """Upload a portable Fisher and its section in ``README.md``, in one commit.

    The upload creates the repository and the branch if they are missing. It removes files of an earlier Fisher at that
    revision that the new one lacks; it touches no other file.

    Args:
        prepared: The Fisher, from :func:`prepare`.
        repo: ``org/name``.
        revision: The branch.
        message: The commit message.
        private: Make a new repository private.

    Returns:
        The commit.

    Raises:
        ConfigError: The Hub refuses the upload, or ``private`` is set for a public repository.
        NotFoundError: The Hub cannot be reached, or has no such revision.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_repository(repo)
    files = {path.name: path for path in sorted(prepared.folder.iterdir()) if is_ours(path.name)}
    with explained(f"push to {repo}", repo):
        api = HfApi(library_name="squisher-mergekit")
        head = _branch(api, repo, revision, private)
        existing = {sibling.rfilename for sibling in head.siblings or ()}
        readme = model_card.insert(
            _text(api, repo, str(head.sha)) if README in existing else None, _section(prepared, repo, revision)
        )
        done = api.create_commit(
            repo,
            [
                *(CommitOperationAdd(name, path) for name, path in files.items()),
                CommitOperationAdd(README, readme.encode()),
                *(CommitOperationDelete(name) for name in sorted(existing) if is_ours(name) and name not in files),
            ],
            commit_message=message or f"Fisher for merging ({prepared.config.estimator or 'unknown estimator'})",
            revision=revision,
            parent_commit=head.sha,
        )
    return Published(repo, revision, done.oid, done.commit_url, (*files, README))


def _branch(api: HfApi, repo: str, revision: str, private: bool) -> ModelInfo:
    """Create the repository and the branch if they are missing; return the state of the branch."""
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
    """Return the README at a commit, with unchanged line ends."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(api.hf_hub_download(repo, README, revision=commit, cache_dir=folder))
        return path.read_bytes().decode("utf-8")


def _section(prepared: Prepared, repo: str, revision: str) -> str:
    """Return the section of the model card."""
    source = repo if revision == "main" else f"{repo}@{revision}"
    config = prepared.config
    return model_card.section(config, source, config.source.model or repo, human_bytes(prepared.after))


def _portable_folder(fisher: Fisher) -> Path | None:
    """Return the folder of a Fisher that was opened from whole portable files, else None."""
    path = Path(fisher.location)
    if path.name == f"{BASENAME}.safetensors":
        path = path.parent
    return path if path.is_dir() and has_fisher(path) and (path / CONFIG_NAME).is_file() else None


def _size(folder: Path) -> int:
    """Return the bytes of the Fisher's files in a folder."""
    return sum(path.stat().st_size for path in folder.iterdir() if is_ours(path.name))
