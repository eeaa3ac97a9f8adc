"""Merges by mergekit's own functions, called as its commands do, for ``squisher plan`` and ``squisher merge``."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from squisher_mergekit.errors import ConfigError, SquisherError
from squisher_mergekit.merging.parameters import METHODS


def read_config(text: str) -> Any:
    """Parse the YAML of a merge as mergekit does.

    Raises:
        ConfigError: It is no valid merge configuration, or one of another method.
    """
    import yaml
    from mergekit.config import MergeConfiguration

    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ConfigError(f"the configuration must be one that mergekit reads, but {error}") from error
    if config.merge_method not in METHODS:
        raise ConfigError(
            f"merge_method must be {' or '.join(METHODS)} here, found {config.merge_method}; use mergekit-yaml for it"
        )
    return config


def plan_config(config: Any, options: Any) -> Any:
    """Plan a merge as ``mergekit-yaml`` would, and stop there (a ``merge_plan.MergePlan``).

    Raises:
        RefusedError: The merge would be refused.
        UnsupportedMergekitError: This mergekit plans in another way.
    """
    from mergekit import merge
    from mergekit.architecture import get_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.plan import MergePlanner

    from squisher_mergekit.merging.mergekit.hooks import need
    from squisher_mergekit.merging.run import current_run

    model_out_config = need(merge, "_model_out_config", "trust_remote_code")
    with mergekit_errors():
        architecture = get_architecture_info(config, options)
        LoaderCache().setup(options=options)
        output = model_out_config(config, architecture, trust_remote_code=options.trust_remote_code)
        # Planning to disk writes nothing; only the executor would.
        MergePlanner(config, architecture, options=options, out_model_config=output).plan_to_disk("unused")
    return current_run().plan


def run_config(config: Any, text: str, folder: Path, options: Any) -> Any:
    """Merge as ``mergekit-yaml`` does, and write a model card that needs no network.

    Returns:
        The finished :class:`~squisher_mergekit.merging.run.Run`.

    Raises:
        RefusedError: The merge is refused.
    """
    from mergekit.card import generate_card
    from mergekit.merge import run_merge

    from squisher_mergekit.merging.report import bare_card, provenance
    from squisher_mergekit.merging.run import current_run

    with mergekit_errors():
        run_merge(config, str(folder), options.model_copy(update={"write_model_card": False}), config_source=text)
    run = current_run()
    if options.write_model_card:
        try:
            card = generate_card(config=config, config_yaml=text, name=folder.name)
        except (OSError, RuntimeError, ValueError):
            # mergekit asks the Hub whether a relative path is a repository, and cannot without a network.
            card = bare_card(folder.name, run.method, text)
        (folder / "README.md").write_text(card + provenance(run), encoding="utf-8")
        (folder / "mergekit_config.yml").write_text(text, encoding="utf-8")
    return run


@contextmanager
def mergekit_errors() -> Iterator[None]:
    """Turn what mergekit and transformers raise for a wrong configuration into one line.

    Raises:
        ConfigError: In their stead.
    """
    try:
        yield
    except SquisherError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError) as error:
        raise ConfigError(f"mergekit cannot do this merge: {error or type(error).__name__}") from error
