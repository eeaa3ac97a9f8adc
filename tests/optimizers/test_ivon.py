"""IVON's Hessian, one flat tensor per group, divided among its parameters."""

import pytest
import torch
import transformers

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import NamingError

SHAPES = {"a.weight": (5, 3), "a.bias": (5,), "b.weight": (2, 5)}


def _saved(folder, entries=None):
    """Write the content of IVON's state_dict in the layout of version 0.1.3."""
    model = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    numel = entries or sum(tensor.numel() for tensor in model.values())
    group = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta1": 0.9, "beta2": 0.999, "weight_decay": 1e-4}
    group |= {"clip_radius": 1e9, "numel": numel, "momentum": torch.zeros(numel), "hess": torch.rand(numel)}
    state = {"count": 0, "avg_grad": None, "avg_nxg": None, "avg_gsq": None}
    optimizer = {"state": state, "param_groups": [{**group, "params": [0, 1, 2]}]}
    torch.save({"model": model, "optimizer": optimizer}, folder / "run.pt")
    return group["hess"]


@pytest.mark.parametrize("names", [None, list(SHAPES)])
def test_each_parameter_gets_its_part(names, tmp_path, caplog):
    """The flat Hessian is sliced in the order of the model without a bias correction. A warning names its start."""
    hess, offset = _saved(tmp_path), 0
    if names is not None:
        from safetensors.torch import save_file

        save_file({name: torch.zeros(shape) for name, shape in SHAPES.items()}, tmp_path / "model.safetensors")
    fisher = load_fisher(tmp_path / "run.pt", names=names)
    for name, shape in SHAPES.items():
        part = hess[offset : offset + torch.Size(shape).numel()].reshape(shape)
        assert torch.equal(fisher[name], part)
        assert torch.equal(fisher.scaled(name), part)
        offset += part.numel()
    assert (fisher.config.optimizer.class_, fisher.config.optimizer.beta2) == ("ivon.IVON", 0.999)
    assert fisher.config.bias_corrected
    assert "hess_init 0.5" in caplog.text


def test_a_tensor_of_another_size_is_refused(tmp_path):
    """A tensor that is larger or smaller than the parameters is refused."""
    _saved(tmp_path, entries=31)
    with pytest.raises(NamingError, match="must fill its flat tensors"):
        load_fisher(tmp_path / "run.pt")


def test_a_head_that_the_base_lacks_was_trained(tmp_path):
    """Parameters that equal the base's were frozen; a new head, which the base does not have, was not."""
    config = transformers.GPT2Config(vocab_size=41, n_embd=12, n_layer=1, n_head=3, n_positions=16, pad_token_id=0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    model.transformer.wte.requires_grad_(False)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 1
    model.save_pretrained(tmp_path)
    numel = sum(p.numel() for p in trained.values())
    group = {"hess_init": 0.5, "beta1": 0.9, "beta2": 0.999, "numel": numel, "hess": torch.rand(numel)}
    optimizer = {"state": {}, "param_groups": [{**group, "params": [*range(len(trained))]}]}
    torch.save({"optimizer": optimizer}, tmp_path / "run.pt")
    fisher = load_fisher(tmp_path / "run.pt", base=tmp_path / "base")
    parts = torch.split(group["hess"], [p.numel() for p in trained.values()])
    assert set(fisher) == set(trained)
    assert all(
        torch.equal(fisher[name], part.view(p.shape)) for (name, p), part in zip(trained.items(), parts, strict=True)
    )
