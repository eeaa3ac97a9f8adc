"""Fingerprint of weights: a short digest that ties a Fisher to the weights it was made at."""

from __future__ import annotations

import hashlib
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from squisher_mergekit.tensors.safetensors import SafetensorsHeader, read_header, safetensors_files

_BLOCKS, _BLOCK = 8, 128


def fingerprint(folder: Path, basename: str = "model") -> str | None:
    """Return the fingerprint of the weights in a folder, or None where they are not safetensors.

    Use :class:`~squisher_mergekit.models.weights.Weights` where the headers are needed as well: it reads them once.

    Args:
        folder: A model folder, or one ``.safetensors`` file.
        basename: ``model``, or ``adapter_model`` for an adapter.
    """
    files = [folder] if folder.is_file() else safetensors_files(folder, basename)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    return fingerprint_of(map(read_header, files))


def fingerprint_of(
    headers: Iterable[SafetensorsHeader],
    changed: Mapping[str, Callable[[str], torch.Tensor]] = MappingProxyType({}),
    *,
    overlapping: bool = False,
) -> str | None:
    """Return the fingerprint of the files with these headers; None if there is no file.

    ``fp1:<names, shapes and dtypes>-<sampled bytes>``: two BLAKE2b digests over the tensors in the order of
    their names. Of each tensor eight blocks of 128 bytes are read, evenly spread, the first and last included (all
    of a small tensor); the cost does not grow with the size of the tensors. In 0.1.0 the last block of a tensor of
    less than 1024 bytes went on into the tensor behind it, so that shards had another digest than a single file.

    Args:
        headers: The headers.
        changed: Name -> function that reads the tensor that stands for the one in the files, of its shape and dtype.
        overlapping: Read small tensors as 0.1.0 did, to compare with a fingerprint of that release.
    """
    headers = list(headers)
    if not headers:
        return None
    structure, content = hashlib.blake2b(digest_size=6), hashlib.blake2b(digest_size=12)
    for name, shape, dtype, sample in sorted(_samples(headers, changed, overlapping)):
        structure.update(f"{name}\0{shape}\0{dtype}\0".encode())
        content.update(name.encode() + b"\0" + sample)
    return f"fp1:{structure.hexdigest()}-{content.hexdigest()}"


def difference(made_at: str | None, used_with: str | None) -> str | None:
    """Describe the difference of two fingerprints; None where they agree or one is unknown."""
    if made_at is None or used_with is None or made_at == used_with:
        return None
    if made_at.split("-")[0] != used_with.split("-")[0]:
        return f"names, shapes or dtypes of the weights differ ({made_at} against {used_with})"
    return f"same names, shapes and dtypes, but other values ({made_at} against {used_with})"


def _samples(
    headers: Iterable[SafetensorsHeader], changed: Mapping[str, Callable[[str], torch.Tensor]], overlapping: bool
) -> Iterable[tuple[str, list[int], str, bytes]]:
    for header in headers:
        with header.file.open("rb") as stream:
            overlay = _Overlay(stream, header, changed)
            for name, entry in header.entries.items():
                begin, end = entry["data_offsets"]
                size = end - begin
                lengths = {at: min(_BLOCK, size if overlapping else size - at) for at in _offsets(size)}
                sample = b"".join(overlay.read(begin + at, length) for at, length in lengths.items())
                yield name, entry["shape"], entry["dtype"], sample


class _Overlay:
    """Bytes of a file, with other bytes in the place of some tensors."""

    def __init__(
        self, stream: BinaryIO, header: SafetensorsHeader, changed: Mapping[str, Callable[[str], torch.Tensor]]
    ) -> None:
        self._stream, self._start, self._changed = stream, header.start, changed
        entries = {name: header.entries[name]["data_offsets"] for name in changed if name in header.entries}
        self._places = sorted((begin, end, name) for name, (begin, end) in entries.items())
        # Two: an overlapping block of a small tensor reaches into the next one.
        self._bytes = lru_cache(maxsize=2)(self._bytes_of)

    def read(self, begin: int, count: int) -> bytes:
        """Return the bytes at a place, counted from the first tensor's."""
        self._stream.seek(self._start + begin)
        found = bytearray(self._stream.read(count))
        for first, last, name in self._places[max(bisect(self._places, (begin, 0, "")) - 1, 0) :]:
            if first >= begin + len(found):
                break
            low, high = max(first, begin), min(last, begin + len(found))
            if low < high:
                found[low - begin : high - begin] = self._bytes(name)[low - first : high - first].numpy().tobytes()
        return bytes(found)

    def _bytes_of(self, name: str) -> torch.Tensor:
        return self._changed[name](name).cpu().contiguous().view(-1).view(torch.uint8)


def _offsets(size: int) -> list[int]:
    if size <= _BLOCKS * _BLOCK:
        return list(range(0, size, _BLOCK))
    return [block * (size - _BLOCK) // (_BLOCKS - 1) for block in range(_BLOCKS)]
