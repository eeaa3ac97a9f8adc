"""Work on a second stream: its order with the current stream, with and without a GPU."""

import contextlib
import types

import pytest
import torch

from squisher_mergekit.tensors.devices.streams import SecondStream

LONG = 200_000_000  # cycles, about a tenth of a second


@pytest.fixture
def log(monkeypatch):
    """Replace torch's streams with ones that log their calls."""
    entries = []

    class _Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            entries.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream):
        entries.append(f"enter {stream.name}")
        yield
        entries.append(f"leave {stream.name}")

    current = _Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device, priority: _Stream("second"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return entries


def test_the_body_waits_for_earlier_work_alone(log):
    """The second stream waits before the launch; the current one waits after the body."""
    with SecondStream(torch.device("cuda")).beside(lambda: log.append("launch")):
        log.append("body")
    assert log == [
        "second waits for current",
        "launch",
        "enter second",
        "body",
        "leave second",
        "current waits for second",
    ]


def test_the_current_stream_waits_for_a_body_that_raises(log):
    """Memory that the body used may be freed after its error."""
    with pytest.raises(ValueError, match="planted"), SecondStream(torch.device("cuda")).beside(lambda: None):
        raise ValueError("planted")
    assert log[-1] == "current waits for second"


def test_a_reservation_is_made_on_the_second_stream(log, monkeypatch):
    """A share of the GPU's memory is allocated once, and an error of the allocator is none of the caller."""
    sizes = []

    def empty(size, **_):
        sizes.append((size, log[-1]))
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=7000), raising=True
    )
    monkeypatch.setattr(torch, "empty", empty)
    SecondStream(torch.device("cuda")).reserve(0.125)
    assert sizes == [(875, "enter second")]


def test_a_cpu_runs_in_order():
    """On a CPU the launched work is complete when the body begins, and nothing is reserved."""
    second, done = SecondStream(torch.device("cpu")), []
    with second.beside(lambda: done.append("launch")):
        done.append("body")
    second.reserve(0.5)
    assert done == ["launch", "body"]


# ---- on a GPU


@pytest.mark.gpu
def test_gpu_streams_see_whole_tensors_and_overlap(device):
    """The body sees earlier work, reads values before the launched work is complete, and is seen afterwards."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    second, current = SecondStream(device), torch.cuda.current_stream(device)
    before, after, launched = torch.zeros(1009, device=device), torch.zeros(1009, device=device), torch.cuda.Event()

    def launch():
        torch.cuda._sleep(5 * LONG)
        launched.record()

    float((after.copy_(before * 2).fill_(0)).sum())  # loads the kernels, which may wait for running ones
    torch.cuda._sleep(LONG)
    before.fill_(1)
    with second.beside(launch):
        assert torch.cuda.current_stream(device) != current
        total = float(before.sum())  # the host waits for the second stream
        overlapped = not launched.query()
        torch.cuda._sleep(10 * LONG)
        after.copy_(before * 2)
    assert torch.cuda.current_stream(device) == current
    assert (total, float(after.sum()), overlapped) == (1009, 2018, True)


@pytest.mark.gpu
def test_gpu_memory_is_reserved_once(device):
    """A body takes its memory from the reservation, and no other memory of the GPU."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    torch.cuda.empty_cache()
    second, share = SecondStream(device), 1 / 256
    allocated = torch.cuda.memory_allocated(device)
    second.reserve(share)
    reserved = torch.cuda.memory_reserved(device)
    half = int(share * torch.cuda.get_device_properties(device).total_memory / 2)
    with second.beside(lambda: None):
        tensor = torch.empty(half, dtype=torch.uint8, device=device)
        assert torch.cuda.memory_allocated(device) >= allocated + half
        assert torch.cuda.memory_reserved(device) == reserved
    del tensor
