"""Emoji in two art styles, 32 x 32 in colour, from the sprite sheets of two packages of npm.

The images are Twemoji (CC-BY 4.0) and Noto (Apache 2.0), packed by emoji-datasource.
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
    """Images of emoji: all of one style, then all of the other.

    Attributes:
        images: pixels from 0 to 1 on white, float32 [n, 3, 32, 32].
        emoji: number of the emoji, [n].
        groups: number of the subcategory, [n].
        names: category and subcategory of each such number.
    """

    images: Tensor
    emoji: Tensor
    groups: Tensor
    names: Sequence[tuple[str, str]]

    def sizes(self) -> dict[int, int]:
        """Return the number of emoji of each subcategory."""
        return dict(Counter(self.groups.tolist()[: len(self.groups) // len(STYLES)]))


def load(packages: Path = PACKAGES) -> Emojis:
    """Return the emoji that both styles have.

    Args:
        packages: Folder of the archives; missing ones are downloaded.

    Raises:
        DemoError: A download fails, an archive has another digest, or pillow is not installed.
    """
    archives = fetch(list(STYLES.values()), packages)
    return read({style: archives[requirement] for style, requirement in STYLES.items()})


def read(archives: dict[str, Path]) -> Emojis:
    """Return the emoji of the archives of ``STYLES``, in the order of the first archive's list.

    If emoji have the same image in a style, such as the flags of a country and of its islands, only the first remains.
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
    """Draw training and test emoji of each group; all styles of an emoji are in the same part.

    Args:
        emoji: Numbers of the emoji, [n].
        groups: Numbers of their groups, [n].
        held: Number of test emoji of each group.
        most: Largest number of training emoji of a group, which keeps the groups balanced.
        seed: Seed of the draw and of the order.

    Returns:
        The indices of the training images and of the test images.

    Raises:
        ValueError: A group has no training emoji.
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
    """Return the given files of an archive."""
    found: dict[str, bytes] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            if member.name in names and (stream := archive.extractfile(member)):
                found[member.name] = stream.read()
                if len(found) == len(names):
                    return found
    raise DemoError(f"{file} must have {', '.join(sorted(set(names) - set(found)))}, which is missing")


def _on_white(png: bytes) -> Tensor:
    """Return the pixels of a sheet from 0 to 1 on white, [height, width, 3]."""
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
    """Return one image of a sheet, without its border of one pixel."""
    left, top = (number * (SIDE + 2) + 1 for number in (column, row))
    return sheet[top : top + SIDE, left : left + SIDE]
