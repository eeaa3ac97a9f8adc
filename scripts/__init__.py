"""Commands of the repository: benchmarks, checkpoints of other trainers, experiments, the demo.

Each is run in the repository's root by ``python -m``, such as ``python -m scripts.benchmarks.merge --help``.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
