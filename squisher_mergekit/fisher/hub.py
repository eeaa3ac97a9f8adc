"""Fishers on the Hugging Face Hub; only our own files are fetched unless somebody asks for a checkpoint by name."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from squisher_mergekit.errors import NotFoundError
from squisher_mergekit.fisher.config import CONFIG_NAME
from squisher_mergekit.fisher.files import BASENAME, check_free, has_fisher, read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.tensors.atomic import written_beside
from squisher_mergekit.tensors.hub import download, parse_id

PATTERNS = [f"{BASENAME}.safetensors", f"{BASENAME}-*.safetensors", f"{BASENAME}.safetensors.index.json", CONFIG_NAME]
STATE_PATTERNS = ["optimizer.pt", "optimizer.bin", "trainer_state.json", "config.json", "adapter_config.json"]
FISHER_REVISION = "fisher"


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
    repo, revision = parse_id(source, "a Fisher must be a file, a folder")
    found = find_beside(repo, revision, cache_dir, also=() if revision else (FISHER_REVISION,))
    if isinstance(found, Path):
        return found
    if not state:
        raise NotFoundError(
            f"no {BASENAME}.safetensors at {source} on the Hub or in its cache: {found}; optimizer state is not "
            f"fetched unasked: if it is kept there, run squisher extract {source} -o OUT and give OUT"
        )
    folder = download(repo, revision, STATE_PATTERNS, cache_dir)
    if isinstance(folder, Path) and any((folder / name).exists() for name in STATE_PATTERNS[:2]):
        return folder
    raise NotFoundError(
        f"no {BASENAME}.safetensors and no optimizer state at {source} on the Hub or in its cache: {found}"
    )


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
        folder = download(repo, candidate, PATTERNS, cache_dir)
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
