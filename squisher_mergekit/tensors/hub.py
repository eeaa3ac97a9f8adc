"""Download of model files from the Hugging Face Hub, with one-line errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from squisher_mergekit.errors import ConfigError, NotFoundError, RefusedError

# Endings of what belongs to a model beside its weights: config, tokenizer, chat template, code.
MODEL_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")


MODEL_PATTERNS = ["model.safetensors", "model-*.safetensors", *(f"*{ending}" for ending in MODEL_ENDINGS)]


def split_revision(source: str) -> tuple[str, str | None]:
    """Split ``org/name[@revision]``.

    Example:
        >>> split_revision("org/name@fisher")
        ('org/name', 'fisher')
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


def parse_id(source: str, required: str) -> tuple[str, str | None]:
    """Return name and revision of a Hub id.

    Raises:
        NotFoundError: It is none.
    """
    repo, revision = split_revision(source)
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")):
        raise NotFoundError(
            f"{required} or a Hub id org/name[@revision], but there is no {source}; relative paths count from the "
            "working directory"
        )
    return repo, revision


def download_model(source: str, option: str) -> Path:
    """Fetch the weights of a model, its config and its tokenizer.

    Args:
        source: ``org/name[@revision]``.
        option: What it is called in a message.

    Returns:
        The local folder.

    Raises:
        NotFoundError: It is no Hub id, or cannot be reached.
    """
    repo, revision = parse_id(source, f"{option} must be a folder")
    folder = download(repo, revision, MODEL_PATTERNS, None)
    if isinstance(folder, str):
        raise NotFoundError(f"{option} must be a folder or a model on the Hub, but {source}: {folder}; check the name")
    return folder


def refuse_offline(what: str) -> None:
    """Refuse what needs the Hub where HF_HUB_OFFLINE forbids it.

    Raises:
        ConfigError: It is set.
    """
    if _is_offline():
        raise ConfigError(f"{what} needs the Hub, but HF_HUB_OFFLINE is set; unset it")


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Show huggingface_hub's progress bars while something runs, or not."""
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
    """Turn what huggingface_hub raises into one line of ours.

    Args:
        what: What is being done, as the subject of a sentence.
        repo: ``org/name``.

    Raises:
        NotFoundError: The Hub cannot be reached, or has no such repository or revision.
        ConfigError: It lets this token do no such thing, or refuses what was sent.
    """
    try:
        yield
    except RefusedError:
        raise
    except _errors() as error:
        raise _explain(error, what, repo) from error


def _errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises."""
    from huggingface_hub.errors import HfHubHTTPError

    # One of its parents is the root of what the HTTP library beneath raises, and that library differs by version.
    roots = [base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)]
    return (*roots, ValueError, RuntimeError)


def _explain(error: Exception, what: str, repo: str) -> RefusedError:
    """Return our error for one of huggingface_hub's."""
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
    if status is not None:
        return ConfigError(f"{what} was refused by the Hub, which answers {status}: {found}; try again later")
    if isinstance(error, ValueError):
        return ConfigError(f"{what} was refused: {found}; correct it")
    return NotFoundError(f"{what} needs the Hub, which cannot be reached: {found}; check the network and HF_ENDPOINT")


def _short(error: BaseException) -> str:
    """Return in few words what the Hub or its client says."""
    away = "HF_HUB_OFFLINE is set" if _is_offline() else "the Hub cannot be reached"
    known = {
        "GatedRepoError": "it is gated, and this token has no access",
        "RepositoryNotFoundError": "no such repository, or it is private to others",
        "RevisionNotFoundError": "no such revision",
        "IncompleteSnapshotError": f"it is in the cache in part, and {away}",
        "LocalEntryNotFoundError": f"it is not in the cache, and {away}",
    }
    # By name, as not every version of huggingface_hub has all of them; the most special comes first.
    for kind in type(error).__mro__:
        if kind.__name__ in known:
            return known[kind.__name__]
    said = getattr(error, "server_message", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:200]


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def download(repo: str, revision: str | None, patterns: list[str], cache_dir: str | None) -> Path | str:
    """Return the snapshot's folder, or in words why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    # That no file matches is an answer, not a warning.
    hub_logging.set_verbosity(logging.ERROR)
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir))
    except _errors() as error:
        return _short(error)
    finally:
        hub_logging.set_verbosity(verbosity)
