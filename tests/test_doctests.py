"""Examples in docstrings."""

import doctest
import importlib
import pkgutil

import pytest

import squisher_mergekit

MODULES = [
    module.name
    for module in pkgutil.walk_packages(squisher_mergekit.__path__, "squisher_mergekit.")
    if "._startup." not in module.name
]


def _module(name):
    """Import a module, or return None for Triton kernels without Triton, which comes with torch for GPUs alone."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None


@pytest.mark.parametrize("name", ["squisher_mergekit", *MODULES])
def test_examples_of_a_module(name):
    """Every example in the docstrings of a module prints its expected output."""
    module = _module(name)
    if module is None:
        pytest.skip("needs triton")
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_there_are_examples():
    """The finder finds examples, because an empty run would prove nothing."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    modules = [module for name in MODULES if (module := _module(name)) is not None]
    found = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(found) > 10
