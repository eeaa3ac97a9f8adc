"""Section of a model card about a published Fisher: its purpose, its provenance, an example merge."""

from __future__ import annotations

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig

BEGIN = "<!-- squisher-mergekit: begin of the Fisher section; replaced by the next push -->"
END = "<!-- squisher-mergekit: end of the Fisher section -->"
HEADER = "---\nlibrary_name: squisher-mergekit\ntags:\n- mergekit\n- fisher\n- squisher\n---\n"

_PURPOSE = """A diagonal Fisher measures how much each weight of a model matters to its training task. With it,
squisher-mergekit merges this model with others of its family, without data: each entry of the result is the mean of the
models' entries, weighted by their Fishers."""
_ADAPTER = """This is the Fisher of a LoRA adapter, with the names in `adapter_model.safetensors`. It does not measure
the merged weights: squisher-mergekit refuses a merge of full models with it."""


def section(config: FisherConfig, source: str, model: str, size: str) -> str:
    """Return the section for one Fisher, between its two markers.

    Args:
        config: The metadata. An unknown value is shown as "unknown".
        source: Hub id of the Fisher, ``org/name[@revision]``.
        model: Hub id of its model, ``org/name``, for the example.
        size: Size of its files, in words.

    Returns:
        Markdown, without paths or host names.

    Example:
        >>> print(section(FisherConfig(), "org/name@fisher", "org/name", "3 kB").splitlines()[2])
        ## Fisher
    """
    rows = [f"| {key} | {_cell(value)} |" for key, value in _facts(config, size)]
    return "\n".join(
        [
            BEGIN,
            "",
            "## Fisher",
            "",
            _PURPOSE,
            "",
            "| | |",
            "|---|---|",
            *rows,
            "",
            *(_example(source, model) if config.parameters == "model" else [_ADAPTER, ""]),
            END,
        ]
    )


def insert(readme: str | None, text: str) -> str:
    r"""Insert a section into a README: in place of the section between the markers, else at the end.

    Args:
        readme: The README; None to make one with a YAML header.
        text: The section, from :func:`section`.

    Returns:
        The README, unchanged outside the markers.

    Raises:
        ConfigError: The README does not have each marker once and in order.

    Example:
        >>> old = f"# Mine\n\n{BEGIN}\nold\n{END}\nmore\n"
        >>> insert(old, f"{BEGIN}\nnew\n{END}") == old.replace("old", "new")
        True
    """
    if readme is None:
        return f"{HEADER}\n{text}\n"
    begins, ends = readme.count(BEGIN), readme.count(END)
    if begins == ends == 0:
        gap = "" if not readme else "\n" if readme.endswith("\n") else "\n\n"
        return f"{readme}{gap}{text}\n"
    start, stop = readme.find(BEGIN), readme.find(END)
    if begins != 1 or ends != 1 or stop < start:
        raise ConfigError(
            "README.md must have the two marker lines of the Fisher section once each and in order, or neither, but "
            f"has {begins} and {ends}; remove the rest of the section there"
        )
    return readme[:start] + text + readme[stop + len(END) :]


def _facts(config: FisherConfig, size: str) -> list[tuple[str, object]]:
    """Return the rows of the table, as names and values."""
    optimizer, source, coverage = config.optimizer, config.source, config.coverage
    total = coverage.with_ + len(coverage.without)
    kind = " ".join(filter(None, (config.estimator, config.statistic))) or None
    facts: list[tuple[str, object]] = [("estimator", kind)]
    if config.estimator in ("squisher", None):
        facts += [
            ("optimizer", optimizer.class_ if optimizer else None),
            ("beta2", _default(optimizer.beta2 if optimizer else None)),
            ("steps", _default(config.steps)),
            ("examples per step", config.examples_per_step),
        ]
    else:
        facts.append(("examples", config.num_examples))
    return [
        *facts,
        ("coverage", f"{coverage.with_} of {total} tensors" if total else None),
        ("made from", source.layout),
        ("encoding", ", ".join(sorted(set(config.encoding.values())))),
        ("size", size),
        ("fingerprint of the weights", config.weights_fingerprint),
    ]


def _default(value: object) -> object:
    """Return the default of a value per parameter, with a note that others differ."""
    return f"{value.get('default')}, others for some tensors" if isinstance(value, dict) else value


def _cell(value: object) -> str:
    """Return a value as the text of one table cell."""
    if value is None:
        return "unknown"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())


def _example(source: str, model: str) -> list[str]:
    """Return the lines of an example merge with this Fisher and another."""
    return [
        "```yaml",
        "merge_method: squisher",
        "models:",
        f"  - model: {model}",
        "    parameters:",
        f"      fisher: {source}",
        "  - model: another/model          # a model of the same family, with its own Fisher",
        "    parameters:",
        "      fisher: another/model@fisher",
        f"base_model: {model}",
        "```",
        "",
        "    mergekit-yaml merge.yml merged",
        "",
    ]
