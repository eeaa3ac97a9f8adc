"""The checkpoints of a run, by their step, and the one that is named as the latest."""

import re
from pathlib import Path

# checkpoint-500, step-500, global_step500, epoch_3
STEP = re.compile(r"(?:[\w.-]*[_-])?(?:checkpoint|step|global_?step|epoch|iter|ckpt)[_-]?(\d+)(?:_universal)?")


def tagged(folder: Path, file: str) -> Path | None:
    """Return the folder that a file beside it names as the latest, None if it names none that is there."""
    path = folder / file
    if not path.is_file() or path.stat().st_size > 255:
        return None
    tag = path.read_text(encoding="utf-8", errors="replace").strip()
    return folder / tag if Path(tag).name == tag and (folder / tag).is_dir() else None


def steps_in(run: Path) -> dict[int, Path]:
    """Return step -> folder of the checkpoints in a run's folder, the last first."""
    steps: dict[int, Path] = {}
    for path in sorted(run.iterdir()):
        if path.is_dir() and (match := STEP.fullmatch(path.name)):
            steps.setdefault(int(match[1]), path)
    return dict(sorted(steps.items(), reverse=True))
