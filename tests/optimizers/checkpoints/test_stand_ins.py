"""Inert stand-ins: objects of other libraries are replaced and named; Python's own callables are refused."""

import argparse
import collections
import enum
import os
import subprocess
import sys
import types

import numpy
import pytest
import torch

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import UnsafeFileError
from squisher_mergekit.optimizers.checkpoints.safe_pickle import load
from squisher_mergekit.optimizers.checkpoints.stand_ins import StandIn, is_data

STATE = {"state": {0: {"step": torch.tensor(2.0), "exp_avg_sq": torch.rand(5, 3)}}, "param_groups": [{"params": [0]}]}


class Colour(enum.Enum):
    """Enumeration of a trainer."""

    RED = "red"


class Settings(dict):
    """Mapping of a trainer that counts its constructions."""

    made = 0

    def __init__(self, **entries):
        type(self).made += 1
        super().__init__(**entries)


class Calls:
    """Object whose pickle calls a function."""

    def __init__(self, function, *given):
        self.call = function, given

    def __reduce__(self):
        return self.call


OBJECTS = {
    "argparse.Namespace": argparse.Namespace(lr=0.1, nested=argparse.Namespace(a=[1])),
    "numpy": {
        "scalar": numpy.float32(2.0),
        "random": numpy.random.default_rng(3).bit_generator.state,
        "array": numpy.ones(3),
    },
    "Colour": {"colour": Colour.RED},
    "Settings": Settings(a=1, b=torch.ones(2)),
    "collections.deque": collections.deque([1, 2], maxlen=4),
    "types.SimpleNamespace": types.SimpleNamespace(x=1),
}


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_another_library_is_replaced_and_named(name, archive, tmp_path, caplog):
    """The state beside it is read bit for bit, in both formats of torch.save, and no constructor is called."""
    torch.save({"optimizer": STATE, "extra": OBJECTS[name]}, tmp_path / "x.pt", _use_new_zipfile_serialization=archive)
    before = Settings.made
    loaded = load(tmp_path / "x.pt")
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg_sq"], STATE["state"][0]["exp_avg_sq"])
    assert Settings.made == before
    assert name in caplog.text


@pytest.mark.parametrize(
    ("function", "given"),
    [
        (os.mkdir, ("M",)),
        (subprocess.check_call, (["touch", "M"],)),
        (eval, ("open('M', 'w')",)),
        (exec, ("open('M', 'w')",)),
        (open, ("M", "w")),
        (__import__, ("this",)),
        (sys.setrecursionlimit, (5,)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("archive", [True, False])
def test_a_callable_of_python_is_refused_and_not_run(function, given, archive, tmp_path, monkeypatch):
    """The refusal names the callable; a harmless object in the same file does not make it acceptable."""
    monkeypatch.chdir(tmp_path)
    saved = {"optimizer": STATE, "args": argparse.Namespace(a=1), "extra": Calls(function, *given)}
    torch.save(saved, "x.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(UnsafeFileError, match=rf"asks for \S*{function.__name__}.*nothing of it was run"):
        load(tmp_path / "x.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_stand_in_keeps_the_saved_attributes(tmp_path):
    """Settings of a script can be looked up, as the reader of Megatron's does."""
    torch.save(argparse.Namespace(adam_beta2=0.98), tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt")
    assert isinstance(loaded, StandIn)
    assert loaded.adam_beta2 == 0.98


@pytest.mark.parametrize(
    "name", ["builtins.getattr", "io.open", "nt.system", "posix.system", "shutil.rmtree", "types.CodeType"]
)
def test_callables_of_python_are_no_data(name):
    """Every module of Python that can act is on the side of the refused ones."""
    assert not is_data(name)


@pytest.mark.parametrize("place", ["state", "nested"])
def test_an_object_in_the_state_of_a_parameter_is_refused(place, tmp_path):
    """Where a tensor or a number is needed, an object of another library is named and not passed over."""
    extra = argparse.Namespace(a=1) if place == "state" else {"x": [argparse.Namespace(a=1)]}
    entry = {**STATE["state"][0], "exp_avg": torch.rand(5, 3), "projector": extra}
    torch.save({**STATE, "state": {0: entry}}, tmp_path / "optimizer.pt")
    with pytest.raises(UnsafeFileError, match=r"parameter 0\).*asks for argparse\.Namespace; nothing of it was run"):
        load_fisher(tmp_path / "optimizer.pt", names=["w"])
