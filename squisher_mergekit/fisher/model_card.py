"""The section of a model card that says what a Fisher is, where it comes from, and how to merge by it."""

from __future__ import annotations

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig

BEGIN = "<!-- squisher-mergekit: begin of the Fisher section; replaced by the next push -->"
END = "<!-- squisher-mergekit: end of the Fisher section -->"
HEADER = "---\nlibrary_name: squisher-mergekit\ntags:\n- mergekit\n- fisher\n- squisher\n---\n"

_PURPOSE = """A diagonal Fisher says how much each weight of a model matters to what the model was trained on. With it,
[squisher-mergekit](https://pypi.org/project/squisher-mergekit/) merges this model with others of its family, without
data: each entry of the result is the mean of the models' entries, weighted by their Fishers."""
_ADAPTER = """This is the Fisher of a LoRA adapter, under the names in `adapter_model.safetensors`. It says nothing of
the merged weights: a merge of full models by it is refused."""


def section(config: FisherConfig, source: str, model: str, size: str) -> str:
    """Return the section for one Fisher, between its two markers; what is not known is shown as unknown.

    Args:
        config: The metadata.
        source: Where it is published, ``org/name[@revision]``.
        model: The model it belongs to, ``org/name``, for the example.
        size: Its size in words.

    Returns:
        Markdown, with no path and no host name in it.

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
    r"""Put a section into a README: in place of the one between the markers, else at the end.

    Args:
        readme: The README as it is; None where there is none, which gives one with a YAML header.
        text: What :func:`section` gave.

    Returns:
        The README; all that is not between the markers stays as it was.

    Raises:
        ConfigError: It has one marker without the other, or several.

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
            f"has {begins} and {ends}; remove what is left of the section there"
        )
    return readme[:start] + text + readme[stop + len(END) :]


def _facts(config: FisherConfig, size: str) -> list[tuple[str, object]]:
    """Return what the table says, name and value."""
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
    """Return one value of those that may differ between parameters, and say that they do."""
    return f"{value.get('default')}, others for some tensors" if isinstance(value, dict) else value


def _cell(value: object) -> str:
    """Write a value so that it stays in its cell of a table."""
    if value is None:
        return "unknown"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())


def _example(source: str, model: str) -> list[str]:
    """Return a merge by this Fisher and another."""
    return [
        "```yaml",
        "merge_method: squisher",
        "models:",
        f"  - model: {model}",
        "    parameters:",
        f"      fisher: {source}",
        "  - model: another/model          # of the same family; its own Fisher",
        "    parameters:",
        "      fisher: another/model@fisher",
        f"base_model: {model}",
        "```",
        "",
        "    pip install squisher-mergekit",
        "    mergekit-yaml merge.yml merged",
        "",
    ]
