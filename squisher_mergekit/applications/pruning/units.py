"""Units of a model: neurons and filters in chains of layers, feed-forward neurons and heads of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from squisher_mergekit.applications.pruning.modules import unmasked
from squisher_mergekit.applications.pruning.structured import Units, UnitSlice
from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.models.parameters import memory_name, unwrap_model

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Modules with output 0 for input 0 that treat all channels in the same way.
_PASSING = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Tanh,
    nn.Hardtanh, nn.Softsign, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.MaxPool1d,
    nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Flatten,
)  # fmt: skip
# Layers that make the neurons of a feed-forward part, and the layer that reads them, below one module.
_FFN = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("wi_0", "wi_1"), "wo"),
    (("wi",), "wo"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("lin1",), "lin2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("intermediate.dense",), "output.dense"),
)
_OUTPUTS = ("o_proj", "out_proj")


def chain_units(model: nn.Module, chain: Sequence[str] | None = None) -> tuple[Units, ...]:
    """Return the filters of convolutions and neurons of linear layers that exactly one other layer reads.

    BatchNorm, pools, dropout, flattening and activations with value 0 at 0 may stand between the two, in any order. The
    last layer has no reader and has no units, nor has a layer before another module (LayerNorm, sigmoid), nor a grouped
    convolution.

    Args:
        model: An ``nn.Sequential`` (which may contain others), or any model with ``chain``.
        chain: Names of modules in the order of the forward pass; each runs once, and only the next one reads its
            output. Functions between them, such as a flattening, must be of the kinds above.

    Raises:
        ConfigError: A name is not a module's, the model is not a chain, or no layer has units.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        >>> [(layer.name, layer.count, layer.read[0].width) for layer in chain_units(model)]
        [('0', 4, 9)]
    """
    inner = unwrap_model(model)
    found: list[Units] = []
    with unmasked(inner):
        steps = list(_steps(inner, chain))
        if len({id(module) for _, module in steps}) < len(steps):
            raise ConfigError("each module of a chain must run once, but one is in it twice; name another chain")
        open_layer: Units | None = None
        flat = chain is not None
        for name, module in steps:
            if isinstance(module, (nn.Linear, *_CONVOLUTIONS)):
                if open_layer is not None:
                    found += _read(open_layer, name, module, inner, flat)
                open_layer, flat = _made(name, module), chain is not None
            elif open_layer is not None and isinstance(module, _NORMS):
                open_layer = _with_norm(open_layer, name, module)
            elif isinstance(module, nn.Flatten) and not module.start_dim:
                open_layer = None  # the examples are joined as well
            elif isinstance(module, _PASSING):
                # From another axis on, the channels stay an axis of their own, which a linear layer does not read.
                flat = flat or (isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1))
            else:
                open_layer = None
    if not found:
        raise ConfigError(
            f"a chain must have a convolution or linear layer that another one reads, but {type(inner).__name__} has "
            "none that is known; name one by chain=[...]"
        )
    return tuple(found)


def ffn_units(model: nn.Module) -> tuple[Units, ...]:
    """Return the neurons in the feed-forward parts of a transformer, found by the names of their layers.

    Known are the names of Llama and its relatives (gate and up), BERT, GPT-2, T5, OPT, DistilBERT and GPT-NeoX. Packed
    experts have no units.

    Raises:
        ConfigError: No layer has a known name.
    """
    inner = unwrap_model(model)
    with unmasked(inner):
        found = []
        for path, module in _modules(inner):
            for makers, reader in _FFN:
                layers = [_child(module, name) for name in (*makers, reader)]
                if all(layer is not None for layer in layers):
                    found.append(_ffn(path, makers, reader, layers))
                    break
    if not found:
        raise ConfigError(
            f"feed-forward parts must be linear layers of known names ({_FFN[0][0][0]}, fc1, c_fc, intermediate.dense "
            f"and others), but {type(inner).__name__} has none; name a chain for chain_units"
        )
    return tuple(found)


def head_units(model: nn.Module) -> tuple[Units, ...]:
    """Return the attention heads of a transformer, found by the names of their layers.

    Queries that share keys and values (grouped-query attention) form one unit with them. Known are the names q_proj,
    k_proj, v_proj (Llama and its relatives, OPT), query, key, value (BERT), and c_attn (GPT-2).

    Raises:
        ConfigError: No layer has a known name, or all queries share one head of keys and values.
    """
    inner = unwrap_model(model)
    with unmasked(inner):
        found = [units for path, module in _modules(inner) if (units := _heads(path, module)) is not None]
    if not found:
        raise ConfigError(
            f"attention must be of layers called q_proj, k_proj, v_proj, or query, key, value, or c_attn, but "
            f"{type(inner).__name__} has none"
        )
    if all(layer.count == 1 for layer in found):
        raise ConfigError(
            f"there must be several heads to choose from, but in {type(inner).__name__} all queries share one head of "
            "keys and values"
        )
    return tuple(found)


def _steps(model: nn.Module, chain: Sequence[str] | None) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and module of a chain; an ``nn.Sequential`` yields its children."""
    if chain is None and not isinstance(model, nn.Sequential):
        raise ConfigError(
            f"a model must be an nn.Sequential for its chain to be found, but it is {type(model).__name__}; name its "
            "modules in the order they run by chain=[...]"
        )
    modules = dict(model.named_modules())
    for name in [""] if chain is None else chain:
        if name not in modules:
            raise ConfigError(
                f"a chain must name modules of the model, but {name!r} is none of {type(model).__name__}'s"
            )
        yield from _leaves(name, modules[name])


def _leaves(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield name, module
        return
    for key, child in module.named_children():
        yield from _leaves(_below(name, key), child)


def _made(name: str, module: Any) -> Units | None:
    """Return the units of a layer, without a reader; None for a grouped convolution."""
    if getattr(module, "groups", 1) != 1:
        return None
    return Units(name, module.weight.shape[0], _weight_and_bias(name, module, 0))


def _weight_and_bias(name: str, module: Any, axis: int, width: int = 1, start: int = 0) -> tuple[UnitSlice, ...]:
    weight = UnitSlice(f"{name}.weight", axis, width, start)
    return (weight,) if module.bias is None else (weight, UnitSlice(f"{name}.bias", 0, width, start))


def _with_norm(layer: Units, name: str, norm: Any) -> Units | None:
    # A norm without its own scale turns a channel of zeros into minus its mean.
    if not norm.affine or norm.num_features % layer.count:
        return None
    width = norm.num_features // layer.count
    affine = tuple(UnitSlice(f"{name}.{part}", 0, width) for part in ("weight", "bias"))
    running = ("running_mean", "running_var") if norm.track_running_stats else ()
    buffers = tuple(UnitSlice(f"{name}.{part}", 0, width) for part in running)
    return Units(layer.name, layer.count, layer.made + affine, (), layer.buffers + buffers)


def _read(layer: Units, name: str, reader: Any, model: nn.Module, flat: bool) -> list[Units]:
    """Return the units with their reader; an empty list if the reader does not fit."""
    inputs = reader.weight.shape[1]
    width, left = divmod(inputs, layer.count)
    after_convolution = isinstance(model.get_submodule(layer.name), _CONVOLUTIONS)
    linear = isinstance(reader, nn.Linear)
    known = width == 1 and after_convolution != linear
    if after_convolution and linear:
        known = flat
    if left or not width or not known or getattr(reader, "groups", 1) != 1:
        return []
    return [Units(layer.name, layer.count, layer.made, (UnitSlice(f"{name}.weight", 1, width),), layer.buffers)]


def _child(module: nn.Module, path: str) -> Any:
    """Return a linear layer below a module; None if the path leads to another module or none."""
    for part in path.split("."):
        module = module._modules.get(part)  # type: ignore[assignment]
        if module is None:
            return None
    return module if isinstance(module, nn.Linear) or _is_conv1d(module) else None


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2's, with weights [in, out]


def _axes(module: nn.Module) -> tuple[int, int]:
    """Return the axes of the outputs and the inputs of a weight."""
    return (1, 0) if _is_conv1d(module) else (0, 1)


def _ffn(path: str, makers: tuple[str, ...], reader: str, layers: list[Any]) -> Units:
    names = [_below(path, name) for name in (*makers, reader)]
    out, inputs = _axes(layers[0])[0], _axes(layers[-1])[1]
    count = layers[-1].weight.shape[inputs]
    if any(layer.weight.shape[out] != count for layer in layers[:-1]):
        raise UnsupportedStateError(
            f"a feed-forward part must read the neurons that it makes, but {names[0]} has "
            f"{layers[0].weight.shape[out]} outputs and {names[-1]} {count} inputs"
        )
    made = (
        part for name, layer in zip(names, layers[:-1], strict=False) for part in _weight_and_bias(name, layer, out)
    )
    return Units(path or names[0], count, tuple(made), (UnitSlice(f"{names[-1]}.weight", inputs),))


def _heads(path: str, module: Any) -> Units | None:
    """Return the heads of an attention module; None for any other module."""
    for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
        layers = [_child(module, name) for name in names]
        if all(layer is not None for layer in layers):
            return _separate_heads(path, module, names, layers)
    fused, reader = _child(module, "c_attn"), _child(module, "c_proj")
    if fused is None or reader is None:
        return None
    size = fused.weight.shape[1] // 3
    width = size // module.num_heads
    whole, output = _below(path, "c_attn"), _below(path, "c_proj")
    made = (part for third in range(3) for part in _weight_and_bias(whole, fused, 1, width, third * size))
    return Units(path or whole, module.num_heads, tuple(made), (UnitSlice(f"{output}.weight", 0, width),))


def _separate_heads(path: str, module: Any, names: tuple[str, ...], layers: list[Any]) -> Units:
    width = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    if not isinstance(width, int) or any(layer.weight.shape[0] % width for layer in layers):
        raise UnsupportedStateError(
            f"attention must give the width of its heads (head_dim), but {path} does not; prune neurons instead"
        )
    count = layers[1].weight.shape[0] // width
    made = (
        part
        for name, layer in zip(names, layers, strict=True)
        for part in _weight_and_bias(_below(path, name), layer, 0, layer.weight.shape[0] // count)
    )
    found = ((name, _child(module, name)) for name in _OUTPUTS)
    # Its own width: queries with a gate, or values of another width, do not have that of the output.
    readers = ((name, *divmod(layer.weight.shape[1], count)) for name, layer in found if layer is not None)
    name, width, left = next(readers, ("", 0, 0))
    read = (UnitSlice(f"{_below(path, name)}.weight", 1, width),) if width and not left else ()
    return Units(path or names[0], count, tuple(made), read)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules by their paths without wrappers, as those of parameters in memory."""
    for path, module in model.named_modules():
        yield memory_name(f"{path}.").removesuffix("."), module


def _below(path: str, name: str) -> str:
    """Return the name of a module below a path, which is empty for the model itself."""
    return f"{path}.{name}" if path else name
