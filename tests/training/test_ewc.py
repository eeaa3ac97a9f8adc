"""Runs of the real Trainer under the penalty, compared with a plain loop, and the state after a task."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn

from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.training import GradientSquares
from squisher_mergekit.training.ewc import EWCCallback, live_squisher
from tests import processes
from tests.training.cases import make, trainer
from tests.training.trainer_worker import CLIP, LAM, SETTINGS, model, penalty_of
from tests.training.worker import wrap

ROOT = Path(__file__).parents[2]


class _Watch(transformers.TrainerCallback):
    """Callback that keeps each micro-batch and the gradient of each step."""

    def __init__(self):
        self.batches, self.gradients = [], []

    def on_train_begin(self, args, state, control, model=None, **_):
        model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if module.training:
            self.batches.append({key: value for key, value in kwargs.items() if isinstance(value, torch.Tensor)})

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])


def _loop(learner, penalty, batches, own=False):
    """Train like the Trainer, with two parts per step; return the Fisher of the task."""
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, weight_decay=0.0)
    squares = GradientSquares(learner)
    learner.train()
    for first in range(0, len(batches), 2):
        optimizer.zero_grad()
        for batch in batches[first : first + 2]:
            learner(**batch).loss.backward()  # the Trainer sums the losses of the parts for this model
        squares.update()
        penalty.add_gradient(learner)
        nn.utils.clip_grad_norm_(learner.parameters(), CLIP)
        optimizer.step()
    return live_squisher(learner, optimizer) if own else squares.fisher()


def _same_state(a, b, rtol=1e-6):
    a, b = a.state_dict(), b.state_dict()
    assert a["tasks"] == b["tasks"]
    assert set(a["terms"]) == set(b["terms"])
    for name, term in a["terms"].items():
        for key in ("fisher", "anchor"):
            torch.testing.assert_close(term[key], b["terms"][name][key], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("source", ["separate", "optimizer"])
def test_the_callback_agrees_with_the_loop(tmp_path, source):
    """Weights and the added Fisher equal those of the loop to 1e-6.

    Each step of two parts has one penalty before clipping.
    """
    by_trainer, watch = model(), _Watch()
    by_loop = copy.deepcopy(by_trainer)
    penalty, same = penalty_of(by_trainer), penalty_of(by_trainer)
    callback = EWCCallback(penalty, source=source)
    trainer("bert", tmp_path, [watch, callback], by_trainer, **SETTINGS).train()
    assert len(watch.batches) == 6
    norms = [nn.utils.get_total_norm(gradients).item() for gradients in watch.gradients]
    assert norms == pytest.approx([CLIP] * 3, rel=1e-4)  # with the penalty, and clipped
    fisher = _loop(by_loop, same, watch.batches, own=source == "optimizer")
    for name, parameter in by_loop.named_parameters():
        torch.testing.assert_close(by_trainer.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    same.add(by_loop, fisher, examples_per_step=4)
    assert penalty.tasks == 2
    _same_state(penalty, same, rtol=1e-4)


def test_the_separate_average_is_that_of_the_task_alone(tmp_path):
    """The squares of the first step are those without a penalty. The optimizer's own include the penalty."""
    found = {}
    for lam, source in ((0.0, "separate"), (1e3, "separate"), (1e3, "optimizer")):
        learner = model()
        penalty = EWCPenalty(lam)
        penalty.load_state_dict(penalty_of(learner).state_dict())
        before = penalty.state_dict()["terms"]
        callback = EWCCallback(penalty, source=source)
        trainer("bert", tmp_path, [callback], learner, **SETTINGS | {"max_steps": 1, "max_grad_norm": 0.0}).train()
        after = penalty.state_dict()["terms"]
        found[lam, source] = torch.cat([(after[n]["fisher"] - before[n]["fisher"]).flatten() for n in before])
    torch.testing.assert_close(found[1e3, "separate"], found[0.0, "separate"])
    assert found[1e3, "optimizer"].sum() > 100 * found[0.0, "separate"].sum()


def test_the_log_has_the_penalty_and_the_ratio(tmp_path):
    """The log has penalty and ratio next to each loss. The loss stays the task's, and the first task has neither."""
    settings = SETTINGS | {"logging_strategy": "steps", "logging_steps": 1}
    learner = model()
    penalty = penalty_of(learner)
    with torch.no_grad():
        expected = penalty(learner).item()
    run = trainer("bert", tmp_path / "a", [EWCCallback(penalty)], learner, **settings | {"learning_rate": 0.0})
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["ewc_penalty"] for entry in logs] == pytest.approx([expected] * 3)
    assert all(entry["ewc_ratio"] > 0 for entry in logs)
    assert [entry["loss"] for entry in logs] == pytest.approx([2 * math.log(5)] * 3, rel=0.01)
    first = trainer("bert", tmp_path / "b", [EWCCallback(EWCPenalty(LAM))], model(), **settings)
    first.train()
    assert not any("ewc_penalty" in entry for entry in first.state.log_history)


def test_one_callback_serves_several_tasks(tmp_path):
    """Three runs add three tasks, each with its own average. With at_end=False the user adds them."""
    learner, penalty = model(), EWCPenalty(LAM)
    callback = EWCCallback(penalty)
    for number in range(3):
        trainer("bert", tmp_path / str(number), [callback], learner, **SETTINGS).train()
        assert penalty.tasks == number + 1
        assert set(callback.squares.steps.values()) == {3}
    callback = EWCCallback(penalty, at_end=False)
    trainer("bert", tmp_path / "last", [callback], learner, **SETTINGS).train()
    assert penalty.tasks == 3
    callback.finish_task(learner)
    assert penalty.tasks == 4


def test_a_resumed_run_continues_the_penalty(tmp_path):
    """A run that stops after two of four steps and resumes has the weights and penalty of an uninterrupted one."""
    settings = SETTINGS | {"max_steps": 4, "save_steps": 2}
    whole, parts = model(), model()
    one, two = penalty_of(whole), penalty_of(whole)
    state = two.state_dict()
    trainer("bert", tmp_path / "one", [EWCCallback(one)], whole, **settings).train()
    trainer("bert", tmp_path / "two", [EWCCallback(two)], parts, **settings).train()
    again, penalty = model(), EWCPenalty(LAM)
    penalty.load_state_dict(state)
    run = trainer("bert", tmp_path / "two", [EWCCallback(penalty)], again, **settings)
    run.train(resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"))
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    _same_state(penalty, one, rtol=1e-5)


@pytest.mark.slow
def test_a_compiled_model_gets_the_penalty(tmp_path):
    """The penalty enters each step under torch.compile as without it."""
    plain, compiled = model(), model()
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer("bert", tmp_path / "a", [EWCCallback(penalty_of(plain))], plain, **SETTINGS).train()
    trainer("bert", tmp_path / "b", [EWCCallback(penalty_of(compiled))], compiled, **SETTINGS | settings).train()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(compiled.get_parameter(name), parameter, rtol=1e-5, atol=1e-5)


def test_a_scaled_loss_gets_a_scaled_penalty():
    """The average under a GradScaler is of the true gradient, and the penalty is scaled like the loss."""
    found = {}
    for scale in (None, 1024.0):
        learner = model()
        callback = EWCCallback(penalty_of(learner))
        scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
        callback._model, callback._optimizer = learner, SimpleNamespace(scaler=scaler)
        callback.squares = GradientSquares(learner)
        ids = torch.arange(3, 14).unsqueeze(0)
        loss = learner(input_ids=ids, labels=torch.tensor([2])).loss
        (loss if scaler is None else scaler.scale(loss)).backward()
        callback.on_step_begin(None, None, None)
        callback._add()
        found[scale] = learner, callback.squares.squares
    for name, parameter in found[None][0].named_parameters():
        torch.testing.assert_close(found[1024.0][0].get_parameter(name).grad, 1024.0 * parameter.grad)
        torch.testing.assert_close(found[1024.0][1][name], found[None][1][name])


@pytest.mark.parametrize(
    ("arguments", "message"), [({"source": "adam"}, "found 'adam'"), ({"beta": 1.0}, "beta must be between 0 and 1")]
)
def test_arguments_out_of_range_are_refused(arguments, message):
    """An argument out of range is refused before training."""
    with pytest.raises(ConfigError, match=message):
        EWCCallback(EWCPenalty(1.0), **arguments)


def test_a_model_of_another_shape_is_refused_in_its_first_step(tmp_path):
    """The error of the first step passes unchanged through the backward pass."""
    penalty = penalty_of(model())
    penalty._terms["classifier.bias"] = penalty._terms["bert.pooler.dense.bias"]
    with pytest.raises(MismatchError, match=r"classifier.bias in the shape \[12\] of its anchor, but it has \[5\]"):
        trainer("bert", tmp_path, [EWCCallback(penalty)], model(), **SETTINGS).train()


class _Several(nn.Linear):
    """Layer with several outputs, some of which enter no loss."""

    def forward(self, inputs):
        found = super().forward(inputs)
        return {"unused": (found * 2, "text"), "used": [found]}


def _begun(learner, penalty):
    """Return a callback within its first step, without a Trainer."""
    callback = EWCCallback(penalty)
    args = SimpleNamespace(train_batch_size=2, gradient_accumulation_steps=1, world_size=1, accelerator_config=None)
    state = SimpleNamespace(train_batch_size=2, global_step=0)
    callback.on_train_begin(args, state, None, model=learner, optimizer=torch.optim.Adam(learner.parameters()))
    callback.on_step_begin(args, state, None)
    return callback


def test_any_output_of_the_model_may_enter_the_loss():
    """A loss of one of several outputs adds the penalty once: 3 x (1 - 0) to the task's gradient of 5."""
    learner, penalty = _Several(1, 1, bias=False), EWCPenalty(3.0)
    nn.init.zeros_(learner.weight)
    penalty.add(learner, {"weight": torch.ones(1, 1)})
    nn.init.ones_(learner.weight)
    callback = _begun(learner, penalty)
    found = learner(torch.tensor([[5.0]]))
    found["used"][0].sum().backward()
    assert learner.weight.grad.item() == 8.0
    assert callback.squares.fisher().scaled("weight").item() == pytest.approx(25.0)
    callback.on_pre_optimizer_step(None, None, None)


def test_outputs_without_a_gradient_are_refused():
    """A step without an observed backward pass is refused, because it would lack the penalty."""
    learner = nn.Linear(2, 1)
    callback = _begun(learner, EWCPenalty(1.0))
    learner(torch.ones(1, 2))
    with pytest.raises(UnsupportedStateError, match="none came by the outputs of Linear"):
        callback.on_pre_optimizer_step(None, None, None)


def test_a_sharded_model_is_refused(tmp_path):
    """The errors of the callback and of the live state name the cure for FSDP2."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        learner = wrap("fsdp2", make("llama"))
        optimizer = torch.optim.Adam(learner.parameters())
        with pytest.raises(UnsupportedStateError, match="FSDP2 in a loop of your own"):
            EWCCallback(EWCPenalty(1.0)).on_train_begin(None, None, None, model=learner, optimizer=optimizer)
        with pytest.raises(UnsupportedStateError, match="take save_squisher"):
            live_squisher(learner, optimizer)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_the_trainer_in_two_processes(tmp_path):
    """Two processes on halves of each batch end with the anchors and the Fisher of one process on the whole."""
    found = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        codes, said = processes.run("tests.training.trainer_worker", "ewc", folder, world, as_torchrun=world == 2)
        assert not any(codes), said
        penalty = EWCPenalty(LAM)
        penalty.load_state_dict(torch.load(folder / "penalty.pt", weights_only=True))
        found.append(penalty)
    assert found[0].tasks == 2
    _same_state(*found, rtol=1e-3)
