"""Additions to accumulators in host memory, in pieces."""

import contextlib

import pytest
import torch

from squisher_mergekit.estimators.per_example.host_sums import HostSums


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slots", [1, 3])
def test_pieces_add_up_to_the_sums(dtype, slots):
    """Tensors of many pieces and of none are added in full, in every order of the buffers."""
    draw = torch.Generator().manual_seed(0)
    sums = HostSums(torch.device("cpu"), slots=slots, slot_bytes=64)
    totals = [torch.zeros(shape, dtype=dtype) for shape in [(7, 11), (0,), (3,)]]
    expected = [total.clone() for total in totals]
    for _ in range(5):
        for total, wanted in zip(totals, expected, strict=True):
            part = torch.rand(total.shape, generator=draw, dtype=dtype)
            sums.add(total, part)
            wanted += part
    sums.wait()
    assert all(torch.equal(total, wanted) for total, wanted in zip(totals, expected, strict=True))
    sums.wait()  # nothing is pending


def test_each_gpu_copies_on_a_stream_of_its_own(monkeypatch):
    """A copy from a GPU waits for that GPU's work, and its event is recorded behind it."""
    log = []

    class _Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            log.append(f"{self.device} waits for {other.device}")

    class _Event:
        def record(self, stream):
            log.append(f"recorded on {stream.device}")

        def synchronize(self):
            log.append("synchronized")

    @contextlib.contextmanager
    def entered(stream):
        log.append(f"enter {stream.device}")
        yield

    class _Piece:
        def __init__(self, device):
            self.device = device

        def record_stream(self, stream):
            log.append(f"used on {stream.device}")

    class _Buffer:
        def copy_(self, piece, non_blocking=False):
            log.append(f"copy from {piece.device}")

    for name, fake in {"Stream": _Stream, "Event": _Event, "stream": entered, "current_stream": _Stream}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    sums = HostSums(torch.device("cpu"))
    for device in (torch.device("cuda", 1), torch.device("cuda", 0)):
        log.clear()
        sums._copy(_Buffer(), _Piece(device))()
        assert log == [
            f"{device} waits for {device}",
            f"enter {device}",
            f"copy from {device}",
            f"recorded on {device}",
            f"used on {device}",
            "synchronized",
        ]


def test_buffers_need_not_be_pinned(monkeypatch, caplog):
    """Where no memory can be locked, one line says so, and other memory takes its place."""
    empty = torch.empty

    def refuse(*args, pin_memory=False, **kwargs):
        if pin_memory:
            raise RuntimeError("no memory to lock")
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", refuse)
    sums = HostSums(torch.device("cuda"), slots=2, slot_bytes=64)
    total = torch.zeros(37)
    sums.add(total, torch.arange(37.0))
    sums.wait()
    assert torch.equal(total, torch.arange(37.0))
    assert [record.message for record in caplog.records] == [
        "sums move to host memory without pinned memory, which is slower: no memory to lock"
    ]
