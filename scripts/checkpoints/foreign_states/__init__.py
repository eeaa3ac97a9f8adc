"""Cases of ``scripts.checkpoints.make``: checkpoints that other trainers' libraries write."""

from scripts.checkpoints.foreign_states.common import Case


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    from scripts.checkpoints.foreign_states import adapters, plain, quantized, sharded, zero

    return {**zero.CASES, **sharded.CASES, **quantized.CASES, **plain.CASES, **adapters.CASES}
