"""Agreement of a Squisher with the Fisher from data."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from squisher_mergekit import estimate_fisher, save_squisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.write import write_fisher


@pytest.mark.parametrize("labels", ["true", "sampled", "exact"])
def test_a_squisher_ranks_parameters_as_the_fisher_does(tmp_path, labels):
    """``squisher compare`` finds a rank correlation above 0.8 with each Fisher after 300 steps."""
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
    save_squisher(model, optimizer, tmp_path / "squisher", examples_per_step=16)
    write_fisher(estimate_fisher(model, [(x, y)], labels), tmp_path / "fisher")
    names = [str(tmp_path / name) for name in ("squisher", "fisher")]
    done = CliRunner().invoke(main, ["compare", *names, "--quiet", "--json", str(tmp_path / "report.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "report.json").read_text())["over_all"]["spearman"]
    print(f"rank correlation of the Squisher with the Fisher of {labels} labels: {found:.3f}")
    assert found > 0.8
