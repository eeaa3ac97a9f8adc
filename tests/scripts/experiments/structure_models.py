"""Small models over one base, with second moments, for the tests of the experiments on structures."""

import torch

from scripts.experiments.structure_merges import Models


def few_models(count, *, out=8, width=6, vectors=True, score=None):
    """Return models whose task vectors share some directions; tensors ``x.encoder.a`` and, if wanted, a vector."""
    generator = torch.Generator().manual_seed(out + width)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    base = {"x.encoder.a": draw(out, width)} | ({"x.norm": draw(out)} if vectors else {})
    names = "abcdef"[:count]
    weights, fishers = {}, {}
    for name in names:
        weights[name] = {key: origin + 0.1 * draw(*origin.shape) for key, origin in base.items()}
        fishers[name] = {key: draw(*origin.shape).square() * 1e-8 for key, origin in base.items()}
    return Models(base, weights, fishers, score or (lambda weights, part: dict.fromkeys(names, 50.0)))
