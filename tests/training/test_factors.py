"""Recorded factors: equal to slow averages, in the folder of the Fisher, through the real Trainer."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from squisher_mergekit import SquisherCallback, load_fisher
from squisher_mergekit.errors import ConfigError, UnsupportedStateError
from squisher_mergekit.training import GradientFactors
from tests.training.cases import make, trainer

BETA, BLOCK, EVERY, ALL_STEPS = 0.75, 5, 2, 5


class Watch(SquisherCallback):
    """Callback that keeps the gradients at which the factors are recorded."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        super().on_pre_optimizer_step(args, state, control, **kwargs)
        self.__dict__.setdefault("seen", []).append(
            {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None}
        )


def _slow(gradients, block):
    """Return the average of ``G G^T`` entry by entry, blocks padded with zeros."""
    size = len(gradients[0])
    width = min(block, size)
    found = torch.zeros(-(-size // width), width, width, dtype=torch.float64)
    for gradient in gradients:
        found *= BETA
        for i in range(size):
            for j in range(size):
                if i // width == j // width:
                    product = gradient[i].double() @ gradient[j].double()
                    found[i // width, i % width, j % width] += (1 - BETA) * product
    return found


@pytest.mark.parametrize("factors", ["rows", "columns", "kron"])
def test_recorded_factors_equal_a_slow_average(tmp_path, factors):
    """The factors of a run with accumulation and clipping are the slow averages over every second step."""
    watch = Watch(factors=factors, every=EVERY, block=BLOCK, factor_beta=BETA)
    trainer("bert", tmp_path, [watch], max_steps=ALL_STEPS, save_steps=ALL_STEPS, max_grad_norm=0.5).train()
    fisher = load_fisher(tmp_path / f"checkpoint-{ALL_STEPS}")
    for side in ("rows", "columns"):
        found = fisher.factors.side(side)
        assert bool(len(found)) == (factors in (side, "kron"))
        for name in found:
            gradients = [step[name] if side == "rows" else step[name].T for step in watch.seen[::EVERY]]
            torch.testing.assert_close(found[name].double(), _slow(gradients, BLOCK), rtol=1e-5, atol=1e-12)
    info = fisher.config.factors
    assert (info.source, info.statistic, info.decay, info.every, info.steps) == ("recorded", "ema", BETA, EVERY, 3)
    matrices = {n for n in fisher if fisher.info(n).shape[1:] and "embeddings" not in n}
    assert set(fisher.factors.names) == matrices
    assert not any(name.endswith((".rows", ".columns")) for name in fisher)


def test_a_resumed_run_continues_the_factors(tmp_path):
    """Two steps, a resume and three more steps give the factors of five steps at once."""
    found = []
    for folder, stops in ((tmp_path / "whole", [5]), (tmp_path / "parts", [2, 5])):
        for number, stop in enumerate(stops):
            callback = SquisherCallback(factors="rows", every=1, block=BLOCK)
            run = trainer("bert", folder, [callback], max_steps=stop, save_steps=stop, lr_scheduler_type="constant")
            run.train(resume_from_checkpoint=str(folder / f"checkpoint-{stops[0]}") if number else None)
        found.append(load_fisher(folder))
    for name in found[0].factors.rows:
        torch.testing.assert_close(found[0].factors.rows[name], found[1].factors.rows[name])
    assert found[1].config.factors.steps == 5


def test_an_optimizer_without_second_moment_gives_the_average_the_factors(tmp_path):
    """With SGD, the factors are beside the moving average of the squared gradient."""
    model = make("bert")
    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    callback = SquisherCallback(beta=0.9, factors="columns", every=1, block=7)
    trainer("bert", tmp_path, [callback], model=model, optimizers=(sgd, None)).train()
    assert len(load_fisher(tmp_path / "fisher_ema").factors.columns)


def test_rows_of_a_conv1d_are_its_outputs():
    """For a matrix kept as [in, out], `rows` records over the second axis."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=6, n_head=2, n_layer=1, n_inner=11, vocab_size=17, n_positions=8))
    factors = GradientFactors(model, "rows", block=4)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    factors.update()
    name = "transformer.h.0.mlp.c_fc.weight"
    assert name not in factors.moments["rows"]
    gradient = dict(model.named_parameters())[name].grad
    wanted = 0.05 * (gradient.T @ gradient)[4:8, 4:8]
    torch.testing.assert_close(factors.moments["columns"][name][1], wanted)


def test_an_overflow_is_left_out():
    """A step with an infinite gradient adds nothing."""
    model = nn.Linear(3, 2)
    factors = GradientFactors(model)
    model(torch.full((1, 3), float("inf"))).sum().backward()
    assert not factors.update()
    assert factors.steps == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"factors": "row"}, "factors must be rows, columns or kron"),
        ({"factors": "rows", "every": 0}, "every of factors must be a whole number"),
        ({"factors": "rows", "block": 1.5}, "block of factors must be a whole number"),
        ({"factors": "rows", "factor_beta": 1.0}, "beta of factors must be between 0 and 1"),
    ],
)
def test_wrong_arguments_are_refused_at_once(settings, words):
    """The callback refuses them before training."""
    with pytest.raises(ConfigError, match=words):
        SquisherCallback(**settings)


def test_sharded_gradients_are_refused(monkeypatch):
    """A sharded parameter has no whole gradient."""
    monkeypatch.setattr("squisher_mergekit.training.factors.is_sharded", lambda parameter: parameter.ndim == 2)
    with pytest.raises(UnsupportedStateError, match="factors need the whole gradient"):
        GradientFactors(nn.Linear(3, 2))
