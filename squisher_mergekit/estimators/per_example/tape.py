"""Recording of a forward pass: the calls of each module with parameters, and the gradients at their outputs.

The backward pass goes from the model's outputs to the outputs of these modules, not to their parameters. It forms no
weight gradient and leaves ``.grad`` alone: a module's input and the gradient at its output determine the per-example
gradients of its parameters.
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
    """One call of a module.

    Attributes:
        module: The module.
        args: Positional arguments.
        kwargs: Keyword arguments.
        dtype: Dtype of the output.
        gradient: Gradient at the output, during a backward pass.
        output: Output, without its graph, if a rule runs the module again.
        version: Number of changes of the output in place when it was recorded.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    gradient: Tensor | None = None
    output: Tensor | None = None
    version: int = 0

    @property
    def unchanged_output(self) -> Tensor | None:
        """Output; None if it was not recorded, or later layers have written into it."""
        kept = self.output is not None and self.output._version == self.version
        return self.output if kept else None


Use = tuple[str, Call]  # a parameter's name in a module, and a call of that module
Uses = list[Use]  # in the order of the forward pass
TakeUses = Callable[[nn.Parameter, Uses], None]


@dataclass
class Tape:
    """Record of the calls of one forward pass, by parameter.

    Attributes:
        size: Number of examples in the batch.
        broadcast_modules: Modules whose output is expanded to the batch if it has batch size 1; None: all modules.
        calls: Parameter -> its uses; a shared parameter has several.
        used_directly: Parameters of modules that also have recorded children: their own code may use them.
        broadcasted: Modules whose output was expanded.
        reruns: Function that returns True for a parameter's name in a module if its rule runs the module again.
        has_frozen: True if the model has frozen parameters, so that another tensor may be the root of the graph.
    """

    size: int
    broadcast_modules: Collection[nn.Module] | None = None
    calls: dict[nn.Parameter, Uses] = field(default_factory=dict)
    used_directly: list[nn.Parameter] = field(default_factory=list)
    broadcasted: set[nn.Module] = field(default_factory=set)
    reruns: Callable[[str, nn.Module], bool] = lambda name, module: False
    has_frozen: bool = False
    _parameters_of_call: dict[int, list[nn.Parameter]] = field(default_factory=dict)  # id of a call -> parameters
    _first_edges: list[Any] = field(default_factory=list)  # graph edges without a recorded call behind them
    _other_roots: list[Tensor] | None = None  # leaves of the graph that are no parameters
    _on_gradient: Callable[[Call, Tensor], None] | None = None

    def record(self, call: Call, output: Tensor, names: Mapping[str, nn.Parameter]) -> None:
        """Record a call, and request the gradient at its output.

        Args:
            call: The call.
            output: Its output tensor. Later in-place changes do not affect the gradient.
            names: Name in the module -> parameter that the call uses.
        """
        for name, parameter in names.items():
            self.calls.setdefault(parameter, []).append((name, call))
        self._parameters_of_call[id(call)] = list(names.values())
        if any(self.reruns(name, call.module) for name in names):
            call.output, call.version = output.detach(), output._version
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._on_gradient(call, gradient) if self._on_gradient else None
        )
        inputs = [tensor for tensor in tensors_of((call.args, call.kwargs)) if tensor.requires_grad]
        self.has_frozen |= any(tensor.is_leaf and not isinstance(tensor, nn.Parameter) for tensor in inputs)
        if not inputs:
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
        """Run a backward pass to the outputs of all calls, and hand each parameter's uses to ``take`` when complete.

        A gradient is freed as soon as every parameter of its call was taken, so that few exist at a time.

        Args:
            outputs: Outputs of the model.
            output_gradient: Gradient at the outputs.
            retain_graph: True if another backward pass follows.
            take: Callback, once for each parameter with a gradient.
            deferred: Parameters that are not taken; their gradients stay until :meth:`drop_gradients`.
            uncalled: Parameters without a recorded call.

        Returns:
            The parameters of ``uncalled`` that the outputs depend on.

        Raises:
            UnsupportedStateError: The model has a reentrant checkpoint, or torch cannot differentiate it.
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

        if self._other_roots is None:
            self._other_roots = _other_roots(outputs) if self.has_frozen else []
        inputs = [*self._first_edges, *self.used_directly, *self._other_roots, *uncalled]
        self._on_gradient = on_gradient
        try:
            found = gradients(outputs, inputs, output_gradient, retain_graph)
        finally:
            self._on_gradient = None
        for parameter, uses in self.calls.items():
            # The outputs do not depend on some of its calls.
            if waiting[parameter] and parameter not in deferred:
                take(parameter, uses)
        used = found[len(inputs) - len(uncalled) :]
        return [p for p, gradient in zip(uncalled, used, strict=True) if gradient is not None and gradient.any()]

    def without_call(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Return the parameters that no recorded call uses."""
        return [parameter for parameter in parameters if parameter not in self.calls]

    def close(self) -> None:
        """Release the graph: its hooks refer to this tape, and the cycle would never be freed."""
        self.calls.clear()
        self.used_directly.clear()
        self._parameters_of_call.clear()
        self._first_edges.clear()
        self._other_roots = None

    def drop_gradients(self) -> None:
        """Free the gradients of a backward pass."""
        for uses in self.calls.values():
            for _, call in uses:
                call.gradient = None


def gradients(
    outputs: Tensor, inputs: Sequence[Any], output_gradient: Tensor, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Return the gradients at tensors or graph edges; None if the outputs do not depend on one.

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
                f"the model must be differentiable in eval mode, but torch says: {why}; freeze the layer that is not"
            ) from error
        raise UnsupportedStateError(
            "gradient checkpointing must not be reentrant, but the model has a checkpoint with use_reentrant=True; "
            "set it to False"
        ) from error


def _other_roots(outputs: Tensor) -> list[Tensor]:
    """Return the leaves of a graph that are no parameters, such as embeddings after ``enable_input_require_grads``."""
    found, seen, waiting = [], set[Any](), [outputs.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and not isinstance(leaf, nn.Parameter):
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested containers."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors_of(item)


def first_tensor(output: Any) -> Tensor | None:
    """Return the first tensor of a module's output."""
    return next(tensors_of(output), None)


ParametersOf = dict[nn.Module, dict[str, nn.Parameter]]
Owners = dict[nn.Parameter, tuple[nn.Module, str]]  # parameter -> the module that uses it, and its name there


def parameters_of_calls(model: nn.Module, owner_of: Mapping[nn.Parameter, tuple[nn.Module, str]]) -> ParametersOf:
    """Return the trainable parameters that each module's calls use, by their names in it.

    Args:
        model: The model.
        owner_of: Parameter -> the module that uses it and its name there, if another module registers it.
    """
    found: ParametersOf = {}
    for module in model.modules():
        names = {name: p for name, p in _own_parameters(module).items() if p not in owner_of}
        names |= {name: p for p, (owner, name) in owner_of.items() if owner is module}
        if names:
            found[module] = names
    return found


def _own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters that a module itself registers, by their names in it.

    A parameter that a child registers too, such as the bias of BERT's decoder, belongs to the child.
    """
    registered = {name: p for name, p in module.named_parameters(recurse=False) if p.requires_grad}
    if not registered:
        return registered
    of_children = {id(p) for child in module.children() for p in child.parameters()}
    return {name: p for name, p in registered.items() if id(p) not in of_children}


Wrap = Callable[[nn.Module, Tape], Any]


@contextmanager
def taped(
    model: nn.Module,
    size: int,
    special_modules: Sequence[tuple[Callable[[nn.Module], bool], Wrap]] = (),
    owner_of: Mapping[nn.Parameter, tuple[nn.Module, str]] | None = None,
    broadcast_modules: Collection[nn.Module] | None = None,
    reruns: Callable[[str, nn.Module], bool] = lambda name, module: False,
) -> Iterator[Tape]:
    """Record the calls of all modules with trainable parameters while the body runs the model.

    Args:
        model: The model, in eval mode.
        size: Number of examples in the batch.
        special_modules: Pairs of a predicate and a context manager. The context manager surrounds the selected modules
            and records the calls of their child embeddings.
        owner_of: See :func:`parameters_of_calls`.
        broadcast_modules: See :class:`Tape`.
        reruns: See :class:`Tape`.

    Yields:
        The tape, filled by one forward pass.
    """
    tape = Tape(size, broadcast_modules, reruns=reruns)
    tape.has_frozen = not all(parameter.requires_grad for parameter in model.parameters())
    with ExitStack() as stack:
        recorded_elsewhere: set[nn.Module] = set()
        for applies, wrap in special_modules:
            for module in filter(applies, model.modules()):
                recorded_elsewhere.update(child for child in module.children() if isinstance(child, nn.Embedding))
                stack.enter_context(wrap(module, tape))
        found = parameters_of_calls(model, owner_of or {})
        for module, names in found.items():
            if any(child is not module and child in found for child in module.modules()):
                tape.used_directly += names.values()
            if module not in recorded_elsewhere:
                hook = _recording_hook(module, tape, names)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield tape


def _recording_hook(module: nn.Module, tape: Tape, names: Mapping[str, nn.Parameter]) -> Callable[..., Any]:
    """Return a hook that records a call; an output of batch size 1, as of positions, is expanded to the batch."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        out = first_tensor(output)
        if out is None or not out.requires_grad:
            return None
        batchless = isinstance(output, Tensor) and out.ndim > 1 and out.shape[0] == 1 < tape.size
        if batchless and (tape.broadcast_modules is None or module in tape.broadcast_modules):
            tape.broadcasted.add(module)
            # A copy, because later layers may write into it.
            out = out.expand(tape.size, *out.shape[1:]).contiguous()
            args = tuple(_repeat(arg, tape.size) for arg in args)
        tape.record(Call(module, args, kwargs, out.dtype), out, names)
        return out if module in tape.broadcasted and batchless else None

    return hook


def _repeat(value: Any, size: int) -> Any:
    """Return a tensor of batch size 1 expanded to the batch; other values unchanged."""
    batchless = isinstance(value, Tensor) and value.ndim > 1 and value.shape[0] == 1
    return value.expand(size, *value.shape[1:]) if batchless else value
