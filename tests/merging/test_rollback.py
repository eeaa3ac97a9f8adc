"""Taking away what a failed merge has written."""

from pathlib import Path

from squisher_mergekit.merging.rollback import Output


def test_the_folders_that_were_made_go_again(tmp_path: Path) -> None:
    """The output folder and the folders made for it vanish with it."""
    output = Output(tmp_path / "runs" / "deep" / "out")
    output.folder.mkdir(parents=True)
    (output.folder / "model.safetensors").touch()
    output.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_others_put_beside_it_stays(tmp_path: Path) -> None:
    """A folder above that another process has put something into meanwhile is left, with all of it."""
    output = Output(tmp_path / "runs" / "out")
    output.folder.mkdir(parents=True)
    (tmp_path / "runs" / "other").mkdir()
    output.remove()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


def test_an_existing_folder_is_left_as_it_was(tmp_path: Path) -> None:
    """Files that were there stay; files and folders that are new go."""
    (tmp_path / "notes.txt").touch()
    output = Output(tmp_path)
    (tmp_path / "model-1.safetensors").touch()
    (tmp_path / "more").mkdir()
    output.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
