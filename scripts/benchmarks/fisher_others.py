"""Four other packages in the benchmark ``fisher``, each used in its fastest way.

Losses are sums over the examples, so no result needs scaling; losses of language models take flattened logits. Each
package works on a copy of the model, because it leaves hooks behind. The batch has position ids for each example:
without them BERT looks positions up once for all examples, and no hook can separate the examples.
"""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import torch
from torch import nn

from scripts.benchmarks.fisher_methods import ALL, CHUNKS, EMPIRICAL, Kind, Method, Run, Sought, add_squares, chunks
from scripts.benchmarks.fisher_models import Batch, labels_of, terms


def require(method: Method) -> None:
    """Raise if the package of a method is not installed.

    Raises:
        ModuleNotFoundError: The package cannot be imported.
    """
    if method.package and importlib.util.find_spec(method.package) is None:
        raise ModuleNotFoundError("not installed, see --help")


def _placed(batch: Batch) -> Batch:
    """Return a batch with position ids for each example."""
    if isinstance(batch, tuple):
        return batch
    ids = batch["input_ids"]
    return {**batch, "position_ids": torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)}


def backpack(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare BackPACK.

    First-order extensions need the leaf modules only, second-order ones the whole sequential network. BackPACK refuses
    a padding index, so the copy has none; no batch has padding.
    """
    from backpack import backpack, extend
    from backpack.extensions import DiagGGNExact, DiagGGNMC, SumGradSquared

    model, batch = copy.deepcopy(model), _placed(batch)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
        if kind == "empirical" and not list(module.children()):
            extend(module)
    if kind != "empirical":
        extend(model)
    extension = {"empirical": SumGradSquared, "sampled": DiagGGNMC, "exact": DiagGGNExact}[kind]()
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))
    parameters = dict(model.named_parameters())

    def run() -> Sought:
        model.zero_grad(set_to_none=True)
        with backpack(extension):
            loss(*terms(model, batch)).backward()
        found = {name: getattr(p, extension.savefield, None) for name, p in parameters.items()}
        for name in found:
            if found[name] is not None:
                delattr(parameters[name], extension.savefield)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    return run


def nngeometry(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare nngeometry; its empirical Fisher takes the log-likelihood of the true labels."""
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM, FIM_MonteCarlo
    from nngeometry.object import PMatDiag

    model = copy.deepcopy(model)
    layers = LayerCollection.from_model(model)  # raises for unknown layers
    _, labels = batch
    loader = _whole(batch)

    def likelihood(inputs: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return model(inputs).log_softmax(-1).gather(1, labels.unsqueeze(1))

    def run() -> Sought:
        common: dict[str, Any] = {"layer_collection": layers, "device": labels.device}
        if kind == "empirical":
            backend = TorchHooksJacobianBackend(model=model, function=likelihood, layer_collection=layers)
            found = PMatDiag(generator=backend, examples=loader).get_diag()
        elif kind == "sampled":
            found = FIM_MonteCarlo(model, loader, PMatDiag, **common).get_diag()
        else:
            found = FIM(model, loader, PMatDiag, **common).get_diag()
        found = found * len(labels)  # nngeometry returns a mean
        named = list(layers.named_parameters(dict(model.named_modules())))
        pieces = found.split([p.numel() for _, p in named])
        return {name: piece.view(p.shape) for (name, p), piece in zip(named, pieces, strict=True)}

    return run


def _whole(batch: Batch) -> torch.utils.data.DataLoader[Any]:
    """Return a loader that yields the whole batch at once, without collating examples."""
    dataset = torch.utils.data.TensorDataset(*batch)

    def whole(_: Any) -> list[torch.Tensor]:
        return [part.detach() for part in batch]  # nngeometry makes it require a gradient, which the batch must not do

    return torch.utils.data.DataLoader(dataset, batch_size=len(labels_of(batch)), collate_fn=whole)


def asdl(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare ASDL (asdfghjkl on PyPI)."""
    import asdl as package

    model, batch = copy.deepcopy(model), _placed(batch)
    kinds = {"empirical": package.FISHER_EMP, "sampled": package.FISHER_MC, "exact": package.FISHER_EXACT}
    config = package.FisherConfig(kinds[kind], [package.SHAPE_DIAG], package.LOSS_CROSS_ENTROPY, data_size=1)
    maker = package.get_fisher_maker(model, config)
    names = {id(p): name for name, p in model.named_parameters()}

    def run() -> Sought:
        model.zero_grad(set_to_none=True)
        outputs = maker.setup_model_call(lambda: terms(model, batch))
        maker.setup_loss_call(nn.functional.cross_entropy, outputs[0], outputs[1], reduction="sum")
        maker.forward_and_backward()
        total: Sought = {}
        for module in model.modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for part in ("weight", "bias"):
                if diagonal is not None and getattr(diagonal, part) is not None:
                    name = names[id(getattr(module, part))]
                    total[name] = total.get(name, 0) + getattr(diagonal, part)
        return total

    return run


def opacus(model: nn.Module, batch: Batch, kind: Kind, chunk: int) -> Run:
    """Prepare Opacus, and square and sum its per-example gradients; Opacus records inputs in train mode only."""
    from opacus import GradSampleModule

    batch = _placed(batch)
    wrapped = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")
    parameters = {name.removeprefix("_module."): p for name, p in wrapped.named_parameters()}

    def run() -> Sought:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for part in chunks(batch, chunk):
            wrapped.zero_grad(set_to_none=True)
            nn.functional.cross_entropy(*terms(wrapped, part), reduction="sum").backward()
            for name, p in parameters.items():
                add_squares(total[name], p.grad_sample)
                p.grad_sample = None
        return total

    return run


OTHERS = [
    Method("BackPACK", ALL, backpack, package="backpack"),
    Method("nngeometry", ALL, nngeometry, package="nngeometry"),
    Method("ASDL", ALL, asdl, package="asdl"),
    *(Method("Opacus", EMPIRICAL, opacus, chunk, package="opacus") for chunk in CHUNKS),
]
