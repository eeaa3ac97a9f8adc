"""Tree of errors."""

from squisher_mergekit.errors import RefusedError


def test_messages_are_one_line() -> None:
    """Line breaks in a message become spaces, and every refusal is a click error with exit code 1."""
    error = RefusedError("one\n two")
    assert (error.message, error.exit_code) == ("one two", 1)
