"""Factors of SOAP and Shampoo from the real optimizers: live, extracted, merged."""

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from squisher_mergekit import load_fisher, save_squisher
from squisher_mergekit.cli.main import main
from tests.optimizers.preconditioners.runs import FIXTURES, KINDS, NAMES, write


@pytest.mark.parametrize("kind", KINDS)
def test_the_real_optimizer_live_and_on_disk(tmp_path, kind):
    """Fishers and factors of the optimizer in memory equal those of its file, and the fixture is such a file."""
    pytest.importorskip(
        "pytorch_optimizer",
        reason="compares the fixtures, which other tests read, with new runs; no reader may need the package",
    )
    model, optimizer = write(kind, tmp_path)
    live = save_squisher(model, optimizer, tmp_path / "live")
    read = load_fisher(tmp_path / "optimizer.pt", names=NAMES)
    assert live.config.steps == read.config.steps
    for side in ("rows", "columns"):
        assert list(live.factors.side(side)) == list(read.factors.side(side))
        for name, factor in live.factors.side(side).items():
            assert torch.equal(factor, read.factors.side(side)[name])
    assert all(torch.equal(live[name], read[name]) for name in live)
    found, kept = (load_file(folder / "truth.safetensors") for folder in (tmp_path, FIXTURES / kind))
    for name, tensor in kept.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", ["soap", "shampoo"])
def test_extract_and_inspect_show_the_factors(tmp_path, kind):
    """`squisher extract` writes the factors, and `squisher inspect` prints a line about them."""
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    arguments = [str(FIXTURES / kind / "optimizer.pt"), "-o", str(tmp_path / "out"), "--quiet"]
    done = CliRunner().invoke(main, ["extract", *arguments, "--names", str(tmp_path / "names.txt")])
    assert done.exit_code == 0, done.output
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--quiet"])
    for output in (done.output, shown.output):
        assert "rows of 2 and columns of 2 matrices in blocks of 7 to 13, optimizer" in output
    fisher = load_fisher(tmp_path / "out")
    assert list(fisher) == list(NAMES)
    before = load_fisher(FIXTURES / kind / "optimizer.pt", names=NAMES)
    assert torch.equal(fisher.factors.columns["0.weight"], before.factors.columns["0.weight"])
