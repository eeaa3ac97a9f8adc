"""Parameters dealt out to several optimizers are found again, or refused."""

import itertools
import random

import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.checkpoint_names import ParameterInfo
from squisher_mergekit.optimizers.assign_names import divide


def _all_ways(sequences, parameters, changed):
    """Every way to deal out, by trying each choice for each parameter: slow, and plainly right."""
    found = []
    for choice in itertools.product([None, *range(len(sequences))], repeat=len(parameters)):
        dealt = [
            [p for p, k in zip(parameters, choice, strict=True) if k == number] for number in range(len(sequences))
        ]
        skipped = {p.name for p, k in zip(parameters, choice, strict=True) if k is None}
        shapes = [[p.shape for p in some] for some in dealt]
        if shapes == sequences and not skipped & set(changed):
            found.append([[p.name for p in some] for some in dealt])
    return found


@pytest.mark.parametrize("seed", range(60))
def test_it_agrees_with_trying_every_way(seed):
    """Accepted exactly where one way fits, and then it is that way."""
    chance = random.Random(seed)
    shapes = [(3, 5), (5,), (5, 5)]
    parameters = [ParameterInfo(f"p{i}", chance.choice(shapes)) for i in range(7)]
    owners = [chance.choice([0, 0, 1, 1, None]) for _ in parameters]
    sequences = [[p.shape for p, k in zip(parameters, owners, strict=True) if k == number] for number in (0, 1)]
    changed = {p.name for p, k in zip(parameters, owners, strict=True) if k is not None and chance.random() < 0.7}
    ways = _all_ways(sequences, parameters, changed)
    needed = [[True] * len(sequence) for sequence in sequences]
    assert ways
    if len(ways) == 1:
        assert divide(sequences, parameters, changed, needed, "file") == ways[0]
    else:
        with pytest.raises(NamingError, match="--names"):
            divide(sequences, parameters, changed, needed, "file")


def test_what_fits_in_no_way_is_refused():
    """Another model's parameters are not forced on this one's."""
    with pytest.raises(NamingError, match="do not fit"):
        divide([[(3,)], [(5,)]], [ParameterInfo("a", (3,)), ParameterInfo("b", (7,))], None, [[True], [True]], "file")


class _Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(11, 5)
        self.up, self.norm, self.down = torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 5)

    def forward(self, x):
        return self.down(self.norm(self.up(self.embed(x))))


@pytest.mark.parametrize("form", ["list", "dict"])
def test_muon_with_adamw_is_a_partial_fisher(form, tmp_path):
    """Matrices that Muon trained are listed as missing with the reason; all others have AdamW's accumulator."""
    torch.manual_seed(3)
    net = _Net()
    matrices = [net.up.weight, net.down.weight]
    others = [p for p in net.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=1e-3), torch.optim.AdamW(others, lr=1e-3)]
    for _ in range(3):
        net(torch.randint(11, (13,))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    states = [optimizer.state_dict() for optimizer in optimizers]
    bundle = {"list": {"model": net.state_dict(), "optimizers": states}}
    bundle["dict"] = {"model": net.state_dict(), "muon": states[0], "adamw": states[1]}
    torch.save(bundle[form], tmp_path / "last.pt")
    fisher = load_fisher(tmp_path)
    named = dict(net.named_parameters())
    assert set(fisher) == {name for name, p in named.items() if any(p is other for other in others)}
    for name in fisher:
        assert torch.equal(fisher[name], optimizers[1].state[named[name]]["exp_avg_sq"])
    assert set(fisher.config.coverage.without) == {"up.weight", "down.weight"}
    assert all("Muon" in why for why in fisher.config.coverage.without.values())
    assert fisher.config.optimizer.class_ == "torch.optim.AdamW"
