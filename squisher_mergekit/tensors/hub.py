"""Download of model files from the Hugging Face Hub, with one-line errors."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from squisher_mergekit.errors import ConfigError, NotFoundError, RefusedError

# Endings of a model's files other than its weights: config, tokenizer, chat template, code.
MODEL_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
MODEL_PATTERNS = ["model.safetensors", "model-*.safetensors", *(f"*{ending}" for ending in MODEL_ENDINGS)]


# Answers of the Hub with a cause of their own -> cause and cure.
_STATUSES = {
    301: ("the repository was moved or renamed", "give its new name"),
    307: ("the repository was moved or renamed", "give its new name"),
    308: ("the repository was moved or renamed", "give its new name"),
    429: ("too many requests", "wait some minutes, or log in by hf auth login"),
}


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``org/name[@revision]`` into name and revision.

    Example:
        >>> split_revision("org/name@fisher")
        ('org/name', 'fisher')
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


_FILE = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:]+))?[:/](?P<path>.+\.safetensors)")


@dataclass(frozen=True)
class HubFile:
    """File of a repository on the Hub.

    Attributes:
        repo: The repository, ``org/name``.
        revision: Branch, tag or commit; None for the main branch.
        path: Path in the repository, with slashes.
    """

    repo: str
    revision: str | None
    path: str


def parse_file(source: str) -> HubFile | None:
    """Return the file that ``org/name[@revision]:path.safetensors`` or ``org/name/path.safetensors`` names; or None.

    Example:
        >>> parse_file("org/name@v2:export/exp_avg_sq.safetensors")
        HubFile(repo='org/name', revision='v2', path='export/exp_avg_sq.safetensors')
        >>> parse_file("org/name/exp_avg_sq.safetensors").path, parse_file("org/name@v2")
        ('exp_avg_sq.safetensors', None)
    """
    found = _FILE.fullmatch(source)
    if found is None or any(part in ("", ".", "..") for part in found["path"].split("/")):
        return None
    return HubFile(found["repo"], found["revision"], found["path"])


def download_file(file: HubFile, cache_dir: str | None = None, beside: str | None = None) -> Path:
    """Download one file of a repository.

    Args:
        file: The file.
        cache_dir: Folder of the cache; None for the default.
        beside: Name of a second file in the same folder of the repository, downloaded if it exists; None for none.

    Raises:
        NotFoundError: The repository cannot be reached, or has no such file.
    """
    wanted = [file.path] if beside is None else [file.path, str(PurePosixPath(file.path).with_name(beside))]
    patterns = ["".join(f"[{letter}]" if letter in "*?[" else letter for letter in path) for path in wanted]
    folder = download(file.repo, file.revision, patterns, cache_dir)
    if isinstance(folder, Path) and (folder / file.path).is_file():
        return folder / file.path
    where = f"revision {file.revision or 'main'} of {file.repo}"
    reason = folder if isinstance(folder, str) else "no such file there"
    raise NotFoundError(
        f"{file.path} must be a local file or one at {where} on the Hub, but there is no such path here, and on the "
        f"Hub or in its cache: {reason}; check the name"
    )


def parse_id(source: str, required: str) -> tuple[str, str | None]:
    """Return name and revision of a Hub id.

    Args:
        source: The id, ``org/name[@revision]``.
        required: Beginning of the message for another value.

    Raises:
        NotFoundError: ``source`` is no Hub id.
    """
    repo, revision = split_revision(source)
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")):
        raise NotFoundError(
            f"{required} or a Hub id org/name[@revision], but there is no {source}; relative paths count from the "
            "working directory"
        )
    return repo, revision


def download_model(source: str, option: str) -> Path:
    """Download the weights of a model, its config and its tokenizer.

    Args:
        source: The id, ``org/name[@revision]``.
        option: Name of the option that gave the id, for messages.

    Returns:
        The local folder.

    Raises:
        NotFoundError: ``source`` is no Hub id, or the Hub cannot be reached.
    """
    repo, revision = parse_id(source, f"{option} must be a folder")
    folder = download(repo, revision, MODEL_PATTERNS, None)
    if isinstance(folder, str):
        raise NotFoundError(f"{option} must be a folder or a model on the Hub, but {source}: {folder}; check the name")
    return folder


def refuse_offline(what: str) -> None:
    """Refuse work that needs the Hub while HF_HUB_OFFLINE is set.

    Args:
        what: The work, as the subject of a sentence.

    Raises:
        ConfigError: HF_HUB_OFFLINE is set.
    """
    if _is_offline():
        raise ConfigError(f"{what} needs the Hub, but HF_HUB_OFFLINE is set; unset it")


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show or hide huggingface_hub's progress bars inside a ``with`` block."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = not shown and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            enable_progress_bars()


@contextmanager
def explained(what: str, repo: str) -> Iterator[None]:
    """Turn exceptions of huggingface_hub into errors of this package, of one line each.

    Args:
        what: The work in the ``with`` block, as the subject of a sentence.
        repo: The repository, ``org/name``.

    Raises:
        NotFoundError: The Hub cannot be reached, or has no such repository or revision.
        ConfigError: The token lacks a right, or the Hub refuses the request.
    """
    try:
        yield
    except RefusedError:
        raise
    except _errors() as error:
        raise _explain(error, what, repo) from error


def _errors() -> tuple[type[Exception], ...]:
    """Return the exception classes of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    # One parent is the root of the HTTP library's exceptions; which library that is differs by version.
    roots = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (*roots, ValueError, RuntimeError)


def _explain(error: Exception, what: str, repo: str) -> RefusedError:
    """Return this package's error for an exception of huggingface_hub."""
    cause: BaseException = error
    while cause.__cause__ is not None and getattr(cause, "response", None) is None:
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    found = _short(cause)
    if status == 401:
        return ConfigError(
            f"{what} needs a token that the Hub knows, but it answers 401: {found}; run hf auth login, or set HF_TOKEN"
        )
    if status == 403:
        return ConfigError(
            f"{what} needs a token with the right to write to {repo}, but the Hub answers 403: {found}; "
            "take a token with that right"
        )
    if status == 404:
        return NotFoundError(f"{what} needs {repo}, but the Hub answers 404: {found}; check name, revision and token")
    if status in _STATUSES:
        found_there, cure = _STATUSES[status]
        return ConfigError(f"{what} was refused by the Hub, which answers {status} ({found_there}): {found}; {cure}")
    if status is not None and status >= 500:
        return ConfigError(f"{what} needs the Hub, which fails with {status}: {found}; try again later")
    if status is not None:
        return ConfigError(f"{what} was refused by the Hub, which answers {status}: {found}; try again later")
    if isinstance(error, ValueError):
        return ConfigError(f"{what} was refused: {found}; correct it")
    return NotFoundError(f"{what} needs the Hub, which cannot be reached: {found}; check the network and HF_ENDPOINT")


def _short(error: BaseException) -> str:
    """Return the reason that the Hub or its client gives, in few words."""
    away = "HF_HUB_OFFLINE is set" if _is_offline() else "the Hub cannot be reached"
    known = {
        "GatedRepoError": "it is gated, and this token has no access",
        "RepositoryNotFoundError": "no such repository, or it is private to others",
        "RevisionNotFoundError": "no such revision",
        "IncompleteSnapshotError": f"it is in the cache in part, and {away}",
        "LocalEntryNotFoundError": f"it is not in the cache, and {away}",
    }
    # By name, as no version of huggingface_hub has all of these classes; subclasses come first.
    for kind in type(error).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in _STATUSES or (status is not None and status >= 500):
        found, cure = _STATUSES.get(status, ("the Hub fails", "try again later"))
        return f"the Hub answers {status} ({found}); {cure}"
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(repo: str, revision: str | None, patterns: list[str], cache_dir: str | None) -> Path | str:
    """Download files of a repository.

    Args:
        repo: The repository, ``org/name``.
        revision: Branch, tag or commit; None for the main branch.
        patterns: Glob patterns of the files.
        cache_dir: Folder of the cache; None for the default.

    Returns:
        The folder of the snapshot, or the reason why there is none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    # A repository without a matching file is an answer here, not worth a warning.
    hub_logging.set_verbosity(logging.ERROR)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir))
    except _errors() as error:
        return _short(error)
    finally:
        hub_logging.set_verbosity(verbosity)
