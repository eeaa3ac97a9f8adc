"""Task2Vec embeddings: the Fisher of a network trained on a task, averaged over each filter; and their files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, ValuesError
from squisher_mergekit.fisher.config import Estimator, Scaling, first_error
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import Moments, check_values
from squisher_mergekit.optimizers.load import load_fisher
from squisher_mergekit.tensors.atomic import written_beside, written_file
from squisher_mergekit.tensors.folder_moves import recover
from squisher_mergekit.tensors.input_files import exists, reading
from squisher_mergekit.tensors.safetensors import SafetensorsStore, read_header, safetensors_notes

Per = Literal["row", "tensor", "entry"]

FORMAT_VERSION = 1
_KEY = "squisher_task2vec"
# Names of heads in Hugging Face, timm and torchvision. A pooler belongs to the trunk.
HEAD = re.compile(
    r"(^|\.)(classifier|pre_classifier|classification_head|score|lm_head|embed_out|qa_outputs|cls)(\.|$)"
    r"|^(fc|heads?)\."
)


class EmbeddingInfo(BaseModel):
    """Metadata of an embedding; fields without a line here are those of ``fisher_config.json``.

    Attributes:
        name: Name of the task.
        per: Granularity: ``row``, ``tensor`` or ``entry``.
        excluded: Name -> reason, for tensors that the embedding omits.
        source: Name of the folder or file of the Fisher.
    """

    format_version: int = FORMAT_VERSION
    name: str
    per: Per = "row"
    scaling: Scaling = "debiased"
    excluded: dict[str, str] = Field(default_factory=dict)
    estimator: Estimator | None = None
    parameters: Literal["model", "adapter"] = "model"
    num_examples: int | None = None
    steps: int | dict[str, int] | None = None
    examples_per_step: float | None = None
    weights_fingerprint: str | None = None
    source: str | None = None

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class Embedding:
    """Task as a vector.

    Attributes:
        tensors: Parameter name -> mean F of each filter, float32, on the CPU.
        info: Metadata.
    """

    tensors: Mapping[str, Tensor]
    info: EmbeddingInfo

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def mean(self) -> float:
        """Mean of all values."""
        return sum(tensor.sum(dtype=torch.float64).item() for tensor in self.tensors.values()) / self.size


def embed(
    fisher: Fisher,
    *,
    per: Per = "row",
    scaling: Scaling = "debiased",
    with_vectors: bool = False,
    exclude: Sequence[str] = (),
    name: str | None = None,
    progress: Iterable[str] | None = None,
) -> Embedding:
    """Return the embedding of a task: the mean of F over each filter of the trunk.

    For a tensor of shape ``[n, ...]``, value i is the mean of ``F[i]`` over all other axes: one value per filter of a
    convolution, row of a matrix or word of an embedding table. (GPT-2 has matrices ``[in, out]``: a row is an input.)
    The embedding omits the head, as tasks differ in its shape and meaning, and, as the original, tensors with one axis.
    One tensor of the Fisher is in memory at a time.

    Args:
        fisher: Fisher of the network after training on the task.
        per: Granularity: one value per ``row``, one per ``tensor``, or every ``entry``.
        scaling: Scale of F, as for :meth:`Fisher.scaled`.
        with_vectors: Include biases and other tensors with one axis, entry by entry.
        exclude: Regular expressions; tensors whose names match one are omitted, as the head.
        name: Name of the task; by default the name of the Fisher's folder.
        progress: The names of ``fisher``, wrapped in a progress bar.

    Returns:
        The embedding.

    Raises:
        ConfigError: An expression is invalid or matches no tensor, no tensor is left, or a number that the scaling
            needs is not recorded.
        ValuesError: An entry is NaN, infinite or negative, or all values are 0.

    Source:
        Achille et al. (2019), "Task2Vec", section 2; Li et al. (2025), section 3.5.

    Example:
        >>> from squisher_mergekit.fisher.config import FisherConfig
        >>> from squisher_mergekit.tensors.safetensors import MemoryStore
        >>> tensors = {"conv.weight": torch.tensor([[1.0, 3.0], [0.0, 5.0]]), "classifier.weight": torch.ones(2, 2)}
        >>> found = embed(Fisher(MemoryStore(tensors), FisherConfig()), name="digits")
        >>> found.tensors, found.info.excluded
        ({'conv.weight': tensor([2.0000, 2.5000])}, {'classifier.weight': 'head'})
    """
    excluded = _excluded(fisher, with_vectors, exclude)
    tensors = {}
    for key in progress or list(fisher):
        if key not in excluded:
            tensors[key] = _values(fisher, key, scaling, per)
    if not any(bool((tensor > 0).any()) for tensor in tensors.values()):
        raise ValuesError(
            f"an embedding must hold a value above 0, but all means over {len(tensors)} tensors of {fisher.location} "
            "are 0; take a Fisher made from more examples or a later checkpoint"
        )
    config = fisher.config
    source = default_name(fisher.location)
    info = EmbeddingInfo(
        name=name or source,
        per=per,
        scaling=scaling,
        excluded=excluded,
        estimator=config.estimator,
        parameters=config.parameters,
        num_examples=config.num_examples,
        steps=config.steps,
        examples_per_step=config.examples_per_step,
        weights_fingerprint=config.weights_fingerprint,
        source=source,
    )
    return Embedding(tensors, info)


def default_name(location: str) -> str:
    """Return the name of a Fisher's folder, or the last part of a Hub id.

    Example:
        >>> default_name("runs/movies/fisher.safetensors"), default_name("org/movies@main")
        ('movies', 'movies')
    """
    path = Path(location.partition("@")[0] if not exists(Path(location)) else location)
    path = path.parent if path.suffix in (".safetensors", ".json", ".pt", ".bin") else path
    return path.resolve().name


def open_tasks(sources: Sequence[str], models: Sequence[str | Path] = ()) -> dict[str, Embedding | Fisher]:
    """Open embeddings and Fishers by the names of their tasks.

    Args:
        sources: Files of embeddings, or sources that ``load_fisher`` opens. ``NAME=SOURCE`` names the task; otherwise
            an embedding has its own name, and a Fisher the name of its folder.
        models: Weights for ``load_fisher``: none, one for all, or one per source.

    Returns:
        Name -> embedding or Fisher, in the order given.

    Raises:
        ConfigError: A name is not a file name, two names are equal, or the number of models is wrong.
        RefusedError: A source cannot be opened.
    """
    if len(models) not in (0, 1, len(sources)):
        raise ConfigError(f"models must be one for all or one for each of {len(sources)} Fishers, found {len(models)}")
    given = list(models) if len(models) == len(sources) else [*models, None][:1] * len(sources)
    found: dict[str, Embedding | Fisher] = {}
    for source, model in zip(sources, given, strict=True):
        name, path = split_name(source)
        task = read_embedding(path) if is_embedding(Path(path)) else load_fisher(path, model)
        name = name or (task.info.name if isinstance(task, Embedding) else default_name(path))
        if name in found:
            raise ConfigError(f"tasks must have different names, but two are {name!r}; name them by NAME={path}")
        if not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
            raise ConfigError(f"a task's name must be one that a file can have, found {name!r}; name it by NAME={path}")
        found[name] = task
    return found


def split_name(source: str) -> tuple[str | None, str]:
    """Return name and path of ``NAME=PATH``; the name is None if the whole text is a path or has no ``=``.

    Example:
        >>> split_name("movies=runs/7/checkpoint-50"), split_name("runs/7")
        (('movies', 'runs/7/checkpoint-50'), (None, 'runs/7'))
    """
    name, sign, path = source.partition("=")
    return (name, path) if sign and not exists(Path(source)) else (None, source)


def _excluded(fisher: Fisher, with_vectors: bool, exclude: Sequence[str]) -> dict[str, str]:
    """Return name -> reason, for the tensors to omit."""
    reasons = {}
    patterns = [_compiled(pattern) for pattern in exclude]
    for pattern in patterns:
        if not any(pattern.search(name) for name in fisher):
            raise ConfigError(
                f"an expression to exclude must be found in the name of a tensor, but {pattern.pattern!r} is in none "
                f"of {fisher.location}; see the names with: squisher inspect"
            )
    for name in fisher:
        found = next((pattern.pattern for pattern in patterns if pattern.search(name)), None)
        if HEAD.search(name):
            reasons[name] = "head"
        elif found is not None:
            reasons[name] = f"matches {found}"
        elif 0 in fisher.info(name).shape:
            reasons[name] = "no entries"
        elif len(fisher.info(name).shape) < 2 and not with_vectors:
            reasons[name] = "one axis"
    if len(reasons) == len(fisher):
        counts = ", ".join(f"{list(reasons.values()).count(why)} {why}" for why in dict.fromkeys(reasons.values()))
        raise ConfigError(
            f"an embedding must keep a tensor, but all {len(fisher)} of {fisher.location} are left out ({counts}); "
            "exclude fewer, or take tensors with one axis by --with-vectors"
        )
    return reasons


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--exclude must be a regular expression, but {pattern!r} is none: {error}") from error


def _values(fisher: Fisher, name: str, scaling: Scaling, per: Per) -> Tensor:
    """Return the means of F over the rows of a tensor or over the tensor, or its entries; flat, float32."""
    raw = fisher[name]
    check_values(raw, name, fisher.location)
    if per == "entry":
        return fisher.scaled(name, scaling).reshape(-1).float().cpu()
    rows = raw.flatten(1) if raw.dim() > 1 else raw.reshape(-1, 1)
    offset, step = fisher.offset(name, scaling), max(1, Moments.BLOCK // max(rows.shape[1], 1))
    # In blocks: the float64 copy of a whole embedding table would be the largest tensor in memory.
    means = torch.empty(len(rows), dtype=torch.float64, device=raw.device)
    for at in range(0, len(rows), step):
        means[at : at + step] = rows[at : at + step].to(torch.float64, copy=True).sub_(offset).mean(1)
    means.mul_(fisher.factor(name, scaling))
    return (means.mean().reshape(1) if per == "tensor" else means).float().cpu()


def write_embedding(embedding: Embedding, path: str | Path) -> None:
    """Write an embedding as one safetensors file, with its metadata as JSON under ``squisher_task2vec``.

    Args:
        embedding: The embedding.
        path: The file to create; it appears when it is complete.

    Raises:
        ConfigError: The file exists.
    """
    from safetensors.torch import save

    path = Path(path)
    _check_new(path)
    tensors = {name: tensor.contiguous() for name, tensor in embedding.tensors.items()}
    with written_file(path, new=True) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt", _KEY: embedding.info.model_dump_json()}))


def places_of(names: Sequence[str], out: Path) -> dict[str, Path]:
    """Return the file of each task: ``out`` itself if it ends in ``.safetensors``, else ``NAME.safetensors`` in it.

    Raises:
        ConfigError: ``out`` is one file for several tasks, or a file exists.
    """
    recover(out)
    single = out.suffix == ".safetensors"
    if single and len(names) > 1:
        raise ConfigError(f"{len(names)} embeddings need a folder, but {out} is a file; give a folder")
    found = {name: out if single else out / f"{name}.safetensors" for name in names}
    for path in found.values():
        _check_new(path)
    return found


def write_embeddings(embeddings: Mapping[str, Embedding], out: Path) -> dict[str, Path]:
    """Write embeddings to the files of :func:`places_of`: all or none.

    Raises:
        ConfigError: As for :func:`places_of`.
    """
    places = places_of(list(embeddings), out)
    if out.suffix == ".safetensors":
        write_embedding(next(iter(embeddings.values())), out)
    else:
        with written_beside(out, "keep") as folder:
            for name, embedding in embeddings.items():
                write_embedding(embedding, folder / places[name].name)
    return places


def _check_new(path: Path) -> None:
    if path.exists():
        raise ConfigError(f"an embedding must be a new file, but there is {path} already; remove it or choose another")


def is_embedding(path: Path) -> bool:
    """Return True if a file has the metadata of an embedding."""
    return path.is_file() and path.suffix == ".safetensors" and _KEY in safetensors_notes(path)


def read_embedding(path: str | Path) -> Embedding:
    """Read an embedding.

    Args:
        path: File of :func:`write_embedding`.

    Raises:
        NotFoundError: The file does not exist, or is not an embedding.
        CorruptFileError: The file or its metadata are damaged.
        ConfigError: A later version wrote the file.
        ValuesError: A value is NaN, infinite or negative.
    """
    path = Path(path)
    if not is_embedding(path):
        raise NotFoundError(f"{path} must be an embedding; make one with: squisher task2vec embed FISHER -o OUT")
    header = read_header(path)
    with reading(path, "an embedding with metadata", "embed again"):
        data = json.loads(header.metadata[_KEY])
        version = data["format_version"]
    if version != FORMAT_VERSION:
        raise ConfigError(f"{path} must have format_version {FORMAT_VERSION}, found {version!r}; upgrade this package")
    try:
        info = EmbeddingInfo.model_validate(data)
    except ValidationError as error:
        raise CorruptFileError(f"{path} must have valid metadata, but {first_error(error)}; embed again") from error
    store = SafetensorsStore([path], str(path), {path: header})
    tensors = {name: store.read(name) for name in store.infos}
    for name, tensor in tensors.items():
        check_values(tensor, name, str(path))
    return Embedding(tensors, info)
