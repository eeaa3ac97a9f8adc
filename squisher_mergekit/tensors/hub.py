"""Download of model files from the Hugging Face Hub, with one-line errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
