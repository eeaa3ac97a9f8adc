"""Download of Fishers from the Hugging Face Hub; a merge downloads only the files of a portable Fisher."""

import shutil
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from torch import Tensor

from squisher_mergekit.errors import ConfigError, NotFoundError
from squisher_mergekit.fisher.config import CONFIG_NAME
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import BASENAME, check_free, has_fisher
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.hub import download, download_file, parse_file, parse_id
from squisher_mergekit.tensors.input_files import exists

PATTERNS = [f"{BASENAME}.safetensors", f"{BASENAME}-*.safetensors", f"{BASENAME}.safetensors.index.json", CONFIG_NAME]
FISHER_REVISION = "fisher"


def is_ours(name: str) -> bool:
    """Return True for the name of a file of a portable Fisher.

    Example:
        >>> is_ours("fisher-00001-of-00002.safetensors"), is_ours("optimizer.pt")
        (True, False)
    """
    return any(fnmatch(name, pattern) for pattern in PATTERNS)


def download_fisher(source: str, cache_dir: str | None = None) -> Path:
    """Download the portable Fisher of a Hub id.

    Args:
        source: ``org/name[@revision]``. Without a revision, the default one is searched first, then ``fisher``. Or one
            file of second moments, ``org/name[@revision]:path.safetensors``, which alone is downloaded.
        cache_dir: The cache; by default Hugging Face's own.

    Returns:
        The local folder or file.

    Raises:
        NotFoundError: ``source`` is not a Hub id, cannot be reached, or has no portable Fisher.
    """
    found = find_by_id(source, cache_dir)
    if isinstance(found, Path):
        return found
    raise NotFoundError(
        f"no {BASENAME}.safetensors at {source} on the Hub or in its cache: {found}; optimizer state is not "
        f"downloaded unasked: if the repository has it, run squisher extract {source} -o OUT and give OUT"
    )


def find_by_id(source: str, cache_dir: str | None = None) -> Path | str:
    """Download the portable Fisher of a Hub id, or the file that it names, or return the reason why there is none.

    Raises:
        NotFoundError: ``source`` is not a Hub id, or names a file that cannot be downloaded.
    """
    file = parse_file(source)
    if file is not None:
        # A portable Fisher is two files; of all others only the named one is downloaded.
        return download_file(file, cache_dir, CONFIG_NAME if is_ours(PurePosixPath(file.path).name) else None)
    repo, revision = parse_id(source, "a Fisher must be a file, a folder")
    return find_fisher(repo, revision, cache_dir, also=() if revision else (FISHER_REVISION,))


def find_fisher(
    repo: str, revision: str | None, cache_dir: str | None = None, also: tuple[str, ...] = (FISHER_REVISION,)
) -> Path | str:
    """Download the portable Fisher of a Hub model: at the model's revision, else at revision ``fisher``.

    Args:
        repo: ``org/name``.
        revision: The model's revision.
        cache_dir: The cache; by default Hugging Face's own.
        also: The revisions to try next.

    Returns:
        The local folder, or the reason of the failure in words.
    """
    reasons = {}
    for candidate in dict.fromkeys((revision, *also)):
        folder = download(repo, candidate, PATTERNS, cache_dir)
        if isinstance(folder, Path) and has_fisher(folder):
            return folder
        reasons[candidate or "main"] = folder if isinstance(folder, str) else f"no {BASENAME}.safetensors there"
    if len(set(reasons.values())) == 1:
        return f"at revision {' and at '.join(reasons)}, {next(iter(reasons.values()))}"
    return "; ".join(f"at revision {candidate}, {why}" for candidate, why in reasons.items())


def with_hub_location(fisher: Fisher, path: Path) -> Fisher:
    """Return a Fisher whose location is ``org/name@commit``, if it comes from a snapshot in a Hub cache.

    Args:
        fisher: An open Fisher.
        path: The folder of its files, or the file.

    Returns:
        The Fisher with its new location; ``fisher`` itself if the folder is not such a snapshot.
    """
    parts = path.parts
    number = max((k for k, part in enumerate(parts) if part == "snapshots"), default=0)
    if not 0 < number < len(parts) - 1 or not parts[number - 1].startswith("models--"):
        return fisher
    repo = parts[number - 1].removeprefix("models--").replace("--", "/", 1)
    inner = "/".join(parts[number + 2 :])
    location = f"{repo}@{parts[number + 1]}" + (f":{inner}" if inner else "")
    return Fisher(_Relocated(fisher, location), fisher.config, fisher.aliases, fisher.factors)


class _Relocated:
    """Store of a Fisher's tensors with another location for messages."""

    def __init__(self, fisher: Fisher, location: str) -> None:
        self.location = location
        self.infos = {name: fisher.info(name) for name in fisher}
        self._fisher = fisher

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self._fisher[name]


def pull(source: str, out: Path) -> Fisher:
    """Download the portable Fisher of a Hub id into a folder, whole or not at all.

    Args:
        source: ``org/name[@revision]``. The default revision is searched first, then revision ``fisher``.
        out: The folder to make. An existing folder must not hold a Fisher.

    Returns:
        The Fisher.

    Raises:
        ConfigError: ``out`` is a file or already holds a Fisher, or ``source`` names one file.
        NotFoundError: The repository has no Fisher, or ``out`` cannot be written.
        CorruptFileError: A file in the repository is truncated or damaged.
    """
    check_free(out)
    if exists(Path(source)) and (source.count("/") != 1 or source.startswith(("/", "."))):
        raise ConfigError(
            f"squisher pull takes a Hub id, org/name[@revision], but {source} is on this machine; copy it, or take "
            f"squisher extract {source} -o {out}"
        )
    cached = download_fisher(source)
    if cached.is_file():
        raise ConfigError(
            f"squisher pull takes org/name[@revision], found {source}; take squisher extract {source} -o {out}"
        )
    try:
        with written_beside(out, "keep") as folder:
            for path in cached.iterdir():
                if is_ours(path.name):
                    shutil.copyfile(path, folder / path.name)
            read_fisher(folder)
    except OSError as error:
        raise NotFoundError(f"{source} cannot be written to {out}: {error}; choose another place") from error
    return read_fisher(out)
