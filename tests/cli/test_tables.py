"""Aligned text."""

from squisher_mergekit.cli.tables import name_lines, name_list, pairs, shape_text, table


def test_a_table_is_aligned_and_ends_in_no_space():
    """Left columns share their start and right columns their end, for any width. Titles count too."""
    lines = list(table(("name", "a long head", "n"), [("x", "1", "1000"), ("a longer name", "22", "")], left=1))
    assert lines == [
        "name           a long head     n",
        "x                        1  1000",
        "a longer name           22",
    ]


def test_a_table_without_rows_is_its_head():
    """A table without rows is its header."""
    assert list(table(("tensor", "zeros"), [])) == ["tensor  zeros"]


def test_pairs_align_their_values():
    """The longest name sets the column. Short names have a minimum width."""
    assert list(pairs([("a", 1), ("a long name of it", 2)])) == ["a                  1", "a long name of it  2"]
    assert list(pairs([("a", 1)])) == ["a          1"]
    assert list(pairs([])) == []


def test_long_lists_of_names_are_cut():
    """A list is complete up to the limit, and then counts the rest."""
    assert name_list(["a", "b"], 2) == "a, b"
    assert name_list(["a", "b", "c", "d"], 2) == "a, b and 2 more"
    assert list(name_lines(["a", "b"], 2, "  ", "elsewhere")) == ["  a", "  b"]
    assert list(name_lines(["a", "b", "c"], 1, "", "elsewhere")) == ["a", "and 2 more, elsewhere"]


def test_shapes_are_text():
    """The shape of a scalar is a word."""
    assert (shape_text((3, 5)), shape_text(())) == ("3x5", "scalar")
