"""Temporary folders: locked while their process lives, removed when it is dead."""

import os
import signal
import subprocess
import sys
import time

import pytest

from squisher_mergekit.tensors.temporary import remove_stale, temporary_folder

_HOLD = """
import signal, sys, time
from pathlib import Path
from squisher_mergekit.tensors.temporary import ENDINGS, cleaned_up_at_signals, temporary_folder
for ending in ENDINGS:
    signal.signal(ending, signal.SIG_DFL)  # a shell starts a background job with some of them ignored
with cleaned_up_at_signals(ENDINGS), temporary_folder(Path(sys.argv[1]), "out") as folder:
    (folder / "part").touch()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Start another process with a temporary folder in tmp_path."""
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.kill()


def test_the_folder_of_a_living_process_stays(tmp_path, holder):
    """Another process takes no folder whose owner lives."""
    assert remove_stale(tmp_path)
    assert len(list(tmp_path.glob(".out.*/part"))) == 1


def test_the_folder_of_a_killed_process_goes(tmp_path, holder):
    """The next temporary folder in the same place removes the folder of a process that was killed."""
    holder.kill()
    holder.wait()
    assert len(list(tmp_path.iterdir())) == 1
    with temporary_folder(tmp_path, "other"):
        assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["other"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_cleans_up(tmp_path, holder, ending):
    """A process that a signal ends removes its folder, and dies of the signal."""
    holder.send_signal(ending)
    assert holder.wait() == -ending
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("hours", "stays"), [(1, True), (30, False)])
def test_the_folder_of_another_host_goes_after_a_day(tmp_path, hours, stays):
    """A lock of another host may not be visible here, so its folder goes when nothing in it changed for a day."""
    folder = tmp_path / ".out.0123abcd.squisher"
    folder.mkdir()
    (folder / "lock").write_text("another-host")
    then = time.time() - hours * 3600
    for path in (folder / "lock", folder):
        os.utime(path, (then, then))
    assert remove_stale(tmp_path) == stays


def test_a_forked_child_does_not_clean_up_for_its_parent(tmp_path):
    """A signal to a child leaves the folder of the parent alone."""
    code = _HOLD.replace(
        "time.sleep(600)",
        "import os, signal\n    child = os.fork()\n"
        "    if not child: os.kill(os.getpid(), signal.SIGTERM)\n    os.waitpid(child, 0)\n"
        '    print((folder / "part").exists())',
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ready", "True"]


@pytest.mark.parametrize("letter", ["a", "\u00e9", "\u6a21", "\U0001f600"])
def test_any_name_that_a_file_can_have_gives_a_folder(tmp_path, letter):
    """File systems count bytes: a name of 255 is cut between letters."""
    name = letter * (255 // len(letter.encode()))
    (tmp_path / name).touch()
    with temporary_folder(tmp_path, name) as folder:
        assert len(folder.name.encode()) <= 255
        assert name.startswith(folder.name[1:].split(".")[0])
