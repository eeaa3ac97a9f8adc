"""Input files: every low-level error becomes one line of this package, and nothing waits, expands or runs code."""

import os

import pytest

from squisher_mergekit import load_fisher
from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.optimizers.checkpoints.safe_pickle import load
from squisher_mergekit.tensors.input_files import (
    expanded,
    parse_shape,
    parse_yaml,
    read_json,
    read_mapping,
    read_text,
    reading,
)
from squisher_mergekit.tensors.safetensors import read_header


@pytest.mark.parametrize("text", ["", "{", '{"a":' * 50_000, "[" * 50_000, "\x00", "9" * 5000])
def test_text_that_is_no_json_is_refused_in_one_line(tmp_path, text):
    """Syntax, depth and numbers with too many digits end alike."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CorruptFileError, match=r"x\.json must be JSON, but .*; copy it again") as caught:
        read_json(tmp_path / "x.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is empty; copy it again"),
        (
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "it is a pointer of Git LFS; fetch the file itself",
        ),
        ("\n<!DOCTYPE html><title>404</title>", "it is a web page or XML; download the file again"),
        ("<?xml version='1.0'?><Error/>", "it is a web page or XML; download the file again"),
    ],
)
def test_a_file_in_place_of_the_one_that_was_meant_is_named(tmp_path, text, message):
    """Readers of JSON, safetensors and pickles say that the file is a pointer, a web page or empty."""
    for name, read in (("x.json", read_json), ("x.safetensors", read_header), ("x.pt", load)):
        (tmp_path / name).write_text(text)
        with pytest.raises(CorruptFileError, match=f"{name} must be .*, but {message}"):
            read(tmp_path / name)


@pytest.mark.parametrize("text", ["3", "[]", "null", '"a"'])
def test_json_of_another_type_is_no_mapping(tmp_path, text):
    """A list is not taken for an empty mapping."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(CorruptFileError, match="must be a mapping in JSON"):
        read_mapping(tmp_path / "x.json")


def test_a_fifo_is_refused_without_waiting(tmp_path):
    """Opening a FIFO that nobody writes to would wait for ever."""
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(CorruptFileError, match="must be a regular file, found a FIFO"):
        read_json(tmp_path / "x.json")


def test_a_configuration_is_read_from_a_pipe():
    """The shell's ``<(command)`` gives such a path."""
    reader, writer = os.pipe()
    os.write(writer, b"a: 1\n")
    os.close(writer)
    assert read_text(f"/dev/fd/{reader}") == "a: 1\n"
    os.close(reader)


def test_a_fifo_without_a_writer_is_an_empty_configuration(tmp_path):
    """The text is empty, and what follows refuses it."""
    os.mkfifo(tmp_path / "x.yml")
    assert read_text(tmp_path / "x.yml") == ""


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"{c}: &{c} [{'*' + p}{(',*' + p) * 9}]\n"
          for p, c in zip("abcdefg", "bcdefgh", strict=True)), "expand"),
        ("a: &a {b: *a}", "its own anchor"),
        ("[" * 20_000, "nested"),
        ("!!python/object/apply:os.getcwd []", "constructor"),
        ("!!timestamp soon", "correct it"),
    ],
)  # fmt: skip
def test_hostile_yaml_is_refused_in_one_line(text, why):
    """Aliases without bound, loops, depth, code and values of a wrong type end alike."""
    with pytest.raises(ConfigError, match=rf"it must be YAML, but .*{why}"):
        parse_yaml(text, "it must be YAML")


def test_aliases_of_an_ordinary_document_are_kept():
    """Only their expansion is bounded."""
    assert parse_yaml("{a: &x {w: 1}, b: *x}", "") == {"a": {"w": 1}, "b": {"w": 1}}


@pytest.mark.parametrize(
    "text", ["3", "[-1]", "[1.5]", "[true]", "[[1]]", "{}", "[", "[" * 50_000, "[99999999999999999999]"]
)
def test_a_note_that_is_no_shape_is_refused(text):
    """A shape is a list of sizes."""
    with pytest.raises(CorruptFileError, match=r"m\.safetensors must"):
        parse_shape(text, "m.safetensors")


@pytest.mark.parametrize(
    "error", [IndexError("i"), MemoryError(), RecursionError(), ZeroDivisionError("z"), EOFError()]
)
def test_every_error_inside_the_block_becomes_ours(error):
    """No list of exception classes can be complete."""
    with pytest.raises(CorruptFileError, match=r"f must be whole, but .*; copy it again"), reading("f", "whole"):
        raise error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: [1\nb: }",
            r"line 2, column 2: while parsing a flow sequence, expected ',' or '\]', but got ':'; correct",
        ),
        ("a: 1\n---\nb: 2", "line 2, column 1: expected a single document in the stream, but found another document"),
        ("? [a]\n: 1", "line 1, column 3: while constructing a mapping, found unhashable key"),
    ],
)
def test_the_line_of_broken_yaml_is_named(text, said):
    """The message has line and reason, without PyYAML's excerpt of the text."""
    with pytest.raises(ConfigError, match=f"^x must be YAML, but {said}"):
        parse_yaml(text, "x must be YAML")


def test_the_home_of_an_unknown_user_is_no_path(monkeypatch, tmp_path):
    """``~`` is expanded; a path of a user who does not exist is not found, in one line."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/base") == tmp_path / "base"
    for opening in (load_fisher, open_weights):
        with pytest.raises(NotFoundError, match="there is no ~no-such-user/base"):
            opening("~no-such-user/base")
