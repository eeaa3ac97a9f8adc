"""EWC penalty on new heads and on frozen, half-precision, wrapped, sharded and adapted models."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit.applications.ewc.penalty import EWCPenalty
from squisher_mergekit.training import GradientSquares
from tests import processes
from tests.applications.ewc.tasks import assert_close, eq14, gradients_of, moved, random_fisher, small_model
from tests.training.cases import make

LORA = peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True)


def test_parameters_without_a_fisher_are_free_and_listed_once(caplog):
    """A new head trains without a penalty. The log names it once, and the attribute lists it while it has no Fisher."""
    model, penalty = small_model(), EWCPenalty(1.0)
    trunk = {name: tensor for name, tensor in random_fisher(model, 1).items() if name.startswith("0.")}
    for _ in range(2):
        penalty.add(model, trunk)
    assert penalty.unpenalised == ("2.weight", "2.bias")
    assert [record.getMessage() for record in caplog.records] == [
        "EWC leaves 2 trainable parameters free, having no Fisher of them: 2.weight, 2.bias"
    ]
    assert set(gradients_of(moved(model, 1), penalty)) == {"0.weight", "0.bias"}
    penalty.add(model, random_fisher(model, 1))
    assert penalty.unpenalised == ()


def test_frozen_parameters_are_left_out_while_they_are_frozen():
    """Frozen parameters get no gradient and add nothing to the value. Unfrozen parameters are penalised again."""
    model, penalty = small_model(), EWCPenalty(1.0)
    fisher = random_fisher(model, 1)
    penalty.add(model, fisher)
    far = moved(model, 2)
    far[0].requires_grad_(False)
    head = {name: tensor for name, tensor in fisher.items() if name.startswith("2.")}
    torch.testing.assert_close(penalty(far).double(), eq14(far, [(model, head)], 1.0)[0], rtol=1e-6, atol=0.0)
    assert set(gradients_of(far, penalty)) == {"2.weight", "2.bias"}
    far[0].requires_grad_(True)
    torch.testing.assert_close(penalty(far).double(), eq14(far, [(model, fisher)], 1.0)[0], rtol=1e-6, atol=0.0)


def test_the_weights_of_half_precision_are_anchored_in_float32():
    """A bfloat16 model keeps a float32 Fisher and anchor, and gets a bfloat16 gradient."""
    model = small_model(dtype=torch.bfloat16)
    far, fisher, penalty = moved(model, 2), random_fisher(model, 1), EWCPenalty(1.0)
    penalty.add(model, fisher)
    _, gradients = eq14(far, [(model, fisher)], 1.0)
    found = gradients_of(far, penalty)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_close(found, gradients, rtol=2**-8)
    assert {term["anchor"].dtype for term in penalty.state_dict()["terms"].values()} == {torch.float32}


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_the_same(wrap):
    """A penalty uses names without wrappers, so it serves the wrapped and the bare model."""
    model, penalty = small_model(), EWCPenalty(1.0)
    penalty.add(wrap(model), random_fisher(model, 1))
    far = moved(model, 2)
    assert penalty(wrap(far)).item() == penalty(far).item() > 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft uses it
def test_models_of_transformers_and_adapters():
    """A Fisher with names on disk matches packed experts and LoRA weights. Tied weights count once."""
    for model in (make("mixtral"), peft.get_peft_model(make("gpt2"), LORA)):
        ids = torch.arange(3, 14).unsqueeze(0)
        model(input_ids=ids, labels=ids).loss.backward()
        squares = GradientSquares(model, 0.5)
        squares.update()
        far = moved(model, 1)
        penalty = EWCPenalty(1.0)
        penalty.add(model, squares.fisher(), examples_per_step=1)
        expected = sum(
            (p.grad.double() ** 2 * (q.detach().double() - p.detach().double()) ** 2).sum()
            for p, q in zip(model.parameters(), far.parameters(), strict=True)
            if p.grad is not None
        )
        torch.testing.assert_close(penalty(far).double(), 0.5 * expected, rtol=1e-5, atol=0.0)
        assert expected > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_agree_with_one(tmp_path, kind):
    """Penalty, ratio and weights under accelerate with DDP, or under FSDP2, equal those of one process."""
    found = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        codes, said = processes.run("tests.applications.ewc.ewc_worker", kind, folder, world)
        assert not any(codes), said
        found[world] = torch.load(folder / "found.pt", weights_only=True)
    one, two = found[1], found[2]
    assert one["value"] > 0
    assert one["ratio"] > 0
    for key in ("value", "ratio"):
        assert two[key] == pytest.approx(one[key], rel=1e-4)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-5, atol=1e-5)
