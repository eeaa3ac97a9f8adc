"""One forward pass that notes what each module with parameters was given, and backward passes that note what came back.

The backward pass goes from the model's outputs to the outputs of these modules, and not to their parameters. So no
weight gradient is ever formed, and ``.grad`` is not touched: a module's input and the gradient at its output are all
that its parameters' per-example gradients are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.errors import UnsupportedStateError


@dataclass
class Call:
    """One call of a module: its arguments, the dtype of its output, and in a backward pass the gradient at that."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    gradient: Tensor | None = None


Use = tuple[str, Call]  # a parameter's name in a module, and a call of this
Uses = list[Use]  # in the order of the forward pass
TakeUses = Callable[[nn.Parameter, Uses], None]


@dataclass
class Tape:
    """The calls of a forward pass, by the parameters that they used, each shared one once.

    ``size``: number of examples in the batch. ``broadcast_modules``: modules whose output is expanded to the batch if
    it has batch size 1; None: all. ``calls``: parameter -> its uses. ``used_directly``: parameters that a module uses
    outside the recorded calls of its children. ``broadcasted``: modules whose output was expanded.
    """

    size: int
    broadcast_modules: Collection[nn.Module] | None = None
    calls: dict[nn.Parameter, Uses] = field(default_factory=dict)
    used_directly: list[nn.Parameter] = field(default_factory=list)
    broadcasted: set[nn.Module] = field(default_factory=set)
    _parameters_of_call: dict[int, list[nn.Parameter]] = field(default_factory=dict)  # id of a call -> parameters
    _first_edges: list[Any] = field(default_factory=list)  # edges of the graph that nothing noted lies behind
    _on_gradient: Callable[[Call, Tensor], None] | None = None

    def record(self, call: Call, output: Tensor, names: Mapping[str, nn.Parameter]) -> None:
        """Add a call, and ask for the gradient at its output.

        Args:
            call: The call.
            output: What it gave out. It may be overwritten afterwards: the gradient is that of what it was.
            names: Name in the module -> parameter that the call uses.
        """
        for name, parameter in names.items():
            self.calls.setdefault(parameter, []).append((name, call))
        self._parameters_of_call[id(call)] = list(names.values())
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._on_gradient(call, gradient) if self._on_gradient else None
        )
        if not any(tensor.requires_grad for tensor in _tensors((call.args, call.kwargs))):
            self._first_edges.append(torch.autograd.graph.get_gradient_edge(output))

    def backward(
        self,
        outputs: Tensor,
        output_gradient: Tensor,
        retain_graph: bool,
        take: TakeUses,
        deferred: Collection[nn.Parameter] = (),
        uncalled: Sequence[nn.Parameter] = (),
    ) -> list[nn.Parameter]:
        """Go back to the outputs of all calls, and give out each parameter's uses once their gradients are there.

        A gradient is dropped as soon as all parameters of its call were given out, so that few are alive at a time.

        Args:
            outputs: Of the model.
            output_gradient: Gradient at the outputs.
            retain_graph: Another backward pass will follow.
            take: Called once for each parameter that was reached.
            deferred: Parameters that are not given out: their gradients stay, until :meth:`drop_gradients`.
            uncalled: Further parameters, of which none should be on the way.

        Returns:
            Those of ``uncalled`` that are.

        Raises:
            UnsupportedStateError: A checkpoint in the model is reentrant.
        """
        waiting = {parameter: len(uses) for parameter, uses in self.calls.items()}

        def on_gradient(call: Call, gradient: Tensor) -> None:
            call.gradient = gradient
            used = self._parameters_of_call[id(call)]
            for parameter in used:
                waiting[parameter] -= 1
                if not waiting[parameter] and parameter not in deferred:
                    take(parameter, self.calls[parameter])
            if not any(waiting[parameter] or parameter in deferred for parameter in used):
                call.gradient = None

        inputs = [*self._first_edges, *self.used_directly, *uncalled]
        self._on_gradient = on_gradient
        try:
            found = gradients(outputs, inputs, output_gradient, retain_graph)
        finally:
            self._on_gradient = None
        for parameter, uses in self.calls.items():
            # Some of its calls are none that the outputs depend on.
            if waiting[parameter] and parameter not in deferred:
                take(parameter, uses)
        used = found[len(inputs) - len(uncalled) :]
        return [p for p, gradient in zip(uncalled, used, strict=True) if gradient is not None and gradient.any()]

    def without_call(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return those of some parameters that no noted call used."""
        return [parameter for parameter in parameters if parameter not in self.calls]

    def close(self) -> None:
        """Let go of the graph: its hooks know this tape, and neither would ever be freed."""
        self.calls.clear()
        self.used_directly.clear()
        self._parameters_of_call.clear()
        self._first_edges.clear()

    def drop_gradients(self) -> None:
        """Drop the gradients of a backward pass."""
        for uses in self.calls.values():
            for _, call in uses:
                call.gradient = None


def gradients(
    outputs: Tensor, inputs: Sequence[Any], output_gradient: Tensor, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients at some tensors or edges of the graph; None at those that the outputs do not depend on.

    Raises:
        UnsupportedStateError: torch cannot differentiate the model, or a checkpoint in it is reentrant.
    """
    try:
        return torch.autograd.grad(outputs, inputs, output_gradient, retain_graph=retain_graph, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            why = " ".join(str(error).split())[:200]
            raise UnsupportedStateError(
                f"the model must be differentiable in eval mode, but torch says: {why}; freeze the part that is not"
            ) from error
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


ParametersOf = dict[nn.Module, dict[str, nn.Parameter]]
Owners = dict[nn.Parameter, tuple[nn.Module, str]]  # parameter -> the module that uses it, and its name in that


def parameters_of_calls(model: nn.Module, owner_of: Mapping[nn.Parameter, tuple[nn.Module, str]]) -> ParametersOf:
    """Return module -> name in it -> trainable parameter that its calls use.

    Args:
        model: The model.
        owner_of: Parameters that are used by another module than the one that holds them, and their names in that.
    """
    found: ParametersOf = {}
    for module in model.modules():
        names = {name: p for name, p in _own_parameters(module).items() if p not in owner_of}
        names |= {name: p for p, (owner, name) in owner_of.items() if owner is module}
        if names:
            found[module] = names
    return found


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that a module holds itself, by their names in it.

    What it holds under a second name, such as BERT's bias of the words, is used by the module within that holds it.
    """
    own = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    if not own:
        return own
    within = {id(p) for child in module.children() for p in child.parameters()}
    return {name: p for name, p in own.items() if id(p) not in within}


Wrap = Callable[[nn.Module, Tape], Any]


@contextmanager
def taped(
    model: nn.Module,
    size: int,
    special_modules: Sequence[tuple[Callable[[nn.Module], bool], Wrap]] = (),
    owner_of: Mapping[nn.Parameter, tuple[nn.Module, str]] | None = None,
    broadcast_modules: Collection[nn.Module] | None = None,
) -> Iterator[Tape]:
    """Note the calls of all modules with trainable parameters while the body runs the model.

    Args:
        model: In eval mode.
        size: Examples in the batch.
        special_modules: Pairs of a predicate on modules and a context manager around those that it selects, which also
            records their child embeddings.
        owner_of: See :func:`parameters_of_calls`.
        broadcast_modules: See :class:`Tape`.

    Yields:
        The tape, filled by one forward pass.
    """
    tape = Tape(size, broadcast_modules)
    with ExitStack() as stack:
        left_out: set[nn.Module] = set()
        for applies, wrap in special_modules:
            for module in filter(applies, model.modules()):
                left_out.update(child for child in module.children() if isinstance(child, nn.Embedding))
                stack.enter_context(wrap(module, tape))
        found = parameters_of_calls(model, owner_of or {})
        for module, names in found.items():
            if any(child is not module and child in found for child in module.modules()):
                tape.used_directly += names.values()
            if module not in left_out:
                hook = _recording_hook(module, tape, names)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield tape


def _recording_hook(module: nn.Module, tape: Tape, names: Mapping[str, nn.Parameter]) -> Callable[..., Any]:
    """Return a hook that notes a call; outputs made once for all examples, as of positions, get a batch axis."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out = first_tensor(output)
        if out is None or not out.requires_grad:
            return None
        batchless = isinstance(output, Tensor) and out.ndim > 1 and out.shape[0] == 1 < tape.size
        if batchless and (tape.broadcast_modules is None or module in tape.broadcast_modules):
            tape.broadcasted.add(module)
            # A copy, as what follows may write into it.
            out = out.expand(tape.size, *out.shape[1:]).contiguous()
            args = tuple(_repeat(arg, tape.size) for arg in args)
        tape.record(Call(module, args, kwargs, out.dtype), out, names)
        return out if module in tape.broadcasted and batchless else None

    return hook


def _repeat(value: Any, size: int) -> Any:
    """Return what was given once for all examples as if it were given for each."""
    batchless = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1
    return value.expand(size, *value.shape[1:]) if batchless else value
