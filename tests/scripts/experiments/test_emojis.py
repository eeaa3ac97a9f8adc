"""Emoji of ``scripts/experiments``, and the convolutions trained on some of them, on made-up archives."""

import io
import json
import sys

import numpy as np
import pytest
import torch

from scripts.demo_tasks.assets import DemoError
from scripts.experiments import convolutions, emojis
from tests.scripts.archives import tarball

pytest.importorskip("PIL")

SIDE = emojis.SIDE


def _sheet(colours):
    """Return a PNG of a sheet of 3 x 2 images, each of one colour (RGBA); missing images are transparent."""
    from PIL import Image

    pixels = np.zeros((2 * (SIDE + 2), 3 * (SIDE + 2), 4), np.uint8)
    for (column, row), colour in colours.items():
        top, left = row * (SIDE + 2) + 1, column * (SIDE + 2) + 1
        pixels[top : top + SIDE, left : left + SIDE] = colour
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def _archive(file, style, table, colours):
    files = {"package/emoji.json": json.dumps(table).encode()}
    if colours is not None:
        files[f"package/img/{style}/sheets-clean/32.png"] = _sheet(colours)
    return tarball(file, files)


def _emoji(column, row, group, *styles):
    has = {f"has_img_{style}": style in styles for style in emojis.STYLES}
    return {"sheet_x": column, "sheet_y": row, "category": "Things", "subcategory": group} | has


RED, BLUE, GREEN, HALF, DARK = (255, 0, 0, 255), (0, 0, 255, 255), (0, 255, 0, 255), (0, 0, 0, 51), (0, 0, 0, 255)
TABLE = [
    _emoji(2, 1, "tool", *emojis.STYLES),
    _emoji(0, 0, "bird", *emojis.STYLES),
    _emoji(1, 0, "bird", "twitter"),  # in one style only
    _emoji(0, 1, "flag", *emojis.STYLES),  # looks like the first in one style
]
SHEETS = {
    "twitter": {(2, 1): RED, (0, 0): HALF, (1, 0): GREEN, (0, 1): RED},
    "google": {(2, 1): BLUE, (0, 0): DARK, (0, 1): GREEN},
}


def _archives(folder, sheets=SHEETS):
    return {style: _archive(folder / f"{style}.tgz", style, TABLE, colours) for style, colours in sheets.items()}


def test_pictures_are_cut_out_whole_and_laid_on_white(tmp_path):
    """Emoji that both styles have are cut out whole on white, one style after the other, by subcategory.

    Duplicates are dropped.
    """
    found = emojis.read(_archives(tmp_path))
    assert found.images.shape == (4, 3, SIDE, SIDE)
    assert found.images.dtype == torch.float32
    means = found.images.mean((2, 3))
    assert torch.allclose(means, torch.tensor([[1.0, 0, 0], [0.8, 0.8, 0.8], [0, 0, 1.0], [0, 0, 0]]))
    assert found.images.std((2, 3)).max() < 1e-6
    assert found.emoji.tolist() == [0, 1, 0, 1]
    assert found.names == [("Things", "bird"), ("Things", "tool")]
    assert found.groups.tolist() == [1, 0, 1, 0]
    assert found.sizes() == {1: 1, 0: 1}


def test_an_archive_without_its_sheet_is_refused(tmp_path):
    """An archive without its sheet is refused with the name and place of the sheet."""
    archives = _archives(tmp_path, {**SHEETS, "google": None})
    with pytest.raises(DemoError, match=r"google.tgz must have package/img/google/sheets-clean/32.png"):
        emojis.read(archives)


def test_without_pillow_the_error_has_the_cure(tmp_path, monkeypatch):
    """Without pillow, the error has the cure in one line."""
    archives = _archives(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DemoError, match=r"need pillow, which is not installed; pip install"):
        emojis.read(archives)


EMOJI, GROUPS = torch.arange(13).repeat(2), torch.tensor([0] * 5 + [1] * 8).repeat(2)


def test_no_emoji_is_in_both_parts():
    """Both styles of an emoji are in the same part.

    Groups have equally many test emoji and at most the given training emoji.
    """
    train, test = emojis.split(EMOJI, GROUPS, held=2, most=4, seed=7)
    assert not set(EMOJI[train].tolist()) & set(EMOJI[test].tolist())
    assert EMOJI[test].bincount(minlength=13).unique().tolist() == [0, 2]
    assert GROUPS[test].bincount().tolist() == [4, 4]
    assert GROUPS[train].bincount().tolist() == [6, 8]
    again, other = (emojis.split(EMOJI, GROUPS, held=2, most=4, seed=seed)[0] for seed in (7, 8))
    assert torch.equal(train, again)
    assert set(train.tolist()) != set(other.tolist())


def test_a_group_without_training_emoji_is_refused():
    """A group of five emoji cannot have five test emoji."""
    with pytest.raises(ValueError, match="group 0 must have more than 5 emoji, found 5"):
        emojis.split(EMOJI, GROUPS, held=5, most=4, seed=0)


def _pictures(monkeypatch):
    """Return images of four subcategories of 7 or 3 emoji, grey by subcategory; one subcategory is of people."""
    sizes, names = (7, 3, 7, 7), [("A", "first"), ("A", "small"), (convolutions.APART, "hand"), ("Z", "last")]
    groups = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)).repeat(2)
    noise = torch.rand(len(groups), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    images = 0.1 * noise + 0.25 * groups[:, None, None, None]
    monkeypatch.setattr(convolutions, "LEAST", 5)
    monkeypatch.setattr(convolutions, "HELD", 2)
    monkeypatch.setattr(convolutions, "EPOCHS", 2)
    return emojis.Emojis(images, torch.arange(sum(sizes)).repeat(2), groups, names)


def test_classes_are_of_enough_emoji_and_no_people(monkeypatch):
    """The tasks have subcategories with enough emoji except people. The convolutions are trained on the others."""
    assert convolutions.classes(_pictures(monkeypatch)) == ([0, 3], [1, 2])


def test_convolutions_see_no_class_of_the_tasks(monkeypatch, tmp_path):
    """The convolutions are trained once, on images of other classes.

    The features of the tasks' images are split by emoji.
    """
    pictures, seen = _pictures(monkeypatch), []
    learn = convolutions.learn

    def spy(images, labels):
        seen.append((images, labels))
        return learn(images, labels)

    monkeypatch.setattr(convolutions, "learn", spy)
    monkeypatch.setattr(emojis, "load", lambda: pictures)
    found, again, other = (convolutions.load(seed, tmp_path) for seed in (1, 1, 2))
    ((images, labels),) = seen
    assert len(images) == 20
    assert torch.allclose(images.mean((1, 2, 3)), 0.3 + 0.25 * labels, atol=0.01)
    assert found.train.shape == (20, convolutions.FEATURES)
    assert found.test_labels.bincount().tolist() == [4, 4]
    assert found.train_labels.bincount().tolist() == [10, 10]
    every = torch.cat([found.train, found.test])
    assert len(every.unique(dim=0)) == 28
    assert torch.equal(found.train, again.train)
    assert not torch.equal(found.test, other.test)


def test_training_the_convolutions_is_reproducible(monkeypatch, tmp_path):
    """A second training in another folder gives the same convolutions to the last digit."""
    pictures = _pictures(monkeypatch)
    monkeypatch.setattr(emojis, "load", lambda: pictures)
    first, second = (convolutions.load(1, tmp_path / name) for name in ("a", "b"))
    assert torch.equal(first.train, second.train)


def test_images_move_by_whole_pixels_on_white():
    """A black point on white moves by at most ``SHIFT`` whole pixels from its position or its mirror image."""
    images = torch.ones(64, 3, SIDE, SIDE)
    images[:, :, 10, 9] = 0
    found = convolutions.moved(images, torch.Generator().manual_seed(0))
    assert found.shape == images.shape
    points = (found[:, 0] == 0).nonzero()
    assert points[:, 0].tolist() == list(range(64))
    assert set(found.unique().tolist()) == {0.0, 1.0}
    assert set((points[:, 1] - 10).tolist()) == set(range(-3, 4))
    assert set(points[:, 2].tolist()) <= {9 + by for by in range(-3, 4)} | {22 + by for by in range(-3, 4)}
    assert len(set(points[:, 2].tolist())) > 7


@pytest.mark.slow
def test_the_archives_suffice_for_the_tasks():
    """The archives have 24 subcategories of at least 20 emoji without People & Body.

    No two emoji look the same in a style.
    """
    found = emojis.load()
    tasks, left = convolutions.classes(found)
    assert len(tasks) == 24
    assert len(tasks) + len(left) == len(found.names)
    assert all(found.names[group][0] != convolutions.APART for group in tasks)
    for style in found.images.chunk(2):
        assert len(style.flatten(1).unique(dim=0)) == len(style)
    assert (found.images.min().item(), found.images.max().item()) == (0.0, 1.0)
