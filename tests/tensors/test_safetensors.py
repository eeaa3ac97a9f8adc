"""Headers of safetensors files: shapes, dtypes and bytes without a tensor read, and refusal of damage."""

import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from squisher_mergekit.errors import CorruptFileError, UnsupportedStateError
from squisher_mergekit.tensors.safetensors import SafetensorsStore, safetensors_files, tensor_infos


def _tensors():
    shapes = {"a.weight": (13, 7), "b.weight": (5,), "d.weight": (3, 5, 2), "e.weight": (), "f.weight": (0, 3)}
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("name", ["../outside.safetensors", "sub/inside.safetensors"])
def test_an_index_cannot_point_elsewhere(tmp_path, name):
    """A shard outside of the index's folder is refused even if it exists."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    save_file({"w": torch.ones(3)}, folder / name)
    (folder / "fisher.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CorruptFileError, match="not a file beside it"):
        safetensors_files(folder, "fisher")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"w": 3}}'])
def test_a_bad_index_is_refused(tmp_path, text):
    """An invalid index is refused in one line with its name."""
    (tmp_path / "fisher.safetensors.index.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"fisher\.safetensors\.index\.json"):
        safetensors_files(tmp_path, "fisher")


def test_a_truncated_file_is_refused_before_anything_is_read(tmp_path):
    """A truncated safetensors file, or one with extra bytes, is refused from its header."""
    save_file(_tensors(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    file = tmp_path / "cut.safetensors"
    for size in (0, 3, 8, 20, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(CorruptFileError, match=r"cut\.safetensors"):
            tensor_infos(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(CorruptFileError, match="promises"):
        tensor_infos(file)


@pytest.mark.parametrize(
    "header", ["[]", "3", "null", '{"w": 3}', '{"w": {}}', '{"w": {"data_offsets": "ab"}}', "\xff"]
)
def test_a_damaged_header_is_refused(tmp_path, header):
    """A header of the right length with invalid content is refused as damaged."""
    raw = header.encode("latin-1")
    file = tmp_path / "bad.safetensors"
    file.write_bytes(struct.pack("<Q", len(raw)) + raw)
    with pytest.raises(CorruptFileError, match=r"bad\.safetensors"):
        tensor_infos(file)


def test_headers_tell_shape_dtype_and_bytes(tmp_path):
    """The header gives shape, dtype and bytes of the tensor without reading it."""
    tensors = {"a": torch.ones(3, 5), "b": torch.ones(7, dtype=torch.bfloat16), "c": torch.ones(2, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    infos = tensor_infos(tmp_path / "model.safetensors")
    assert {name: (info.shape, info.dtype, info.nbytes) for name, info in infos.items()} == {
        "a": ((3, 5), torch.float32, 60),
        "b": ((7,), torch.bfloat16, 14),
        "c": ((2,), torch.int64, 16),
    }


def test_a_header_that_lies_about_places_is_refused_before_it_is_read(tmp_path):
    """Offsets that overlap are found in the header, even where they end where the file does."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, file)
    file.write_bytes(file.read_bytes().replace(b"[0,16]", b"[0,12]"))
    with pytest.raises(
        CorruptFileError, match=r"x\.safetensors must be a whole safetensors file, but a cannot be read"
    ):
        SafetensorsStore([file], "here")


def _raw(file, dtype, shape, nbytes):
    """Write a file with one tensor of zeros of any dtype."""
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    header = json.dumps({"w": entry}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(nbytes))
    return file


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("U16", torch.uint16),
        ("U32", torch.uint32),
        ("U64", torch.uint64),
        ("C64", torch.complex64),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2FNUZ", torch.float8_e5m2fnuz),
    ],
)
def test_every_dtype_of_torch_is_read_as_itself(name, dtype, tmp_path):
    """The dtype in the header is that of the tensor which the library returns."""
    file = _raw(tmp_path / "x.safetensors", name, [3], 3 * dtype.itemsize)
    assert tensor_infos(file)["w"].dtype == dtype
    assert SafetensorsStore([file], "here").read("w").dtype == dtype


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "F6_E3M2", "Q7"])
def test_a_dtype_that_torch_lacks_is_refused_where_it_is_needed(name, tmp_path):
    """Shape and bytes of a dtype that torch lacks are known. Reading it is refused with dtype, tensor and file."""
    file = _raw(tmp_path / "x.safetensors", name, [8], 4)
    store = SafetensorsStore([file], "here")
    info = store.infos["w"]
    assert (info.shape, info.nbytes, info.is_floating_point) == ((8,), 4, True)
    wanted = rf"w in .*x\.safetensors must have a dtype .* found {name}; save"
    with pytest.raises(UnsupportedStateError, match=wanted):
        _ = info.dtype
    with pytest.raises(UnsupportedStateError, match=wanted):
        store.read("w")


def _with_header(file, header, data=b""):
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return file


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": 32, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": {"0": 1}, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": {"0": 0, "1": 4}},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [None, 4]},
        {"dtype": "F32", "shape": [1 << 80], "data_offsets": [0, 4]},
        {"shape": [1], "data_offsets": [0, 4]},
        None,
    ],
)
def test_a_header_with_values_of_wrong_types_is_refused(tmp_path, entry):
    """Every value of an entry is checked before it is used."""
    file = _with_header(tmp_path / "x.safetensors", {"w": entry}, bytes(4))
    with pytest.raises(CorruptFileError, match=r"x\.safetensors must be a whole safetensors file"):
        tensor_infos(file)


@pytest.mark.parametrize("metadata", [3, ["a"], {"a": 1}, {"a": None}])
def test_metadata_other_than_texts_are_refused(tmp_path, metadata):
    """Readers of metadata get texts alone."""
    file = _with_header(tmp_path / "x.safetensors", {"__metadata__": metadata})
    with pytest.raises(CorruptFileError, match="metadata"):
        tensor_infos(file)


def test_a_file_truncated_after_its_header_was_read_is_refused(tmp_path):
    """No page of a mapped file can vanish, because none is mapped."""
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(5000), "b": torch.ones(5000)}, file)
    store = SafetensorsStore([file], "here")
    first = store.read("a")
    os.truncate(file, 200)
    with pytest.raises(CorruptFileError, match="has changed since its header was read"):
        store.read("b")
    assert first.sum() == 5000


def test_tensors_are_read_to_the_host_inside_another_default(tmp_path):
    """A program may have called ``torch.set_default_device``."""
    save_file({"w": torch.arange(7.0)}, tmp_path / "model.safetensors")
    store = SafetensorsStore([tmp_path / "model.safetensors"], "here")
    with torch.device("meta"):
        found = store.read("w")
    assert found.tolist() == list(range(7))
