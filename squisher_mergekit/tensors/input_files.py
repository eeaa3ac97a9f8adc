"""Input files: the one place where bytes that others wrote become data, or one error of this package.

Every reader opens its file by :func:`open_input`, parses JSON and YAML here, and does the rest inside :func:`reading`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import stat
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from squisher_mergekit.errors import ConfigError, CorruptFileError, SquisherError

MOST_JSON = 200_000_000  # bytes; the history of a long run is the largest JSON file of a checkpoint
MOST_YAML = 2_000_000  # bytes; PyYAML needs about ten seconds for each million
_MOST_NODES = 200_000  # values in a YAML document with its aliases expanded
_COPY = "copy it again"
# First bytes of files that stand in place of another one, with the noun phrase and the cure of the message.
_SUBSTITUTES = (
    (b"version https://git-lfs.", "a pointer of Git LFS", "fetch the file itself by git lfs pull"),
    (b"<", "a web page or XML", "download the file again (the address or the login was wrong)"),
)
FileState = tuple[int, int, int]  # inode, size, time of change


@contextmanager
def reading(place: object, required: str, cure: str = _COPY) -> Iterator[None]:
    """Turn every low-level error inside a ``with`` block into one error of this package.

    Args:
        place: The file, for the message.
        required: Noun phrase of the required content, such as ``a whole safetensors file``.
        cure: Cure in the message.

    Raises:
        CorruptFileError: Any exception of another library, or of Python, was raised.

    Example:
        >>> with reading("x", "text"):
        ...     [][0]
        Traceback (most recent call last):
        squisher_mergekit.errors.CorruptFileError: x must be text, but IndexError: list index out of range; ...
    """
    try:
        yield
    except SquisherError:
        raise
    except Exception as error:  # hostile content can make a parser raise nearly anything
        reason, cure = substitute(place) or (brief(error), cure)
        raise CorruptFileError(f"{place} must be {required}, but {reason}; {cure}") from error


def substitute(place: object) -> tuple[str, str] | None:
    """Return the reason and the cure for a file in place of the one that was meant; None for any other content.

    A clone without Git LFS leaves pointers, a failed download a web page or nothing.

    Args:
        place: The file; anything but a path of a regular file is no substitute.
    """
    try:
        with open_input(Path(str(place))) as stream:
            begin = stream.read(64)
    except (OSError, ValueError, SquisherError):
        return None
    if not begin:
        return "it is empty", _COPY
    found = (one for one in _SUBSTITUTES if begin.lstrip().startswith(one[0]))
    return next(((f"it is {kind}", cure) for _, kind, cure in found), None)


def brief(error: BaseException) -> str:
    """Return the text of an exception in at most 200 characters.

    Example:
        >>> brief(KeyError("weight_map")), brief(MemoryError())
        ("KeyError: 'weight_map'", 'MemoryError')
    """
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    if isinstance(error, TypeError | AttributeError | LookupError):  # their texts alone say little
        text = f"{type(error).__name__}: {error}"
    text = " ".join(text.split())
    # torch puts its advice about weights_only before the reason, and a further one behind it.
    reason = (text.partition("WeightsUnpickler error: ")[2] or text).partition(" Check the documentation of torch")[0]
    return reason[:200] or type(error).__name__


def open_input(file: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; a FIFO or a device is refused without waiting for it.

    Raises:
        CorruptFileError: The path is no regular file.
        OSError: The file cannot be opened.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise CorruptFileError(f"{file} must be a regular file, found {_kind(mode)}; give a file")
        return os.fdopen(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def exists(path: Path) -> bool:
    """Return True if a path that a user gave exists; False as well if no file system can have it, as it is too long.

    Example:
        >>> exists(Path()), exists(Path("x" * 5000))
        (True, False)
    """
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def expanded(path: str | Path) -> Path:
    """Return a path with ``~`` or ``~user`` expanded; unchanged, so that it is not found, if there is no such user.

    Example:
        >>> expanded("models/~base"), expanded("~no-such-user/base")
        (PosixPath('models/~base'), PosixPath('~no-such-user/base'))
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def file_state(file: Path | BinaryIO) -> FileState:
    """Return inode, size and time of change of a file, open or not, which reveal that it was changed or replaced."""
    found = file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_into(buffer: memoryview, file: Path, offset: int, state: FileState, required: str) -> None:
    """Fill a buffer with the bytes of a file from an offset on.

    A copy is safe where a mapping is not: a page behind the end of a file that was truncated meanwhile would stop the
    process by a bus error.

    Args:
        buffer: The bytes to fill.
        file: The file.
        offset: Offset of the first byte.
        state: State of the file when its header was read.
        required: Noun phrase of the required content, for the message.

    Raises:
        CorruptFileError: The file has changed since then.
    """
    with reading(file, required), open_input(file) as stream:
        if file_state(stream) != state:
            raise ValueError("it has changed since its header was read")
        stream.seek(offset)
        while buffer:
            count = stream.readinto(buffer)  # type: ignore[attr-defined]
            if not count:
                raise ValueError("it became shorter")
            buffer = buffer[count:]


def refuse_irregular(folder: Path) -> None:
    """Refuse a folder with a FIFO, a socket or a device among its files; to open one could wait forever.

    Raises:
        CorruptFileError: An entry is neither a file nor a folder, nor a link to one.
    """
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        with contextlib.suppress(OSError):  # a broken link is a missing file
            mode = entry.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise CorruptFileError(
                    f"{entry} must be a regular file, found {_kind(mode)}; remove it, or give a file"
                )


def _kind(mode: int) -> str:
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((kind for matches, kind in kinds if matches(mode)), "a device")


def read_json(file: Path, cure: str = _COPY) -> Any:
    """Return the content of a JSON file.

    Raises:
        CorruptFileError: The file is no JSON, is nested too deeply, or is too large.
    """
    with reading(file, "JSON", cure):
        with open_input(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > MOST_JSON:
                raise ValueError(f"it has {size} bytes, more than {MOST_JSON}")
            data = stream.read()
        return json.loads(data.decode("utf-8-sig"))


def read_mapping(file: Path, cure: str = _COPY) -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Raises:
        CorruptFileError: The file is no JSON, or holds something other than a mapping.
    """
    data = read_json(file, cure)
    if not isinstance(data, dict):
        raise CorruptFileError(f"{file} must be a mapping in JSON, found a {type(data).__name__}; {cure}")
    return data


def parse_json(text: str, place: object, required: str, cure: str = _COPY) -> Any:
    """Return the content of JSON in a text, such as the metadata of a safetensors file.

    Args:
        text: The JSON.
        place: The file that the text comes from, for the message.
        required: Noun phrase of the required content.
        cure: Cure in the message.

    Raises:
        CorruptFileError: The text is no JSON, or is nested too deeply.
    """
    with reading(place, required, cure):
        return json.loads(text)


def parse_shape(text: object, place: object) -> tuple[int, ...]:
    """Return the shape in a note of a safetensors file.

    Raises:
        CorruptFileError: The text is no list of sizes.

    Example:
        >>> parse_shape("[13, 7]", "x.safetensors")
        (13, 7)
    """
    sizes = parse_json(str(text), place, "a file with the shape of each tensor", "make it again")
    if not isinstance(sizes, list) or any(type(size) is not int or not 0 <= size < 1 << 62 for size in sizes):
        raise CorruptFileError(f"{place} must note the shape of each tensor, found {str(text)[:50]!r}; make it again")
    return tuple(sizes)


def read_text(file: Path, most: int = MOST_YAML) -> str:
    """Return the text of a short file written by hand; a pipe with a writer is read to its end.

    Raises:
        CorruptFileError: The file is too large, or is no text.
    """
    with reading(file, "a text file in UTF-8", "give another file"):
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        data = bytearray()
        try:
            while len(data) <= most:
                try:
                    block = os.read(descriptor, 1 << 16)
                except BlockingIOError:  # a pipe whose writer is not done
                    select.select([descriptor], [], [])
                    continue
                if not block:
                    return data.decode("utf-8-sig")
                data += block
        finally:
            os.close(descriptor)
        raise ValueError(f"it has more than {most} bytes")


def parse_yaml(text: str, required: str, loader_class: Any = None) -> Any:
    """Return the content of a YAML document; only plain types, and no aliases that expand without bound.

    Args:
        text: The document.
        required: Beginning of the message.
        loader_class: Subclass of ``yaml.SafeLoader``; None for that class.

    Raises:
        ConfigError: The text is no YAML, or its aliases expand to too many values.

    Example:
        >>> parse_yaml("{a: &x [1, 2], b: *x}", "the configuration must be YAML")
        {'a': [1, 2], 'b': [1, 2]}
    """
    import yaml

    try:
        if len(text) > MOST_YAML:
            raise ValueError(f"it has more than {MOST_YAML} characters")
        loader = (loader_class or yaml.SafeLoader)(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _expanded(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except ConfigError:
        raise
    except Exception as error:  # PyYAML raises errors of Python for wrong values of known types
        raise ConfigError(f"{required}, but {_yaml_reason(error)}; correct it") from error


def _yaml_reason(error: Exception) -> str:
    """Return the text of an error of PyYAML with its line alone; the excerpts of the document would be cut."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return brief(error)
    reason = ", ".join(filter(None, (getattr(error, "context", None), getattr(error, "problem", None))))
    return f"line {mark.line + 1}, column {mark.column + 1}: {reason:.200}"


def _expanded(node: Any, known: dict[int, int]) -> int:
    """Return the number of values below a YAML node with its aliases expanded.

    Raises:
        ValueError: A node contains itself, or there are too many values.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands inside its own anchor")
        return known[id(node)]
    known[id(node)] = 0
    children = node.value if isinstance(node.value, list) else []
    pairs = (child if isinstance(child, tuple) else (child,) for child in children)
    count = 1 + sum(_expanded(child, known) for pair in pairs for child in pair)
    if count > _MOST_NODES:
        raise ValueError(f"its aliases expand to more than {_MOST_NODES} values")
    known[id(node)] = count
    return count


def is_name(value: Hashable) -> bool:
    """Return True for a text that can be encoded and printed as the name of a tensor.

    Example:
        >>> is_name("w"), is_name(chr(0xD800))
        (True, False)
    """
    try:
        return isinstance(value, str) and bool(value.encode("utf-8") or True)
    except UnicodeEncodeError:
        return False
