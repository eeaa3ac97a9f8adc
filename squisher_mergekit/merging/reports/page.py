"""Report of a merge, or of its plan, as one HTML file that needs no network."""

from __future__ import annotations

import importlib.resources
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from squisher_mergekit.merging.merge_plan import size_text
from squisher_mergekit.merging.reports.heat_maps import VOTES, HeatMap, counted_votes, letter, share_maps
from squisher_mergekit.merging.reports.totals import blank_text

_DARK = 0.55  # figures above it have white text


def page(preview: Mapping[str, Any], recipe: str, title: str, report: Mapping[str, Any] | None = None) -> str:
    """Return the page.

    Args:
        preview: Plan of the merge, see :meth:`~squisher_mergekit.merging.merge_plan.MergePlan.as_dict`.
        recipe: Configuration of the merge, YAML.
        title: Title of the page.
        report: Report of the run; None for a plan, which has no shares yet.

    Returns:
        The HTML file.
    """
    parts = [f"<h1>{escape(title)}</h1>", _summary(preview, report), *_warnings(preview)]
    parts += [_heading("Models"), _models(preview, report)]
    if report is not None:
        parts += [_heading("Share of each model"), _shares(report)]
        if "structure" in report:
            parts += [_heading("Merged step of the coupled matrices"), _steps(report)]
    if preview["fallbacks"]:
        parts += [_heading("Tensors without a Fisher"), _pairs(preview["fallbacks"])]
    if preview["notes"]:
        parts += [_heading("Notes"), *(f"<p>{escape(note)}</p>" for note in preview["notes"])]
    parts += [_heading("Recipe"), f"<pre>{escape(recipe)}</pre>"]
    if report is not None:
        parts += [_heading("Tensors"), _tensors(report)]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + f"\n<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def _summary(preview: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    method = preview["method"]
    found = f"{escape(method)}: {size_text(dict(preview))}"
    if report is None:
        return f'<p class="soft">Plan. {found}</p>'
    silent = f"; {report['silent']:.2%} without a vote: base value" if report.get("silent") else ""
    return f'<p class="soft">{found}; {escape(blank_text(report))}{silent}</p>'


def _warnings(preview: Mapping[str, Any]) -> list[str]:
    lost = [f"the merge loses {len(preview['lost'])} tensors: {', '.join(preview['lost'])}"] if preview["lost"] else []
    return [f'<p class="warning">{escape(text)}</p>' for text in [*lost, *preview["warnings"]]]


def _models(preview: Mapping[str, Any], report: Mapping[str, Any] | None) -> str:
    weights = {} if report is None else report["effective_weight"]
    labels = list(weights) or [model["model"] for model in preview["models"]]
    letters = {label: letter(place) for place, label in enumerate(labels)}
    shares = {} if report is None else counted_votes(report)
    head = ["", "model", "Fisher"]
    head += [] if report is None else ["effective weight"]
    head += [VOTES[key] for key in shares]
    head += ["coverage", "steps", "beta2", "scale", "kind", "optimizer"]
    rows = []
    for model in preview["models"]:
        label, scale = model["model"], model["scale"]
        cells = [letters.get(label, "base"), label, model["fisher"]]
        cells += [] if report is None else [f"{weights[label]:.1%}" if label in weights else "base"]
        cells += [f"{found.get(label, 0.0):.1%}" if label in weights else "" for found in shares.values()]
        cells += [
            f"{model['covered'] / max(model['entries'], 1):.1%}",
            model["steps"],
            model["beta2"],
            None if scale is None else f"{model['scaling']} x{scale:.4g}",
            ", ".join(str(model[key]) for key in ("estimator", "layout") if model[key] is not None),
            model["optimizer"],
        ]
        rows.append(cells)
    return _list(head, rows, paths=(1, 2), words=("kind", "optimizer"))


def _list(
    head: Sequence[str], rows: Iterable[Sequence[Any]], paths: Sequence[int] = (0,), words: Sequence[str] = ()
) -> str:
    """Return a table; the columns ``paths`` hold long texts, those named in ``words`` short ones, others numbers."""
    kinds = [
        ' class="name path"' if place in paths else ' class="name"' if text in words or place < min(paths) else ""
        for place, text in enumerate(head)
    ]

    def line(tag: str, cells: Sequence[Any]) -> str:
        texts = ("" if value is None else escape(str(value)) for value in cells)
        return "".join(f"<{tag}{kind}>{text}</{tag}>" for kind, text in zip(kinds, texts, strict=True))

    body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
    return (
        f'<div class="wide"><table class="list"><thead><tr>{line("th", head)}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _shares(report: Mapping[str, Any]) -> str:
    found = share_maps(report)
    largest = max((value for each in found for value in each.values.values()), default=0.0)
    top = min(max(math.ceil(5 * largest) / 5, 0.2), 1.0)
    maps = "".join(f"<div><h3>{escape(each.title)}</h3>{_map(each, top)}</div>" for each in found)
    steps = "".join(f'<i style="--v:{v:g}"></i>' for v in (0, 0.2, 0.4, 0.6, 0.8, 1))
    key = f'<div class="key"><b>0 %</b>{steps}<b>{top:.0%}</b> of the entries, by layer and kind of matrix</div>'
    return f'{key}<div class="maps">{maps}</div>'


def _map(found: HeatMap, top: float) -> str:
    heads = "".join(f'<th class="kind"><span>{escape(column)}</span></th>' for column in found.columns)
    lines = []
    for row in found.rows:
        cells = []
        for column in found.columns:
            value = found.values.get((row, column))
            if value is None:
                cells.append('<td class="none"></td>')
                continue
            share = min(max(value / top, 0.0), 1.0)
            dark = ' class="dark"' if share > _DARK else ""
            place = escape(f"{row} {column}".strip(), quote=True)
            cells.append(f'<td{dark} style="--v:{share:.3f}" title="{place}: {value:.2%}">{value * 100:.0f}</td>')
        lines.append(f'<tr><th class="name">{escape(row)}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="wide"><table class="map"><thead><tr><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _steps(report: Mapping[str, Any]) -> str:
    """Return the table of shares in the merged step, conflict and effective rank by layer."""
    structure = report["structure"]
    labels = list(structure["share"])
    letters = {label: letter(list(report["effective_weight"]).index(label)) for label in labels}
    sides = list(structure["effective_rank"])
    head = ["layer", *(f"share of {letters[label]}" for label in labels), "conflict"]
    head += [f"rank over {side} of {letters[label]}" for side in sides for label in labels]
    entries = {"all": structure, **structure["layers"]}
    rows = [
        [
            layer,
            *(f"{found['share'].get(label, 0.0):.1%}" for label in labels),
            f"{found['conflict']:.1%}",
            *(f"{found['effective_rank'].get(s, {}).get(label, 0.0):.1f}" for s in sides for label in labels),
        ]
        for layer, found in entries.items()
    ]
    text = (
        '<p class="soft">Conflict: 0 for equal models, 1 if they cancel out. Rank: number of directions that a factor '
        "weighs.</p>"
    )
    return text + _list(head, rows)


def _pairs(reasons: Mapping[str, str]) -> str:
    return _list(["tensor", "reason"], reasons.items(), paths=(0, 1))


def _tensors(report: Mapping[str, Any]) -> str:
    """Return the table of all tensors, which sorts by any column."""
    labels = list(report["effective_weight"])
    titles = ["tensor", "entries", *(letter(place) for place in range(len(labels))), "no signal"]
    votes = [(key, label) for key, found in counted_votes(report).items() for label in labels if label in found]
    titles += [f"{letter(labels.index(label))} {VOTES[key]}" for key, label in votes]
    head = "".join(
        f'<th{"" if place else " class=name"}><button class="sort">{escape(text)}</button></th>'
        for place, text in enumerate(titles)
    )
    rows = []
    for name, found in report["by_tensor"].items():
        shares = [found["effective_weight"].get(label, 0.0) for label in labels]
        shares += [found["fell_back"], *(found.get(key, {}).get(label, 0.0) for key, label in votes)]
        cells = "".join(f'<td data-value="{share:.6f}">{share:.1%}</td>' for share in shares)
        count = found["entries"]
        rows.append(f'<tr><td class="name">{escape(name)}</td><td data-value="{count}">{count:,}</td>{cells}</tr>')
    return (
        '<p><input id="filter" type="search" placeholder="part of a name" aria-label="part of a name"></p>'
        f'<div class="wide"><table class="list" id="tensors"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
