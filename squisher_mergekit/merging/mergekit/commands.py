"""Merges by mergekit's own functions, called as its commands call them, for the commands of this package.

mergekit is imported inside the functions: it takes seconds, and ``squisher --help`` must not wait for it.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from squisher_mergekit.errors import ConfigError, NotFoundError, SquisherError
from squisher_mergekit.merging.mergekit.supported import need
from squisher_mergekit.merging.parameters import METHODS, scalars
from squisher_mergekit.tensors.input_files import brief, exists, expanded

LOG = logging.getLogger("squisher_mergekit")

if TYPE_CHECKING:
    import click

    from squisher_mergekit.merging.run import Run
    from squisher_mergekit.merging.sources import FisherSources


def help_class() -> "type[click.Command]":
    """Return mergekit's class of commands, whose help groups the merge options."""
    from mergekit.options import PrettyPrintHelp

    found: type[click.Command] = PrettyPrintHelp
    return found


def merge_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add mergekit's merge options to a command, which gets them as the argument ``merge_options``."""
    from mergekit.options import add_merge_options

    decorated: Callable[..., Any] = add_merge_options(function)
    for option in getattr(decorated, "__click_params__", ()):
        if option.name == "out_shard_size":
            convert = option.type.convert
            option.type.convert = functools.partial(_shard_size, convert)
    return decorated


def _shard_size(convert: Callable[..., int], value: Any, param: Any, ctx: Any) -> int:
    """Return a size in bytes.

    Raises:
        BadParameter: mergekit's function, which ends in a traceback, cannot read it.
    """
    import click

    try:
        return convert(value, param, ctx)
    except (ValueError, IndexError):
        raise click.BadParameter(
            f"a size must be a number of bytes, or a whole number with k, m or b (thousand, million, billion), found "
            f"{value!r:.80}; write 5b for 5 GB",
            ctx,
            param,
        ) from None


def read_config(text: str) -> Any:
    """Parse the YAML of a merge as mergekit does.

    Raises:
        ConfigError: The text is no valid merge configuration, or is for another merge method.
    """
    from mergekit.config import MergeConfiguration

    return MergeConfiguration.model_validate(read_document(text))  # checked by the hook into this class


def read_document(text: str) -> dict[str, Any]:
    """Parse the YAML of a merge by a method of this package.

    Raises:
        ConfigError: The text is no YAML of a merge, or is for another merge method.
    """
    from squisher_mergekit.merging.mergekit import document

    parsed: dict[str, Any] = document.read_yaml(text)
    method = parsed.get("merge_method")
    if method not in METHODS:
        document.refuse_misspelt_method(method)
        cure = f"use mergekit-yaml for {method}" if method else "add it"
        raise ConfigError(f"merge_method must be {' or '.join(METHODS)} here, found {method}; {cure}")
    return parsed


def resolved_models(config: Any, trust_remote_code: bool = False) -> list[tuple[str, str | None]]:
    """Return name and stated dtype of each model, with runs replaced by checkpoints, and adapters by base and LoRA.

    Args:
        config: Configuration of the merge; changed in place.
        trust_remote_code: Let transformers run the code of a model.

    Raises:
        RefusedError: A model does not exist, or its configuration cannot be read.
    """
    from squisher_mergekit.merging.mergekit.model_folders import resolve_models

    resolve_models(config)
    found = []
    for item in config.models:
        with mergekit_errors(config):
            dtype = getattr(item.model.config(trust_remote_code=trust_remote_code), "dtype", None)
        found.append((str(item.model), None if dtype is None else str(dtype).removeprefix("torch.")))
    return found


def input_paths(config: Any, further: Iterable[Any] = ()) -> list[Path]:
    """Return the local folders and files that a merge reads: those of its models and adapters, and its Fishers.

    Args:
        config: Configuration of the merge; changed in place.
        further: Further values of ``fisher:``.

    Raises:
        RefusedError: A model does not exist.
    """
    from squisher_mergekit.merging.mergekit.document import blocks_of
    from squisher_mergekit.merging.mergekit.model_folders import resolve_models

    resolve_models(config)
    models = [part for item in config.referenced_models() for part in (item.model, item.lora) if part is not None]
    named = [value for block in blocks_of(config) for value in scalars(block.settings.get("fisher", "auto"))]
    fishers = [str(value) for value in (*named, *further) if value not in ("auto", "none")]
    paths = [*(Path(part.path) for part in models), *(expanded(fisher) for fisher in fishers)]
    return [path for path in paths if exists(path)]


def plan_config(
    config: Any,
    *,
    strict: bool = False,
    allow_missing: bool = False,
    sources: "FisherSources | None" = None,
    **options: Any,
) -> dict[str, Any]:
    """Plan a merge as ``mergekit-yaml`` does, and stop there.

    Args:
        config: Configuration of the merge.
        strict: Refuse a Fisher made at other weights.
        allow_missing: Go on without tensors that the merge would lose.
        sources: Open Fishers to share with other runs; the caller closes them.
        **options: Fields of mergekit's ``MergeOptions``.

    Returns:
        The preview, see :meth:`~squisher_mergekit.merging.merge_plan.MergePlan.as_dict`.

    Raises:
        RefusedError: The merge is refused.
        UnsupportedMergekitError: The installed mergekit plans in another way.
    """
    from mergekit import merge
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    from squisher_mergekit.merging.mergekit.lookup import forget_files
    from squisher_mergekit.merging.mergekit.model_folders import resolve_models
    from squisher_mergekit.merging.run import Run

    forget_files()
    model_out_config = need(merge, "_model_out_config", "trust_remote_code")
    resolve_models(config, options.get("lora_merge_cache"), options.get("transformers_cache"))
    with (
        Run(config.merge_method, quiet=True, strict=strict, allow_missing=allow_missing, sources=sources) as run,
        mergekit_errors(config),
    ):
        given = _options_of(run, MergeOptions(**options, quiet=True))
        architecture = get_architecture_info(config, given)
        LoaderCache().setup(options=given)
        output = model_out_config(config, architecture, trust_remote_code=given.trust_remote_code)
        # Planning to disk writes nothing; the executor, which does, never runs.
        MergePlanner(config, architecture, options=given, out_model_config=output).plan_to_disk("unused")
    assert run.preview is not None
    return run.preview


def run_config(
    config: Any,
    text: str,
    folder: Path,
    options: Any,
    *,
    strict: bool = False,
    allow_missing: bool = False,
    reported: bool = False,
    sources: "FisherSources | None" = None,
) -> "Run":
    """Merge as ``mergekit-yaml`` does, and write a model card that needs no network.

    Args:
        config: Configuration of the merge.
        text: The configuration as YAML.
        folder: Output folder.
        options: mergekit's ``MergeOptions``.
        strict: Refuse a Fisher made at other weights.
        allow_missing: Go on without tensors that the merge would lose.
        reported: Compute the figures of a structure as well.
        sources: Open Fishers to share with other runs; the caller closes them.

    Returns:
        The closed run, with its report and preview.

    Raises:
        RefusedError: The merge is refused.
    """
    from mergekit.merge import generate_card, run_merge

    from squisher_mergekit.merging.reports.card import CARD, provenance
    from squisher_mergekit.merging.run import Run

    given_run = Run(config.merge_method, options.quiet, strict, allow_missing, reported, sources)
    with given_run as run, mergekit_errors(config):
        given = _options_of(run, options.model_copy(update={"write_model_card": False}))
        run_merge(config, str(folder), given, config_source=text)
    if options.write_model_card:
        card = generate_card(config=config, config_yaml=text, name=folder.name)
        (folder / CARD).write_text(card + provenance(run, _base_of(config)), encoding="utf-8")
        (folder / "mergekit_config.yml").write_text(text, encoding="utf-8")
    return run


def run_as_adapter(
    config: Any,
    text: str,
    folder: Path,
    options: Any,
    rank: int | None,
    *,
    strict: bool = False,
    allow_missing: bool = False,
) -> tuple["Run", dict[str, Any]]:
    """Merge LoRAs of one base in float32, and write the change from the base as an adapter of peft.

    Args:
        config: Configuration of the merge.
        text: The configuration as YAML.
        folder: Output folder.
        options: mergekit's ``MergeOptions``.
        rank: Rank of the adapter; None for the sum of the ranks.
        strict: Refuse a Fisher made at other weights.
        allow_missing: Go on without tensors that the merge would lose.

    Returns:
        The closed run, and the report of :func:`~squisher_mergekit.models.lora.low_rank.write_adapter`.

    Raises:
        ConfigError: A model is no LoRA.
        RefusedError: The merge is refused.
    """
    from mergekit.io.tasks import LoaderCache

    from squisher_mergekit.merging.mergekit.model_folders import resolve_models
    from squisher_mergekit.merging.mergekit.references import AdaptedReference
    from squisher_mergekit.merging.reports.card import CARD, bare_card, provenance
    from squisher_mergekit.models.adapters import ADAPTER_CONFIG
    from squisher_mergekit.models.lora.low_rank import common_bias, write_adapter
    from squisher_mergekit.models.weights import Weights
    from squisher_mergekit.tensors.atomic import scratch_beside

    resolve_models(config, cache_dir=options.transformers_cache)
    models = [item.model for item in config.models or []]
    plain = next((model for model in models if not isinstance(model, AdaptedReference)), None)
    if plain is not None or not models:
        raise ConfigError(
            f"--as-adapter needs LoRAs under models:, but {plain or 'there is none'}"
            f"{' is a full model' if plain else ''}; list LoRAs alone, or leave --as-adapter out"
        )
    adapters = [Path(model.lora.path) for model in models]
    common_bias([folder for folder in adapters if exists(folder / ADAPTER_CONFIG)])
    config.dtype, config.out_dtype = "float32", None
    changes = {"lora_merge_dtype": "float32", "lora_merge_cache": None, "copy_tokenizer": False}
    with scratch_beside(folder) as scratch:
        given = options.model_copy(update={**changes, "write_model_card": False})
        run = run_config(config, text, scratch / "merged", given, strict=strict, allow_missing=allow_missing)
        loras = [LoaderCache().get(model).files.lora for model in models]
        if not loras[0].base.infos:
            raise ConfigError(
                f"--as-adapter needs the base as safetensors, but {loras[0].base.folder} has none; save the base by "
                "save_pretrained"
            )
        merged = Weights(scratch / "merged")
        report = write_adapter(folder, loras, rank, str(models[0].model), merged.read)
    if options.write_model_card:
        card = bare_card(folder.name, run.method, text) + provenance(run, _base_of(config))
        (folder / CARD).write_text(card, encoding="utf-8")
        (folder / "mergekit_config.yml").write_text(text, encoding="utf-8")
    return run, report


def _base_of(config: Any) -> str | None:
    """Return the name of the base model; None without one."""
    return None if config.base_model is None else str(config.base_model)


def _options_of(run: "Run", options: Any) -> Any:
    """Return mergekit's options with the run added, which the planner finds there."""
    from mergekit.options import MergeOptions

    class RunOptions(MergeOptions):  # type: ignore[misc]
        """Merge options, and the run that they belong to."""

        run: Any

    return RunOptions(**dict(options), run=run)


@contextmanager
def mergekit_errors(config: Any = None) -> Iterator[None]:
    """Turn the errors of mergekit and transformers for a wrong configuration into one line.

    Args:
        config: Configuration of the merge, whose models on the Hub an error may concern; None without one.

    Raises:
        NotFoundError: The Hub cannot be reached, or has no such model.
        ConfigError: mergekit or transformers raised another error.
    """
    try:
        yield
    except SquisherError:
        raise
    except Exception as error:  # a damaged file can make mergekit, transformers and safetensors raise nearly anything
        remote = [] if config is None or "huggingface" not in str(error).lower() else _not_local(config)
        if remote:
            raise NotFoundError(
                f"a model must be a local folder or on the Hub, but there is no folder {' nor '.join(remote)}, and of "
                f"the Hub: {brief(error).partition('. ')[0]}; download the model first, correct the name, or write "
                "BASE+ADAPTER for a LoRA whose base is elsewhere"
            ) from error
        raise ConfigError(f"mergekit cannot do this merge: {brief(error)}") from error


def _not_local(config: Any) -> list[str]:
    """Return the names of the models of a merge that are no local folders, each once."""
    paths = [
        path.path for model in config.referenced_models() for path in (model.model, model.lora) if path is not None
    ]
    return list(dict.fromkeys(path for path in paths if not exists(Path(path))))


def without_hub(generate_card: Callable[..., str]) -> Callable[..., str]:
    """Return mergekit's function for model cards that needs no Hub for merges by our methods.

    Args:
        generate_card: mergekit's function, which asks the Hub about local folders as well.
    """

    @functools.wraps(generate_card)
    def card(config: Any, config_yaml: str, name: str | None = None) -> str:
        try:
            return generate_card(config=config, config_yaml=config_yaml, name=name)
        except Exception:  # each version of the Hub's client raises other classes
            if config.merge_method not in METHODS:
                raise
            from squisher_mergekit.merging.reports.card import bare_card

            return bare_card(name or "", config.merge_method, config_yaml)

    return card


def with_tokenizer_warning(copy_tokenizer: Callable[..., None]) -> Callable[..., None]:
    """Return mergekit's function that copies the tokenizer, with one line in place of a traceback where there is none.

    Args:
        copy_tokenizer: mergekit's function, which raises any error of transformers.
    """

    @functools.wraps(copy_tokenizer)
    def copy(merge_config: Any, out_path: str, options: Any) -> None:
        if merge_config.merge_method not in METHODS:
            copy_tokenizer(merge_config, out_path, options=options)
            return
        from squisher_mergekit.merging.mergekit.model_folders import lacks_tokenizer

        donor = merge_config.base_model or merge_config.referenced_models()[0]
        if lacks_tokenizer(donor):
            LOG.warning("%s has no tokenizer, so the merged model has none; copy one into its folder", donor)
            return
        try:
            copy_tokenizer(merge_config, out_path, options=options)
        except Exception as error:  # transformers raises nearly anything for a tokenizer that it cannot load
            LOG.warning("the tokenizer of %s cannot be copied, so the merged model has none: %s", donor, brief(error))

    return copy
