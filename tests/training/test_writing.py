"""Plain loops of torch and accelerate, compared with the live optimizer's state of each parameter."""

import signal
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import save_model
from torch import nn

from squisher_mergekit import load_fisher, save_squisher
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.tensors.safetensors import MemoryStore
from squisher_mergekit.training.writing import copy_fisher, replace_fisher
from tests.training.cases import Tokens, accumulators, make


class Net(nn.Module):
    """Network with two tied layers, one of another shape, a buffer, and an attribute called module."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.up = nn.Linear(7, 11, bias=False)
        self.tied = nn.Linear(7, 11)
        self.tied.weight = self.up.weight

    def forward(self, x):
        hidden = self.norm(self.module(x)).relu()
        return self.up(hidden) + self.tied(hidden)


def _net():
    torch.manual_seed(5)
    return Net()


def _train(model, optimizer, steps=3, wrapped=None):
    generator = torch.Generator().manual_seed(11)
    run = model if wrapped is None else wrapped
    for _ in range(steps):
        optimizer.zero_grad()
        run(torch.randn(13, 5, generator=generator)).square().mean().backward()
        optimizer.step()


def _same(fisher, truth):
    return set(fisher) == set(truth) and all(torch.equal(fisher[name], tensor) for name, tensor in truth.items())


def test_two_lines_in_a_plain_loop(tmp_path):
    """Two lines of a plain loop write weights and Fisher with the same names.

    The Fisher equals the optimizer's state.
    """
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    _train(model, optimizer)
    save_model(model, str(tmp_path / "model.safetensors"))
    fisher = save_squisher(model, optimizer, tmp_path, examples_per_step=13, max_grad_norm=2.0, loss_reduction="mean")
    truth = accumulators(model, optimizer)
    truth["tied.weight"] = truth.pop("up.weight")  # the name that safetensors keeps
    assert _same(load_fisher(tmp_path, model=tmp_path), truth)
    assert torch.equal(fisher["up.weight"], truth["tied.weight"])
    config = fisher.config
    assert (config.steps, config.examples_per_step, config.loss_reduction) == (3, 13, "mean")
    assert (config.optimizer.beta2, config.optimizer.max_grad_norm) == (0.95, 2.0)
    assert config.weights_fingerprint is not None
    assert config.coverage.without["up.weight"] == "tied to tied.weight"
    assert config.coverage.without["norm.running_mean"] == "a buffer"


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), nn.DataParallel], ids=["compile", "dp"])
def test_wrappers_do_not_change_the_names(tmp_path, wrap):
    """The names are those of the model inside its wrappers."""
    model = _net()
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    _train(model, optimizer, wrapped=wrapped)
    assert _same(save_squisher(wrapped, optimizer, tmp_path), accumulators(model, optimizer))


@pytest.fixture
def accelerator():
    """Return accelerate on the CPU, and reset it afterwards."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def test_a_loop_of_accelerate(tmp_path, accelerator):
    """Prepared models and optimizers are accepted. Steps are those of the optimizer, not micro-batches."""
    model = make("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, stepper, loader = accelerator.prepare(
        model, optimizer, torch.utils.data.DataLoader(Tokens("llama"), batch_size=4)
    )
    for batch in loader:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch).loss)
            stepper.step()
            stepper.zero_grad()
    accelerator.unwrap_model(prepared).save_pretrained(tmp_path)
    fisher = save_squisher(prepared, stepper, tmp_path, examples_per_step=8)
    assert fisher.config.steps == 3
    assert fisher.config.weights_fingerprint is not None
    assert _same(fisher, accumulators(model, optimizer))


def test_the_order_of_groups_does_not_matter(tmp_path):
    """Each tensor has its name, step and decay for any groups in any order."""
    model = _net()
    backwards = list(model.parameters())[::-1]
    optimizer = torch.optim.AdamW([{"params": backwards[:2], "betas": (0.9, 0.9)}, {"params": backwards[2:]}])
    _train(model, optimizer)
    fisher = save_squisher(model, optimizer, tmp_path)
    assert _same(fisher, accumulators(model, optimizer))
    names = {id(p): name for name, p in model.named_parameters()}
    fast = {names[id(p)] for p in backwards[:2]}
    assert {name for name in fisher if fisher.config.beta2_of(name) == 0.9} == fast


def test_several_optimizers_make_one_fisher(tmp_path):
    """The second moments of one optimizer per part of the model go into one file."""
    model = _net()
    parts = [model.module, nn.ModuleList([model.norm, model.up, model.tied])]
    optimizers = [torch.optim.AdamW(part.parameters()) for part in parts]
    for optimizer in optimizers:
        _train(model, optimizer, steps=2)
    truth = accumulators(model, optimizers[0]) | accumulators(model, optimizers[1])
    assert _same(save_squisher(model, optimizers, tmp_path), truth)


@pytest.mark.parametrize(
    ("make_optimizer", "statistic", "class_"),
    [
        (torch.optim.Adagrad, "sum", "torch.optim.Adagrad"),
        (torch.optim.RMSprop, "ema", "torch.optim.RMSprop"),
        (
            lambda p: transformers.Adafactor(p, lr=1e-3, relative_step=False),
            "ema",
            "transformers.optimization.Adafactor",
        ),
    ],
    ids=["adagrad", "rmsprop", "adafactor"],
)
def test_other_optimizers(tmp_path, make_optimizer, statistic, class_):
    """A Fisher of a live optimizer has the values, statistic and class that extract reads from its file."""
    model = _net()
    optimizer = make_optimizer(model.parameters())
    _train(model, optimizer)
    fisher = save_squisher(model, optimizer, tmp_path / "live")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    read = load_fisher(tmp_path / "optimizer.pt", names=[name for name, _ in model.named_parameters()])
    assert _same(fisher, dict(read))
    assert (fisher.config.statistic, fisher.config.optimizer.class_) == (statistic, class_)
    assert read.config.statistic == statistic


class Hidden(torch.optim.AdamW):
    """Optimizer of a user that stores its settings without a class."""

    def __init__(self, parameters):
        super().__init__(parameters)
        del self.param_groups[0]["decoupled_weight_decay"]

    def step(self, closure=None):
        self.param_groups[0]["decoupled_weight_decay"] = True
        super().step()
        del self.param_groups[0]["decoupled_weight_decay"]


def test_a_parameter_with_two_second_moments_is_refused(tmp_path):
    """Two optimizers that stepped one parameter have two second moments; one that never did gives none."""
    model = _net()
    first, second = (torch.optim.AdamW(model.parameters(), lr=1e-3) for _ in range(2))
    _train(model, first)
    assert _same(save_squisher(model, [second, first], tmp_path / "one"), accumulators(model, first))
    assert _same(save_squisher(model, [first, second], tmp_path / "two"), accumulators(model, first))
    _train(model, second)
    with pytest.raises(UnsupportedStateError, match=r"\.weight has one in each of two optimizers; give the optimizer"):
        save_squisher(model, [first, second], tmp_path / "both")
    assert not (tmp_path / "both").exists()


def test_the_class_of_an_optimizer_comes_from_the_live_object(tmp_path):
    """The class comes from the live object if the state does not have it."""
    model = _net()
    optimizer = Hidden(model.parameters())
    _train(model, optimizer)
    assert save_squisher(model, optimizer, tmp_path).config.optimizer.class_ == f"{__name__}.Hidden"


def test_a_parameter_that_was_never_stepped_is_listed(tmp_path):
    """Frozen parameters and parameters without a step are left out and listed with different reasons."""
    model = _net()
    model.module.bias.requires_grad_(False)
    model.unused = nn.Linear(3, 2, bias=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    _train(model, optimizer)
    without = save_squisher(model, optimizer, tmp_path).config.coverage.without
    assert without["module.bias"] == "not given to the optimizer (frozen)"
    assert without["unused.weight"] == "never stepped (frozen or unused)"


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    """Parameters of an equal model are refused, because names are not assigned by position or shape."""
    model, other = _net(), _net()
    optimizer = torch.optim.AdamW(other.parameters())
    _train(other, optimizer)
    with pytest.raises(MismatchError, match="must be the model's"):
        save_squisher(model, optimizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_model_are_refused(tmp_path):
    """The Fisher is compared with the weights in the folder."""
    save_model(nn.Linear(5, 7), str(tmp_path / "model.safetensors"))
    model = _net()
    optimizer = torch.optim.AdamW(model.parameters())
    _train(model, optimizer)
    with pytest.raises(MismatchError, match="is not in"):
        save_squisher(model, optimizer, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"model.safetensors"}


@pytest.mark.parametrize("kind", ["sgd", "fresh"])
def test_an_optimizer_without_second_moments_is_refused(tmp_path, kind):
    """SGD, and AdamW before its first step, are refused in one line without leftovers."""
    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9) if kind == "sgd" else torch.optim.AdamW(
        model.parameters()
    )  # fmt: skip
    if kind == "sgd":
        _train(model, optimizer)
    with pytest.raises(UnsupportedStateError) as error:
        save_squisher(model, optimizer, tmp_path)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_dtype_that_loses_entries_is_refused(tmp_path):
    """The dtype float16 is refused before any read."""
    model = _net()
    with pytest.raises(ConfigError, match=r"float32 or bfloat16.*, found 'float16'"):
        save_squisher(model, torch.optim.AdamW(model.parameters()), tmp_path, dtype="float16")


def _fisher(value, names=("a", "b", "c")):
    config = FisherConfig(estimator="squisher", statistic="ema", steps=1, optimizer={"beta2": 0.5})
    return Fisher(MemoryStore({name: torch.full((7,), value) for name in names}), config)


def test_a_fisher_is_replaced_whole(tmp_path):
    """No file of an older Fisher stays in the folder, in shards or not. Other files stay."""
    out = tmp_path / "out"
    replace_fisher(_fisher(1.0), out)
    for name in ("fisher-00001-of-00002.safetensors", "fisher.safetensors.index.json", "model.safetensors"):
        (out / name).write_text("old")
    replace_fisher(_fisher(2.0, ("a",)), out)
    assert {file.name for file in out.iterdir()} == {"fisher.safetensors", "fisher_config.json", "model.safetensors"}
    assert read_fisher(out)["a"][0] == 2.0
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_fisher_is_copied_whole(tmp_path):
    """The copy is equal and replaces an older Fisher, and the source stays."""
    replace_fisher(_fisher(1.0), tmp_path / "a")
    replace_fisher(_fisher(2.0), tmp_path / "b")
    copy_fisher(tmp_path / "a", tmp_path / "b")
    for folder in ("a", "b"):
        assert read_fisher(tmp_path / folder)["c"][0] == 1.0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]


def test_a_write_that_fails_leaves_the_old_fisher(tmp_path):
    """A NaN in the new Fisher leaves the folder unchanged."""
    replace_fisher(_fisher(1.0), tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(ValueError, match="NaN"):
        replace_fisher(_fisher(float("nan")), tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from squisher_mergekit.training.writing import replace_fisher
from tests.training.test_writing import _fisher

class Deadly(type(_fisher(1.0)._store)):
    def read(self, name):
        if name == "c":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(name)

fisher = _fisher(2.0)
fisher._store.__class__ = Deadly
replace_fisher(fisher, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("older", [False, True])
def test_a_killed_process_leaves_no_incomplete_fisher(tmp_path, older):
    """A process killed at the third tensor leaves the earlier state of the folder: no Fisher or a complete one."""
    out = tmp_path / "out"
    if older:
        replace_fisher(_fisher(1.0), out)
    done = subprocess.run([sys.executable, "-c", KILLED, out], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert out.exists() == older
    if older:
        assert read_fisher(out)["c"][0] == 1.0


@pytest.mark.parametrize(
    "metadata",
    [
        {"max_grad_norm": -1.0},
        {"examples_per_step": 0},
        {"tokens_per_step": -3},
        {"clipped_share": 1.5},
        {"max_grad_norm": float("nan")},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_numbers_that_no_reader_would_open_are_refused(tmp_path, metadata):
    """A number out of the range of fisher_config.json is refused by name, before a file is written."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(5, 3)).square().mean().backward()
    optimizer.step()
    with pytest.raises(ConfigError, match=next(iter(metadata))):
        save_squisher(model, optimizer, tmp_path / "fisher", **metadata)
    assert not (tmp_path / "fisher").exists()
