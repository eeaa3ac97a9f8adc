"""Portable Fisher in one file or in shards, written completely or not at all."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, UnsupportedStateError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import has_fisher, write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore

CONFIG = {
    "estimator": "squisher",
    "statistic": "ema",
    "steps": {"default": 3, "b.weight": 2},
    "optimizer": {"class": "torch.optim.AdamW", "beta2": 0.9},
    "coverage": {"with": 5, "without": {"lm_head.weight": "tied to a.weight", "c.weight": "not given (frozen)"}},
}


def _random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (10 ** (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 - 9)).float()


def _tensors():
    shapes = {"a.weight": (13, 7), "b.weight": (5,), "d.weight": (3, 5, 2), "e.weight": (), "f.weight": (0, 3)}
    return {name: _random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def _fisher(tensors=None, **changes):
    return Fisher(MemoryStore(tensors or _tensors()), FisherConfig.model_validate(CONFIG | changes))


def _assert_same(found, tensors):
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_one_file_comes_back_bit_for_bit(tmp_path):
    """Tensors, metadata and ties come back bit for bit, and mean and norm are recorded."""
    config = write_fisher(_fisher(), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["fisher.safetensors", "fisher_config.json"]
    found = read_fisher(tmp_path / "out")
    _assert_same(found, _tensors())
    assert found.config == config
    assert torch.equal(found["lm_head.weight"], _tensors()["a.weight"])
    assert "c.weight" not in found
    values = torch.cat([
        (tensor.double() / (1 - 0.9 ** (2 if name == "b.weight" else 3))).flatten()
        for name, tensor in _tensors().items()
    ])  # fmt: skip
    assert config.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert config.norm == pytest.approx(values.norm().item(), rel=1e-12)
    assert config.model_copy(update={"mean": None, "norm": None}) == _fisher().config
    assert config.coverage.with_ == 5


def test_safetensors_itself_reads_the_file(tmp_path):
    """The file is a plain safetensors file with the metadata that Hugging Face's loaders require."""
    write_fisher(_fisher(), tmp_path / "out")
    file = tmp_path / "out" / "fisher.safetensors"
    _assert_same(load_file(file), _tensors())
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "pt"


def test_the_folder_the_file_and_the_index_all_open(tmp_path):
    """A Fisher opens by its folder, its file or its index."""
    write_fisher(_fisher(), tmp_path / "one")
    write_fisher(_fisher(), tmp_path / "many", shard_bytes=200)
    for source in ("one", "one/fisher.safetensors", "many", "many/fisher.safetensors.index.json"):
        _assert_same(read_fisher(tmp_path / source), _tensors())


def test_shards_are_named_and_indexed_as_hugging_face_does(tmp_path):
    """No shard exceeds the limit, except one with a single tensor. The index maps every name and sums the bytes."""
    tensors = {f"w{i}.weight": _random(i + 3, 11, seed=i) for i in range(9)} | {"wide.weight": _random(101, 3)}
    limit = 1000
    write_fisher(_fisher(tensors), tmp_path / "out", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert [file.name for file in files] == [f"fisher-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    index = json.loads((tmp_path / "out" / "fisher.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in files}
    assert index["weight_map"] == {name: file for file, some in held.items() for name in some}
    assert set(index["weight_map"]) == set(tensors)
    sizes = {file: sum(t.numel() * t.element_size() for t in some.values()) for file, some in held.items()}
    assert index["metadata"] == {"total_size": sum(sizes.values())}
    assert all(size <= limit or len(held[file]) == 1 for file, size in sizes.items())
    _assert_same(read_fisher(tmp_path / "out"), tensors)
    assert has_fisher(tmp_path / "out")


def test_bfloat16_is_the_nearest_and_half_the_size(tmp_path):
    """bfloat16 rounds to the nearest even number like torch, and the metadata say so."""
    config = write_fisher(_fisher(), tmp_path / "out", torch.bfloat16)
    assert config.encoding == {"default": "bfloat16"}
    _assert_same(read_fisher(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in _tensors().items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_float16_is_never_written(tmp_path, dtype):
    """float16, which loses small entries, and other dtypes are refused without output."""
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        write_fisher(_fisher(), tmp_path / "out", dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_entries_leave_nothing_behind(tmp_path, bad):
    """A bad entry in the last tensor is refused, and the shards already written are removed."""
    tensors = _tensors() | {"z.weight": torch.tensor([1.0, bad])}
    with pytest.raises(ValuesError, match=r"z\.weight"):
        write_fisher(_fisher(tensors), tmp_path / "out", shard_bytes=50)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing_behind(tmp_path):
    """Ctrl-C during the write leaves no folder and no temporary file."""

    def names():
        yield "a.weight"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_fisher(_fisher(), tmp_path / "out", progress=names())
    assert list(tmp_path.iterdir()) == []


def test_an_existing_fisher_is_not_overwritten(tmp_path):
    """A folder with a Fisher, or a file at the path of the folder, is not overwritten."""
    write_fisher(_fisher(), tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    before = (tmp_path / "out" / "fisher.safetensors").read_bytes()
    for out in ("out", "file"):
        with pytest.raises(ConfigError, match="must not hold a Fisher yet"):
            write_fisher(_fisher({"x": torch.ones(3)}), tmp_path / out)
    assert (tmp_path / "out" / "fisher.safetensors").read_bytes() == before
    assert (tmp_path / "file").read_text() == "mine"


def test_a_fisher_may_be_written_next_to_the_weights(tmp_path):
    """A Fisher written into the folder of a model keeps the files of the model."""
    save_file(_tensors(), tmp_path / "model.safetensors")
    write_fisher(_fisher(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "fisher.safetensors",
        "fisher_config.json",
        "model.safetensors",
    ]
    _assert_same(read_fisher(tmp_path), _tensors())


def test_no_fisher_and_no_metadata_are_different_errors(tmp_path):
    """An empty folder has no Fisher. Tensors without fisher_config.json are incomplete."""
    with pytest.raises(NotFoundError, match="squisher extract"):
        read_fisher(tmp_path)
    write_fisher(_fisher(), tmp_path / "out")
    (tmp_path / "out" / "fisher_config.json").unlink()
    with pytest.raises(NotFoundError, match=r"fisher_config\.json must be in the folder of"):
        read_fisher(tmp_path / "out")


def test_an_encoding_of_a_later_version_is_refused(tmp_path):
    """Codes of an unknown encoding are refused by name and not read as numbers."""
    write_fisher(_fisher(), tmp_path / "out")
    file = tmp_path / "out" / "fisher_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"encoding": {"default": "float32", "b": "log2"}}))
    with pytest.raises(ConfigError, match="encoded as log2"):
        read_fisher(tmp_path / "out")


def test_a_missing_shard_is_named(tmp_path):
    """A missing shard is refused with the names of shard and index."""
    write_fisher(_fisher(), tmp_path / "out", shard_bytes=200)
    gone = sorted((tmp_path / "out").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(CorruptFileError, match=rf"index\.json names {gone.name}, which is not a file beside it"):
        read_fisher(tmp_path / "out")


def test_save_and_load_fisher_are_inverse(tmp_path):
    """A computed Fisher with its fingerprint comes back from ``save`` through ``load_fisher``."""
    fisher = Fisher(_tensors(), FisherConfig.model_validate(CONFIG | {"weights_fingerprint": "fp1:0123456789abcdef"}))
    config = fisher.save(tmp_path / "new" / "out")
    found = load_fisher(tmp_path / "new" / "out")
    _assert_same(found, _tensors())
    assert found.config == config
    assert config.weights_fingerprint == "fp1:0123456789abcdef"
    assert config.coverage.with_ == len(fisher)
    assert (config.mean, config.norm) == pytest.approx(fisher.moments(), rel=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_save_takes_a_dtype_by_name_or_object(tmp_path, dtype):
    """``save`` rounds to the nearest bfloat16, and the metadata record the dtype."""
    assert _fisher().save(str(tmp_path / "out"), dtype=dtype).encoding == {"default": "bfloat16"}
    _assert_same(read_fisher(tmp_path / "out"), {name: tensor.bfloat16() for name, tensor in _tensors().items()})


@pytest.mark.parametrize(("code", "error"), [("log8", 0.04), ("log4", 0.4)])
def test_save_compresses(tmp_path, code, error):
    """A logarithmic code keeps the relative error of each entry within its bound, and the file is smaller."""
    tensors = {"w": _random(67, 41)}
    fisher = Fisher(tensors, FisherConfig(estimator="empirical", statistic="mean"))
    assert fisher.save(tmp_path / "out", compress=code).encoding == {"default": code}
    found = read_fisher(tmp_path / "out")
    torch.testing.assert_close(found["w"], tensors["w"], rtol=error, atol=0.0)
    assert found.info("w").nbytes < tensors["w"].numel() * 4


def test_save_refuses_a_folder_with_a_fisher(tmp_path):
    """An existing Fisher is not overwritten, and an empty folder is used."""
    (tmp_path / "out").mkdir()
    _fisher().save(tmp_path / "out")
    before = (tmp_path / "out" / "fisher.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="must not hold a Fisher yet"):
        _fisher({"a.weight": _random(3, seed=9)}).save(tmp_path / "out")
    assert (tmp_path / "out" / "fisher.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "words"), [({"dtype": "float16"}, "float32 or bfloat16"), ({"compress": "zip"}, "compress must be")]
)
def test_save_refuses_unknown_options(tmp_path, options, words):
    """An unknown dtype or compact form is refused, and no file is made."""
    with pytest.raises(ConfigError, match=words):
        _fisher().save(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_save_copies_an_opened_fisher(tmp_path):
    """A compact Fisher saved again is plain, with the decoded entries."""
    _fisher().save(tmp_path / "compact", compress="log8")
    compact = read_fisher(tmp_path / "compact")
    assert compact.save(tmp_path / "plain").encoding == {"default": "float32"}
    _assert_same(read_fisher(tmp_path / "plain"), {name: compact[name].float() for name in compact})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_fisher_in_float8_is_refused(tmp_path, dtype):
    """Squared gradients are below the smallest number of float8, so that most entries would be 0."""
    save_file({"w": torch.ones(3).to(dtype)}, tmp_path / "fisher.safetensors")
    (tmp_path / "fisher_config.json").write_text(FisherConfig(statistic="mean").to_json())
    with pytest.raises(UnsupportedStateError, match=r"w in .* is float8"):
        read_fisher(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "trainer_state.json"])
def test_another_json_file_is_no_fisher(name, tmp_path):
    """It does not stand for the Fisher beside it, as the files of the Fisher do."""
    write_fisher(_fisher(), tmp_path / "out")
    (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(CorruptFileError, match=rf"a Fisher must be a folder .* but .*{name} is another JSON file"):
        read_fisher(tmp_path / "out" / name)
    _assert_same(read_fisher(tmp_path / "out" / "fisher_config.json"), _tensors())
