"""Fisher as a mapping: lazy reads, ties, scaling against float64, mean, norm and checks."""

import math

import pytest
import torch

from squisher_mergekit.errors import ConfigError, MismatchError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.values import Moments, check_values
from squisher_mergekit.tensors.safetensors import MemoryStore, check_shape


def _random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (10 ** (torch.randn(*shape, generator=generator, dtype=torch.float64) * 2 - 8)).to(dtype)


def _config(**changes):
    return FisherConfig.model_validate(
        {"estimator": "squisher", "statistic": "ema", "steps": 3, "optimizer": {"beta2": 0.999}} | changes
    )


class _Counting(MemoryStore):
    """Store that counts its reads."""

    def __init__(self, tensors):
        super().__init__(tensors)
        self.reads = []

    def read(self, name):
        self.reads.append(name)
        return super().read(name)


def test_tensors_are_read_when_asked_for():
    """Opening, iterating, counting and asking for shapes read nothing. A look-up reads one tensor."""
    store = _Counting({"a": _random(3, 5), "b": _random(7, seed=1)})
    fisher = Fisher(store, _config(), {"c": "a"})
    assert (list(fisher), len(fisher), "b" in fisher, "x" in fisher, 3 in fisher) == (["a", "b"], 2, True, False, False)
    assert (fisher.info("a").shape, fisher.info("b").nbytes, fisher.info("c").dtype) == ((3, 5), 28, torch.float32)
    assert store.reads == []
    assert torch.equal(fisher["b"], _random(7, seed=1))
    assert store.reads == ["b"]


def test_other_names_of_a_tensor_are_found_but_not_counted():
    """An alias finds the tensor, its shape and its scale, but is no separate entry."""
    config = _config(steps={"default": 3, "a": 1}, optimizer={"beta2": 0.75})
    fisher = Fisher(MemoryStore({"a": _random(5)}), config, {"tied": "a", "dangling": "nothing"})
    assert torch.equal(fisher["tied"], fisher["a"])
    assert ("tied" in fisher, "dangling" in fisher, list(fisher)) == (True, False, ["a"])
    assert fisher.factor("tied") == 4.0
    assert torch.equal(fisher.scaled("tied"), fisher.scaled("a"))
    for ask in (fisher.__getitem__, fisher.info, fisher.scaled):
        with pytest.raises(KeyError):
            ask("dangling")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scaling", ["raw", "debiased", "per_example"])
def test_scaled_is_float64_rounded_once(dtype, scaling):
    """A scaled tensor is the exact product rounded once to float32 (float64 if stored so), and a new tensor."""
    raw = _random(17, 13, dtype=dtype)
    fisher = Fisher(MemoryStore({"w": raw}), _config(examples_per_step=7))
    before = raw.clone()
    factor = {"raw": 1.0, "debiased": 1 / (1 - 0.999**3), "per_example": 7 / (1 - 0.999**3)}[scaling]
    scaled = fisher.scaled("w", scaling)
    assert scaled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scaled, (raw.double() * factor).to(scaled.dtype))
    scaled.zero_()
    assert torch.equal(fisher["w"], before)


def test_adagrads_start_is_subtracted_before_the_mean():
    """A sum that began at 0.5 becomes (sum - 0.5) / steps."""
    config = _config(statistic="sum", steps=4, optimizer={"initial_accumulator_value": 0.5})
    fisher = Fisher(MemoryStore({"w": torch.tensor([0.5, 1.5, 4.5])}), config)
    assert fisher.scaled("w").tolist() == [0.0, 0.25, 1.0]
    assert fisher.scaled("w", "raw").tolist() == [0.5, 1.5, 4.5]
    mean, norm = fisher.moments()
    assert (mean, norm) == (pytest.approx(1.25 / 3), pytest.approx(math.sqrt(0.0625 + 1)))


@pytest.mark.parametrize("start", [0.1, 0.3, 0.7, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adagrads_start_is_subtracted_as_stored(start, dtype):
    """An entry without any gradient is exactly 0, and none is negative, although float32 rounds 0.7."""
    config = _config(statistic="sum", steps=4, optimizer={"initial_accumulator_value": start})
    parameter = torch.nn.Parameter(torch.ones(17))
    optimizer = torch.optim.Adagrad([parameter], initial_accumulator_value=start)
    for _ in range(4):
        parameter.grad = torch.cat([torch.zeros(5), torch.full((12,), 0.5)])
        optimizer.step()
    fisher = Fisher(MemoryStore({"w": optimizer.state[parameter]["sum"].to(dtype)}), config)
    scaled = fisher.scaled("w")
    assert scaled[:5].tolist() == [0.0] * 5
    torch.testing.assert_close(scaled[5:], torch.full((12,), 0.25), rtol=1e-2, atol=0)
    mean, _ = fisher.moments()
    assert mean == pytest.approx(scaled.double().mean().item(), rel=1e-6)


def test_mean_and_norm_are_those_of_all_entries_in_float64(monkeypatch):
    """Mean and norm are over tensors of several shapes, scales and blocks."""
    tensors = {f"w{i}": _random(23, i + 2, seed=i) for i in range(5)} | {"wide": torch.full((11,), 1e30)}
    config = _config(steps={"default": 3, "w1": 2})
    everything = torch.cat([
        (tensor.double() / (1 - 0.999 ** (2 if name == "w1" else 3))).flatten() for name, tensor in tensors.items()
    ])  # fmt: skip
    for block in (Moments.BLOCK, 7):
        monkeypatch.setattr(Moments, "BLOCK", block)
        mean, norm = Fisher(MemoryStore(tensors), config).moments()
        assert mean == pytest.approx(everything.mean().item(), rel=1e-12)
        assert norm == pytest.approx(everything.norm().item(), rel=1e-12)


def test_recorded_mean_and_norm_spare_the_reading():
    """Mean and norm in the metadata are used at the debiased scale, and at no other."""
    store = _Counting({"w": torch.ones(3)})
    fisher = Fisher(store, _config(mean=0.5, norm=2.0))
    assert fisher.moments() == (0.5, 2.0)
    assert store.reads == []
    assert fisher.moments("raw") == (1.0, pytest.approx(math.sqrt(3)))


def test_an_empty_fisher_has_mean_and_norm_zero():
    """Mean and norm of an empty Fisher or tensor are 0."""
    assert Fisher(MemoryStore({}), _config()).moments() == (0.0, 0.0)
    assert Fisher(MemoryStore({"w": torch.zeros(0, 3)}), _config()).moments() == (0.0, 0.0)


def test_a_scale_that_is_not_recorded_is_refused():
    """Without steps, only the raw scale is available."""
    fisher = Fisher(MemoryStore({"w": torch.ones(3)}), _config(steps=None))
    with pytest.raises(ConfigError, match="steps"):
        fisher.scaled("w")
    assert torch.equal(fisher.scaled("w", "raw"), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ([float("nan")], "1 NaN of"),
        ([float("inf"), float("inf")], "2 infinite of"),
        ([-1e-30], "1 negative of"),
        ([float("-inf")], "1 infinite, 1 negative of"),
        ([float("nan"), -1.0, float("inf")], "1 NaN, 1 infinite, 1 negative of"),
    ],
)
def test_bad_entries_are_counted_by_kind(dtype, bad, words):
    """NaN, infinite and negative entries, even one among many, are refused with tensor, position and counts."""
    tensor = torch.cat([_random(29, dtype=dtype), torch.tensor(bad, dtype=dtype)])
    with pytest.raises(ValuesError, match=f"layer.w in here has {words} {29 + len(bad)} entries"):
        check_values(tensor, "layer.w", "here")
    with pytest.raises(ValuesError):
        Fisher(MemoryStore({"w": tensor}), _config()).moments()


def test_good_entries_pass():
    """Zeros, negative zero, the smallest and largest number, and an empty tensor are valid."""
    check_values(torch.tensor([0.0, -0.0, 1e-45, torch.finfo(torch.float32).max]), "w", "here")
    check_values(torch.zeros(0), "w", "here")


def test_a_tiny_negative_of_float64_is_refused():
    """A negative entry that float32 would round to zero is refused."""
    with pytest.raises(ValuesError, match="1 negative of 2"):
        check_values(torch.tensor([1.0, -1e-60], dtype=torch.float64), "w", "here")


def test_shapes_must_be_equal():
    """A transposed or flattened shape is refused with both shapes. An equal shape passes as any sequence type."""
    check_shape("w", (3, 5), torch.Size([3, 5]), "here")
    for found in ((5, 3), (15,), ()):
        with pytest.raises(MismatchError, match=r"Fisher of w .*\[3, 5\], but here has"):
            check_shape("w", found, (3, 5), "here")


@pytest.mark.parametrize("compress", [None, "log8", "log4", "rank1"])
def test_another_default_device_changes_nothing(compress, tmp_path):
    """A program may have called ``torch.set_default_device``: a Fisher is written, read and scaled on the host."""
    tensors = {"w": _random(131, 17), "b": _random(13, seed=1)}
    plain, other = (Fisher(tensors, _config()).scaled("w"), Fisher(tensors, _config()))
    wanted = other.save(tmp_path / "plain", compress=compress)
    with torch.device("meta"):
        assert other.save(tmp_path / "other", compress=compress) == wanted
        assert torch.equal(other.scaled("w"), plain)
        found = read_fisher(tmp_path / "other")
        assert all(torch.equal(found[name], read_fisher(tmp_path / "plain")[name]) for name in tensors)
