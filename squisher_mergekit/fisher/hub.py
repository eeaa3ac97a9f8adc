"""Fishers on the Hugging Face Hub; only our own files are fetched unless somebody asks for a checkpoint by name."""

from pathlib import Path

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.fisher.config import CONFIG_NAME
from squisher_mergekit.fisher.files import BASENAME, has_fisher

PATTERNS = [f"{BASENAME}.safetensors", f"{BASENAME}-*.safetensors", f"{BASENAME}.safetensors.index.json", CONFIG_NAME]
STATE_PATTERNS = ["optimizer.pt", "optimizer.bin", "trainer_state.json", "config.json", "adapter_config.json"]
FISHER_REVISION = "fisher"


def split(source: str) -> tuple[str, str | None]:
    """Split ``org/name[@revision]``.

    Example:
        >>> split("org/name@fisher")
        ('org/name', 'fisher')
    """
    repo, _, revision = source.partition("@")
    return repo, revision or None


def resolve(source: str, cache_dir: str | None = None) -> Path:
    """Fetch what a Hub id names: a portable Fisher, or else the optimizer state kept there.

    Args:
        source: ``org/name[@revision]``.
        cache_dir: Where to keep it; Hugging Face's own cache by default.

    Returns:
        The local folder.

    Raises:
        NotFoundError: It is no Hub id, cannot be reached, or holds neither.
    """
    repo, revision = split(source)
    if repo.count("/") != 1 or repo.startswith(("/", ".", "~")):
        raise NotFoundError(
            f"a Fisher must be a file, a folder or a Hub id org/name[@revision], but there is no {source}; "
            "relative paths count from the working directory"
        )
    folder = _download(repo, revision, PATTERNS, cache_dir)
    if isinstance(folder, Path) and has_fisher(folder):
        return folder
    state = _download(repo, revision, STATE_PATTERNS, cache_dir)
    if isinstance(state, Path) and any((state / name).exists() for name in STATE_PATTERNS[:2]):
        return state
    why = f": {folder}" if isinstance(folder, str) else ""
    raise NotFoundError(f"no {BASENAME}.safetensors and no optimizer state at {source} on the Hub or in its cache{why}")


def find_beside(repo: str, revision: str | None, cache_dir: str | None = None) -> Path | None:
    """Look for the Fisher of a Hub model: our files at its own revision, then at revision ``fisher``.

    Args:
        repo: ``org/name``.
        revision: The model's revision.
        cache_dir: Where to keep it.

    Returns:
        The local folder, or None if there is none.
    """
    for candidate in (revision, FISHER_REVISION):
        folder = _download(repo, candidate, PATTERNS, cache_dir)
        if isinstance(folder, Path) and has_fisher(folder):
            return folder
    return None


def _download(repo: str, revision: str | None, patterns: list[str], cache_dir: str | None) -> Path | str:
    """Return the snapshot's folder, or in words why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, cache_dir=cache_dir))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        return " ".join(str(error).split())[:200]
