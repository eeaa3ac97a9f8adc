"""Training of the weights in a mask; the others are compared by their bits."""

import math
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import prune

from squisher_mergekit.applications.masks import MASK_NAME, Mask, read_mask, write_mask
from squisher_mergekit.errors import MismatchError, UnsupportedStateError
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.training.masked import HeldParameter, MaskCallback, MaskedTraining
from tests import processes
from tests.training.cases import Tokens, make, trainer
from tests.training.masked_worker import CLIP, data, mlp, random_mask, steps


def _bits(model):
    """Return a mapping from names to the bits of a model's parameters."""
    return {name: _int(p) for name, p in model.named_parameters()}


def _int(tensor):
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().view(kinds[tensor.element_size()])


def _check(before, model, mask):
    """Assert that all bits off the mask stay, and that some on the mask move in each tensor."""
    for name, bits in _bits(model).items():
        kept = mask[name]
        assert torch.equal(bits[~kept], before[name][~kept]), name
        assert not kept.any() or not torch.equal(bits[kept], before[name][kept]), name


OPTIMIZERS = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw foreach amsgrad": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, foreach=True, amsgrad=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, fused=True),
    "adam with coupled decay": lambda ps: torch.optim.Adam(ps, lr=1e-2, weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=1e-1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-1, initial_accumulator_value=0.1, weight_decay=0.1),
    "adafactor": lambda ps: torch.optim.Adafactor(ps, lr=1e-1, weight_decay=0.1),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2, weight_decay=0.1),
    "adamw without eps": lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1, eps=0.0),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1e-2, weight_decay=0.1),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-2),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_off_the_mask_nothing_moves(kind):
    """100 steps with decay, earlier momentum and clipping change no bit off the mask, for any optimizer."""
    model, optimizer = mlp(), None
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, 5)
    before, mask = _bits(model), random_mask(model, 0.3)
    with MaskedTraining(model, optimizer, mask):
        steps(model, optimizer, 100)
    _check(before, model, mask)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    steps(model, optimizer, 1)
    moved = _bits(model)
    assert all(not torch.equal(moved[name][~mask[name]], before[name][~mask[name]]) for name in mask)


def test_lbfgs_moves_the_live_weights_alone():
    """LBFGS, which calls the loss several times per step, moves the weights on the mask alone."""
    model, (inputs, labels) = mlp(), data()[0]
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1)
    before, mask = _bits(model), random_mask(model, 0.3)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        return loss

    with MaskedTraining(model, optimizer, mask):
        for _ in range(5):
            optimizer.step(closure)
    _check(before, model, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_masked_training_is_that_of_the_kept_weights_alone(dtype):
    """Masked training equals the training of a model that has only the weights in the mask, with clipping."""
    model = mlp().to(dtype)
    mask = random_mask(model, 0.3)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    live = {name: nn.Parameter(base[name][mask[name]]) for name in base}
    alone = torch.optim.AdamW(live.values(), lr=1e-2, weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with MaskedTraining(model, optimizer, mask):
        norms = steps(model, optimizer, 20)
    for number in range(20):
        inputs, labels = data()[number % len(data())]
        weights = {name: base[name].masked_scatter(mask[name], live[name]) for name in base}
        alone.zero_grad()
        outputs = torch.func.functional_call(model, weights, inputs.to(dtype))
        nn.functional.cross_entropy(outputs, labels).backward()
        norm = nn.utils.clip_grad_norm_(live.values(), CLIP)
        alone.step()
        torch.testing.assert_close(norms[number], norm, rtol=1e-4, atol=0)
    assert max(norms) > CLIP
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter[mask[name]], live[name], rtol=1e-3, atol=1e-5)


def test_earlier_state_is_cleared_off_the_mask():
    """Gradients and both moments become 0 off the mask and stay unchanged on it."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, 5)
    mask = random_mask(model, 0.3)
    old = {
        name: {"grad": p.grad.clone()} | {key: optimizer.state[p][key].clone() for key in ("exp_avg", "exp_avg_sq")}
        for name, p in model.named_parameters()
    }
    with MaskedTraining(model, optimizer, mask):
        for name, p in model.named_parameters():
            for key, was in old[name].items():
                now = p.grad if key == "grad" else optimizer.state[p][key]
                assert torch.equal(now, was * mask[name]), (name, key)
            assert optimizer.state[p]["step"] == 5


def test_codes_of_8_bits_are_cleared_to_the_code_of_zero():
    """A momentum in 8-bit codes, as bitsandbytes keeps it, becomes the code whose value is 0; code 0 is minus 1."""
    parameter = nn.Parameter(torch.zeros(5))
    off = torch.tensor([True, False, True, False, False])
    state = {
        "state1": torch.tensor([0, 2, 3, 4, 1], dtype=torch.uint8),
        "qmap1": torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]),
        "state2": torch.tensor([4, 3, 2, 1, 0], dtype=torch.uint8),
        "qmap2": torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]),
        "absmax1": torch.ones(1),
    }
    HeldParameter.now(parameter, off).clear([state])
    assert state["qmap1"][state["state1"].long()].tolist() == [0.0, 0.0, 0.0, 1.0, -0.5]
    assert state["qmap2"][state["state2"].long()].tolist() == [0.0, 0.75, 0.0, 0.25, 0.0]


def test_gradients_add_up_masked():
    """Gradients of two backward passes add up on the mask, also if they are not finite off the mask."""
    weight = nn.Parameter(torch.tensor([4.0, 0.0, 16.0, 1.0]))
    model = nn.ParameterDict({"w": weight})
    mask = torch.tensor([True, False, True, False])
    with MaskedTraining(model, torch.optim.SGD([weight], lr=0.5), {"w": mask}):
        weight.sqrt().sum().backward()
        assert weight.grad.tolist() == [0.25, 0.0, 0.125, 0.0]
        weight.square().sum().backward()
        assert weight.grad.tolist() == [8.25, 0.0, 32.125, 0.0]
        assert nn.utils.clip_grad_norm_([weight], 1e9).item() == pytest.approx(math.hypot(8.25, 32.125))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_bits_hold_in_any_precision(dtype):
    """A signed zero and a NaN off the mask keep their bits."""
    model = mlp().to(dtype)
    with torch.no_grad():
        model[0].weight[0, :3] = torch.tensor([-0.0, 0.0, 1.0])
        model[2].weight.fill_(-0.0)
        model[4].bias[0] = float("nan")
    mask = random_mask(model, 0.5)
    mask["0.weight"][0, :2] = False
    mask["2.weight"][:] = False
    mask["4.bias"][:] = False
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1, weight_decay=0.1)
    with MaskedTraining(model, optimizer, mask):
        for _ in range(3):
            optimizer.zero_grad()
            model[:4](data()[0][0].to(dtype)).square().sum().backward()
            optimizer.step()
    after = _bits(model)
    assert all(torch.equal(after[name][~mask[name]], before[name][~mask[name]]) for name in mask)
    assert not torch.equal(after["0.weight"], before["0.weight"])


def test_a_pruned_network_stays_pruned():
    """Zeros off the mask stay zeros, also where torch's own pruning masks the weight, by either name."""
    model = mlp()
    mask = random_mask(model, 0.5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.mul_(mask[name])
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with MaskedTraining(model, optimizer, mask):
        steps(model, optimizer, 10)
    _check(before, model, mask)
    prune.custom_from_mask(model[0], "weight", mask["0.weight"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for names in (mask, {"0.weight_orig" if n == "0.weight" else n: m for n, m in mask.items()}):
        with MaskedTraining(model, optimizer, names):
            steps(model, optimizer, 3)
        assert not model[0].weight[~mask["0.weight"]].any()
        assert not model[0].weight_orig[~mask["0.weight"]].any()


def test_sparse_gradients_are_masked():
    """Sparse gradients of an embedding are masked, also with repeated rows."""
    model = nn.Sequential(nn.Embedding(11, 3, sparse=True), nn.Linear(3, 2))
    optimizers = [
        torch.optim.SparseAdam(model[0].parameters(), lr=0.1),
        torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9),
    ]
    before, mask = _bits(model), random_mask(model, 0.5)
    with MaskedTraining(model, optimizers, mask):
        for _ in range(5):
            model.zero_grad()
            model(torch.tensor([0, 7, 7, 3, 10])).square().sum().backward()
            assert not model[0].weight.grad.to_dense()[~mask["0.weight"]].any()
            for optimizer in optimizers:
                optimizer.step()
    _check(before, model, mask)


def test_a_frozen_parameter_needs_no_mask():
    """A frozen parameter stays unchanged, in the mask or not."""
    model = mlp()
    model[0].requires_grad_(False)
    mask = random_mask(model, 0.3)
    before = _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for part in (mask, {name: one for name, one in mask.items() if not name.startswith("0.")}):
        with MaskedTraining(model, optimizer, part):
            steps(model, optimizer, 3)
    _check(before, model, mask | {"0.weight": torch.zeros(13, 7).bool(), "0.bias": torch.zeros(13).bool()})


def test_masked_training_can_be_attached_without_with():
    """A second attachment changes nothing, and detaching removes every hook."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    mask, before = random_mask(model, 0.3), _bits(model)
    masked = MaskedTraining(model, optimizer, mask)
    steps(model, optimizer, 1)
    middle = _bits(model)
    assert not torch.equal(middle["0.weight"], before["0.weight"])
    assert masked.attach().attach() is masked
    steps(model, optimizer, 3)
    _check(middle, model, mask)
    masked.detach()
    assert not optimizer._optimizer_step_post_hooks
    assert not any(p._backward_hooks for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_mask_file_fits_the_model_in_memory(tmp_path, name):
    """A mask by names on disk fits packed experts and tied weights."""
    model = make(name)
    model.save_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(5)
    infos = open_weights(tmp_path).infos
    write_mask(
        Mask({key: torch.rand(info.shape, generator=generator) < 0.3 for key, info in infos.items()}),
        tmp_path / MASK_NAME,
    )
    base = {key: open_weights(tmp_path).read(key).clone() for key in infos}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with MaskedTraining(model, optimizer, tmp_path / MASK_NAME):
        for batch in Tokens(name).ids[:6].view(3, 2, -1):
            optimizer.zero_grad()
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
    model.save_pretrained(tmp_path / "tuned")
    tuned, mask = open_weights(tmp_path / "tuned"), read_mask(tmp_path)
    for key in infos:
        kept = mask[key]
        assert torch.equal(_int(tuned.read(key))[~kept], _int(base[key])[~kept])
        assert not torch.equal(tuned.read(key)[kept], base[key][kept])


def test_a_loop_of_accelerate():
    """Wrapped models and optimizers with accumulation work.

    The clipping of accelerate uses the gradients on the mask.
    """
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    mask, before = random_mask(model, 0.3), _bits(model)
    with MaskedTraining(model, optimizer, mask):
        for inputs, labels in data() * 2:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(inputs), labels))
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    live = torch.cat([p.grad[mask[name]] for name, p in model.named_parameters()]).norm()
                    assert live.item() == pytest.approx(min(norm.item(), CLIP), rel=1e-4)
                optimizer.step()
                optimizer.zero_grad()
    _check(before, model, mask)


def test_a_scaler_of_losses_sees_live_gradients_alone():
    """An overflowed gradient off the mask skips no step of a loss scaler."""
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with MaskedTraining(nn.ParameterDict({"w": weight}), optimizer, {"w": torch.tensor([True, False])}):
        scaler.scale((weight * torch.tensor([1.0, 1e38])).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert weight.tolist() == [pytest.approx(0.9), 1.0]
    assert scaler.get_scale() == 2.0**16


def test_the_trainer(tmp_path):
    """One argument of the Trainer masks the training, with decay and clipping. Afterwards the model has no hooks."""
    callback = MaskCallback({})
    run = trainer("bert", tmp_path, [callback], weight_decay=0.1, max_grad_norm=0.1)
    callback.mask, before = random_mask(run.model, 0.3), _bits(run.model)
    run.train()
    _check(before, run.model, callback.mask)
    assert not any(p._backward_hooks for p in run.model.parameters())


def test_the_trainer_resumes_a_checkpoint(tmp_path):
    """The Trainer resumes a dense checkpoint with its momenta. Weights off the mask keep their values in it."""
    trainer("bert", tmp_path, [], weight_decay=0.1).train()
    checkpoint = tmp_path / "checkpoint-3"
    model = make("bert")
    saved = {name: open_weights(checkpoint).read(name).clone() for name in open_weights(checkpoint).infos}
    mask = Mask(random_mask(model, 0.5))
    write_mask(mask, tmp_path / MASK_NAME)
    run = trainer("bert", tmp_path, [MaskCallback(tmp_path / MASK_NAME)], model, max_steps=6, weight_decay=0.1)
    run.train(resume_from_checkpoint=str(checkpoint))
    assert run.state.global_step == 6
    _check({name: _int(tensor) for name, tensor in saved.items()}, run.model, mask)
    optimizer = run.optimizer.optimizer
    for name, p in run.model.named_parameters():
        assert not optimizer.state[p]["exp_avg"][~mask[name]].any()


def _adamw(model):
    return torch.optim.AdamW(model.parameters())


def test_a_mask_that_does_not_fit_is_refused():
    """A mask with a missing parameter, another shape, numbers or other names is refused.

    A foreign optimizer is refused too.
    """
    model = mlp()
    mask, optimizer = random_mask(model, 0.3), _adamw(model)
    one_less = {name: one for name, one in mask.items() if name != "2.bias"}
    for wrong, message in (
        (one_less, r"but 2\.bias is \[11\] and its mask missing; give one, or freeze the parameter"),
        (mask | {"2.bias": torch.ones(12).bool()}, r"but 2\.bias is \[11\] and its mask \[12\] of torch\.bool"),
        (mask | {"2.bias": torch.ones(11)}, r"its mask \[11\] of torch\.float32"),
        (mask | {"9.bias": torch.ones(11).bool()}, r"9\.bias is none of Sequential's; give the mask of this model"),
        (Mask(one_less), r"a mask must be of this model, but of 2\.bias, \[11\], memory has missing"),
    ):
        with pytest.raises(MismatchError, match=message):
            MaskedTraining(model, optimizer, wrong)
    with pytest.raises(MismatchError, match="must train parameters of the model, but AdamW has none of them"):
        MaskedTraining(model, _adamw(mlp()), mask)
    with pytest.raises(UnsupportedStateError, match=r"must be one of torch .*, found SimpleNamespace"):
        MaskedTraining(model, SimpleNamespace(param_groups=[]), mask)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_weights_in_parts_are_refused(tmp_path):
    """FSDP2 and ZeroRedundancyOptimizer are refused, because they divide the weights."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = mlp()
        mask = random_mask(model, 0.3)
        zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
        with pytest.raises(UnsupportedStateError, match="whole in each process, but ZeroRedundancyOptimizer"):
            MaskedTraining(model, zero, mask)
        fully_shard(model)
        with pytest.raises(UnsupportedStateError, match="but FSDP or tensor parallelism holds them in parts"):
            MaskedTraining(model, _adamw(model), mask)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "ddp_views"])
def test_two_processes_train_as_one(tmp_path, kind):
    """DDP averages masked gradients. Both processes end with the bits of one process on the whole batch."""
    codes, said = processes.run("tests.training.masked_worker", kind, tmp_path, 2)
    assert codes == [0, 0], said
    ends = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = mlp()
    mask, before = random_mask(model, 0.3), _bits(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    with MaskedTraining(model, optimizer, mask):
        norms = steps(model, optimizer, 20)
    for end in ends:
        torch.testing.assert_close(end["norms"], torch.stack(norms), rtol=1e-3, atol=1e-6)
        for name, p in model.named_parameters():
            assert torch.equal(_int(end[name]), _int(ends[0][name]))
            assert torch.equal(_int(end[name])[~mask[name]], before[name][~mask[name]])
            torch.testing.assert_close(end[name], p.detach(), rtol=1e-3, atol=1e-5)
