"""Weights on disk, and changed copies of a model."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from squisher_mergekit.errors import (
    ConfigError,
    CorruptFileError,
    MismatchError,
    NotFoundError,
    UnsupportedStateError,
    ValuesError,
)
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.fits import check_fits
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.fingerprint import fingerprint
from squisher_mergekit.models.weights import (
    Weights,
    check_alike,
    check_finite,
    check_folder,
    open_weights,
    refuse_quantised,
    write_changed,
)
from squisher_mergekit.tensors.safetensors import MemoryStore, safetensors_notes
from tests import hub_server
from tests.estimators.models import make


@pytest.fixture
def saved(tmp_path):
    """Return a Llama in three shards, with files of a tokenizer and a trainer."""
    folder = tmp_path / "model"
    make("llama").save_pretrained(folder, max_shard_size="5KB")
    for name in ("tokenizer.json", "chat_template.jinja", "trainer_state.json", "optimizer.pt", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "checkpoint-3").mkdir()
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def _fisher(weights, mark=None, **others):
    tensors = {name: torch.ones(info.shape) for name, info in weights.infos.items()} | others
    config = FisherConfig(estimator="empirical", statistic="mean", weights_fingerprint=mark)
    return Fisher(MemoryStore({name: tensor for name, tensor in tensors.items() if tensor is not None}), config)


def test_a_changed_copy_is_the_model_but_for_the_change(saved, tmp_path):
    """A changed copy keeps shards, index, config and tokenizer.

    It loads with from_pretrained, and other weights keep their bits.
    """
    weights, out = open_weights(saved), tmp_path / "out"
    write_changed(weights, out, lambda name, tensor: tensor * 2 if "q_proj" in name else tensor)
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (saved, out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor * 2 if "q_proj" in name else tensor), name
    kept = {path.name for path in saved.iterdir()} - {"trainer_state.json", "optimizer.pt", "training_args.bin"}
    assert {path.name for path in out.iterdir()} == kept - {"checkpoint-3"}
    for file in saved.glob("model-*"):
        assert list(load_file(file)) == list(load_file(out / file.name))


def test_bits_of_every_dtype_are_copied(tmp_path):
    """Unchanged floats of 8 to 64 bits, integers, bools, scalars and empty tensors keep their bits."""
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
              torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # fmt: skip
    tensors = {str(dtype): torch.arange(7).reshape(7, 1).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "mine": "yes"})
    write_changed(open_weights(tmp_path), tmp_path / "out", lambda _, tensor: tensor)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "out")


def test_a_tensor_can_be_left_out(tmp_path):
    """A change that returns None removes the tensor."""
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    write_changed(open_weights(tmp_path), tmp_path / "out", lambda name, tensor: tensor if name == "b" else None)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["b"]


def test_a_failed_copy_leaves_no_files(saved, tmp_path):
    """A failed copy leaves nothing at its path or next to it."""

    def change(name, tensor):
        if "layers.1" in name:
            raise RuntimeError("halfway")
        return tensor

    with pytest.raises(RuntimeError, match="halfway"):
        write_changed(open_weights(saved), tmp_path / "out", change)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_existing_output_is_refused(saved, tmp_path):
    """A file or a folder with content is refused as output. An empty folder is used."""
    weights = open_weights(saved)
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path / "file", saved):
        with pytest.raises(ConfigError, match="must be new or empty"):
            write_changed(weights, taken, lambda _, tensor: tensor)
    (tmp_path / "empty").mkdir()
    write_changed(weights, tmp_path / "empty", lambda _, tensor: tensor)
    assert open_weights(tmp_path / "empty").infos == weights.infos


def test_missing_weights_are_refused(saved, tmp_path):
    """A missing folder, an invalid Hub id, a folder without safetensors and a missing shard are refused in one line."""
    with pytest.raises(NotFoundError, match="--base must be a folder or a Hub id"):
        open_weights(tmp_path / "nowhere", "--base")
    (tmp_path / "bare").mkdir()
    with pytest.raises(NotFoundError, match=r"bare has none; save the model by save_pretrained"):
        open_weights(tmp_path / "bare")
    next(saved.glob("model-00002*")).unlink()
    with pytest.raises(CorruptFileError, match="copy the missing shard"):
        open_weights(saved)


def test_weights_come_from_the_hub(saved, tmp_path, monkeypatch):
    """An id fetches the files of a model from the Hub, and no other files."""
    files = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    with hub_server.serve() as hub:
        hub_server.point_at(hub, tmp_path / "home", monkeypatch)
        hub.add("me/llama", files)
        found = open_weights("me/llama")
    assert found.infos == open_weights(saved).infos
    assert (found.folder / "chat_template.jinja").is_file()
    assert not any("optimizer" in path for _, path in hub.requests)


def test_a_fisher_of_other_weights_is_accepted_with_a_warning(saved):
    """A Fisher of other weights gives a warning. A Fisher of the same weights, or of unknown ones, gives none."""
    weights = open_weights(saved)
    assert check_fits(_fisher(weights, fingerprint(saved)), weights, weights.infos) is None
    assert check_fits(_fisher(weights), weights, weights.infos) is None
    assert "differ" in (check_fits(_fisher(weights, "fp1:0-1"), weights, weights.infos) or "")


def test_a_fisher_that_does_not_fit_is_refused(saved):
    """A Fisher with a missing tensor, an extra one, or another shape is refused."""
    weights = open_weights(saved)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(MismatchError, match=f"lacks {name}"):
        check_fits(_fisher(weights, **{name: None}), weights, weights.infos)
    check_fits(_fisher(weights, **{name: None}), weights, [other for other in weights.infos if other != name])
    with pytest.raises(MismatchError, match="but strange in memory is not in"):
        check_fits(_fisher(weights, strange=torch.ones(2)), weights, ())
    with pytest.raises(MismatchError, match=r"must have the weight's shape"):
        check_fits(_fisher(weights, **{name: torch.ones(2)}), weights, ())


def test_different_models_are_refused(saved, tmp_path):
    """Models with another shape, another dtype or a missing tensor are refused."""
    weights = open_weights(saved)
    check_alike(weights, weights, weights.infos)
    name = "lm_head.weight"
    for change, found in (
        (lambda tensor: tensor[1:].clone(), r"has \[28, 12\]"),
        (lambda tensor: tensor.bfloat16(), "of torch.bfloat16"),
        (lambda tensor: None, "has none"),
    ):
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        write_changed(weights, out, lambda key, tensor, change=change: change(tensor) if key == name else tensor)
        with pytest.raises(MismatchError, match=found):
            check_alike(weights, open_weights(out), weights.infos)


def test_the_index_is_kept(saved, tmp_path):
    """A changed copy has the index of the source, because its shards are the same."""
    write_changed(open_weights(saved), tmp_path / "out", lambda _, tensor: tensor)
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "out" / index).read_text()) == json.loads((saved / index).read_text())


@pytest.mark.parametrize("name", ["special_tokens_map.json", "model-00009-of-00009.safetensors", "vocab.txt"])
def test_a_fifo_in_a_model_is_refused(saved, name):
    """A FIFO among the files of a model is refused at once, whatever its name."""
    os.mkfifo(saved / name)
    with pytest.raises(CorruptFileError, match=f"{name} must be a regular file, found a FIFO"):
        open_weights(saved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 40_000_000}, "num_hidden_layers from 0 to 10000, found 40000000"),
        ({"num_hidden_layers": -7}, "from 0 to 10000, found -7"),
        ({"text_config": {"n_routed_experts": 9e8}}, "n_routed_experts of at most 10000"),
        ({"depths": [2, 1_000_000, 2]}, "depths of at most 10000"),
    ],
)
def test_an_impossible_model_is_refused(saved, changes, words):
    """A config that no model has is refused before anything is built of it; other negative numbers are valid."""
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"vision_feature_layer": -2}))
    check_folder(saved)
    (saved / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(CorruptFileError, match=words):
        check_folder(saved)


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    ("name", "tensor", "quantised"),
    [
        ("block.up.weight", torch.ones(2, 3).to(torch.float8_e5m2), False),
        ("block.up.qweight", torch.ones(2, 3, dtype=torch.int32), False),
        ("experts.up_proj_blocks", torch.ones(2, 3, dtype=torch.uint8), False),
        ("block.up.codes", torch.ones(2, 3, dtype=torch.uint8), True),
    ],
)
def test_quantised_weights_are_refused(tmp_path, name, tensor, quantised, pickled):
    """The dtypes in the headers, of pickled weights in the pickle, and the config tell that weights are quantised."""
    if pickled:
        torch.save({name: tensor}, tmp_path / "pytorch_model.bin")
    else:
        save_file({name: tensor}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}} if quantised else {}))
    with pytest.raises(UnsupportedStateError, match=rf"{name} of model is stored as .*before it was quantised"):
        refuse_quantised(Weights(tmp_path), "model")


@pytest.mark.parametrize("name", ["embeddings.position_ids", "norm.num_batches_tracked"])
def test_integer_buffers_are_no_quantised_weights(tmp_path, name):
    """Tables and counters of integers are as they always were."""
    tensors = {name: torch.ones(1, 7, dtype=torch.int64), "up.weight": torch.ones(2, 3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    refuse_quantised(Weights(tmp_path), "model")


def test_an_overflow_of_float16_is_no_broken_training():
    """The message for infinite entries in float16 names another dtype as the cure."""
    with pytest.raises(ValuesError, match="in float16, which ends at 65504; give dtype: bfloat16"):
        check_finite(torch.tensor([1.0, 1e6]).half(), "w", "model")


def test_notes_of_any_length_are_copied(tmp_path):
    """The copy of a file has its metadata, however long."""
    notes = {"format": "pt", "training": json.dumps({"steps": 13}) * 401}
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(3, 5)}, tmp_path / "model" / "model.safetensors", notes)
    write_changed(Weights(tmp_path / "model"), tmp_path / "out", lambda name, tensor: tensor * 2)
    assert safetensors_notes(tmp_path / "out" / "model.safetensors") == notes


def test_a_single_file_of_diffusers_is_copied_without_an_old_index(tmp_path):
    """An index of older shards would name files that the copy lacks."""
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.ones(3, 5)}, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    index = {"weight_map": {"w": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    write_changed(Weights(tmp_path / "unet"), tmp_path / "out", lambda name, tensor: tensor)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["diffusion_pytorch_model.safetensors"]
