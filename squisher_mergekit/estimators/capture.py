"""One forward pass that notes what each module with parameters was given, and backward passes that note what came back.

The backward pass goes from the model's outputs to the outputs of these modules, and not to their parameters. So no
weight gradient is ever formed, and ``.grad`` is not touched: a module's input and the gradient at its output are all
that its parameters' per-example gradients are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError


@dataclass
class Call:
    """One call of a module: its arguments, its output, and after a backward pass the gradient at the output."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    gradient: Tensor | None = None


@dataclass
class Tape:
    """The calls of a forward pass, by the parameters that they used, each shared one once.

    ``size``: examples in the batch. ``calls``: parameter -> (name in its module, call), in the order of the pass.
    """

    size: int
    calls: dict[nn.Parameter, list[tuple[str, Call]]] = field(default_factory=dict)

    def all_calls(self) -> Iterator[Call]:
        """Yield each call once."""
        seen = set()
        for uses in self.calls.values():
            for _, call in uses:
                if id(call) not in seen:
                    seen.add(id(call))
                    yield call

    def backward(self, outputs: Tensor, column: Tensor, keep: bool) -> None:
        """Fill in the gradients at the outputs of all calls.

        Args:
            outputs: Of the model.
            column: Gradient at the outputs.
            keep: Another backward pass will follow.

        Raises:
            UnsupportedStateError: A checkpoint in the model is reentrant.
        """
        calls = list(self.all_calls())
        found = gradients(outputs, [call.output for call in calls], column, keep)
        for call, gradient in zip(calls, found, strict=True):
            call.gradient = gradient


def gradients(outputs: Tensor, at: Sequence[Tensor], column: Tensor, keep: bool) -> tuple[Tensor | None, ...]:
    """Return the gradients at some tensors; None at those that the outputs do not depend on.

    Raises:
        UnsupportedStateError: A checkpoint in the model is reentrant.
    """
    try:
        return torch.autograd.grad(outputs, at, column, retain_graph=keep, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedStateError(
            "gradients of chosen tensors need checkpoints that are not reentrant, but the model has one with "
            "use_reentrant=True; set it to False"
        ) from error


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from _tensors(item)


def first_tensor(output: Any) -> Tensor | None:
    """Return the tensor that a module's output is or begins with."""
    return next(_tensors(output), None)


Homes = dict[nn.Module, dict[str, nn.Parameter]]
Moved = dict[nn.Parameter, tuple[nn.Module, str]]  # parameter -> the module that uses it, and its name in that


def homes(model: nn.Module, moved: Mapping[nn.Parameter, tuple[nn.Module, str]]) -> Homes:
    """Return module -> name in it -> trainable parameter that its calls use.

    Args:
        model: The model.
        moved: Parameters that are used by another module than the one that holds them, and their names in that.
    """
    found: Homes = {}
    for module in model.modules():
        own = {name: p for name, p in _owned(module).items() if p not in moved}
        own |= {name: p for p, (home, name) in moved.items() if home is module}
        if own:
            found[module] = own
    return found


def _owned(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that a module holds itself, by their names in it.

    What it holds under a second name, such as BERT's bias of the words, is used by the module within that holds it.
    """
    within = {id(p) for child in module.children() for p in child.parameters()}
    own = module.named_parameters(recurse=False)
    return {name: p for name, p in own if p.requires_grad and id(p) not in within}


Wrap = Callable[[nn.Module, Tape], Any]


@contextmanager
def taped(
    model: nn.Module,
    size: int,
    special: Sequence[tuple[Callable[[nn.Module], bool], Wrap]] = (),
    moved: Mapping[nn.Parameter, tuple[nn.Module, str]] | None = None,
) -> Iterator[Tape]:
    """Note the calls of all modules with trainable parameters while the body runs the model.

    Args:
        model: In eval mode.
        size: Examples in the batch.
        special: Which modules something has to be wrapped around, and what, as a context manager. Modules right in
            them are left to it.
        moved: See :func:`homes`.

    Yields:
        The tape, filled by one forward pass.
    """
    tape = Tape(size)
    with ExitStack() as stack:
        left_out: set[nn.Module] = set()
        for applies, wrap in special:
            for module in filter(applies, model.modules()):
                left_out.update(child for child in module.children() if isinstance(child, nn.Embedding))
                stack.enter_context(wrap(module, tape))
        for module, names in homes(model, moved or {}).items():
            if module not in left_out:
                hook = _note(module, tape, names)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        for module in model.modules():
            # An activation that overwrites a noted output would take its gradient with it.
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
                stack.callback(setattr, module, "inplace", True)
        yield tape


def _note(module: nn.Module, tape: Tape, names: Mapping[str, nn.Parameter]) -> Callable[..., Any]:
    """Return a hook that notes a call; outputs made once for all examples, as of positions, get a batch axis."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out = first_tensor(output)
        if out is None or not out.requires_grad:
            return None
        once = isinstance(output, Tensor) and out.ndim > 1 and out.shape[0] == 1 < tape.size
        if once:
            out = out.expand(tape.size, *out.shape[1:])
        note(tape, Call(module, args, kwargs, out), names)
        return out if once else None

    return hook


def note(tape: Tape, call: Call, names: Mapping[str, nn.Parameter]) -> None:
    """Add a call to a tape, under each parameter that it uses; ``names``: name in its module -> parameter."""
    for name, parameter in names.items():
        tape.calls.setdefault(parameter, []).append((name, call))
