"""Streaming writer of safetensors, compared with the library's reader in any dtype that both have."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.tensors import writer as module
from squisher_mergekit.tensors.dtypes import DTYPES
from squisher_mergekit.tensors.safetensors import tensor_infos
from squisher_mergekit.tensors.writer import SafetensorsWriter, header_room


def test_every_dtype_comes_back_bit_for_bit(tmp_path):
    """Tensors of all dtypes in one file, some with strides, come back bit for bit with the metadata."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8, generator=generator).view(dtype)
        for name, dtype in DTYPES.items()
    }
    tensors["transposed"] = torch.arange(15.0).reshape(3, 5).T
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, header_room(list(tensors))) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.note("made_by", "a test")
    found = load_file(file)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }
    for name, tensor in tensors.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name
        assert tensor_infos(file)[name].dtype == tensor.dtype
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["made_by"] == "a test"


def test_a_dtype_that_the_format_lacks_is_refused(tmp_path):
    """complex128, which safetensors lacks, is refused with the list of its dtypes."""
    with (
        SafetensorsWriter(tmp_path / "x.safetensors", header_room(["w"])) as writer,
        pytest.raises(UnsupportedStateError, match=r"dtypes F64, .* found torch\.complex128; convert"),
    ):
        writer.add("w", torch.zeros(3, dtype=torch.complex128))
    assert load_file(tmp_path / "x.safetensors") == {}


def test_written_bytes_are_flushed_before_the_file_is_finished(tmp_path, monkeypatch):
    """Flushes of the open file start as soon as enough bytes are written; the content stays that of the tensors."""
    sizes = []
    monkeypatch.setattr(module, "_FLUSH", 4000)
    monkeypatch.setattr(module, "_sync", lambda file: sizes.append(os.fstat(file).st_size))
    tensors = {name: torch.arange(1009.0) + number for number, name in enumerate("abcde")}
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, header_room(list(tensors))) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert 1 <= len(sizes) <= len(tensors)
    assert 4000 < sizes[0] <= file.stat().st_size
    found = load_file(file)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("waiting", [0, 5000, 1 << 26])
def test_tensors_that_wait_are_written_in_order(tmp_path, monkeypatch, waiting):
    """Whatever may wait, every tensor has its bytes and its digest, also an empty one at the end."""
    monkeypatch.setattr(module, "_WAITING", waiting)
    tensors = {f"w{n}": torch.arange(float(n * 101)) for n in (3, 0, 13, 7, 1)} | {"last": torch.zeros(0)}
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, header_room(list(tensors), parts=2), digests=True) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found = load_file(file)
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with safe_open(file, "pt") as opened:
        assert {f"{name}.crc32" for name in tensors} <= set(opened.metadata())


def test_an_error_of_a_write_is_raised(tmp_path):
    """A stream that cannot be written is an error when the file is finished."""
    writer = SafetensorsWriter(tmp_path / "x.safetensors", header_room(["a"]))
    writer._stream.close()
    writer.add("a", torch.zeros(3))
    with pytest.raises(ValueError, match="closed file"), writer:
        pass


def test_a_file_system_that_cannot_flush_is_no_error(tmp_path, monkeypatch):
    """Some network file systems refuse to sync an open file; the file is written all the same."""

    def refuse(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(module, "_FLUSH", 1)
    monkeypatch.setattr(module.os, "fdatasync", refuse, raising=False)
    file = tmp_path / "x.safetensors"
    with SafetensorsWriter(file, header_room(["w"])) as writer:
        writer.add("w", torch.arange(7.0))
    assert torch.equal(load_file(file)["w"], torch.arange(7.0))


def test_an_error_of_a_flush_is_raised(tmp_path, monkeypatch):
    """A disk that fails while written bytes are flushed is an error of the writer."""

    def fail(file):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(module, "_FLUSH", 1)
    monkeypatch.setattr(module, "_sync", fail)
    with (
        pytest.raises(OSError, match="Input/output error"),
        SafetensorsWriter(tmp_path / "x.safetensors", header_room(["w"])) as writer,
    ):
        writer.add("w", torch.zeros(3))


class _PartlyWriting:
    """Stream that takes at most some bytes of each write, as one on a disk that is nearly full."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, data):
        return self._stream.write(bytes(data)[:11])


def test_a_stream_that_takes_a_part_gets_the_rest(tmp_path):
    """Tensors and header are whole although each write of the system takes a part."""
    tensors = {"a": torch.arange(37.0), "b": torch.arange(13)}
    with SafetensorsWriter(tmp_path / "x.safetensors", header_room(list(tensors))) as writer:
        writer._stream = _PartlyWriting(writer._stream)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_room_counts_notes(tmp_path):
    """A header with long notes, whose quotes are escaped, fits its room."""
    notes = {"recipe": '{"a": "b"}' * 997, "author": "\u00e9" * 101}
    with SafetensorsWriter(tmp_path / "x.safetensors", header_room(["w"], notes=notes)) as writer:
        for key, value in notes.items():
            writer.note(key, value)
        writer.add("w", torch.ones(3))
    with safe_open(tmp_path / "x.safetensors", "pt") as opened:
        assert opened.metadata() == notes | {"format": "pt"}
