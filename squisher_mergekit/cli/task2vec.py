"""``squisher task2vec``: tasks as vectors, how far they are from each other, and which one to start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from squisher_mergekit.applications.task2vec.distances import Metric, Normalize
    from squisher_mergekit.applications.task2vec.embedding import Embedding, Per
    from squisher_mergekit.applications.task2vec.ranking import Quality
    from squisher_mergekit.fisher.config import Scaling

_PATH = click.Path(path_type=Path)
_METRICS = ["cosine", "asymmetric", "plain_cosine", "normalized_cosine", "log_euclidean", "kl", "jensen_shannon"]
_LONGEST = 10
_SHOWN = 8


@click.group("task2vec")
def command() -> None:
    """Embed tasks by their Fishers, and tell which tasks are near.

    The embedding of a task is the mean of its Fisher over each filter (row) of the network's trunk. The networks must
    have one architecture and should come from the same pre-trained weights. Wherever a task is asked for, NAME=PATH
    names it; else it has the name of its Fisher's folder.

    \b
    Example:
        squisher task2vec embed runs/movies runs/products runs/news -o tasks
        squisher task2vec distance tasks/*.safetensors --plot tasks.png
        squisher task2vec rank tasks/movies.safetensors tasks/products.safetensors tasks/news.safetensors
    """


def _with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a distance."""
    options = (
        click.option(
            "--metric", type=click.Choice(_METRICS), default="cosine", show_default=True, help="Which distance."
        ),
        click.option(
            "--normalize",
            type=click.Choice(["none", "mean", "norm"]),
            default="mean",
            show_default=True,
            help="What each task is divided by first: a factor on one task alone changes the distance.",
        ),
        click.option(
            "--alpha", type=float, help="Of --metric asymmetric: what a complex source gains; 0.15 by default."
        ),
        click.option(
            "--model", type=_PATH, multiple=True, help="Weights of Fishers from optimizers: once, or for each."
        ),
        click.option("--quiet", is_flag=True, help="No progress bar."),
        click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well."),
    )
    for option in reversed(options):
        function = option(function)
    return function


@command.command("embed")
@click.argument("fishers", metavar="FISHER...", nargs=-1, required=True)
@click.option("-o", "--out", type=_PATH, required=True, help="A folder for NAME.safetensors; or a .safetensors file.")
@click.option(
    "--per",
    type=click.Choice(["row", "tensor", "entry"]),
    default="row",
    show_default=True,
    help="One value for each filter or row, for each tensor, or for each entry.",
)
@click.option(
    "--scaling",
    type=click.Choice(["raw", "debiased", "per_example"]),
    default="debiased",
    show_default=True,
    help="The scale of F.",
)
@click.option("--with-vectors", is_flag=True, help="Take biases and other tensors with one axis as well.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Leave out tensors in whose names this is found.")
@click.option("--model", type=_PATH, multiple=True, help="Weights of Fishers from optimizers: once, or for each.")
@click.option("--quiet", is_flag=True, help="No progress bar.")
@click.option("--json", "json_file", type=_PATH, help="Write the report to a file as well.")
def embed_command(
    fishers: tuple[str, ...],
    out: Path,
    per: Per,
    scaling: Scaling,
    with_vectors: bool,
    exclude: tuple[str, ...],
    model: tuple[Path, ...],
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Average each FISHER over the filters of the network, into a small file.

    A FISHER is a portable one or whatever `squisher extract` reads. The head is left out, known by its name:
    classifier, score, lm_head, qa_outputs, cls and the like (a pooler is none). So are tensors with one axis. The
    report lists what was left out.

    \b
    Example:
        squisher task2vec embed movies=runs/1/checkpoint-50 news=runs/2/checkpoint-50 -o tasks
    """
    from squisher_mergekit.applications.task2vec.embedding import (
        Embedding,
        embed,
        open_tasks,
        places_of,
        write_embeddings,
    )
    from squisher_mergekit.tensors.atomic import write_json

    tasks = open_tasks(fishers, model)
    places_of(list(tasks), out)
    found = {}
    for name, task in tasks.items():
        if isinstance(task, Embedding):
            raise click.UsageError(f"a FISHER must be no embedding, but {name} is one already")
        bar = _bar(task, f"Embedding {name}", quiet)
        options: dict[str, Any] = {"per": per, "scaling": scaling, "with_vectors": with_vectors, "exclude": exclude}
        found[name] = embed(task, name=name, progress=bar, **options)
    places = write_embeddings(found, out)
    for line in _embedding_lines(found):
        click.echo(line)
    if json_file is not None:
        write_json(json_file, {name: _as_dict(embedding, places[name]) for name, embedding in found.items()})


@command.command("distance")
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True)
@click.option("--plot", type=_PATH, help="Write a heat map, near tasks side by side, as PNG.")
@_with_options
def distance_command(
    tasks: tuple[str, ...],
    plot: Path | None,
    metric: Metric,
    normalize: Normalize,
    alpha: float | None,
    model: tuple[Path, ...],
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show the distance between every two TASKs.

    A TASK is an embedding, or a Fisher, which is embedded per row at the debiased scale. Metrics: cosine, the paper's,
    of F_a / (F_a + F_b) and F_b / (F_a + F_b); asymmetric, that less alpha times the source's own distance from a task
    that tells nothing; plain_cosine, of F itself; normalized_cosine, of the variances 1 / F; log_euclidean; kl;
    jensen_shannon.

    \b
    Example:
        squisher task2vec distance tasks/*.safetensors --plot tasks.png --json tasks.json
    """
    from squisher_mergekit.applications.task2vec.distances import clustered, distance_matrix
    from squisher_mergekit.tensors.atomic import write_json, write_whole

    if plot is not None:
        from squisher_mergekit.cli.task2vec_plots import heat_map  # says at once if matplotlib is missing

    known = _known_alpha(metric, alpha)
    found = _embedded(tasks, model, quiet)
    bar = _bar(found, "Comparing", quiet, "task")
    matrix = distance_matrix(found, metric, normalize, known, bar)
    order, tree = clustered(matrix)
    title = _title(metric, normalize, known)
    click.echo(title)
    for line in _matrix_lines(list(found), matrix, metric == "asymmetric"):
        click.echo(line)
    for line in _notes(found):
        click.echo(line)
    if plot is not None:
        write_whole(plot, heat_map(matrix, list(found), order, tree, title))
    if json_file is not None:
        report = {"metric": metric, "normalize": normalize, "alpha": known if metric == "asymmetric" else None}
        names = list(found)
        ordered = [names[place] for place in order]
        write_json(json_file, report | {"tasks": names, "order": ordered, "distances": matrix.tolist()})


@command.command("rank")
@click.argument("target")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--each", is_flag=True, help="Take each task given as the target in turn, not the first one alone.")
@click.option("--transfer", type=_PATH, help="Known results, CSV or JSON: target, source, score (higher is better).")
@click.option("--sizes", type=_PATH, help="Examples of each task, CSV or JSON: task, size; for the order by size.")
@_with_options
def rank_command(
    target: str,
    sources: tuple[str, ...],
    each: bool,
    transfer: Path | None,
    sizes: Path | None,
    metric: Metric,
    normalize: Normalize,
    alpha: float | None,
    model: tuple[Path, ...],
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Order the SOURCE tasks by their distance to TARGET, the nearest first.

    With --transfer, the results of training on a source before the target, the order is judged: reciprocal rank of the
    best source (MRR is its mean over targets), NDCG (the gain of a source is its score less the lowest one), and the
    place of the best source. The same of the order by size of the data, largest first, and of a random order stand
    beside it. Sizes are the Fishers' numbers of examples where all record them, or those of --sizes.

    \b
    Example:
        squisher task2vec rank movies=a news=b spam=c --each --transfer results.csv --sizes sizes.csv
    """
    from squisher_mergekit.applications.task2vec import ranking
    from squisher_mergekit.applications.task2vec.distances import distance_matrix
    from squisher_mergekit.tensors.atomic import write_json

    known = _known_alpha(metric, alpha)
    found = _embedded((target, *sources), model, quiet)
    names = list(found)
    targets = names if each else names[:1]
    results = ranking.read_transfer(transfer, names, targets) if transfer else None
    counts = ranking.read_sizes(sizes, names) if sizes else ranking.known_sizes(found)
    matrix = distance_matrix(found, metric, normalize, known, _bar(found, "Comparing", quiet, "task"))
    orders = ranking.orders_of(matrix, names, targets)
    judged = None if results is None else ranking.assess(orders, results, counts)
    click.echo(_title(metric, normalize, known))
    for line in (*_order_lines(orders, results), *_notes(found)):
        click.echo(line)
    if judged is not None:
        for line in _quality_lines(judged, counts is not None):
            click.echo(line)
    if json_file is not None:
        report = {"metric": metric, "normalize": normalize, "alpha": known if metric == "asymmetric" else None}
        quality = None if judged is None else {k: {t: vars(q) for t, q in rows.items()} for k, rows in judged.items()}
        write_json(json_file, report | {"distances": orders, "sizes": counts, "quality": quality})


def _known_alpha(metric: str, alpha: float | None) -> float:
    from squisher_mergekit.applications.task2vec.distances import ALPHA

    if alpha is not None and metric != "asymmetric":
        raise click.UsageError("--alpha belongs to --metric asymmetric")
    return ALPHA if alpha is None else alpha


def _embedded(sources: Sequence[str], models: Sequence[Path], quiet: bool) -> dict[str, Embedding]:
    """Return all tasks as embeddings, Fishers embedded with the defaults."""
    from squisher_mergekit.applications.task2vec.embedding import Embedding, embed, open_tasks

    return {
        name: task
        if isinstance(task, Embedding)
        else embed(task, name=name, progress=_bar(task, f"Embedding {name}", quiet))
        for name, task in open_tasks(sources, models).items()
    }


def _bar(names: Any, label: str, quiet: bool, unit: str = "tensor") -> Any:
    from tqdm import tqdm

    return tqdm(list(names), desc=label, unit=unit, disable=quiet, delay=2)


def _title(metric: str, normalize: str, alpha: float) -> str:
    form = f"asymmetric, alpha {alpha:g}" if metric == "asymmetric" else metric.replace("_", " ")
    divided = {"none": "F as it is", "mean": "F divided by its mean", "norm": "F divided by its L2 norm"}
    return f"Task2Vec distance ({form}; {divided[normalize]})"


def _embedding_lines(found: dict[str, Embedding]) -> Iterator[str]:
    width = max(len(name) for name in found)
    for name, embedding in found.items():
        info = embedding.info
        per = {"row": "a row", "tensor": "a tensor", "entry": "an entry"}[info.per]
        kind = info.estimator or "unknown estimator"
        yield (
            f"{name:{width}}  {embedding.size:,} values, one {per} of {len(embedding.tensors)} tensors; {kind}, "
            f"{info.scaling}, mean {embedding.mean:.3g}"
        )
    for reason, names in _left_out(found).items():
        shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        yield f"left out, {reason}: {len(names)} ({shown})"


def _left_out(found: dict[str, Embedding]) -> dict[str, list[str]]:
    reasons: dict[str, dict[str, None]] = {}
    for embedding in found.values():
        for name, why in embedding.info.excluded.items():
            reasons.setdefault(why, {})[name] = None
    return {why: list(names) for why, names in reasons.items()}


def _as_dict(embedding: Embedding, place: Path) -> dict[str, object]:
    tensors = {name: tensor.numel() for name, tensor in embedding.tensors.items()}
    return {"file": str(place), "mean": embedding.mean, "tensors": tensors, **embedding.info.model_dump(mode="json")}


def _matrix_lines(names: list[str], matrix: Tensor, directed: bool) -> Iterator[str]:
    """Return the matrix as aligned text, columns by number where names are long, and the nearest of each."""
    numbered = max(len(name) for name in names) > _LONGEST
    labels = [f"{number} {name}" for number, name in enumerate(names, 1)] if numbered else names
    heads = [str(number) for number in range(1, len(names) + 1)] if numbered else names
    width = max(len(label) for label in (*labels, "from / to"))
    cells = [
        ["-" if i == j else _number(value) for j, value in enumerate(row)] for i, row in enumerate(matrix.tolist())
    ]
    space = max(len(cell) for cell in (*heads, *(cell for row in cells for cell in row)))
    column = "nearest source" if directed else "nearest"
    yield (
        f"{'from / to' if directed else '':{width}}  " + "  ".join(f"{head:>{space}}" for head in heads) + f"  {column}"
    )
    for place, (label, row) in enumerate(zip(labels, cells, strict=True)):
        others = matrix[:, place].clone()
        others[place] = float("inf")
        nearest = names[int(others.argmin())]
        yield f"{label:{width}}  " + "  ".join(f"{cell:>{space}}" for cell in row) + f"  {nearest}"


def _number(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3e}"


def _notes(found: dict[str, Embedding]) -> Iterator[str]:
    """Say what makes distances less trustworthy than they look."""
    kinds = {embedding.info.estimator or "unknown" for embedding in found.values()}
    if len(kinds) > 1:
        yield f"note: F is estimated in different ways ({', '.join(sorted(kinds))}), which sets tasks apart as well"


def _order_lines(orders: dict[str, dict[str, float]], results: dict[str, dict[str, float]] | None) -> Iterator[str]:
    width = max(len(name) for keys in orders.values() for name in keys)
    for target, keys in orders.items():
        yield f"sources for {target}:"
        for place, source in enumerate(sorted(keys, key=lambda name: keys[name]), 1):
            score = "" if results is None else f"  score {results[target][source]:g}"
            yield f"  {place:2}  {source:{width}}  {_number(keys[source])}{score}"


def _quality_lines(judged: dict[str, dict[str, Quality]], sized: bool) -> Iterator[str]:
    rows = list(judged["distance"])
    width = max(len("place of the best"), *(len(row) + 2 for row in rows))
    for title, measure in (
        ("reciprocal rank", "reciprocal_rank"),
        ("NDCG", "ndcg"),
        ("place of the best", "best_rank"),
    ):
        yield f"{title:{width}}  " + "  ".join(f"{order:>8}" for order in judged)
        for row in rows:
            cells = "  ".join(f"{getattr(judged[order][row], measure):8.3f}" for order in judged)
            yield f"  {row:{width - 2}}  {cells}"
    if not sized:
        yield "the sizes of the data are not known to all Fishers; give --sizes for the order by size"
