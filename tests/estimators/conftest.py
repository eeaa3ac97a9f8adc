"""Fixtures of the estimator tests."""

import pytest


@pytest.fixture
def interpreter(monkeypatch):
    """Let loops of Triton's interpreter run up to a number that comes with the launch.

    Triton 3.6 takes ``int`` of an array with one entry there, and NumPy 2.4 refuses that.
    """
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
