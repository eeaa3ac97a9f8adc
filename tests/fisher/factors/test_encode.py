"""Compact factors: form, size and measured error; upload and download."""

import pytest
import torch
from click.testing import CliRunner

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.fisher.config import FactorsInfo, FisherConfig
from squisher_mergekit.fisher.factors.blocks import second_moments
from squisher_mergekit.fisher.factors.mapping import factors_in_memory
from squisher_mergekit.fisher.mapping import Fisher
from tests import hub_server

REPO = "org/with-factors"


def _fisher(rows=150, columns=67, block=128):
    generator = torch.Generator().manual_seed(6)
    gradient = torch.randn(rows, 9, generator=generator) @ torch.randn(9, columns, generator=generator)
    gradient += 0.1 * torch.randn(rows, columns, generator=generator)
    factors = {"rows": {"w": second_moments(gradient, block)}, "columns": {"w": second_moments(gradient.T, block)}}
    known = factors_in_memory(factors, FactorsInfo(source="recorded", statistic="ema"), {"w": gradient.shape})
    return Fisher({"w": gradient.square()}, FisherConfig(estimator="empirical", statistic="mean"), factors=known)


def _error(fisher, read):
    pairs = [(fisher.factors.side(s)[n], read.factors.side(s)[n]) for s in ("rows", "columns") for n in ("w",)]
    lost = sum((a.double() - b.double()).square().sum() for a, b in pairs)
    return float((lost / sum(a.double().square().sum() for a, _ in pairs)).sqrt())


@pytest.mark.parametrize(
    ("dtype", "compress", "form", "most"),
    [("float32", None, "full", 0.0), ("bfloat16", None, "full", 0.004), ("float32", "log8", "full", 0.004),
     ("float32", "log4", "low_rank", 0.05), ("bfloat16", "rank1", "low_rank", 0.05)],
)  # fmt: skip
def test_the_recorded_error_is_that_of_the_file(tmp_path, dtype, compress, form, most):
    """The relative Frobenius error in the metadata is that of the factors that a reader gets."""
    fisher = _fisher()
    config = fisher.save(tmp_path / "f", dtype, compress)
    read = load_fisher(tmp_path / "f")
    assert config.factors.form == form
    assert (config.factors.error or 0.0) == pytest.approx(_error(fisher, read), rel=1e-6, abs=1e-12)
    assert (config.factors.error or 0.0) <= most
    assert read.factors.nbytes <= fisher.factors.nbytes * {"full": 1, "low_rank": 0.35}[form]


def test_low_rank_factors_stay_as_they_are(tmp_path):
    """A second file of low-rank factors has their bits."""
    _fisher().save(tmp_path / "one", compress="rank1")
    one = load_fisher(tmp_path / "one")
    one.save(tmp_path / "two", compress="log8")
    two = load_fisher(tmp_path / "two")
    assert two.factors.info == one.factors.info
    assert all(torch.equal(two.factors.rows[name], one.factors.rows[name]) for name in one.factors.rows)


def test_small_blocks_stay_full(tmp_path):
    """A block with fewer rows than the low rank would save nothing."""
    config = _fisher(block=16).save(tmp_path / "f", compress="rank1")
    assert config.factors.form == "full"
    assert load_fisher(tmp_path / "f").factors.rows["w"].dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
def test_push_and_pull(tmp_path, monkeypatch):
    """`push` prints size and error of the factors, and `pull` gets them."""
    fisher = _fisher()
    fisher.save(tmp_path / "f")
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch)
        pushed = CliRunner().invoke(main, ["push", str(tmp_path / "f"), REPO, "--quiet"])
        assert pushed.exit_code == 0, pushed.output
        pulled = CliRunner().invoke(main, ["pull", f"{REPO}@fisher", "-o", str(tmp_path / "out"), "--quiet"])
        assert pulled.exit_code == 0, pulled.output
    read = load_fisher(tmp_path / "out")
    assert f"relative error {read.config.factors.error:.2%} (Frobenius)" in pushed.output
    assert "(low rank)" in pushed.output
    assert _error(fisher, read) == pytest.approx(read.config.factors.error, rel=1e-6)
