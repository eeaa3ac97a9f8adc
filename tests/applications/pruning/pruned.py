"""Models on disk with Fishers, and a slow reference for pruning."""

import torch

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.training.cases import make


def stored(folder, name, dtype=torch.float32, shard="8KB"):
    """Save a small model in shards, load it again, and return it with a random Fisher."""
    model = make(name, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return type(model).from_pretrained(folder, dtype=dtype), fisher_of(folder)


def fisher_of(folder, seed=3):
    """Return a Fisher of the weights in a folder, spread over many orders of magnitude, with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, info in open_weights(folder).infos.items():
        spread = torch.rand(info.shape, generator=generator)
        tensors[name] = torch.where(spread < 0.1, 0.0, 1e-9 * spread**20)
    config = FisherConfig(
        estimator="empirical", statistic="sum", num_examples=7, weights_fingerprint=fingerprint(folder)
    )
    return Fisher(MemoryStore(tensors), config)


def slow_masks(scores, keep, min_keep=0.0):
    """Choose masks in float64 by a full sort: the floor of each tensor first, then the largest of all."""
    kept = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    for name, score in scores.items():
        floor = -int(-score.numel() * min_keep // 1)
        kept[name].view(-1)[score.flatten().argsort(descending=True, stable=True)[:floor]] = True
    rest = [
        (-value, row, place)
        for row, (name, score) in enumerate(scores.items())
        for place, value in enumerate(score.flatten().tolist())
        if not kept[name].view(-1)[place]
    ]
    masks = list(kept.values())
    for _, row, place in sorted(rest)[: keep - sum(int(mask.sum()) for mask in masks)]:
        masks[row].view(-1)[place] = True
    return kept
