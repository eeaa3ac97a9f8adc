"""Digests of a portable Fisher's tensors: written with the tensors, verified as they are read."""

import json
import logging
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from squisher_mergekit.errors import ConfigError, CorruptFileError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher


@pytest.fixture
def folder(tmp_path):
    """A Fisher of three tensors, two of one shape."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.rand(9, 40, generator=generator) for name in ("q.weight", "k.weight")}
    config = FisherConfig(estimator="squisher", statistic="ema", steps=5, optimizer={"beta2": 0.9})
    Fisher(tensors | {"bias": torch.rand(7)}, config).save(tmp_path / "f")
    return tmp_path / "f"


def _rewrite(folder, change):
    file = folder / "fisher.safetensors"
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    change(header, data)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def _swap(key):
    def change(header, _):
        header["q.weight"][key], header["k.weight"][key] = header["k.weight"][key], header["q.weight"][key]

    return change


def _rename(header, _):
    header["q.weight"], header["k.weight"] = header["k.weight"], header["q.weight"]
    notes = header["__metadata__"]
    notes["q.weight.crc32"], notes["k.weight.crc32"] = notes["k.weight.crc32"], notes["q.weight.crc32"]


def _transpose(header, _):
    header["q.weight"]["shape"] = [40, 9]


def _flip(header, data):
    data[header["k.weight"]["data_offsets"][1] - 1] ^= 1


@pytest.mark.parametrize("change", [_swap("data_offsets"), _rename, _transpose, _flip])
def test_exchanged_renamed_reshaped_and_flipped_tensors_are_noticed(folder, change):
    """The digest covers name, dtype, shape and bytes; exchanging the digests as well does not help."""
    _rewrite(folder, change)
    fisher = read_fisher(folder)
    with pytest.raises(CorruptFileError, match=r"fisher\.safetensors must have the digest .*--no-verify"):
        [fisher[name] for name in fisher]


def test_without_verification_the_bytes_are_read_as_they_are(folder):
    """``verify=False`` is the way to what can be saved."""
    _rewrite(folder, _flip)
    assert set(read_fisher(folder, verify=False)) == {"q.weight", "k.weight", "bias"}
    assert read_fisher(folder, verify=False)["k.weight"].shape == (9, 40)


def test_a_file_with_digests_of_some_tensors_is_refused(folder):
    """A missing digest cannot switch its verification off."""
    _rewrite(folder, lambda header, _: header["__metadata__"].pop("bias.crc32"))
    with pytest.raises(CorruptFileError, match="lacks that of bias"):
        read_fisher(folder)


def test_a_file_without_digests_is_read_with_a_line_that_says_so(folder, caplog):
    """Files of earlier versions and of other writers have none."""
    file = folder / "fisher.safetensors"
    save_file(load_file(file), file)
    with caplog.at_level(logging.WARNING):
        fisher = read_fisher(folder)
    assert fisher["bias"].shape == (7,)
    assert [record.getMessage().partition(" has ")[2][:10] for record in caplog.records] == ["no digests"]


@pytest.mark.parametrize(
    "change",
    [
        {"steps": -1},
        {"steps": 10**30},
        {"steps": {"default": 5, "bias": -2}},
        {"optimizer": {"beta2": float("inf")}},
        {"optimizer": {"beta2": -0.1}},
        {"optimizer": {"beta2": {"default": 1.0}}},
        {"optimizer": {"initial_accumulator_value": -1.0}},
        {"tokens_per_step": 0},
        {"examples_per_step": float("nan")},
        {"clipped_share": 1.5},
        {"num_examples": -3},
        {"norm": float("nan")},
        {"mean": -1e-9},
        {"format_version": True},
        {"format_version": 0},
    ],
)
def test_numbers_out_of_their_range_are_refused(folder, change):
    """Numbers are checked where they enter: no later computation sees them."""
    file = folder / "fisher_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=r"fisher_config\.json must have"):
        read_fisher(folder)


def test_an_accumulator_of_zeros_is_refused(folder):
    """Its mean in the metadata tells."""
    file = folder / "fisher_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"mean": 0.0}))
    with pytest.raises(ValuesError, match="are 0; take a checkpoint"):
        read_fisher(folder)


@pytest.mark.parametrize("kind", [{}, {"dtype": "bfloat16"}, {"compress": "log8"}])
def test_mean_and_norm_are_those_of_the_entries_in_the_file(tmp_path, kind):
    """The recorded mean and norm are those of the entries that a reader gets, also after rounding to bfloat16."""
    tensors = {"w": torch.rand(37, 53, generator=torch.Generator().manual_seed(5)) ** 3, "b": torch.full((11,), 1.003)}
    Fisher(tensors, FisherConfig(estimator="squisher", statistic="mean")).save(tmp_path / "f", **kind)
    found = read_fisher(tmp_path / "f")
    entries = torch.cat([found[name].double().flatten() for name in found])
    assert found.config.mean == pytest.approx(float(entries.mean()), rel=1e-9)
    assert found.config.norm == pytest.approx(float(entries.norm()), rel=1e-9)
