"""Model card of a merge: names without a local path, and the picture."""

import pytest

from squisher_mergekit.merging.reports.card import CARD, PICTURE, add_picture, public_name

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name",
    ["acme/qwen-math", "acme/qwen-math@v1.2", f"acme/m@{COMMIT}", f"acme/m@{COMMIT}:export/exp_avg_sq.safetensors"],
)
def test_an_id_of_the_hub_keeps_its_organisation(name):
    """Ids stay whole, with a revision and a file in the repository."""
    assert public_name(name) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/srv/secret/law", "law"),
        ("/srv/secret/law/checkpoint-30", "law/checkpoint-30"),
        ("secret/law/optimizer.pt", "optimizer.pt"),
        ("../secret/law", "law"),
        ("none (F = 0)", "none (F = 0)"),
        ("law", "law"),
    ],
)
def test_a_local_path_is_not_shown(name, shown):
    """The card shows the last part of a path, and for a checkpoint the name of its run."""
    assert public_name(name) == shown


def test_a_relative_folder_is_no_id(tmp_path, monkeypatch):
    """A path of two parts that is here is a folder, whatever the Hub has."""
    (tmp_path / "secret" / "law").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("secret/law") == "law"


def test_a_picture_needs_a_card(tmp_path):
    """The card shows the picture; a folder without a card gets none."""
    add_picture(tmp_path, b"png", "Shares")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / CARD).write_text("# x\n", encoding="utf-8")
    add_picture(tmp_path, b"png", "Shares")
    assert (tmp_path / PICTURE).read_bytes() == b"png"
    assert f"![Shares]({PICTURE})" in (tmp_path / CARD).read_text(encoding="utf-8")
