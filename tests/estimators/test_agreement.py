"""What training left behind and what data say, side by side."""

import torch
from torch import nn

from squisher_mergekit import estimate_fisher, save_squisher
from squisher_mergekit.fisher.compare import compare


def test_a_squisher_ranks_parameters_as_the_fisher_does(tmp_path):
    """After 300 steps on a small task the accumulator's ranks go with those of the empirical Fisher."""
    torch.manual_seed(13)
    model = nn.Sequential(nn.Linear(17, 23), nn.Tanh(), nn.Linear(23, 5))
    x = torch.randn(512, 17) * torch.linspace(0.1, 2, 17)
    y = (x @ torch.randn(17, 5) + torch.randn(512, 5)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99))
    for step in range(300):
        part = slice(16 * step % 512, 16 * step % 512 + 16)
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
    squisher = save_squisher(model, optimizer, tmp_path, examples_per_step=16)
    fisher = estimate_fisher(model, [(x, y)])
    found = compare(squisher, fisher)
    print(f"rank correlation of the Squisher with the empirical Fisher: {found.over_all.spearman:.3f}")
    assert found.over_all.spearman > 0.8
