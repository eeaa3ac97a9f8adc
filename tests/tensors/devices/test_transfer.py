"""Moves of large tensors between host memory and a device, piece by piece through buffers of several threads."""

import pytest
import torch

from squisher_mergekit.tensors.devices import transfer
from squisher_mergekit.tensors.devices.transfer import Lanes, lanes_of, moved


@pytest.mark.parametrize("size", [1, 101, 1009, 10007])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8, torch.bool], ids=str)
def test_every_byte_arrives_in_both_directions(device, size, dtype):
    """Pieces that do not divide the tensor, fewer pieces than threads, and buffers that are used again."""
    lanes = Lanes(device, threads=3, piece=128)
    source = torch.randint(2, 256, (size, 3), generator=torch.Generator().manual_seed(size)).to(dtype)
    there = lanes.upload(source)
    assert (there.device.type, there.dtype, there.shape) == (device.type, dtype, source.shape)
    torch.testing.assert_close(there.cpu(), source, rtol=0, atol=0)
    back = lanes.download(there)
    assert back.device.type == "cpu"
    torch.testing.assert_close(back, source, rtol=0, atol=0)


def test_the_device_waits_for_an_upload_and_a_download_for_the_device(device):
    """Work on the current stream before a move and after it sees whole tensors, though nobody synchronizes."""
    lanes = Lanes(device, threads=4, piece=1 << 16)
    for seed in range(5):
        source = torch.randn(1009, 499, generator=torch.Generator().manual_seed(seed))
        there = lanes.upload(source)
        doubled = there * 2
        del there  # its memory may serve the next tensor
        torch.testing.assert_close(lanes.download(doubled), source * 2, rtol=0, atol=0)


def test_large_tensors_take_the_pinned_way(device, monkeypatch):
    """Moved uses the threads from 32 MB on, and gives the same tensor as torch."""
    monkeypatch.setattr(transfer, "LEAST", 1 << 10)
    source = torch.randn(1009, 7)
    there = moved(source, device)
    torch.testing.assert_close(moved(there, torch.device("cpu")), source, rtol=0, atol=0)
    transposed = moved(source.T, device)
    torch.testing.assert_close(transposed.cpu(), source.T, rtol=0, atol=0)
    assert (lanes_of.cache_info().currsize > 0) == (device.type == "cuda")


def test_a_gradient_or_an_empty_tensor_moves_too(device, monkeypatch):
    """A tensor that requires a gradient moves as data; one without entries is no special case."""
    monkeypatch.setattr(transfer, "LEAST", 0)
    lanes = Lanes(device, threads=2, piece=64)
    weight = torch.randn(13, 7, requires_grad=True)
    assert not lanes.upload(weight).requires_grad
    torch.testing.assert_close(lanes.upload(weight).cpu(), weight.detach(), rtol=0, atol=0)
    assert lanes.upload(torch.zeros(0, 3)).shape == (0, 3)
    assert moved(torch.zeros(0, 3), device).device.type == device.type


def test_a_failed_piece_is_an_error():
    """An exception of a thread reaches the caller."""
    lanes = Lanes(torch.device("cpu"), threads=2, piece=64)
    with pytest.raises(RuntimeError):
        lanes._move(torch.zeros(100), torch.zeros(99), transfer._Lane.upload)


def test_a_machine_without_pinned_memory_has_the_plain_way(monkeypatch, caplog):
    """One line says so, and not for every tensor."""
    monkeypatch.setattr(transfer, "Lanes", lambda device: (_ for _ in ()).throw(RuntimeError("no memory to lock")))
    lanes_of.cache_clear()
    found = [lanes_of(torch.device("cuda", 7)) for _ in range(3)]
    lanes_of.cache_clear()
    assert found == [None] * 3
    assert [record.message for record in caplog.records] == [
        "tensors move to cuda:7 without pinned memory, which is slower: no memory to lock"
    ]


def test_a_tensor_stays_where_it_is():
    """No copy is made of a tensor that is on the device."""
    tensor = torch.ones(3)
    assert moved(tensor, torch.device("cpu")) is tensor


def test_buffers_are_in_host_memory_inside_another_default(device):
    """Workers of mergekit for several GPUs run inside ``torch.device``, where pinned memory could not be had."""
    source = torch.arange(101.0)
    with torch.device("meta"):
        there = Lanes(device, threads=2, piece=64).upload(source)
    torch.testing.assert_close(there.cpu(), source, rtol=0, atol=0)
