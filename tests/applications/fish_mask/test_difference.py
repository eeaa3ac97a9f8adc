"""Difference of two models, applied and removed bit for bit, and refused for any other model."""

import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from squisher_mergekit.applications.fish_mask.difference import (
    DIFFERENCE_NAME,
    Difference,
    DifferenceMetadata,
    read_difference,
    write_difference,
)
from squisher_mergekit.applications.fish_mask.files import reset_files
from squisher_mergekit.applications.fish_mask.patching import apply_files, patched, remove_files
from squisher_mergekit.applications.masks import read_mask
from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError, NotFoundError
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.tensors.safetensors import MemoryStore, safetensors_notes
from tests.applications.fish_mask.fish import Pair, bits, same

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
CASES = [
    ("bert", torch.float32, "2GB"),
    ("bert", torch.bfloat16, "5KB"),
    ("llama-tied", torch.bfloat16, "7KB"),
    ("mixtral", torch.float32, "9KB"),
]


@pytest.mark.parametrize(("name", "dtype", "shard"), CASES)
def test_a_difference_is_applied_and_removed(tmp_path, name, dtype, shard):
    """A difference turns the base into the reset model and back: tensors, names and config.

    Both models load and compute.
    """
    pair, out = Pair(tmp_path, name, dtype, shard), tmp_path / "out"
    reset_files(pair.tuned, pair.base, out, fisher=pair.fisher, keep=0.2)
    apply_files(pair.base, out, tmp_path / "again", strict=True)
    assert same(tmp_path / "again", out)
    remove_files(tmp_path / "again", out / DIFFERENCE_NAME, tmp_path / "base_again", strict=True)
    assert same(tmp_path / "base_again", pair.base)
    for made, wanted in (("again", out), ("base_again", pair.base)):
        assert json.loads((tmp_path / made / "config.json").read_text()) == json.loads(
            (wanted / "config.json").read_text()
        )
    first, second = pair.load(out), pair.load(tmp_path / "again")
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(("name", "dtype", "shard"), CASES)
def test_in_memory_as_on_disk(tmp_path, name, dtype, shard):
    """A difference applied to tensors in memory gives the tensors that it gives on disk."""
    pair, out = Pair(tmp_path, name, dtype, shard), tmp_path / "out"
    reset_files(pair.tuned, pair.base, out, score="random", keep=0.2, difference_only=True)
    base = {key: open_weights(pair.base).read(key) for key in open_weights(pair.base).infos}
    tuned = patched(base, read_difference(out))
    apply_files(pair.base, out, tmp_path / "again")
    disk = open_weights(tmp_path / "again")
    assert tuned.keys() == disk.infos.keys()
    assert all(torch.equal(bits(tensor), bits(disk.read(key))) for key, tensor in tuned.items())
    back = patched(tuned, read_difference(out), "base")
    assert back.keys() == base.keys()
    assert all(torch.equal(bits(tensor), bits(base[key])) for key, tensor in back.items())


@given(
    shape=st.lists(st.sampled_from([0, 1, 7, 11]), max_size=3),
    share=st.sampled_from([0.0, 0.01, 0.5, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
def test_any_tensor(tmp_path_factory, shape, share, dtype, seed):
    """A difference works for tensors of any shape and density. NaN and the sign of a zero count as differences."""
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(shape, generator=generator) * 9).to(dtype)
    changed = torch.rand(shape, generator=generator) < share
    other = torch.where(torch.rand(shape, generator=generator) < 0.5, float("nan"), -0.0)
    tuned = torch.where(changed, other.to(dtype) if dtype.is_floating_point else base + 1, base)
    found = _difference(tmp_path_factory.mktemp("d"), {"w": tuned, "same": base}, {"w": base, "same": base})
    assert not found.changes("same")
    for one, side, wanted in ((base, "tuned", tuned), (tuned, "base", base)):
        result = patched({"w": one, "same": base}, found, side)["w"]
        assert result.shape == wanted.shape
        assert torch.equal(bits(result), bits(wanted))


def _difference(folder, tuned, base, **metadata):
    write_difference(MemoryStore(tuned), MemoryStore(base), folder / DIFFERENCE_NAME, DifferenceMetadata(**metadata))
    return read_difference(folder)


def test_tensors_of_one_model_are_stored_whole(tmp_path):
    """Tensors of only one model and tensors of another shape are stored whole, then added or removed."""
    tuned = {"head": torch.ones(3), "table": torch.ones(7, 2), "same": torch.ones(5), "ids": torch.arange(5)}
    base = {"mlm": torch.zeros(2), "table": torch.zeros(6, 2), "same": torch.ones(5), "ids": torch.arange(5).flip(0)}
    found = _difference(tmp_path, tuned, base)
    for one, side, wanted in ((base, "tuned", tuned), (tuned, "base", base)):
        result = patched(one, found, side)
        assert result.keys() == wanted.keys()
        assert all(torch.equal(result[name], wanted[name]) for name in wanted)


def test_a_change_takes_its_place_and_two_values(tmp_path):
    """A changed entry takes 12 bytes in float32 and 8 in bfloat16.

    Dense changes store the positions as one bit per entry.
    """
    base, places = torch.zeros(100_003), torch.arange(0, 100_003, 200)
    for dtype, changed, size in (
        (torch.float32, places, 12 * len(places)),
        (torch.bfloat16, places, 8 * len(places)),
        (torch.float32, slice(None), 8 * 100_003 + 100_003 / 8),
    ):
        tuned = base.to(dtype).clone()
        tuned[changed] = 1
        _difference(tmp_path, {"w": tuned}, {"w": base.to(dtype)})
        assert size <= (tmp_path / DIFFERENCE_NAME).stat().st_size < size + 2000


def _other(folder, source, change):
    """Save a changed copy of a model's weights."""
    tensors = {name: open_weights(source).read(name).clone() for name in open_weights(source).infos}
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text((source / "config.json").read_text())
    return folder


def test_other_models_are_refused(tmp_path):
    """A model with other names, shapes, dtypes or values at changed positions is refused. Nothing is written."""
    pair, out, target = Pair(tmp_path, "bert"), tmp_path / "out", tmp_path / "target"
    reset_files(pair.tuned, pair.base, out, fisher=pair.fisher, keep=0.2)
    found = read_difference(out)
    name = next(one for one in found.changed if one.endswith("attention.self.query.weight"))
    own = found.metadata.renamed[name]
    place = int(found._positions(name, 144, len(found._store.read(f"{name}.base"))).nonzero()[0][0])

    def one_value(tensors):
        tensors[own].view(-1)[place] += 1

    for number, (change, message) in enumerate(
        (
            (one_value, f"{name} must be as in the base model of .* but in .* 1 of the [0-9]+ values that change"),
            (lambda tensors: tensors.pop(own), f"{name} must be in the base model of .*, but .* has none"),
            (
                lambda tensors: tensors.update({own: torch.ones(12, 13)}),
                "names, shapes or dtypes of the weights differ",
            ),
            (lambda tensors: tensors.update({own: tensors[own].half()}), "names, shapes or dtypes of the weights"),
            (lambda tensors: tensors.update(more=torch.ones(1)), "names, shapes or dtypes of the weights differ"),
        )
    ):
        with pytest.raises(MismatchError, match=message):
            apply_files(_other(tmp_path / f"other{number}", pair.base, change), out, target)
    with pytest.raises(MismatchError, match=r"classifier\.\w+ is added by the difference .*, but .* has it already"):
        apply_files(out, out, target)
    with pytest.raises(MismatchError, match=r"bert\.\S+ must be in the tuned model of .* has none"):
        remove_files(pair.base, out, target)
    head = _other(tmp_path / "head", out, lambda tensors: tensors["classifier.bias"].add_(1))
    with pytest.raises(MismatchError, match=r"classifier\.bias must be as in the tuned model .* has other values"):
        remove_files(head, out, target)
    with pytest.raises(ConfigError, match="must be new or empty"):
        apply_files(pair.base, out, pair.tuned)
    assert not target.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_base_with_other_unchanged_entries_gives_a_warning(tmp_path, caplog):
    """A model that differs at unchanged positions gives a warning, or an error with strict."""
    pair, out = Pair(tmp_path, "bert"), tmp_path / "out"
    reset_files(pair.tuned, pair.base, out, score="random", keep=0.2, exclude=("word_embeddings",))
    name = "embeddings.word_embeddings.weight"
    other = _other(tmp_path / "other", pair.base, lambda tensors: tensors[name].add_(1))
    with pytest.raises(MismatchError, match=r"is not the base model that .* was made from: same names"):
        apply_files(other, out, tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()
    apply_files(other, out, tmp_path / "loose")
    assert "same names, shapes and dtypes, but other values" in caplog.text
    assert torch.equal(open_weights(tmp_path / "loose").read(f"bert.{name}"), open_weights(other).read(name))


def test_damaged_files_are_refused(tmp_path):
    """A missing, foreign or truncated file is refused, as are wrong positions and missing values."""
    with pytest.raises(NotFoundError, match=r"a folder with difference\.safetensors, but there is no"):
        read_difference(tmp_path)
    file = tmp_path / DIFFERENCE_NAME
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(CorruptFileError, match="must be a difference of version 1, but it says format None"):
        read_difference(tmp_path)
    base = {"w": torch.zeros(1009), "x": torch.zeros(1009)}
    tuned = {"w": torch.arange(1009).eq(7).float(), "x": torch.arange(1009).remainder(2).float()}
    _difference(tmp_path, tuned, base)
    whole, notes = file.read_bytes(), _notes(file)
    file.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match="must be a whole safetensors file"):
        read_difference(tmp_path)
    file.write_bytes(whole)
    tensors = load_file(file)
    for change, message in (
        ({"w.index": torch.tensor([1009], dtype=torch.int32)}, "must have its positions within w, but one is"),
        ({"w.index": torch.tensor([-1], dtype=torch.int32)}, "must have its positions within w, but one is"),
        ({"x.bits": torch.zeros_like(tensors["x.bits"])}, "must have its positions within x, but one is"),
        ({"w.index": torch.tensor([7])}, "must hold positions and both values of w, but does not"),
        ({"w.base": torch.zeros(2)}, "must hold positions and both values of w, but does not"),
        ({"x.bits": torch.zeros(3, dtype=torch.uint8)}, "must hold positions and both values of x, but does not"),
        ({"x.bits": None}, "must hold positions and both values of x, but does not"),
    ):
        damaged = {name: one for name, one in (tensors | change).items() if one is not None}
        save_file(damaged, file, notes)
        with pytest.raises(CorruptFileError, match=message):
            patched(base, read_difference(tmp_path))
    save_file(tensors, file, notes | {"about": '{"unknown": 1}'})
    with pytest.raises(CorruptFileError, match="must be a whole difference, but TypeError"):
        Difference(file)


def _notes(file):
    data = file.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]


def test_places_are_not_repeated_in_memory():
    """The comparison of bits uses a view of the memory of the tensor."""
    from squisher_mergekit.applications.fish_mask.difference import bits_of

    tensor = torch.zeros(13)
    bits_of(tensor)[3] = np.float32(1).view(np.int32)
    assert tensor[3] == 1


@pytest.mark.parametrize("note", ["{" * 90_000, "x\n" * 5_000])
@pytest.mark.parametrize("read", [read_difference, read_mask])
def test_a_long_note_makes_no_long_message(tmp_path, read, note):
    """Masks and differences with any text as their format are refused in one short line."""
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(3, dtype=torch.uint8)}, file, metadata={"format": note, "version": note})
    with pytest.raises(CorruptFileError, match="it says format") as caught:
        read(file)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


def test_a_base_with_long_notes_is_patched(tmp_path):
    """The metadata of the base's file, however long, are those of the patched file."""
    notes = {"format": "pt", "training": "steps " * 997}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.full((5, 7), value)}, tmp_path / name / "model.safetensors", notes)
    reset_files(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", keep=0.4, score="movement", head=())
    apply_files(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    assert safetensors_notes(tmp_path / "again" / "model.safetensors") == notes
    assert same(tmp_path / "again", tmp_path / "out")


def test_shards_of_diffusers_keep_their_index(tmp_path):
    """The index of patched shards has the name that diffusers looks for, and there is no other one."""
    shards = {key: f"diffusion_pytorch_model-0000{k}-of-00002.safetensors" for k, key in enumerate("ab", 1)}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        (tmp_path / name).mkdir()
        for key, shard in shards.items():
            save_file({key: torch.full((5, 7), value)}, tmp_path / name / shard)
        text = json.dumps({"metadata": {"total_size": 280}, "weight_map": shards})
        (tmp_path / name / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    reset_files(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", keep=0.4, score="movement", head=())
    apply_files(tmp_path / "base", tmp_path / "out", tmp_path / "again")
    (index,) = (tmp_path / "again").glob("*.json")
    assert index.name == "diffusion_pytorch_model.safetensors.index.json"
    assert json.loads(index.read_text()) == {"metadata": {"total_size": 280}, "weight_map": shards}
