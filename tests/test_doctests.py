"""The examples in docstrings are true."""

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


@pytest.mark.parametrize("name", ["squisher_mergekit", *MODULES])
def test_examples_of_a_module(name):
    """Every example in the docstrings of a module prints what it says."""
    module = importlib.import_module(name)
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL
    assert doctest.testmod(module, optionflags=flags).failed == 0


def test_there_are_examples():
    """The finder sees examples: an empty run would prove nothing."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(found) > 10
