"""Roles of weights that are not ordinary matrices: embeddings, norms, biases, and the output layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.models.names import CheckpointNames
from squisher_mergekit.models.parameters import parameters_of, unwrap_model
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.tensors.safetensors import TensorInfo

Role = Literal["embedding", "norm", "bias", "output"]
ROLES: tuple[Role, ...] = ("embedding", "norm", "bias", "output")
# Names that tell a role where there is no config to build the model from.
# T5's table is called shared; the shared experts of a mixture are not one, nor is GPT-NeoX's output layer embed_out.
_EMBEDDING = re.compile(r"(^|[._])(embed(?!_out\.)\w*|wte|wpe|word_embeddings)([._]|$)|(^|\.)shared(\.|$)")
_OUTPUT = re.compile(r"^(lm_head|classifier|score|qa_outputs|cls|head|fc_out|output_projection|embed_out)\.")


def roles_of(model: nn.Module) -> dict[str, Role]:
    """Return the roles of a model's parameters, by name in memory; ordinary matrices have none.

    Embeddings are the parameters of ``nn.Embedding`` and of modules with such a name. Vectors are biases if their name
    says so, else norms. In a model of transformers the output layer is all that the base model lacks; in any other
    model it is the last module that has a matrix.

    Example:
        >>> roles_of(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 2)))
        {'0.bias': 'bias', '1.weight': 'norm', '1.bias': 'bias', '2.weight': 'output', '2.bias': 'bias'}
    """
    inner = unwrap_model(model)
    embeddings = {id(p) for m in inner.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    outputs = output_parameters(inner)
    roles: dict[str, Role] = {}
    for name, parameter in parameters_of(inner).items():
        role = _by_shape(name, parameter.ndim)
        if id(parameter) in embeddings or (role is None and _EMBEDDING.search(name)):
            role = "embedding"
        elif role is None and id(parameter) in outputs:
            role = "output"
        if role is not None:
            roles[name] = role
    return roles


def roles_on_disk(weights: Weights) -> dict[str, Role]:
    """Return the roles of the weights in a folder, by name on disk; ordinary matrices have none.

    The roles are those of the model that ``config.json`` describes. Where that model cannot be built, names tell the
    roles: ``embed``, ``lm_head``, ``classifier`` and the like.
    """
    if weights.outline is None:
        return _by_name(weights.infos)
    model, checkpoint_names = weights.outline
    return named_on_disk(roles_of(model), checkpoint_names, weights.infos)


def named_on_disk(
    roles: Mapping[str, Role], checkpoint_names: CheckpointNames, names: Iterable[str]
) -> dict[str, Role]:
    """Return roles by name on disk.

    Args:
        roles: Name in memory -> role.
        checkpoint_names: The model's names in memory and on disk.
        names: The names on disk.
    """
    found: dict[str, Role] = {}
    for name in names:
        sources = checkpoint_names.sources.get(checkpoint_names.aliases.get(name, name), ())
        role = roles.get(checkpoint_names.first.get(sources[0], sources[0])) if sources else _by_shape(name, 2)
        if role is not None:
            found[name] = role
    return found


def matching(names: Collection[str], pattern: str, what: str) -> list[str]:
    """Return the names that match a pattern.

    Args:
        names: All names.
        pattern: A name, or a regular expression that is searched for in the names.
        what: Meaning of the pattern, as the subject of a message.

    Raises:
        ConfigError: The pattern is no regular expression, or matches no name.

    Example:
        >>> matching(["a.weight", "a.bias", "b.bias"], "^a", "an ignored name")
        ['a.weight', 'a.bias']
    """
    try:
        hit = [name for name in names if name == pattern or re.search(pattern, name)]
    except re.error as error:
        raise ConfigError(f"{what} must be a name or a regular expression, found {pattern!r}: {error}") from error
    if not hit:
        raise ConfigError(
            f"{what} must match the name of a tensor, but {pattern!r} matches none; a name is "
            f"{next(iter(names), 'none')}, for example"
        )
    return hit


def ignored(
    roles: Mapping[str, Role], names: Iterable[str], patterns: Iterable[str] = (), skip: Iterable[Role] = ROLES
) -> dict[str, str]:
    """Return name -> reason, for the weights that a selection leaves out.

    Args:
        roles: Name -> role.
        names: All names.
        patterns: Names, or regular expressions that are searched for in the names.
        skip: Roles to leave out.

    Raises:
        ConfigError: A pattern is no regular expression, or matches no name.
    """
    everything, why = list(names), {}
    wanted = set(skip)
    for name in everything:
        if roles.get(name) in wanted:
            why[name] = str(roles[name])
    for pattern in patterns:
        hit = matching(everything, pattern, "an ignored name")
        why.update({name: f"matches {pattern}" for name in hit if name not in why})
    return why


def _by_shape(name: str, ndim: int) -> Role | None:
    if name.rpartition(".")[2] == "bias":
        return "bias"
    return "norm" if ndim < 2 else None


def _by_name(infos: Mapping[str, TensorInfo]) -> dict[str, Role]:
    roles: dict[str, Role] = {}
    for name, info in infos.items():
        role = role_by_name(name, len(info.shape))
        if role is not None:
            roles[name] = role
    return roles


def role_by_name(name: str, ndim: int) -> Role | None:
    """Return the role that a weight's name suggests; ordinary matrices have none.

    Example:
        >>> role_by_name("lm_head.weight", 2)
        'output'
    """
    role = _by_shape(name, ndim)
    if role is None:
        role = "embedding" if _EMBEDDING.search(name) else "output" if _OUTPUT.search(name) else None
    return role


def is_running_statistic(name: str) -> bool:
    """Return True for the name of a batch norm's running mean or variance, a buffer wherever its class is unknown.

    Example:
        >>> is_running_statistic("1.running_mean"), is_running_statistic("1.weight")
        (True, False)
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def output_parameters(model: nn.Module) -> set[int]:
    """Return the ids of the output layer's parameters, of any shape."""
    of_transformers: Any = model
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and hasattr(model, "get_output_embeddings"):
        inside = {id(parameter) for parameter in base.parameters()} if base is not model else None
        last = of_transformers.get_output_embeddings()
        found = {id(parameter) for parameter in last.parameters()} if isinstance(last, nn.Module) else set()
        rest = {id(parameter) for parameter in model.parameters()}
        return found | (rest - inside if inside is not None else set())
    holders = [module for module in model.modules() if any(p.ndim > 1 for p in module.parameters(recurse=False))]
    return {id(parameter) for parameter in holders[-1].parameters(recurse=False)} if holders else set()
