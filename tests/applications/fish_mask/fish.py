"""Model on disk with its base and a Fisher, for tests of FISH masks."""

import torch
import transformers

from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.estimators.models import make


class Pair:
    """Folders of a base, of a tuned model, and of a Fisher of the tuned model."""

    def __init__(self, folder, name, dtype=torch.float32, shard="2GB"):
        self.base, self.tuned, self.fisher = folder / "base", folder / "tuned", folder / "fisher"
        model = make(name).to(dtype)
        self.kind = type(model)
        # A pre-trained model has no head, so its names lack the prefix of the trunk.
        trunk = model.base_model if model.get_output_embeddings() is None else model
        trunk.save_pretrained(self.base, max_shard_size=shard)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                # A quarter of the weights do not move.
                parameter += (noise * (torch.rand(parameter.shape, generator=generator) < 0.75)).to(dtype)
        model.save_pretrained(self.tuned, max_shard_size=shard)
        write_fisher(fisher_of(self.tuned), self.fisher)

    def load(self, folder, kind=None):
        """Return the model in a folder."""
        transformers.set_seed(1)
        return (kind or self.kind).from_pretrained(folder, dtype="auto")

    def load_base(self):
        """Return the base as it was saved: for a model with a head, the trunk alone."""
        return (
            transformers.AutoModel.from_pretrained(self.base, dtype="auto")
            if self.trunk_alone
            else self.load(self.base)
        )

    @property
    def trunk_alone(self):
        """Return True if the base has no head."""
        return "ForSequence" in self.kind.__name__ or "ForImage" in self.kind.__name__


def fisher_of(folder, seed=3):
    """Return a Fisher of the parameters in a folder, spread over many orders of magnitude, with some zeros."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, info in open_weights(folder).infos.items():
        if info.dtype.is_floating_point and "running_" not in name:
            spread = torch.rand(info.shape, generator=generator)
            tensors[name] = torch.where(spread < 0.1, 0.0, 1e-9 * spread**20)
    config = FisherConfig(estimator="empirical", statistic="mean", weights_fingerprint=fingerprint(folder))
    return Fisher(MemoryStore(tensors), config)


def bits(tensor):
    """Return the bits of a tensor for a comparison."""
    return tensor.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def same(first, second):
    """Return True if two folders hold the same weights, bit for bit."""
    a, b = open_weights(first), open_weights(second)
    return a.infos == b.infos and all(
        torch.equal(bits(a.read(n)), bits(b.read(n)))
        if i.dtype.is_floating_point
        else torch.equal(a.read(n), b.read(n))
        for n, i in a.infos.items()
    )
