"""Penalty of elastic weight consolidation (EWC): it keeps a model near its weights after earlier tasks."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from squisher_mergekit.applications.ewc.quadratics import Quadratic, add_quadratics, like_parameter
from squisher_mergekit.applications.ewc.runaway import RunawayMonitor, sum_of_squares
from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.fisher.by_parameter import by_parameter
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import check_values
from squisher_mergekit.models.parameters import parameters_of
from squisher_mergekit.tensors.sharded import distributed_like, gathered, is_sharded

LOG = logging.getLogger("squisher_mergekit")
Mode = Literal["separate", "online"]
Scale = Literal["batch", "dataset"]


def identity(model: nn.Module) -> dict[str, Tensor]:
    """Return ones for all trainable parameters, by name in memory: the Fisher of the L2 baseline.

    Example:
        >>> identity(nn.Linear(2, 1, bias=False))
        {'weight': tensor([[1., 1.]])}
    """
    return {name: torch.ones_like(p.detach()) for name, p in parameters_of(model).items() if p.requires_grad}


class EWCPenalty:
    """Penalty ``lambda / 2 sum_t sum_i F_ti (theta_i - theta^_ti)^2`` over the learnt tasks t.

    A training loop needs two lines: ``penalty.add_gradient(model)`` after the backward pass of the task's loss, before
    clipping and the optimizer step, and ``penalty.add(model, fisher)`` after a task. ``penalty(model)`` returns the
    penalty as a scalar to add to a loss. The scalar is slower, and an average of the gradient (Adam's, or
    :class:`~squisher_mergekit.training.GradientSquares`) then includes the gradient of the penalty.

    One quadratic stores the terms of all tasks, so that memory and time do not grow with the number of tasks: a Fisher
    and an anchor per parameter, in float32 (float64 for float64). Parameters without a Fisher, such as a new head, are
    free (``unpenalised``); frozen parameters are left out while they are frozen.

    Args:
        lam: Lambda of the paper, finite and not negative, the same for all tasks; 0 is no penalty.
        mode: ``separate``: each task has its anchor and its Fisher, and the terms are summed. ``online``: one Fisher
            ``F = F_new + gamma F_old`` about the latest anchor.
        gamma: Weight of the earlier Fisher in ``online``, from 0 to 1.
        scale: Factor of the debiased Fisher (see :meth:`~squisher_mergekit.Fisher.scaled`). ``batch`` multiplies an
            average of squared batch gradients (the optimizer's, or ``GradientSquares``) by the examples per step, as
            the squared mean gradient is the Fisher divided by that number; a computed Fisher stays. ``dataset``
            multiplies such an average by ``num_examples`` instead, as in the paper (there without debiasing). A number
            multiplies any Fisher.

    Raises:
        ConfigError: An argument is out of range.

    Source: Eq. 14 of "Fishers for Free?" (Li et al., ICML 2025); Kirkpatrick et al., 2017; ``online``: Schwarz et al.,
    2018.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> penalty = EWCPenalty(lam=10.0)
        >>> penalty.add(model, {"weight": torch.tensor([[1.0, 4.0]])})
        >>> _ = nn.init.ones_(model.weight)
        >>> penalty(model)
        tensor(25., grad_fn=<MulBackward0>)
        >>> penalty.add_gradient(model)
        >>> model.weight.grad
        tensor([[10., 40.]])
    """

    def __init__(
        self, lam: float, *, mode: Mode = "separate", gamma: float = 1.0, scale: Scale | float = "batch"
    ) -> None:
        if not 0 <= lam < math.inf:
            raise ConfigError(f"lambda must be finite and not negative, found {lam}; 0 is no penalty")
        if mode not in ("separate", "online"):
            raise ConfigError(f"mode must be separate or online, found {mode!r}")
        if not 0 <= gamma <= 1:
            raise ConfigError(f"gamma must be from 0 to 1, found {gamma}")
        if scale not in ("batch", "dataset") and not (isinstance(scale, float | int) and 0 < scale < math.inf):
            raise ConfigError(f"scale must be batch, dataset or a positive number, found {scale!r}")
        self.lam, self.mode, self.gamma, self.scale = float(lam), mode, float(gamma), scale
        self.tasks = 0
        self.unpenalised: tuple[str, ...] = ()
        self._terms: dict[str, Quadratic] = {}
        self._monitor = RunawayMonitor()

    @torch.no_grad()
    def add(
        self,
        model: nn.Module,
        fisher: Mapping[str, Tensor],
        num_examples: int | None = None,
        *,
        examples_per_step: float | None = None,
    ) -> None:
        """Add a learnt task: the present weights as anchors, and their Fisher.

        Args:
            model: The model with the weights of the task, wrapped or not. If FSDP2 shards the model, each process
                stores its shards, and all processes must call this method.
            fisher: A Fisher, or a mapping by names in memory. A mapping has no scale: a number in ``scale`` multiplies
                it, ``batch`` and ``dataset`` do not.
            num_examples: Number of examples of the task, for ``scale="dataset"``.
            examples_per_step: Examples per step for ``scale="batch"``, if the Fisher does not record them.

        Raises:
            MismatchError: Names or shapes do not fit the model.
            ValuesError: An entry is NaN, infinite or negative.
            ConfigError: A number that the scale needs is unknown, or lambda times the Fisher overflows.
        """
        parameters = parameters_of(model)
        factor = self._factor(fisher, num_examples, examples_per_step)
        place = fisher.location if isinstance(fisher, Fisher) else "memory"
        found = by_parameter(model, fisher)
        if not found:
            raise MismatchError(
                f"EWC needs the Fisher of at least one parameter, but {place} has none; give another one"
            )
        fresh = {}
        for name, tensor in found.items():
            check_values(_local(tensor), name, place)
            parameter = parameters[name]
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            entries = distributed_like(tensor.to(dtype) * factor, parameter, dtype)
            fresh[name] = Quadratic(entries, parameter.detach().to(dtype, copy=True))
        terms = self._joined(fresh, self._of(parameters), parameters)
        self._check(terms)
        self._terms, self.tasks = terms, self.tasks + 1
        self._list_free(parameters)
        self._monitor.check()
        self._monitor.start()

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty as a differentiable scalar; 0 before the first task.

        Raises:
            MismatchError: A penalised parameter is missing, or has another shape.
        """
        parameters = parameters_of(model)
        terms = self._of(parameters) if self.lam else {}
        having = [term.at(parameters[name]) for name, term in terms.items() if parameters[name].requires_grad]
        if not having:
            return torch.zeros((), device=next((p.device for p in parameters.values()), None))
        return 0.5 * self.lam * torch.stack([part.to(having[0]) for part in having]).sum()

    @torch.no_grad()
    def add_gradient(self, model: nn.Module) -> None:
        """Add the gradient ``lambda F (theta - theta^)`` of the penalty to ``.grad``, without a graph.

        Call the method once per optimizer step in all processes, when the gradient of the task is complete: after the
        last backward pass of an accumulation (accelerate: ``if accelerator.sync_gradients``), after ``unscale_`` of a
        GradScaler, and before clipping. Every 100 steps, and in :meth:`add`, the :meth:`ratio` is checked: above a
        million the penalty runs away, and the log says so once per task.

        Raises:
            MismatchError: A penalised parameter is missing, or has another shape.
        """
        parameters = parameters_of(model)
        norms: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, term in (self._of(parameters) if self.lam else {}).items():
            parameter = parameters[name]
            if not parameter.requires_grad:
                continue
            gradient = term.half_gradient(parameter.detach()).mul_(self.lam)
            norms[0].append(torch.linalg.vector_norm(gradient))
            if parameter.grad is None:
                parameter.grad = gradient.to(parameter.dtype)
            else:
                norms[1].append(torch.linalg.vector_norm(parameter.grad, dtype=gradient.dtype))
                parameter.grad.add_(gradient)
        if norms[0]:
            self._monitor.note(*map(sum_of_squares, norms))

    def ratio(self) -> float | None:
        """Return the ratio of the penalty's squared gradient to the task's, over the penalised parameters.

        Both are summed over the present hundred steps of :meth:`add_gradient`; None before the first step.
        """
        return self._monitor.ratio()

    def drop(self, *names: str) -> None:
        """Remove parameters from the penalty, such as a head that was replaced.

        Args:
            names: Names in memory.

        Raises:
            MismatchError: A parameter is not penalised.
        """
        for name in names:
            if name not in self._terms:
                raise MismatchError(
                    f"a dropped parameter must be penalised, but {name!r} is not; give a name in memory"
                )
        self._terms = {name: term for name, term in self._terms.items() if name not in names}

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers, strings and tensors; sharded tensors stay sharded."""
        terms = {name: {"fisher": t.fisher, "anchor": t.anchor, "offset": t.offset} for name, t in self._terms.items()}
        return {"mode": self.mode, "gamma": self.gamma, "tasks": self.tasks, "terms": terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a state of :meth:`state_dict`; lambda may differ.

        Args:
            state: The state.

        Raises:
            ConfigError: The state has another mode or gamma, or lambda times the Fisher overflows.
        """
        for key in ("mode", "gamma"):
            if state[key] != getattr(self, key):
                raise ConfigError(
                    f"the penalty must have the {key} {getattr(self, key)}, found {state[key]}; give that one"
                )
        terms = {name: Quadratic(**term) for name, term in state["terms"].items()}
        self._check(terms)
        self._terms, self.tasks = terms, state["tasks"]
        self._monitor.start()

    def _factor(self, fisher: Mapping[str, Tensor], num_examples: float | None, per_step: float | None) -> float:
        if not isinstance(self.scale, str):
            return float(self.scale)
        if not isinstance(fisher, Fisher) or not fisher.config.of_batches:
            return 1.0
        name = "num_examples" if self.scale == "dataset" else "examples_per_step"
        number = num_examples if self.scale == "dataset" else per_step or fisher.config.examples_per_step
        if number is None:
            raise ConfigError(
                f"scale {self.scale} needs {name}, which is not known of {fisher.location}; give add(..., {name}=N), "
                "or a number as scale"
            )
        if not 0 < number < math.inf:
            raise ConfigError(f"{name} must be a positive number, found {number}")
        return float(number)

    def _of(self, parameters: Mapping[str, nn.Parameter]) -> dict[str, Quadratic]:
        """Return the terms, each on the device of its parameter."""
        for name, term in self._terms.items():
            cure = f"give the model that it was made with, or penalty.drop({name!r})"
            if name not in parameters:
                raise MismatchError(f"EWC needs the parameters that it penalises, but the model has no {name}; {cure}")
            found, wanted = list(parameters[name].shape), list(term.anchor.shape)
            if found != wanted:
                raise MismatchError(
                    f"EWC needs {name} in the shape {wanted} of its anchor, but it has {found}; give new classes a "
                    f"head of their own, or penalty.drop({name!r})"
                )
            self._terms[name] = like_parameter(term, parameters[name])
        return self._terms

    def _joined(
        self, fresh: Mapping[str, Quadratic], old: Mapping[str, Quadratic], parameters: Mapping[str, nn.Parameter]
    ) -> dict[str, Quadratic]:
        """Return the terms of all tasks; a parameter without a new Fisher counts as F = 0."""
        if self.mode == "separate":
            return {**old, **{n: add_quadratics(old[n], term) if n in old else term for n, term in fresh.items()}}
        joined = dict(fresh)
        for name, term in old.items():
            fisher = term.fisher * self.gamma + (fresh[name].fisher if name in fresh else 0.0)
            joined[name] = Quadratic(fisher, parameters[name].detach().to(fisher.dtype, copy=True))
        return joined

    def _check(self, terms: Mapping[str, Quadratic]) -> None:
        for name, term in terms.items():
            largest = float(gathered(term.fisher.max())) if term.fisher.numel() else 0.0
            if not self.lam * largest < torch.finfo(term.fisher.dtype).max:
                raise ConfigError(
                    f"lambda times the Fisher must be finite in {term.fisher.dtype}, but lambda is {self.lam:.3g} and "
                    f"the largest entry of {name} {largest:.3g}; give a smaller lambda"
                )

    def _list_free(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Update the list of trainable parameters without a Fisher, and log the new ones."""
        free = tuple(name for name, p in parameters.items() if p.requires_grad and name not in self._terms)
        new = [name for name in free if name not in self.unpenalised]
        if new:
            shown = ", ".join(new[:5]) + (", ..." if len(new) > 5 else "")
            LOG.warning("EWC leaves %d trainable parameters free, having no Fisher of them: %s", len(new), shown)
        self.unpenalised = free


def _local(tensor: Any) -> Tensor:
    """Return the local shard of a tensor."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part
