"""Coupled merges with lambda, and with trimmed task vectors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from squisher_mergekit.merging.coupling.execution import Structure, merge_coupled
from squisher_mergekit.merging.density import Trim
from squisher_mergekit.merging.inputs import Ballot, Input
from squisher_mergekit.merging.votes.options import VoteOptions
from tests.merging.models import base_and_models, entry
from tests.merging.reference import assert_config_refused, assert_within, keep_largest, largest, merged


@pytest.mark.parametrize("kind", ["rows", "columns", "kron"])
def test_task_vectors_are_trimmed_first(kind: str) -> None:
    """A coupled merge trims the task vectors first, and lambda extends the result."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(14, 9, generator=generator, dtype=torch.float64)
    structure, plain, trimmed = Structure(kind, block=7), [], []
    for density in (0.3, 0.8, 1.0):
        theta = base + torch.randn(14, 9, generator=generator, dtype=torch.float64)
        fisher = torch.rand(14, 9, generator=generator, dtype=torch.float64)
        trim = None if density == 1 else Trim(base, fisher, density)
        trimmed.append(Input(theta, fisher, density, trim=trim))
        own = theta if density == 1 else keep_largest(theta, base.clone(), fisher, density)
        plain.append(Input(own, fisher, density))
    expected = merge_coupled(base, plain, structure, torch.float64).values
    ballot = Ballot(VoteOptions(trimmed="abstain", extent=1.5), base)
    found = merge_coupled(base, trimmed, structure, torch.float64, ballot=ballot).values
    assert_within(found, base + 1.5 * (expected - base), largest([base, *(item.theta for item in plain)]))


def _config(root: Path, **settings: Any) -> dict[str, Any]:
    models = [entry(root, i, density=settings.pop(f"density{i}", 1.0)) for i in (1, 2)]
    base = str(root / "m0")
    return {"merge_method": "squisher", "base_model": base, "models": models, "parameters": {"block": 6, **settings}}


@pytest.mark.parametrize("structure", ["rows", "kron"])
def test_lambda(tmp_path: Path, structure: str) -> None:
    """`mergekit-yaml` extends the step of a coupled merge, and of the tensors left to the diagonal."""
    weights, _ = base_and_models(tmp_path, 3)
    plain = merged(_config(tmp_path, structure=structure), tmp_path / "plain")
    result = merged(_config(tmp_path, structure=structure, **{"lambda": 2.0}), tmp_path / "out")
    for name, tensor in result.items():
        base = weights[0][name].double()
        size = largest([base, plain[name], *(m[name] for m in weights[1:])])
        assert_within(tensor, base + 2 * (plain[name].double() - base), size * 2)


def test_density_needs_abstention(tmp_path: Path) -> None:
    """A density with votes for the base is refused with a structure; with abstention it is merged."""
    base_and_models(tmp_path, 3)
    refused = _config(tmp_path, structure="rows", density1=0.5)
    assert_config_refused(tmp_path / "x", refused, "must be 1 with structure: rows", "set trimmed: abstain")
    merged(_config(tmp_path, structure="rows", density1=0.5, trimmed="abstain"), tmp_path / "out")
