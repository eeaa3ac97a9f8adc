"""States of SOAP and Shampoo: saved by the real optimizers, and built in the layout of other implementations."""

import pytest
import torch
from safetensors.torch import load_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import CorruptFileError, SquisherError, UnsupportedStateError
from tests.optimizers.preconditioners.runs import BETA2, FIXTURES, KINDS, NAMES, STEPS


def _load(kind):
    return load_fisher(FIXTURES / kind / "optimizer.pt", names=NAMES), load_file(FIXTURES / kind / "truth.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_are_the_live_matrices(kind):
    """Each factor equals the optimizer's matrices to the bit; a whole one is one block; axes without one have none."""
    fisher, truth = _load(kind)
    found = {f"{name}.{side}": fisher.factors.side(side)[name] for side in ("rows", "columns") for name in
             fisher.factors.side(side)}  # fmt: skip
    wanted = {name: factor for name, factor in truth.items() if name.endswith((".rows", ".columns"))}
    assert found.keys() == wanted.keys()
    for name, factor in wanted.items():
        assert torch.equal(found[name], factor if factor.ndim == 3 else factor[None]), name


@pytest.mark.parametrize(
    "kind", ["soap", "soap_vectors", "shampoo", "scalable", "scalable_rmsprop", "scalable_adagrad"]
)
def test_the_diagonal_has_the_sums_of_the_squared_gradients(kind):
    """Row sums and column sums of the diagonal are those of the gradients, not of an eigenbasis."""
    fisher, truth = _load(kind)
    for name in ("0.weight", "2.weight"):
        torch.testing.assert_close(fisher[name].double().sum(1), truth[f"{name}.row_sums"], rtol=2e-4, atol=1e-9)
        torch.testing.assert_close(fisher[name].double().sum(0), truth[f"{name}.column_sums"], rtol=2e-4, atol=1e-9)


def test_one_preconditioned_axis_gives_its_sums_exactly():
    """The sums over the other axis are those of `exp_avg_sq`, which the basis keeps, up to one common factor."""
    fisher, truth = _load("soap_one_side")
    assert list(fisher.factors.rows) == ["0.weight"]
    assert list(fisher.factors.columns) == ["2.weight"]
    # The first gradient is in the factors alone, so that the sums over the other axis are of one gradient less.
    for name, key, axis in (("0.weight", "row_sums", 1), ("2.weight", "column_sums", 0)):
        found, wanted = fisher[name].double().sum(axis), truth[f"{name}.{key}"]
        torch.testing.assert_close(found / found.sum(), wanted / wanted.sum(), rtol=2e-4, atol=0)


def test_vectors_are_plain_or_the_diagonal_of_their_factor():
    """A vector that is not preconditioned has Adam's second moment, of one gradient less."""
    fisher, _ = _load("soap")
    assert (fisher.config.steps_of("0.weight"), fisher.config.steps_of("0.bias")) == (STEPS, STEPS - 1)
    preconditioned, truth = _load("soap_vectors")
    for name in ("0.bias", "2.bias"):
        torch.testing.assert_close(preconditioned[name].double(), truth[f"{name}.row_sums"], rtol=2e-4, atol=1e-12)
    assert preconditioned.config.beta2_of("0.bias") == 0.8


def test_the_metadata_name_the_optimizer_and_its_statistic():
    """SOAP keeps a moving average; Shampoo a sum that began at a multiple of the identity."""
    soap, shampoo = _load("soap")[0].config, _load("shampoo")[0].config
    assert (soap.optimizer.class_, soap.factors.statistic, soap.factors.decay) == ("SOAP", "ema", BETA2)
    assert (shampoo.optimizer.class_, shampoo.factors.statistic, shampoo.factors.initial) == ("Shampoo", "sum", 1e-3)
    assert {soap.factors.source, shampoo.factors.source} == {"optimizer"}


def _reference_soap(gradients, beta=0.9):
    """Return the state that SOAP's first implementation saves: `step` per parameter, counted from the second."""
    left = right = 0
    for gradient in gradients:
        left = left * beta + (1 - beta) * gradient @ gradient.T
        right = right * beta + (1 - beta) * gradient.T @ gradient
    bases = [torch.linalg.eigh(factor)[1].flip(1) for factor in (left, right)]
    squares = torch.zeros_like(gradients[0])
    return {
        "step": len(gradients) - 1, "exp_avg": squares.clone(), "exp_avg_sq": squares, "GG": [left, right],
        "Q": bases, "precondition_frequency": 10, "shampoo_beta": beta,
    }  # fmt: skip


def _save(file, state, **group):
    torch.save({"state": {0: state}, "param_groups": [{"params": [0], "betas": (0.9, 0.95), **group}]}, file)
    return file


@pytest.mark.parametrize("shape", [(5, 3), (2, 17)])
def test_the_reference_implementation_counts_from_the_second_step(tmp_path, shape):
    """The mean square per step is that of all gradients."""
    generator = torch.Generator().manual_seed(shape[0])
    gradients = [torch.randn(shape, generator=generator) for _ in range(6)]
    fisher = load_fisher(_save(tmp_path / "optimizer.pt", _reference_soap(gradients)), names=["w"])
    assert fisher.config.steps == 6
    weights = torch.tensor([0.9 ** (5 - i) for i in range(6)], dtype=torch.float64)
    mean = sum(w * g.double().square() for w, g in zip(weights, gradients, strict=True)) / weights.sum()
    torch.testing.assert_close(fisher.scaled("w").double().sum(1), mean.sum(1), rtol=1e-5, atol=0)


def test_merged_axes_have_no_diagonal(tmp_path):
    """One factor over all entries of a matrix is of no axis; the file has nothing else to read."""
    state = _reference_soap([torch.randn(3, 4)])
    state["GG"], state["Q"] = [torch.eye(12)], [torch.eye(12)]
    with pytest.raises(UnsupportedStateError, match="in another basis"):
        load_fisher(_save(tmp_path / "optimizer.pt", state), names=["w"])


def _shampoo(left, right, prefix="precond_"):
    return {
        "step": 3, f"{prefix}0": left, f"inv_{prefix}0": left, f"{prefix}1": right, f"inv_{prefix}1": right,
        "momentum_buffer": torch.zeros(len(left), len(right)),
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["precond_", "pre_cond_"])
def test_a_factor_of_preconditioned_gradients_is_refused(tmp_path, prefix):
    """Versions that precondition the gradient between the two factors are known by the traces."""
    gradient = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    left, right = gradient @ gradient.T, 30 * gradient.T @ gradient
    file = _save(tmp_path / "optimizer.pt", _shampoo(left, right, prefix), epsilon=0.0)
    with pytest.raises(UnsupportedStateError, match="must be of the same gradients"):
        load_fisher(file, names=["w"])
    fine = _save(tmp_path / "optimizer.bin", _shampoo(left, gradient.T @ gradient, prefix), epsilon=0.0)
    assert set(load_fisher(fine, names=["w"]).factors.columns) == {"w"}


def test_shampoo_with_momentum_is_refused(tmp_path):
    """Its momentum of preconditioned gradients is part of the factors."""
    file = _save(tmp_path / "optimizer.pt", _shampoo(torch.eye(2), torch.eye(2)), momentum=0.9)
    with pytest.raises(UnsupportedStateError, match="with momentum"):
        load_fisher(file, names=["w"])


@pytest.mark.parametrize("damage", [torch.ones(3), torch.ones(3, 4), torch.ones(1).expand(9, 9), "text"])
def test_a_damaged_factor_is_refused(tmp_path, damage):
    """A factor must be a square matrix with bytes of its own."""
    state = _reference_soap([torch.randn(3, 4)])
    state["GG"][0] = damage
    with pytest.raises(CorruptFileError, match="must be a square matrix"):
        load_fisher(_save(tmp_path / "optimizer.pt", state), names=["w"])


@pytest.mark.parametrize(("kind", "name"), [("soap", "2.weight"), ("shampoo", "0.weight")])
def test_a_flipped_bit_in_a_factor_is_noticed(tmp_path, kind, name):
    """The checksums of the file are verified for the diagonal and for the factor."""
    content = bytearray((FIXTURES / kind / "optimizer.pt").read_bytes())
    factor = load_file(FIXTURES / kind / "truth.safetensors")[f"{name}.columns"].numpy().tobytes()
    content[content.index(factor) + len(factor) // 2] ^= 1
    file = tmp_path / "optimizer.pt"
    file.write_bytes(content)
    fisher = load_fisher(file, names=NAMES)
    with pytest.raises(CorruptFileError):
        fisher[name]
    with pytest.raises(CorruptFileError):
        fisher.factors.columns[name]


@pytest.mark.parametrize(
    "settings",
    [
        {"betas": ()},
        {"betas": ("x", "y")},
        {"betas": (0.9, float("nan"))},
        {"betas": (0.9, 3.0)},
        {"shampoo_beta": float("nan")},
        {"shampoo_beta": "0.9"},
        {"shampoo_beta": [0.9]},
    ],
    ids=str,
)
def test_a_damaged_setting_is_refused_in_one_line(tmp_path, settings):
    """A decay that is missing, no number or out of range gives no Fisher."""
    state = _reference_soap([torch.randn(3, 4)])
    if "betas" in settings:
        state.pop("shampoo_beta")
    else:
        state |= settings
    with pytest.raises(SquisherError) as found:
        load_fisher(_save(tmp_path / "optimizer.pt", state, **settings), names=["w"])
    assert "\n" not in str(found.value)
