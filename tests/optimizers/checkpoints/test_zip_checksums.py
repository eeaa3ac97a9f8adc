"""Flipped bytes in a zip archive of torch, which torch.load does not detect."""

import subprocess
import sys
import zipfile

import pytest
import torch
from click.testing import CliRunner

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import CorruptFileError
from squisher_mergekit.optimizers.checkpoints import safe_pickle, zip_checksums
from squisher_mergekit.optimizers.checkpoints.zip_checksums import Checksums, check_archive
from tests.checkpoints import copy, flip, truth

CASE, NAME = "trainer_llama_decay", "model.layers.0.mlp.up_proj.weight"


def _flipped(folder):
    """Flip a bit of one second moment."""
    file = folder / "optimizer.pt"
    row = truth(CASE)[NAME][3].numpy().tobytes()
    flip(file, file.read_bytes().index(row) + 5)
    return folder


def test_a_flipped_bit_is_found_when_it_is_read(tmp_path):
    """A tensor with a flipped bit is refused when it is read. Other tensors are right, and opening succeeds."""
    fisher = load_fisher(_flipped(copy(CASE, tmp_path)))
    with pytest.raises(CorruptFileError, match=r"checksum .*--no-verify"):
        fisher[NAME]
    assert all(torch.equal(fisher[name], tensor) for name, tensor in truth(CASE).items() if name != NAME)


def test_extraction_refuses_a_flipped_bit_unless_verify_is_off(tmp_path):
    """`squisher extract` refuses a flipped bit without leftovers. With --no-verify it copies the damaged value."""
    folder = _flipped(copy(CASE, tmp_path))
    done = CliRunner().invoke(main, ["extract", str(folder), "-o", str(tmp_path / "out"), "--quiet"])
    assert (done.exit_code, "checksum" in done.output, (tmp_path / "out").exists()) == (1, True, False)
    done = CliRunner().invoke(main, ["extract", str(folder), "-o", str(tmp_path / "out"), "--quiet", "--no-verify"])
    assert done.exit_code == 0
    found = load_fisher(tmp_path / "out")[NAME]
    assert int((found != truth(CASE)[NAME]).sum()) == 1


def test_a_flipped_bit_of_the_pickle_is_always_found(tmp_path):
    """The checksum of the pickle is always verified, also without --no-verify."""
    file = copy(CASE, tmp_path) / "optimizer.pt"
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        record = next(r for name, r in check_archive(stream).items() if name.endswith("data.pkl"))
        content = archive.read(record.name)
    place = content.index(b"betas") + 1  # changes a key and keeps the pickle's grammar valid
    flip(file, record.offset + place, mask=0x02)
    for verify in (True, False):
        with pytest.raises(CorruptFileError, match=r"optimizer\.pt"):
            load_fisher(file, verify=verify)


@pytest.mark.parametrize(("kept", "reads"), [(1 << 28, 2), (100, 7)])
def test_the_parts_of_a_tensor_share_one_read(tmp_path, monkeypatch, kept, reads):
    """Parts are views of one verified read, unless the record is too large to keep; the next tensor frees it."""
    file = tmp_path / "x.pt"
    tensors = {"fused": torch.arange(21.0 * 13).reshape(21, 13), "other": torch.arange(37.0)}
    torch.save(tensors, file)
    sizes = []

    def read_into(buffer, *found):
        sizes.append(len(buffer))
        zip_input(buffer, *found)

    zip_input = zip_checksums.read_into
    monkeypatch.setattr(zip_checksums, "read_into", read_into)
    monkeypatch.setattr(zip_checksums, "_KEPT", kept)
    monkeypatch.setattr(zip_checksums, "_BLOCK", 500)
    checksums = Checksums(wanted=True)
    fused = safe_pickle.load(file, checksums)["fused"]
    parts = [checksums.verify(fused[start : start + 7, 2:]) for start in (0, 7, 14)]
    assert all(torch.equal(part, tensors["fused"][7 * n : 7 * n + 7, 2:]) for n, part in enumerate(parts))
    other = checksums.verify(safe_pickle.load(file, checksums)["other"])
    assert torch.equal(other, tensors["other"])
    assert len(sizes) == reads
    assert checksums._kept is None


@pytest.mark.parametrize("kept", [1 << 28, 100])
def test_a_flipped_bit_is_found_in_every_part(tmp_path, monkeypatch, kept):
    """The checksum is that of the whole record, so a part before the damage is refused as well, each time."""
    file = tmp_path / "x.pt"
    torch.save({"fused": torch.arange(21.0 * 13)}, file)
    flip(file, file.read_bytes().index(torch.tensor([200.0, 201.0]).numpy().tobytes()))
    monkeypatch.setattr(zip_checksums, "_KEPT", kept)
    checksums = Checksums(wanted=True)
    fused = safe_pickle.load(file, checksums)["fused"]
    for start in (0, 0, 13):
        with pytest.raises(CorruptFileError, match="checksum"):
            checksums.verify(fused[start : start + 13])


def test_a_tensor_must_be_one_record(tmp_path):
    """A pickle that claims more than its record is refused, also with a valid checksum."""
    torch.save({"a": torch.ones(4), "b": torch.ones(4)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                assert data.count(b"K\x04t") == 2  # the number of entries of each storage
                data = data.replace(b"K\x04t", b"K\x05t", 1)
            new.writestr(name, data)
    with pytest.raises(CorruptFileError, match="must each be one record"):
        safe_pickle.load(tmp_path / "y.pt", Checksums(wanted=True))


def test_compressed_records_are_refused(tmp_path):
    """Torch stores uncompressed records. A compressed one is refused, because it could expand to any size."""
    torch.save({"a": torch.ones(4)}, tmp_path / "x.pt")
    with (
        zipfile.ZipFile(tmp_path / "x.pt") as old,
        zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with (tmp_path / "y.pt").open("rb") as stream, pytest.raises(CorruptFileError, match="not compressed"):
        check_archive(stream)


@pytest.mark.parametrize(("moment", "verify"), [("before", True), ("between", False)])
def test_a_file_cut_while_it_is_mapped_stops_no_process(tmp_path, moment, verify):
    """A file that is truncated after it was opened is refused, where a mapped page would be a bus error."""
    folder = copy("trainer_llama_decay", tmp_path)
    lines = [
        "import os, sys",
        "from squisher_mergekit import load_fisher",
        f"fisher = load_fisher({str(folder)!r}, verify={verify})",
        "names = sorted(fisher)",
        f"_ = [fisher[name] for name in names if {moment == 'between'} and fisher.info(name).nbytes < 1000]",
        f"os.truncate({str(folder / 'optimizer.pt')!r}, 100)",
        "fisher[max(names, key=lambda name: fisher.info(name).nbytes)]",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True)
    assert done.returncode == 1, done.returncode
    assert "optimizer.pt must be a whole file that nobody changes, but it has changed" in done.stderr


@pytest.mark.parametrize("first", [16, 19])
def test_a_file_that_was_dropped_leaves_no_record_to_the_next_one(first, tmp_path):
    """A flipped bit is found in a file that is mapped to the addresses of an earlier one, small or large."""
    torch.save({"v": torch.arange(float(first)) + 1}, tmp_path / "a.pt")
    torch.save({"v": torch.arange(17.0) + 1}, tmp_path / "b.pt")
    flip(tmp_path / "b.pt", (tmp_path / "b.pt").read_bytes().index(torch.tensor([5.0, 6.0]).numpy().tobytes()) + 1)
    checksums = Checksums(wanted=True)
    for name in ("a", "a", "b"):
        tensor = safe_pickle.load(tmp_path / f"{name}.pt", checksums)["v"]
        if name == "a":
            assert torch.equal(checksums.verify(tensor), torch.arange(float(first)) + 1)
    with pytest.raises(CorruptFileError, match="checksum"):
        checksums.verify(tensor)
