"""Accumulators over several batches: counts, draws, devices and sharded models."""

import copy
import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.utils.checkpoint import checkpoint

from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.estimators import output_gradients as labels_module
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.dataset.load_model import shard
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.estimators.per_example.verify import Verification
from tests.estimators import oracle
from tests.estimators.models import MODELS, assert_close, batch_of, loss_of, make, task_of


@pytest.fixture
def group(tmp_path):
    """Initialize a process group of size one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_batch_draws_by_its_number_alone():
    """Batches added in another order draw the same labels."""
    torch.manual_seed(0)
    model = make("llama").double()
    batches = [batch_of("causal-lm", seed=n) for n in range(3)]
    forwards, backwards = FisherAccumulator(model, "sampled"), FisherAccumulator(model, "sampled")
    for number in (0, 1, 2):
        forwards.add(batches[number])
        backwards.add(batches[2 - number], 2 - number)
    for p, total in forwards.accumulators.items():
        torch.testing.assert_close(backwards.accumulators[p], total)


def test_another_seed_draws_others():
    """Another seed draws other labels; the same seed draws the same."""
    torch.manual_seed(0)
    model, batch = make("llama"), batch_of("causal-lm")
    first, again, other = (estimate_fisher(model, [batch], "sampled", seed=seed) for seed in (3, 3, 4))
    name = "lm_head.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("name", ["llama", "bert-mlm", "t5"])
def test_tokens_as_data(name):
    """With datum token, the squared gradients of the token losses are summed, and tokens are counted."""
    torch.manual_seed(0)
    model, kind, batch = make(name), MODELS[name][0], batch_of(MODELS[name][0])
    fisher = estimate_fisher(model, [batch], datum="token", statistic="sum", task=task_of(name))
    singles = []
    labels = batch["labels"].clone()
    if kind == "seq2seq":
        batch = batch | {"decoder_input_ids": oracle.shifted(model, labels)}
    if kind == "causal-lm":
        labels[:, 0] = -100
    for place in range(labels.shape[1]):
        alone = torch.full_like(labels, -100)
        alone[:, place] = labels[:, place]
        singles.append(batch | {"labels": alone})
    assert_close(fisher, oracle.fisher(model, singles, loss_of(kind, "true"), "example"), model=model)
    assert fisher.config.num_examples == int((labels >= 0).sum())
    assert fisher.config.datum == "token"


def test_a_parameter_of_a_later_batch_gets_its_gradient():
    """A weight that no layer call uses, and that only the second batch reaches, gets its gradient."""

    class _Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.seldom, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.out(nn.functional.linear(x, self.seldom.weight) if (x[:, 0] > 5).all() else x)

    torch.manual_seed(0)
    model = _Late()
    batches = [(torch.randn(n, 5), torch.arange(n) % 3) for n in (3, 4, 3)]
    batches[1][0][:, 0] += 10
    fisher = estimate_fisher(model, batches, statistic="sum", task="classification")
    expected = torch.zeros(5, 5).double()
    wide = copy.deepcopy(model).double()
    for n in range(4):
        out = wide.out(nn.functional.linear(batches[1][0][n].double(), wide.seldom.weight))
        loss = nn.functional.cross_entropy(out, batches[1][1][n])
        expected += torch.autograd.grad(loss, wide.seldom.weight)[0].square()
    torch.testing.assert_close(fisher["seldom.weight"].double(), expected, rtol=1e-5, atol=1e-9)


def test_datum_token_needs_a_language_model():
    """Datum token is refused for a classifier, which has no outputs per token."""
    with pytest.raises(ConfigError, match="datum token needs a model with outputs for each token"):
        estimate_fisher(make("bert"), [batch_of("classification")], datum="token")


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "gpt2", "llama-tied", "t5", "qwen3"])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_no_step_waits_for_the_device(name, labels, monkeypatch):
    """A whole step runs on tensors without values, so it depends on shapes alone."""
    choose = labels_module._choose_labels  # a draw without values does not take a generator
    monkeypatch.setattr(labels_module, "_choose_labels", lambda p, targets, kind, _: choose(p, targets, kind, None))
    with FakeTensorMode():
        model, batch = make(name), batch_of(MODELS[name][0])
        model.eval()
        accumulator = FisherAccumulator(model, labels, task=task_of(name), verify=False)
        # The state after the first batch, which found the outputs that all examples share.
        tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        accumulator._verification = Verification({}, tables, set(accumulator.accumulators))
        accumulator.add(batch)
        assert all(total.shape == p.shape for p, total in accumulator.accumulators.items())


def test_activations_are_freed_with_their_batch():
    """Activations are freed with their batch, because no hook keeps the graph alive."""
    torch.manual_seed(0)
    model, seen = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    accumulator = FisherAccumulator(model, task="classification")
    for _ in range(2):
        accumulator.add((torch.randn(5, 7), torch.arange(5) % 3))
    gc.collect()
    assert len(seen) > 2
    assert not [activation for activation in seen if activation() is not None]


@pytest.mark.parametrize("how", ["whole", "in place", "inside"])
def test_a_compiled_model_has_the_same_squares(how):
    """A model compiled as a whole, in place or inside has the squares of the plain model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3))
    batch = (torch.randn(5, 7), torch.arange(5) % 3)
    plain = estimate_fisher(model, [batch])
    compiled = copy.deepcopy(model)
    if how == "whole":
        compiled = torch.compile(compiled, backend="eager")
    elif how == "in place":
        compiled.compile(backend="eager")
    else:
        compiled[0] = torch.compile(compiled[0], backend="eager")
    compiled(batch[0])
    found = estimate_fisher(compiled, [batch])
    assert {name: found[name].tolist() for name in found} == {name: plain[name].tolist() for name in plain}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")  # without such inputs
def test_reentrant_checkpoints_are_refused():
    """Reentrant checkpoints raise an error that names the cure."""

    class _Reentrant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 3)

        def forward(self, x):
            return self.b(checkpoint(self.a, self.a(x), use_reentrant=True))

    with pytest.raises(UnsupportedStateError, match="use_reentrant=True; set it to False"):
        estimate_fisher(_Reentrant(), [(torch.randn(5, 7), torch.arange(5) % 3)])


def test_autocast_needs_no_setting():
    """Under bfloat16 autocast the verification in float32 passes, and squares are float32."""
    torch.manual_seed(0)
    model, batch = make("llama"), batch_of("causal-lm")
    exact = estimate_fisher(model, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = estimate_fisher(model, [batch])
    assert all(narrow[name].dtype == torch.float32 for name in narrow)
    off = [float((narrow[name] - exact[name]).norm() / exact[name].norm()) for name in exact]
    assert max(off) < 0.1, max(off)


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral-grouped", "t5", "vit"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .FSDPT5Block. returned a view:UserWarning")  # it warns alone
def test_a_sharded_model_has_the_same_fisher(name):
    """Accumulators are sharded like FSDP2's parameters, and .grad stays None."""
    torch.manual_seed(1)
    model, kind = make(name), MODELS[name][0]
    batches = [batch_of(kind), batch_of(kind, 2, seed=3)]
    whole = estimate_fisher(copy.deepcopy(model), batches, "sampled", task=task_of(name))
    split = shard(model, torch.device("cpu"))
    accumulator = FisherAccumulator(split, "sampled", task=task_of(name))
    assert all(hasattr(total, "full_tensor") for total in accumulator.accumulators.values())
    found = estimate_fisher(split, batches, "sampled", task=task_of(name))
    assert_close(found, {name: whole[name].double() for name in whole})
    assert all(p.grad is None for p in split.parameters())


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use:UserWarning")  # the group has one process
def test_unsupported_shardings_are_refused():
    """Flat parameters of FSDP1, the joint form of a sharded model and other shardings raise an error."""
    flat = FullyShardedDataParallel(nn.Linear(7, 3), use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(UnsupportedStateError, match="take FSDP2"):
        FisherAccumulator(flat, task="classification")
    split = nn.Linear(7, 3)
    fully_shard(split)
    with pytest.raises(UnsupportedStateError, match="grouping batch squares the gradient of one process's batch"):
        FisherAccumulator(split, grouping="batch", task="classification")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    parallel = parallelize_module(nn.Linear(7, 3), init_device_mesh("cpu", (1,)), ColwiseParallel())
    with pytest.raises(UnsupportedStateError, match="split in another way"):
        FisherAccumulator(parallel, task="classification")


@pytest.mark.usefixtures("group")
def test_a_batch_that_does_not_count_adds_nothing():
    """A batch that does not count changes neither the accumulators nor the number of examples."""
    torch.manual_seed(1)
    model, batch = make("llama"), batch_of("causal-lm")
    accumulator = FisherAccumulator(shard(model, torch.device("cpu")))
    accumulator.add(batch)
    before = {name: total.full_tensor().clone() for name, total in accumulator.named_accumulators().items()}
    accumulator.add(batch, counts=False)
    assert all(
        torch.equal(total.full_tensor(), before[name]) for name, total in accumulator.named_accumulators().items()
    )
    assert accumulator.examples == len(batch["labels"])
