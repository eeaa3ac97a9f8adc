"""Recorder of merged weights: against gradients of the weights themselves, in loops of torch."""

import peft
import pytest
import torch
from torch import nn

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import ConfigError, MismatchError, UnsupportedStateError
from squisher_mergekit.training import LoraRecorder
from tests import processes
from tests.small_models import MODELS
from tests.training.lora.reference import Reference
from tests.training.lora.worker import record

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),  # peft's call
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out is set to:UserWarning"),
]
BETA = 0.75
RUNS = {
    "a rank pattern": ("llama", {"target_modules": ["v_proj", "up_proj"], "rank_pattern": {"up_proj": 5}}),
    "rsLoRA": ("t5", {"target_modules": ["wo", "k"], "use_rslora": True}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "dropout": ("qwen2", {"target_modules": ["k_proj", "gate_proj"], "lora_dropout": 0.5}),
    "a head of its own": ("bert", {"target_modules": ["key", "output.dense"], "modules_to_save": ["classifier"]}),
    "biases": ("gpt2", {"target_modules": ["c_fc"], "bias": "all"}),
}


def _adapted(name, seed=0, **lora):
    torch.manual_seed(seed)
    settings = {"r": 3, "lora_alpha": 6, "init_lora_weights": True} | lora
    model = peft.get_peft_model(MODELS[name]().train(), peft.LoraConfig(**settings))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.1)
    return model


def _batch(name, step, rows=4):
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 50, (rows, 9), generator=generator)
    labels = torch.randint(0, 5, (rows,), generator=generator) if name == "bert" else ids.clone()
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    if name != "bert":
        labels[0, 5:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _train(name, model, recorder, reference, steps=3, parts=1, clip=1e9, checkpointing=None):
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    for step in range(steps):
        for part in range(parts):
            (model(**_batch(name, step * parts + part)).loss / parts).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        reference.add()
        assert recorder.update()
        optimizer.step()
        model.zero_grad()


@pytest.mark.parametrize("run", RUNS)
def test_a_recorded_fisher_equals_the_reference(run):
    """F is that of the gradients of the weights themselves, after accumulation and clipping, with padded rows."""
    name, lora = RUNS[run]
    model = _adapted(name, **lora)
    recorder = LoraRecorder(model, BETA, seed=5)
    reference = Reference(recorder)
    _train(name, model, recorder, reference, parts=2, clip=0.05 if run != "dropout" else 1e9)
    reference.check(recorder.fisher(), 2e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant):
    """A layer whose forward pass runs twice counts once."""
    model = _adapted("llama", target_modules=["o_proj", "gate_proj"])
    recorder = LoraRecorder(model, BETA)
    reference = Reference(recorder)
    _train("llama", model, recorder, reference, checkpointing=reentrant)
    reference.check(recorder.fisher(), 2e-4)


def test_scaled_losses_count_unscaled():
    """With a scaler of losses, F is of the gradients after ``unscale_`` and clipping; an overflow is left out."""
    model = _adapted("llama", target_modules=["k_proj"])
    recorder = LoraRecorder(model, BETA)
    reference = Reference(recorder)
    factors = [p for n, p in model.named_parameters() if "lora_" in n]
    optimizer = torch.optim.SGD([{"params": factors}, {"params": [*reference.weights.values()], "lr": 0.0}], lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(3):
        loss = model(**_batch("llama", step)).loss
        scaler.scale(loss * (float("inf") if step == 1 else 1.0)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        if step != 1:
            reference.add()
        assert recorder.update() == (step != 1)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
    reference.check(recorder.fisher(), 2e-4)


def test_the_probes_have_no_bias():
    """The mean over many draws of the signs is the square of the gradient, row by row and column by column."""
    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(5, 3)), peft.LoraConfig(r=2, target_modules=["0"]))
    recorder = LoraRecorder(model, beta=0.9999)
    weight = model.get_base_model()[0].base_layer.weight.requires_grad_(True)
    x, target = torch.randn(7, 5), torch.randn(7, 3)
    for _ in range(600):
        model.zero_grad()
        (model(x) - target).square().sum().backward()
        recorder.update()
    found, square = recorder.fisher()["0.weight"].double(), weight.grad.double().square()
    # Over four standard errors of a mean over 600 draws.
    assert torch.allclose(found.mean(1), square.mean(1), rtol=0.25)
    assert torch.allclose(found.mean(0), square.mean(0), rtol=0.25)


def test_the_random_state_and_the_gradients_stay_as_they_are():
    """Training with a recorder gives the same weights, bit for bit."""
    trained = []
    for recorded in (False, True):
        model = _adapted("bert", target_modules=["value"], lora_dropout=0.1)
        recorder = LoraRecorder(model, BETA) if recorded else None
        optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        for step in range(2):
            model(**_batch("bert", step)).loss.backward()
            if recorder is not None:
                recorder.update()
            optimizer.step()
            optimizer.zero_grad()
        trained.append([p.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_passes_outside_of_training_do_not_count():
    """A pass in evaluation mode, one without a gradient and one of the base alone add nothing."""
    model = _adapted("llama", target_modules=["q_proj"])
    recorder = LoraRecorder(model, BETA)
    reference = Reference(recorder)
    with torch.no_grad():
        model(**_batch("llama", 8))
    model.eval()
    model(**_batch("llama", 9)).loss.backward()
    model.zero_grad()
    model.train()
    _train("llama", model, recorder, reference)
    reference.check(recorder.fisher(), 2e-4)
    recorder.remove()
    model(**_batch("llama", 3)).loss.backward()
    assert not recorder.update()


def test_a_state_continues_the_averages():
    """Two steps, a new recorder with the state, and two steps give the averages of four."""
    fishers = []
    for parts in ((4,), (2, 2)):
        model, state = _adapted("gpt2", target_modules=["c_proj"]), None
        for steps in parts:
            recorder = LoraRecorder(model, BETA, seed=9)
            if state is not None:
                recorder.load_state_dict(state)
            for step in range(steps):
                model(**_batch("gpt2", step % 2)).loss.backward()
                recorder.update()
                model.zero_grad()
            state = {**recorder.state_dict()}
            recorder.remove()
        fishers.append(recorder.fisher())
    assert all(torch.allclose(fishers[0][n], fishers[1][n], rtol=1e-6) for n in fishers[0])


def _frozen():
    model = _adapted("llama", target_modules=["q_proj"])
    return model.requires_grad_(False)


def _two_adapters():
    model = _adapted("llama", target_modules=["q_proj"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    return model


REFUSED = {
    "full weights": (lambda: MODELS["llama"](), "needs a LoRA of peft"),
    "DoRA": (lambda: _adapted("llama", target_modules=["up_proj"], use_dora=True), "is DoRA"),
    "PiSSA": (lambda: _adapted("llama", target_modules=["up_proj"], init_lora_weights="pissa"), "random draw"),
    "an embedding": (lambda: _adapted("llama", target_modules=["embed_tokens"]), "of class Embedding"),
    "tied weights": (lambda: _adapted("qwen2", target_modules=["lm_head"]), "which is tied to"),
    "IA3": (
        lambda: peft.get_peft_model(
            MODELS["llama"](), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        ),
        "peft_type IA3",
    ),
    "a frozen LoRA": (_frozen, "is_trainable=True"),
    "two LoRAs at once": (_two_adapters, "needs one active LoRA"),
    "DataParallel": (lambda: nn.DataParallel(_adapted("llama", target_modules=["q_proj"])), "one process per GPU"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about embeddings and tied weights
def test_other_models_are_refused_in_one_line(case):
    """The message has the requirement, the place and the cure, before the first step."""
    make, words = REFUSED[case]
    model = make()
    with pytest.raises(UnsupportedStateError, match=words) as raised:
        LoraRecorder(model)
    assert ";" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_sharded_gradients_are_refused(monkeypatch):
    """A sharded factor has no whole gradient."""
    model = _adapted("llama", target_modules=["q_proj"])
    monkeypatch.setattr("squisher_mergekit.training.lora.recorder.is_sharded", lambda parameter: parameter.ndim == 2)
    with pytest.raises(UnsupportedStateError, match="FSDP and DeepSpeed shard it"):
        LoraRecorder(model)


def test_nothing_recorded_is_refused():
    """A Fisher needs a step, and the state that of the same LoRA."""
    recorder = LoraRecorder(_adapted("llama", target_modules=["q_proj"]), BETA)
    with pytest.raises(MismatchError, match="found none"):
        recorder.fisher()
    with pytest.raises(ConfigError, match=r"those of beta 0\.75"):
        recorder.load_state_dict({"beta": 0.5})
    with pytest.raises(MismatchError, match=r"model\.norm\.weight is none of its weights"):
        recorder.load_state_dict({"beta": BETA, "averages": {"model.norm.weight": torch.ones(12)}})
    with pytest.raises(ConfigError, match="between 0 and 1"):
        LoraRecorder(_adapted("llama", target_modules=["q_proj"]), 1.0)


@pytest.mark.slow
def test_two_processes_record_what_one_does(tmp_path):
    """With DDP and accumulation, F is that of one process on all rows."""
    codes, said = processes.run("tests.training.lora.worker", "ddp", tmp_path, 2)
    assert codes == [0, 0], said
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["0"]
    one, two = record(lambda model: model, 0, 1).fisher(), load_fisher(tmp_path / "0")
    assert set(one) == set(two)
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5 * float(one[name].max()))
