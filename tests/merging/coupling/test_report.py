"""Report of coupled merges, against slow float64 references."""

import pytest
import torch

from squisher_mergekit.merging.coupling import execution as coupled
from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.coupling.report import rank_sums, structure_lines, structure_report
from squisher_mergekit.merging.inputs import Input
from tests.merging.coupling.reference import REFERENCES, factor, step_report

WEIGHTS = [1.0, 0.5, 2.0]
NAME = "model.layers.3.mlp.up_proj.weight"


def _draw(shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator, dtype=torch.float64)
    thetas = [base + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    fishers = [1e-9 * torch.rand(shape, generator=generator, dtype=torch.float64) ** 3 for _ in range(count)]
    return base, thetas, fishers


def _outcome(base, thetas, fishers, structure, weights, dtype=torch.float64):
    known = [None] * len(thetas) if fishers is None else [fisher.to(dtype) for fisher in fishers]
    inputs = [Input(t.to(dtype), f, w) for t, f, w in zip(thetas, known, weights, strict=True)]
    return merge_coupled(base.to(dtype), inputs, structure, dtype, reported=True)


def _report(*arguments, name=NAME, **settings):
    outcome = _outcome(*arguments, **settings)
    return structure_report({name: (["a", "b", "c", "d"], outcome.report)}), outcome.values.double()


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("shape", [(9, 5), (5, 11), (1, 7)])
@pytest.mark.parametrize("block", [2, 4, 50])
@pytest.mark.parametrize("known", [True, False])
def test_shares_and_conflict_equal_the_dense_reference(kind, shape, block, known):
    """Odd sizes and blocks that do not divide, with Fishers and without, in float64 and float32."""
    base, thetas, fishers = _draw(shape, 3)
    given = fishers if known else None
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        report, merged = _report(base, thetas, given, Structure(kind, block, 0.1, steps=60), WEIGHTS, dtype=dtype)
        shares, conflict = step_report(kind, base, merged, thetas, given, WEIGHTS, block, 0.1)
        assert list(report["share"].values()) == pytest.approx(shares, abs=tolerance)
        assert report["conflict"] == pytest.approx(conflict, abs=tolerance)


@pytest.mark.parametrize("kind", REFERENCES)
def test_panels_change_no_figure(kind, monkeypatch):
    """A matrix reported in many panels equals the matrix reported in one, block by block."""
    base, thetas, fishers = _draw((13, 9), 3)
    whole, _ = _report(base, thetas, fishers, Structure(kind, 4), WEIGHTS)
    monkeypatch.setattr(coupled, "PANEL", 30)
    parts, _ = _report(base, thetas, fishers, Structure(kind, 4), WEIGHTS)
    assert parts["conflict"] == pytest.approx(whole["conflict"])
    assert parts["tensors"][NAME]["blocks"] == pytest.approx(whole["tensors"][NAME]["blocks"])
    assert len(parts["tensors"][NAME]["blocks"]) == (3 if kind == "columns" else 4)
    for side, ranks in whole["effective_rank"].items():
        assert parts["effective_rank"][side] == pytest.approx(ranks)


@pytest.mark.parametrize("kind", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_models_have_no_conflict(kind, dtype):
    """The conflict of three copies is 0, not a rounding error."""
    base, thetas, fishers = _draw((9, 5), 3)
    report, _ = _report(base, [thetas[1]] * 3, fishers, Structure(kind, 4), WEIGHTS, dtype=dtype)
    assert report["conflict"] == 0
    assert report["tensors"][NAME]["blocks"] == [0.0] * len(report["tensors"][NAME]["blocks"])


@pytest.mark.parametrize("kind", REFERENCES)
def test_opposite_models_are_in_full_conflict(kind):
    """Two models that step in opposite directions with one Fisher cancel out."""
    base, thetas, fishers = _draw((9, 5), 1)
    opposite = 2 * base - thetas[0]
    report, merged = _report(base, [thetas[0], opposite], fishers * 2, Structure(kind, 4, steps=60), [1.0, 1.0])
    torch.testing.assert_close(merged, base)
    assert report["conflict"] == pytest.approx(1)


@pytest.mark.parametrize("kind", REFERENCES)
def test_conflict_is_between_0_and_1(kind):
    """The merge fits the models at least as well as the base does, block by block."""
    base, thetas, fishers = _draw((12, 10), 3)
    report, _ = _report(base, thetas, fishers, Structure(kind, 5), WEIGHTS)
    assert all(0 < conflict < 1 for conflict in report["tensors"][NAME]["blocks"])
    assert sum(report["share"].values()) == pytest.approx(1)


def test_a_model_of_weight_0_has_no_share():
    """The shares name the models that are merged."""
    base, thetas, fishers = _draw((9, 5), 3)
    report, _ = _report(base, thetas, fishers, Structure("rows", 4), [1.0, 0.0, 2.0])
    assert set(report["share"]) == {"a", "c"}


@pytest.mark.parametrize(("kind", "sides"), [("rows", 1), ("columns", 1), ("kron", 2)])
def test_effective_ranks_are_those_of_the_factors(kind, sides):
    """(tr L)^2 / ||L||_F^2 by eigenvalues, the mean over the blocks by their rows."""
    base, thetas, fishers = _draw((9, 7), 2)
    report, _ = _report(base, thetas, fishers, Structure(kind, 4), [1.0, 1.0])
    assert len(report["effective_rank"]) == sides
    for side, ranks in report["effective_rank"].items():
        for label, theta, fisher in zip("ab", thetas, fishers, strict=True):
            step = theta - base
            if side == "columns":
                step, fisher = step.T, fisher.T
            total, size = 0.0, 0.0
            for low in range(0, len(step), 4):
                part = slice(low, low + 4)
                values = torch.linalg.eigvalsh(factor(step[part], fisher[part], 4))
                total += len(values) * float(values.sum() ** 2 / values.square().sum())
                size += len(values) ** 2
            assert ranks[label] == pytest.approx(total / len(step))
            assert report["of"][side] == pytest.approx(size / len(step))


def test_blocks_without_a_signal_have_no_rank():
    """A block of zeros counts neither as rank 0 nor as rank b."""
    factors = torch.stack([torch.zeros(3, 3), torch.eye(3), torch.ones(3, 3)])
    (rank,), (size,), (rows,) = rank_sums([factors]).tolist()
    assert (rank / rows, size / rows) == (2, 3)


@pytest.mark.parametrize("known", [True, False])
def test_a_matrix_without_a_step_is_reported(known):
    """Models that equal the base, with Fishers or without, give zeros, not NaN."""
    base, _, fishers = _draw((9, 5), 2)
    for kind in REFERENCES:
        report, _ = _report(base, [base, base], fishers if known else None, Structure(kind, 4), [1.0, 1.0])
        assert (report["conflict"], set(report["share"].values())) == (0, {0})


def test_layers_sum_their_matrices():
    """Layers stand by number with their matrices together; an unnumbered tensor is a layer of its own."""
    base, thetas, fishers = _draw((9, 5), 2)
    factors = (1, 2, 3, 4)
    outcomes = [_outcome(base * i, [t * i for t in thetas], fishers, Structure("rows", 4), [1, 1]) for i in factors]
    names = ["h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight", "h.10.mlp.c_fc.weight", "lm_head.weight"]
    report = structure_report({n: (["a", "b"], o.report) for n, o in zip(names, outcomes, strict=True)})
    assert list(report["layers"]) == ["h.0", "h.10", "lm_head"]
    sums = sum(outcome.report.figures.sum((1, 2)) for outcome in outcomes[:2])
    assert report["layers"]["h.0"]["conflict"] == pytest.approx(float(sums[2] / sums[1]))


def test_a_merge_without_a_report_computes_none():
    """Nobody pays for figures that nobody reads."""
    base, thetas, fishers = _draw((9, 5), 2)
    inputs = [Input(t, f) for t, f in zip(thetas, fishers, strict=True)]
    assert merge_coupled(base, inputs, Structure("kron", 4), torch.float64).report is None


def test_lines_name_the_worst_layer():
    """The terminal gets shares, the range of conflicts with its worst layer, and ranks."""
    base, thetas, fishers = _draw((9, 5), 2)
    outcome = _outcome(base, thetas, fishers, Structure("kron", 4), [1, 1])
    text = "\n".join(structure_lines(structure_report({NAME: ("ab", outcome.report)}), {"a": "A", "b": "B"}))
    for words in ("merged step of 1 coupled matrices: A ", "(model.layers.3)", "effective rank over columns: A "):
        assert words in text
