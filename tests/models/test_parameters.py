"""Names of live models, compared with the names in their saved files."""

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from squisher_mergekit import load_fisher, save_squisher
from squisher_mergekit.errors import NamingError, UnsupportedStateError
from squisher_mergekit.models.parameters import describe, memory_names
from tests.small_models import LENGTH
from tests.training.cases import make


def _step(model, steps=2):
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(3, 53, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        model(input_ids=ids, labels=ids[:, 0] % 5 if hasattr(model, "classifier") else ids).loss.backward()
        optimizer.step()
    return optimizer


def _names(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", ["bert", "mixtral"])
def test_names_of_a_new_model_are_those_of_saving(tmp_path, name):
    """A model without files gets the names that save_pretrained writes later, also for packed experts."""
    model = make(name)
    fisher = save_squisher(model, _step(model), tmp_path / "fisher")
    model.save_pretrained(tmp_path / "model")
    assert set(fisher) == _names(tmp_path / "model")


def test_a_loaded_model_keeps_its_names_on_disk(tmp_path):
    """A model loaded from files with old names (LayerNorm.gamma) is saved with these, and its Fisher has them."""
    model = make("bert")
    state = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for key, tensor in model.state_dict().items()
    }
    model.save_pretrained(tmp_path / "old", state_dict=state)
    names = _names(tmp_path / "old")
    loaded = type(model).from_pretrained(tmp_path / "old")
    conversions = list(loaded._weight_conversions)
    fisher = save_squisher(loaded, _step(loaded), tmp_path / "fisher")
    assert loaded._weight_conversions == conversions
    loaded.save_pretrained(tmp_path / "new")
    assert set(fisher) == _names(tmp_path / "new")
    assert any("gamma" in name for name in names)


def test_a_description_leaves_the_model_unchanged():
    """A description of a model leaves no trace in it."""
    model = make("mixtral")
    before = set(vars(model))
    describe(model).checkpoint_names.convert({})
    assert set(vars(model)) == before


def test_modules_wrapped_one_by_one_are_looked_through(tmp_path):
    """Activation checkpointing changes module names. The Fisher has the names of the weights."""
    plain, wrapped = make("mixtral"), make("mixtral")
    for number, layer in enumerate(wrapped.model.layers):
        wrapped.model.layers[number] = checkpoint_wrapper(layer)
    assert any("_checkpoint_wrapped_module" in name for name, _ in wrapped.named_parameters())
    fishers = [
        save_squisher(model, _step(model), tmp_path / kind) for kind, model in (("plain", plain), ("wrapped", wrapped))
    ]
    assert set(fishers[0]) == set(fishers[1])
    for name in fishers[0]:
        torch.testing.assert_close(fishers[0][name], fishers[1][name])


def test_wrapped_modules_of_a_class_that_cannot_be_built_are_refused():
    """A model with inner wrappers that cannot be built again is refused in one line."""
    model = make("llama")

    class Special(type(model)):
        def __init__(self):
            raise AssertionError("never called")

    model.__class__ = Special
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    with pytest.raises(NamingError, match="must be one that can be built from its config") as error:
        describe(model)
    assert "\n" not in str(error.value)


def test_a_name_of_the_models_own_is_kept():
    """An attribute called module is no wrapper, whether the model is wrapped or not."""
    model = nn.Module()
    model.module = nn.Linear(2, 3)
    for wrapped in (model, nn.DataParallel(model), torch.compile(model, backend="eager")):
        assert set(memory_names(wrapped).values()) == {"module.weight", "module.bias"}


def test_tied_embeddings_have_one_entry(tmp_path):
    """A tied name finds the Fisher of the other name and is listed."""
    model = make("qwen2")
    save_squisher(model, _step(model), tmp_path)
    fisher = load_fisher(tmp_path)
    assert "lm_head.weight" not in list(fisher)
    assert torch.equal(fisher["lm_head.weight"], fisher["model.embed_tokens.weight"])


def test_deepspeed_is_refused_with_the_cure(tmp_path):
    """An engine of DeepSpeed is recognised by its module and refused before any file is written."""
    engine = type("DeepSpeedEngine", (nn.Linear,), {"__module__": "deepspeed.runtime.engine"})(2, 3)
    optimizer = torch.optim.AdamW(engine.parameters())
    with pytest.raises(UnsupportedStateError, match="take squisher extract on the checkpoint"):
        save_squisher(engine, optimizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()
