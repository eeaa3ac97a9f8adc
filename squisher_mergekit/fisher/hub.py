"""Fishers on the Hugging Face Hub; only our own files are fetched unless somebody asks for a checkpoint by name."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from squisher_mergekit.errors import ConfigError, NotFoundError, RefusedError
from squisher_mergekit.fisher.config import CONFIG_NAME
from squisher_mergekit.fisher.files import BASENAME, check_free, has_fisher, read_fisher, written_beside
from squisher_mergekit.fisher.mapping import Fisher

PATTERNS = [f"{BASENAME}.safetensors", f"{BASENAME}-*.safetensors", f"{BASENAME}.safetensors.index.json", CONFIG_NAME]
STATE_PATTERNS = ["optimizer.pt", "optimizer.bin", "trainer_state.json", "config.json", "adapter_config.json"]
# Endings of what belongs to a model beside its weights: config, tokenizer, chat template, code.
MODEL_ENDINGS = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")
MODEL_PATTERNS = ["model.safetensors", "model-*.safetensors", *(f"*{ending}" for ending in MODEL_ENDINGS)]
FISHER_REVISION = "fisher"


def split(source: str) -> tuple[str, str | None]:
    """Split ``org/name[@revision]``.

    Example:
        >>> split("org/name@fisher")
        ('org/name', 'fisher')
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


def _id_of(source: str, required: str) -> tuple[str, str | None]:
    """Return name and revision of a Hub id.

    Raises:
        NotFoundError: It is none.
    """
    repo, revision = split(source)
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")):
        raise NotFoundError(
            f"{required} or a Hub id org/name[@revision], but there is no {source}; relative paths count from the "
            "working directory"
        )
    return repo, revision


def is_ours(name: str) -> bool:
    """Return whether a file of a repository belongs to a portable Fisher.

    Example:
        >>> is_ours("fisher-00001-of-00002.safetensors"), is_ours("optimizer.pt")
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def resolve(source: str, cache_dir: str | None = None, *, state: bool = True) -> Path:
    """Fetch what a Hub id names: a portable Fisher, or else the optimizer state kept there.

    Args:
        source: ``org/name[@revision]``. Without a revision a Fisher is looked for at the default one, then at
            ``fisher``.
        cache_dir: Where to keep it; Hugging Face's own cache by default.
        state: Optimizer state, which can be many times the size of the model, may be fetched as well.

    Returns:
        The local folder.

    Raises:
        NotFoundError: It is no Hub id, cannot be reached, or holds neither.
    """
    repo, revision = _id_of(source, "a Fisher must be a file, a folder")
    found = find_beside(repo, revision, cache_dir, also=() if revision else (FISHER_REVISION,))
    if isinstance(found, Path):
        return found
    if not state:
        raise NotFoundError(
            f"no {BASENAME}.safetensors at {source} on the Hub or in its cache: {found}; optimizer state is not "
            f"fetched unasked: if it is kept there, run squisher extract {source} -o OUT and give OUT"
        )
    folder = _download(repo, revision, STATE_PATTERNS, cache_dir)
    if isinstance(folder, Path) and any((folder / name).exists() for name in STATE_PATTERNS[:2]):
        return folder
    raise NotFoundError(
        f"no {BASENAME}.safetensors and no optimizer state at {source} on the Hub or in its cache: {found}"
    )


def model(source: str, option: str) -> Path:
    """Fetch the weights of a model, its config and its tokenizer.

    Args:
        source: ``org/name[@revision]``.
        option: What it is called in a message.

    Returns:
        The local folder.

    Raises:
        NotFoundError: It is no Hub id, or cannot be reached.
    """
    repo, revision = _id_of(source, f"{option} must be a folder")
    folder = _download(repo, revision, MODEL_PATTERNS, None)
    if isinstance(folder, str):
        raise NotFoundError(f"{option} must be a folder or a model on the Hub, but {source}: {folder}; check the name")
    return folder


def find_beside(
    repo: str, revision: str | None, cache_dir: str | None = None, also: tuple[str, ...] = (FISHER_REVISION,)
) -> Path | str:
    """Look for the Fisher of a Hub model: our files at its own revision, then at revision ``fisher``.

    Args:
        repo: ``org/name``.
        revision: The model's revision.
        cache_dir: Where to keep it.
        also: Which revisions to look at then.

    Returns:
        The local folder, or in words why there is none.
    """
    reasons = {}
    for candidate in dict.fromkeys((revision, *also)):
        folder = _download(repo, candidate, PATTERNS, cache_dir)
        if isinstance(folder, Path) and has_fisher(folder):
            return folder
        reasons[candidate or "main"] = folder if isinstance(folder, str) else f"no {BASENAME}.safetensors there"
    if len(set(reasons.values())) == 1:
        return f"at revision {' and at '.join(reasons)}, {next(iter(reasons.values()))}"
    return "; ".join(f"at revision {candidate}, {why}" for candidate, why in reasons.items())


def named(fisher: Fisher, path: Path) -> Fisher:
    """Return a Fisher that says ``org/name@commit`` of its place, where that is a snapshot in a Hub cache.

    Args:
        fisher: An open Fisher.
        path: The folder it was opened from.

    Returns:
        The same tensors; the same Fisher where the folder is no such snapshot.
    """
    try:
        kind, commit = path.parts[-3], path.parts[-1]
    except IndexError:
        return fisher
    if path.parts[-2] != "snapshots" or not kind.startswith("models--"):
        return fisher
    repo = kind.removeprefix("models--").replace("--", "/", 1)
    return Fisher(_Named(fisher, f"{repo}@{commit}"), fisher.config, fisher.aliases)


class _Named:
    """The tensors of a Fisher, under another name of their place."""

    def __init__(self, fisher: Fisher, location: str) -> None:
        self.location = location
        self.infos = {name: fisher.info(name) for name in fisher}
        self._fisher = fisher

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._fisher[name]


def pull(source: str, out: Path) -> Fisher:
    """Fetch the portable Fisher that a Hub id names into a folder; nothing stays there unless it is whole.

    Args:
        source: ``org/name[@revision]``. Without a revision it is looked for at the default one, then at ``fisher``.
        out: The folder to make; it may exist, but must hold no Fisher yet.

    Returns:
        The Fisher.

    Raises:
        ConfigError: ``out`` holds a Fisher already, or is no folder.
        NotFoundError: There is no Fisher there.
        CorruptFileError: What is there is not whole.
    """
    check_free(out)
    cached = resolve(source, state=False)
    try:
        with written_beside(out) as folder:
            for path in cached.iterdir():
                if is_ours(path.name):
                    shutil.copyfile(path, folder / path.name)
            read_fisher(folder)
    except OSError as error:
        raise NotFoundError(f"{source} cannot be written to {out}: {error}; choose another place") from error
    return read_fisher(out)


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


def _download(repo: str, revision: str | None, patterns: list[str], cache_dir: str | None) -> Path | str:
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
