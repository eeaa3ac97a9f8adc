"""Read-ahead of files along a schedule: order, budget, early stops, files that cannot be read."""

import os
import threading

import pytest

from squisher_mergekit.tensors.read_ahead import FileRange, ReadAhead


class _Kernel:
    """Record of the advice that a thread gives, to wait for."""

    def __init__(self):
        self.asked = []
        self._changed = threading.Condition()

    def __call__(self, file, start, length, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        with self._changed:
            self.asked.append((os.fstat(file).st_ino, start, length))
            self._changed.notify_all()

    def wait(self, count):
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.asked) >= count, timeout=60)
            return list(self.asked)


@pytest.fixture
def kernel(monkeypatch):
    """Record the advice in place of the system's."""
    recorded = _Kernel()
    monkeypatch.setattr(os, "posix_fadvise", recorded)
    return recorded


@pytest.fixture
def files(tmp_path):
    """Write two files of 100 bytes."""
    made = [tmp_path / name for name in ("a", "b")]
    for file in made:
        file.write_bytes(bytes(100))
    return made


def _bytes(asked):
    return sum(length for _, _, length in asked)


def test_pieces_come_in_the_order_of_the_schedule_within_the_budget(files, kernel):
    """The thread asks for pieces in order, and never for more than the budget ahead of the running step."""
    a, b = files
    steps = [[FileRange(b, 10, 25), FileRange(a, 0, 30)], [], [FileRange(a, 40, 60)]]
    inodes = {file: file.stat().st_ino for file in files}
    with ReadAhead(steps, budget=40, piece=10) as ahead:
        first = kernel.wait(4)
        assert first == [(inodes[b], 10, 10), (inodes[b], 20, 10), (inodes[b], 30, 5), (inodes[a], 0, 10)]
        ahead.reached(0)
        kernel.wait(10)
        assert _bytes(kernel.asked) == 55 + 40
        ahead.reached(1)
        ahead.reached(2)
        kernel.wait(12)
    assert _bytes(kernel.asked) == 115
    assert kernel.asked[-1] == (inodes[a], 90, 10)


@pytest.mark.parametrize("budget", [1, 7, 1000])
def test_a_step_larger_than_the_budget_is_read_whole(files, kernel, budget):
    """The bytes of the running step do not count, so that a large tensor cannot stop the thread."""
    with ReadAhead([[FileRange(files[0], 0, 23)], [FileRange(files[1], 3, 9)]], budget, piece=4) as ahead:
        ahead.reached(0)
        ahead.reached(1)
        count = 0
        while _bytes(kernel.asked) < 9:
            count += 1
            kernel.wait(count)
    assert all(length <= max(1, min(4, budget)) for _, _, length in kernel.asked)


@pytest.mark.parametrize("reached", [None, 0, 1])
def test_an_early_end_stops_the_thread(files, kernel, reached):
    """A merge that stops while the thread waits for the budget ends it."""
    before = threading.active_count()
    with ReadAhead([[FileRange(file, 0, 100)] for file in files] * 3, budget=5) as ahead:
        kernel.wait(1)
        if reached is not None:
            ahead.reached(reached)
    assert threading.active_count() == before


def test_a_file_that_cannot_be_opened_is_left_to_its_reader(files, kernel, tmp_path):
    """The thread passes over a missing file and a folder without a sound, and goes on with the next file."""
    os.mkfifo(tmp_path / "fifo")
    parts = [FileRange(tmp_path / "missing", 0, 50), FileRange(files[1], 0, 10)]
    with ReadAhead([parts[:1], parts[1:]], budget=30, piece=10) as ahead:
        ahead.reached(0)
        assert kernel.wait(1) == [(files[1].stat().st_ino, 0, 10)]


@pytest.mark.parametrize("steps", [[], [[]], [[FileRange(None, 0, 0)]]])
def test_a_schedule_without_bytes_starts_no_thread(steps, kernel):
    """Tensors in memory need no read-ahead."""
    before = threading.active_count()
    with ReadAhead(steps):
        assert threading.active_count() == before
