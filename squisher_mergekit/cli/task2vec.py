"""``squisher task2vec``: embeddings of tasks, distances between them, rankings of sources for a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from squisher_mergekit.cli.options import (
    HELP_OPTIONS,
    PATH,
    OutputFolderPath,
    choice_option,
    combined,
    models_option,
    out_option,
    plot_option,
    report_options,
    scaling_option,
)
from squisher_mergekit.cli.tables import name_list, table

if TYPE_CHECKING:
    from torch import Tensor

    from squisher_mergekit.applications.task2vec.distances import Metric, TaskNormalize
    from squisher_mergekit.applications.task2vec.embedding import Embedding, Per
    from squisher_mergekit.applications.task2vec.ranking import Quality
    from squisher_mergekit.fisher.config import Scaling

_METRICS = ["cosine", "asymmetric", "plain_cosine", "normalized_cosine", "log_euclidean", "kl", "jensen_shannon"]
_LONGEST = 10
_SHOWN = 8


@click.group("task2vec", context_settings=HELP_OPTIONS)
def command() -> None:
    """Embed tasks by their Fishers, and compare the embeddings.

    The embedding of a task is the mean of its Fisher over each filter (row) of the network's trunk. The networks must
    have one architecture, and should come from the same pre-trained weights. NAME=PATH names a task; by default it has
    the name of its Fisher's folder.

    \b
    Example:
        squisher task2vec embed runs/movies runs/products runs/news -o tasks
        squisher task2vec distance tasks/*.safetensors --plot tasks.png
        squisher task2vec rank tasks/movies.safetensors tasks/products.safetensors tasks/news.safetensors
    """


class _Divisor(click.Choice):  # type: ignore[type-arg,unused-ignore]
    """Choice of the divisor; ``norm`` is the old word for ``l2``."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the chosen word."""
        if value == "norm":
            click.echo("--normalize norm is deprecated; use --normalize l2", err=True)
            value = "l2"
        return super().convert(value, param, ctx)


_distance_options = combined(
    choice_option("--metric", _METRICS, "Distance between two tasks.", default="cosine"),
    click.option(
        "--normalize",
        type=_Divisor(["none", "mean", "l2"]),
        default="mean",
        show_default=True,
        help="Divisor of each task's F: none, its mean, or its L2 norm. A factor on one task changes the distance.",
    ),
    click.option(
        "--alpha", type=float, help="Weight of a source's complexity in --metric asymmetric; 0.15 by default."
    ),
    models_option,
    report_options,
)


@command.command("embed")
@click.argument("fishers", metavar="FISHER...", nargs=-1, required=True)
@out_option("Folder for NAME.safetensors, or a .safetensors file.", OutputFolderPath(".safetensors"))
@choice_option(
    "--per",
    ["row", "tensor", "entry"],
    "One value for each filter or row, for each tensor, or for each entry.",
    default="row",
)
@scaling_option("Scale of F.")
@click.option("--with-vectors", is_flag=True, help="Include biases and other tensors with one axis.")
@click.option("--exclude", multiple=True, metavar="REGEX", help="Exclude each tensor whose name matches. Repeatable.")
@models_option
@report_options
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

    A FISHER is a portable Fisher, or a source that `squisher extract` reads. The command excludes the head by its name
    (classifier, score, lm_head, qa_outputs, cls and similar names; a pooler is not a head) and tensors with one axis.
    The report lists the excluded tensors.

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
    from squisher_mergekit.cli.output import progress_bar, write_report

    tasks = open_tasks(fishers, model)
    places_of(list(tasks), out)
    found = {}
    for name, task in tasks.items():
        if isinstance(task, Embedding):
            raise click.UsageError(f"each FISHER must be a Fisher, but {name} is an embedding already")
        bar = progress_bar(task, f"Embedding {name}", quiet)
        found[name] = embed(
            task, name=name, per=per, scaling=scaling, with_vectors=with_vectors, exclude=exclude, progress=bar
        )
    places = write_embeddings(found, out)
    for line in _embedding_lines(found):
        click.echo(line)
    write_report(json_file, {name: _as_dict(embedding, places[name]) for name, embedding in found.items()})


@command.command("distance")
@click.argument("tasks", metavar="TASK...", nargs=-1, required=True)
@plot_option("Write a heat map as PNG, with near tasks side by side.")
@_distance_options
def distance_command(
    tasks: tuple[str, ...],
    plot: Path | None,
    metric: Metric,
    normalize: TaskNormalize,
    alpha: float | None,
    model: tuple[Path, ...],
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Show the distance between each pair of TASKs.

    A TASK is an embedding, or a Fisher, which is embedded per row at the debiased scale. Metrics: cosine (of the paper)
    compares F_a / (F_a + F_b) with F_b / (F_a + F_b); asymmetric subtracts alpha times the distance of the source from
    the trivial task; plain_cosine compares F itself; normalized_cosine compares the variances 1 / F; the others are
    log_euclidean, kl and jensen_shannon.

    \b
    Example:
        squisher task2vec distance tasks/*.safetensors --plot tasks.png --json tasks.json
    """
    from squisher_mergekit.applications.task2vec.distances import clustered, distance_matrix
    from squisher_mergekit.cli.output import progress_bar, write_picture, write_report

    if plot is not None:
        from squisher_mergekit.cli.task2vec_plots import heat_map  # refuses before any work if matplotlib is missing

    known = _known_alpha(metric, alpha)
    found = _embedded(tasks, model, quiet)
    bar = progress_bar(found, "Comparing", quiet, "task")
    matrix = distance_matrix(found, metric, normalize, known, bar)
    order, tree = clustered(matrix)
    title = _title(metric, normalize, known)
    click.echo(title)
    for line in _matrix_lines(list(found), matrix, metric == "asymmetric"):
        click.echo(line)
    for line in _notes(found):
        click.echo(line)
    if plot is not None:
        write_picture(plot, heat_map(matrix, list(found), order, tree, title))
    report = {"metric": metric, "normalize": normalize, "alpha": known if metric == "asymmetric" else None}
    names = list(found)
    ordered = [names[place] for place in order]
    write_report(json_file, report | {"tasks": names, "order": ordered, "distances": matrix.tolist()})


@command.command("rank")
@click.argument("target")
@click.argument("sources", metavar="SOURCE...", nargs=-1, required=True)
@click.option("--each", is_flag=True, help="Rank for each task as the target in turn, not only for the first one.")
@click.option(
    "--transfer", type=PATH, help="CSV or JSON file of known results: target, source, score (higher is better)."
)
@click.option(
    "--sizes", type=PATH, help="CSV or JSON file of the number of examples: task, size; for the order by size."
)
@_distance_options
def rank_command(
    target: str,
    sources: tuple[str, ...],
    each: bool,
    transfer: Path | None,
    sizes: Path | None,
    metric: Metric,
    normalize: TaskNormalize,
    alpha: float | None,
    model: tuple[Path, ...],
    quiet: bool,
    json_file: Path | None,
) -> None:
    """Rank the SOURCE tasks by their distance to TARGET, nearest first.

    --transfer gives the results of training on a source before the target. The command then scores the ranking: by the
    reciprocal rank of the best source (MRR is its mean over targets), by NDCG (the gain of a source is its score less
    the lowest one), and by the position of the best source. It also scores the order by number of examples, largest
    first, and a random order. The numbers come from the metadata of the Fishers, or from --sizes.

    \b
    Example:
        squisher task2vec rank movies=a news=b spam=c --each --transfer results.csv --sizes sizes.csv
    """
    from squisher_mergekit.applications.task2vec import ranking
    from squisher_mergekit.applications.task2vec.distances import distance_matrix
    from squisher_mergekit.cli.output import progress_bar, write_report

    known = _known_alpha(metric, alpha)
    found = _embedded((target, *sources), model, quiet)
    names = list(found)
    targets = names if each else names[:1]
    results = ranking.read_transfer(transfer, names, targets) if transfer else None
    counts = ranking.read_sizes(sizes, names) if sizes else ranking.known_sizes(found)
    matrix = distance_matrix(found, metric, normalize, known, progress_bar(found, "Comparing", quiet, "task"))
    orders = ranking.orders_of(matrix, names, targets)
    judged = None if results is None else ranking.assess(orders, results, counts)
    click.echo(_title(metric, normalize, known))
    for line in (*_order_lines(orders, results), *_notes(found)):
        click.echo(line)
    if judged is not None:
        for line in _quality_lines(judged, counts is not None):
            click.echo(line)
    report = {"metric": metric, "normalize": normalize, "alpha": known if metric == "asymmetric" else None}
    quality = None if judged is None else {k: {t: vars(q) for t, q in rows.items()} for k, rows in judged.items()}
    write_report(json_file, report | {"distances": orders, "sizes": counts, "quality": quality})


def _known_alpha(metric: str, alpha: float | None) -> float:
    """Return alpha, or its default."""
    from squisher_mergekit.applications.task2vec.distances import ALPHA

    if alpha is not None and metric != "asymmetric":
        raise click.UsageError("--alpha belongs to --metric asymmetric")
    return ALPHA if alpha is None else alpha


def _embedded(sources: Sequence[str], models: Sequence[Path], quiet: bool) -> dict[str, Embedding]:
    """Return all tasks as embeddings; Fishers are embedded with the defaults."""
    from squisher_mergekit.applications.task2vec.embedding import Embedding, embed, open_tasks
    from squisher_mergekit.cli.output import progress_bar

    return {
        name: task
        if isinstance(task, Embedding)
        else embed(task, name=name, progress=progress_bar(task, f"Embedding {name}", quiet))
        for name, task in open_tasks(sources, models).items()
    }


def _title(metric: str, normalize: str, alpha: float) -> str:
    """Return the title of tables and pictures."""
    form = f"asymmetric, alpha {alpha:g}" if metric == "asymmetric" else metric.replace("_", " ")
    divided = {"none": "F as it is", "mean": "F divided by its mean", "l2": "F divided by its L2 norm"}
    return f"Task2Vec distance ({form}; {divided[normalize]})"


def _embedding_lines(found: dict[str, Embedding]) -> Iterator[str]:
    """Yield a line for each embedding, and the excluded tensors by reason."""
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
        yield f"left out, {reason}: {len(names)} ({name_list(names, _SHOWN)})"


def _left_out(found: dict[str, Embedding]) -> dict[str, list[str]]:
    """Return reason -> names of the tensors that it excludes in some embedding."""
    reasons: dict[str, dict[str, None]] = {}
    for embedding in found.values():
        for name, why in embedding.info.excluded.items():
            reasons.setdefault(why, {})[name] = None
    return {why: list(names) for why, names in reasons.items()}


def _as_dict(embedding: Embedding, file: Path) -> dict[str, object]:
    """Return the metadata and sizes of an embedding as JSON data."""
    tensors = {name: tensor.numel() for name, tensor in embedding.tensors.items()}
    return {"file": str(file), "mean": embedding.mean, "tensors": tensors, **embedding.info.model_dump(mode="json")}


def _matrix_lines(names: list[str], matrix: Tensor, directed: bool) -> Iterator[str]:
    """Yield the matrix as a table, with the nearest task of each; long names get a number."""
    numbered = max(len(name) for name in names) > _LONGEST
    labels = [f"{number} {name}" for number, name in enumerate(names, 1)] if numbered else names
    heads = [str(number) for number in range(1, len(names) + 1)] if numbered else names
    rows = []
    for index, (label, values) in enumerate(zip(labels, matrix.tolist(), strict=True)):
        others = matrix[:, index].clone()
        others[index] = float("inf")
        cells = ["-" if column == index else _number(value) for column, value in enumerate(values)]
        rows.append((label, *cells, names[int(others.argmin())]))
    head = ("from / to" if directed else "", *heads, "nearest source" if directed else "nearest")
    yield from table(head, rows)


def _number(value: float) -> str:
    """Return a distance as text."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3e}"


def _notes(found: dict[str, Embedding]) -> Iterator[str]:
    """Yield notes on differences between the Fishers that distort the distances."""
    kinds = {embedding.info.estimator or "unknown" for embedding in found.values()}
    if len(kinds) > 1:
        yield f"note: F is estimated in different ways ({', '.join(sorted(kinds))}), which adds to the distances"


def _order_lines(orders: dict[str, dict[str, float]], results: dict[str, dict[str, float]] | None) -> Iterator[str]:
    """Yield the ranked sources of each target."""
    width = max(len(name) for keys in orders.values() for name in keys)
    for target, keys in orders.items():
        yield f"sources for {target}:"
        for place, source in enumerate(sorted(keys, key=lambda name: keys[name]), 1):
            score = "" if results is None else f"  score {results[target][source]:g}"
            yield f"  {place:2}  {source:{width}}  {_number(keys[source])}{score}"


def _quality_lines(judged: dict[str, dict[str, Quality]], sized: bool) -> Iterator[str]:
    """Yield the scores of the rankings, one table for each measure."""
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
        yield "some Fishers do not record their number of examples; give --sizes for the order by size"
