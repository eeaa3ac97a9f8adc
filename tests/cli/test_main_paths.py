"""Paths that no file system can have end in one line, in every command."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from squisher_mergekit.cli.main import main

PATHS = {"long name": "x" * 5000, "long folder": f"/tmp/{'x' * 5000}/model", "many folders": "/tmp" + "/a" * 3000}
COMMANDS = [
    "extract PATH -o out",
    "extract here --names PATH -o out",
    "extract here --base PATH -o out",
    "extract here -o PATH",
    "inspect PATH",
    "inspect here --json PATH",
    "compare PATH here",
    "plan PATH",
    "merge PATH out",
    "prune PATH --score magnitude --sparsity 0.5 -o out",
    "mask select PATH --keep 0.1 --score random -o out",
    "mask reset here --base PATH --keep 0.1 --score movement -o out",
    "mask apply here --difference PATH -o out",
    "task2vec embed a=PATH -o out",
    "estimate PATH --task causal-lm --data rows.jsonl -o out",
    "estimate here --task causal-lm --data PATH -o out",
    "push PATH org/name",
]


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_path_that_no_file_system_can_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, path: str
) -> None:
    """The command refuses it in one line of bounded length, and leaves nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    found = CliRunner().invoke(main, [word.replace("PATH", path) for word in command.split()])
    assert found.exit_code in (1, 2), found.output[-500:]
    assert isinstance(found.exception, SystemExit), repr(found.exception)[:500]
    assert max(map(len, found.output.splitlines())) < 15_000
    assert {entry.name for entry in tmp_path.iterdir()} == {"here", "rows.jsonl"}
