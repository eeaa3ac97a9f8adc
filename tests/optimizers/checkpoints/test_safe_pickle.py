"""Loading files of torch.save: old and new formats, damage at every place, and pickles that would run code."""

import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from squisher_mergekit.errors import CorruptFileError, NotFoundError, UnsafeFileError, UnsupportedStateError
from squisher_mergekit.optimizers.checkpoints.safe_pickle import load

STATES = Path(__file__).parents[2] / "fixtures" / "optimizer_states"
MAPS = Path("/proc/self/maps")  # Linux alone lists the mapped files


def _state():
    generator = torch.Generator().manual_seed(5)
    value = torch.rand(13, 7, generator=generator)
    return {"state": {0: {"step": torch.tensor(3.0), "exp_avg_sq": value}}, "param_groups": [{"params": [0]}]}


def _same(loaded, saved):
    assert loaded["param_groups"] == saved["param_groups"]
    for key, tensor in saved["state"][0].items():
        assert torch.equal(loaded["state"][0][key], tensor)


def test_an_archive_is_mapped_not_read(tmp_path):
    """A file in today's format comes back bit for bit, and its tensors are in the mapped file."""
    torch.save(_state(), tmp_path / "optimizer.pt")
    loaded = load(tmp_path / "optimizer.pt")
    _same(loaded, _state())
    if MAPS.exists():
        address = loaded["state"][0]["exp_avg_sq"].data_ptr()
        ranges = [line.split()[0].split("-") for line in MAPS.read_text().splitlines() if str(tmp_path) in line]
        assert any(int(low, 16) <= address < int(high, 16) for low, high in ranges)


def test_the_format_before_archives_is_read(tmp_path):
    """Files of torch before 1.6, which are no zip archives, have the same content."""
    file = tmp_path / "optimizer.pt"
    torch.save(_state(), file, _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(file)
    _same(load(file), _state())


def test_a_missing_file_is_refused(tmp_path):
    """A missing file, or a folder in its place, is refused as missing."""
    for path in (tmp_path / "optimizer.pt", tmp_path):
        with pytest.raises(NotFoundError, match="but there is none"):
            load(path)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path, archive, share):
    """A truncated file in either format is refused as damaged, in one line with its path."""
    file = tmp_path / "optimizer.pt"
    torch.save(_state(), file, _use_new_zipfile_serialization=archive)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CorruptFileError) as caught:
        load(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"not a pickle at all", b"\x00" * 999, b"\x80\x02", b"{}\n"])
def test_garbage_is_refused(tmp_path, content):
    """A file that torch did not write is refused as damaged, for any first bytes."""
    file = tmp_path / "optimizer.pt"
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"optimizer\.pt"):
        load(file)


class _Marks:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("archive", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, archive):
    """A call of os.mkdir in the pickle is named and not run. A plain torch.load would run it."""
    file, marker = tmp_path / "optimizer.pt", tmp_path / "marker"
    torch.save({**_state(), "extra": _Marks(marker)}, file, _use_new_zipfile_serialization=archive)
    # torch does not list the globals of the old format, so the error cannot name them.
    with pytest.raises((UnsafeFileError, CorruptFileError)) as caught:
        load(file)
    assert not marker.exists()
    if archive:
        assert type(caught.value) is UnsafeFileError
        assert f"asks for {os.mkdir.__module__}.mkdir; nothing of it was run" in str(caught.value)
    torch.load(file, weights_only=False)
    assert marker.is_dir()


def test_a_bare_pickle_that_would_run_code_runs_none(tmp_path):
    """A file of the pickle module that would run code is refused as well."""
    file, marker = tmp_path / "optimizer.pt", tmp_path / "marker"
    file.write_bytes(pickle.dumps(_Marks(marker), protocol=2))
    with pytest.raises((UnsafeFileError, CorruptFileError)):
        load(file)
    assert not marker.exists()


def test_numpy_scalars_are_left_unread(tmp_path, caplog):
    """Some trainers keep numpy numbers next to the state. They are replaced, and a warning names their class."""
    import numpy

    file = tmp_path / "optimizer.pt"
    torch.save({**_state(), "loss": numpy.float64(0.5)}, file)
    _same(load(file), _state())
    assert re.search(r"optimizer\.pt holds objects that a Fisher does not need, left unread: numpy", caplog.text)


def test_the_error_names_the_call_in_the_fixture(tmp_path):
    """The error names the foreign call of the fixture."""
    shutil.copy(STATES / "bad_malicious_pickle" / "optimizer.pt", tmp_path)
    needed = torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "optimizer.pt")
    assert len(needed) == 1
    with pytest.raises(UnsafeFileError, match=needed[0].replace(".", r"\.")):
        load(tmp_path / "optimizer.pt")


@pytest.mark.parametrize(("module", "name"), [("galore_torch.projector", "GaLore"), ("apollo_torch.x", "APOLLO")])
def test_optimizers_of_projections_are_refused_by_name(tmp_path, module, name):
    """The state of projection optimizers has an object of their library.

    The error names it instead of calling the file unsafe.
    """
    torch.save(_state(), tmp_path / "old.pt")
    with zipfile.ZipFile(tmp_path / "old.pt") as old, zipfile.ZipFile(tmp_path / "optimizer.pt", "w") as new:
        for entry in old.namelist():
            data = old.read(entry)
            if entry.endswith("data.pkl"):
                data = data[:2] + f"c{module}\nProjector\n0".encode() + data[2:]
            new.writestr(entry, data)
    with pytest.raises(UnsupportedStateError, match=f"{name} keeps that of a projection"):
        load(tmp_path / "optimizer.pt")


@pytest.mark.parametrize("protocol", [0, 4, 34])
def test_torch_does_not_warn_of_a_damaged_file(tmp_path, protocol):
    """A plain pickle of any protocol, known or not, is refused without a warning of torch beside the message."""
    content = pickle.dumps(_state(), min(protocol, 5))
    (tmp_path / "optimizer.pt").write_bytes(bytes([0x80, protocol]) + content[2:] if protocol else content)
    with pytest.raises((CorruptFileError, UnsafeFileError), match=r"optimizer\.pt") as caught:
        load(tmp_path / "optimizer.pt")
    assert "In PyTorch 2.6" not in str(caught.value)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("record", ["data.pkl", "version", "data/0"])
def test_a_compressed_record_is_refused(tmp_path, method, record):
    """An archive with any record compressed, by any method, is refused before it expands."""
    torch.save(_state(), tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "x.pt", "w") as packed:
        for info in plain.infolist():
            chosen = method if info.filename.endswith("/" + record) else zipfile.ZIP_STORED
            packed.writestr(info.filename, plain.read(info.filename), compress_type=chosen)
    with pytest.raises(CorruptFileError, match="must be stored as it is"):
        load(tmp_path / "x.pt")
