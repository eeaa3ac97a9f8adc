"""The checkpoints of a run, by their step."""

import re
from pathlib import Path

# checkpoint-500, step-500, global_step500, epoch_3
STEP = re.compile(r"(?:[\w.-]*[_-])?(?:checkpoint|step|global_?step|epoch|iter|ckpt)[_-]?(\d+)(?:_universal)?")


def steps_in(run: Path) -> dict[int, Path]:
    """Return step -> folder of the checkpoints in a run's folder, the last first."""
    steps: dict[int, Path] = {}
    for path in sorted(run.iterdir()):
        if path.is_dir() and (match := STEP.fullmatch(path.name)):
            steps.setdefault(int(match[1]), path)
    return dict(sorted(steps.items(), reverse=True))
