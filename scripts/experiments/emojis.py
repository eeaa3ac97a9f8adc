"""Emoji in two art styles, 32 x 32 in colour, read from the sprite sheets of two packages of npm.

The pictures are Twemoji (CC-BY 4.0) and Noto (Apache 2.0), as emoji-datasource packs them.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scripts.demo_tasks.assets import GOOGLE, TWITTER, DemoError, fetch
from scripts.experiments.digits import PACKAGES

SIDE = 32
STYLES = {"twitter": TWITTER, "google": GOOGLE}


@dataclass(frozen=True)
class Emojis:
    """Pictures, one of each emoji and style: all of one style, then all of the other.

    ``images``: from 0 to 1 on white, float32 [n, 3, 32, 32]. ``emoji``: number of the emoji, [n]. ``groups``: number of
    its subcategory, [n]. ``names``: category and subcategory, by that number.
    """

    images: Tensor
    emoji: Tensor
    groups: Tensor
    names: Sequence[tuple[str, str]]

    def sizes(self) -> dict[int, int]:
        """Return how many emoji a subcategory has."""
        return dict(Counter(self.groups.tolist()[: len(self.groups) // len(STYLES)]))


def load(packages: Path = PACKAGES) -> Emojis:
    """Return all emoji that both styles have.

    Args:
        packages: Folder of the archives, which are downloaded if they are not there.

    Raises:
        DemoError: An archive cannot be had, or is not the one expected; or pillow is not installed.
    """
    archives = fetch(list(STYLES.values()), packages)
    return read({style: archives[requirement] for style, requirement in STYLES.items()})


def read(archives: dict[str, Path]) -> Emojis:
    """Return the emoji of the archives of ``STYLES``, in the order of the first one's list.

    Of emoji that look the same in a style, such as the flags of a country and of its islands, the first one alone.
    """
    table: list[dict[str, Any]] = []
    sheets = {}
    for style, file in archives.items():
        sheet, listed = f"package/img/{style}/sheets-clean/{SIDE}.png", "package/emoji.json"
        members = _members(file, (sheet, listed))
        table = table or json.loads(members[listed])
        sheets[style] = _on_white(members[sheet])
    kept, pictures = [], []
    seen: set[tuple[str, bytes]] = set()
    for one in table:
        if all(one[f"has_img_{style}"] for style in archives):
            found = [_cut(sheet, one["sheet_x"], one["sheet_y"]) for sheet in sheets.values()]
            same = {(style, picture.numpy().tobytes()) for style, picture in zip(sheets, found, strict=True)}
            if not same & seen:
                kept.append((one["category"], one["subcategory"]))
                pictures.append(torch.stack(found))
            seen |= same
    names = sorted(set(kept))
    groups = torch.tensor([names.index(name) for name in kept]).repeat(len(sheets))
    images = torch.stack(pictures, 1).flatten(0, 1).permute(0, 3, 1, 2).contiguous()
    return Emojis(images, torch.arange(len(kept)).repeat(len(sheets)), groups, names)


def split(emoji: Tensor, groups: Tensor, held: int, most: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw emoji of each group to learn from and to test on; all styles of one go the same way.

    Args:
        emoji: Numbers of the emoji, [n].
        groups: Numbers of their groups, [n].
        held: How many emoji of each group are tested.
        most: How many of each are learnt from at most, so that none outnumbers the others by far.
        seed: Of the draw and of the order.

    Returns:
        The places of the pictures to learn from and of those to test on.

    Raises:
        ValueError: A group would have nothing to learn from.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for group in groups.unique().tolist():
        members = emoji[groups == group].unique()
        if len(members) <= held:
            raise ValueError(f"group {group} must have more than {held} emoji, found {len(members)}")
        members = members[torch.randperm(len(members), generator=generator)]
        parts[0].append(members[held : held + most])
        parts[1].append(members[:held])
    places = [torch.isin(emoji, torch.cat(part)).nonzero().squeeze(1) for part in parts]
    train, test = (rows[torch.randperm(len(rows), generator=generator)] for rows in places)
    return train, test


def _members(file: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Return files of an archive, unpacked no further than the last of them."""
    found: dict[str, bytes] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            if member.name in names and (stream := archive.extractfile(member)):
                found[member.name] = stream.read()
                if len(found) == len(names):
                    return found
    raise DemoError(f"{file} must have {', '.join(sorted(set(names) - set(found)))}, and has not")


def _on_white(png: bytes) -> Tensor:
    """Return a sheet's pixels from 0 to 1, [height, width, 3], what is transparent being white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DemoError(
            'emoji need pillow, which is not installed; pip install "squisher-mergekit[plots]" brings it'
        ) from error
    with Image.open(io.BytesIO(png)) as picture:
        pixels = torch.from_numpy(np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255)
    colour, opaque = pixels[..., :3], pixels[..., 3:]
    return colour * opaque + (1 - opaque)


def _cut(sheet: Tensor, column: int, row: int) -> Tensor:
    """Return one picture; each has a border of one pixel around it."""
    left, top = (number * (SIDE + 2) + 1 for number in (column, row))
    return sheet[top : top + SIDE, left : left + SIDE]
