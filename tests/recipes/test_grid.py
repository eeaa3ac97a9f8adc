"""Grids of parameters: form, values, points, and their place in a configuration."""

import pytest

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.recipes.grid import check_grid, label, parse_grid, points, with_point


def test_values_are_read_as_yaml():
    """Numbers are numbers, words are words, and the order is that of the text."""
    assert parse_grid(["floor=0.1, 1e-3,0", "missing=average,error"]) == {
        "floor": (0.1, 0.001, 0),
        "missing": ("average", "error"),
    }


def test_a_path_is_a_word():
    """A path that begins with a dot, and a Hub id that begins with a digit, are words."""
    assert parse_grid(["fisher=./a,../b,01-ai/Yi@fisher"]) == {"fisher": ("./a", "../b", "01-ai/Yi@fisher")}


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["lambda"], "NAME=VALUE"),
        (["=1"], "NAME=VALUE"),
        (["a=1,,2"], "NAME=VALUE"),
        (["a=1", "a=2"], "there twice"),
        (["a=1,1"], "each value once"),
        (["a=[1"], "a number or a word"),
        (["a={b: 1}"], "a number or a word"),
        (["a=1x"], "a number or a word"),
        (["a=null"], "a number or a word"),
        ([], "1 to 1000 points"),
        ([f"{name}={','.join(map(str, range(11)))}" for name in "abc"], "found 1331"),
        ([f"{name}={','.join(map(str, range(1000)))}" for name in "abcd"], "found 1000000000000"),
    ],
)
def test_a_grid_of_another_form_is_refused(axes, message):
    """A text without values, a repetition, and too many points are refused in one line."""
    with pytest.raises(ConfigError, match=message) as found:
        parse_grid(axes)
    assert "\n" not in str(found.value)


def test_points_change_the_last_parameter_first():
    """Every combination appears once, and each has a label of its own."""
    found = list(points({"a": (1, 2), "b": ("x", "y", "z")}))
    assert [label(point) for point in found] == ["a=1,b=x", "a=1,b=y", "a=1,b=z", "a=2,b=x", "a=2,b=y", "a=2,b=z"]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"dampin": (1,)}, "did you mean damping"),
        ({"damping": (0.1, -1)}, "--grid.damping"),
        ({"prior": (0.1,)}, "ubgm_squisher"),
    ],
)
def test_every_value_is_checked_before_the_first_merge(grid, message):
    """An unknown parameter, one of the other method, or a value out of range is refused."""
    with pytest.raises(ConfigError, match=message):
        check_grid("squisher", grid)


def test_a_point_wins_over_the_top_level_and_changes_nothing_else():
    """The parameters of a point join those of the configuration, which stays as it was."""
    document = {"models": [{"model": "a"}], "parameters": {"floor": 0.5, "block": 7}}
    assert with_point(document, {"floor": 0.1}) == {**document, "parameters": {"floor": 0.1, "block": 7}}
    assert document["parameters"]["floor"] == 0.5
    assert with_point({"models": []}, {"floor": 0.1})["parameters"] == {"floor": 0.1}


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": 2}}]}, r"models\[1\].parameters"),
        (
            {"slices": [{"sources": [{"model": "a", "parameters": {"weight": 2}}]}]},
            r"slices\[0\].sources\[0\].parameters",
        ),
    ],
)
def test_a_value_of_one_model_is_refused(document, place):
    """A value under a model would win over the grid without a word."""
    with pytest.raises(ConfigError, match=place):
        with_point(document, {"weight": 1.0})
