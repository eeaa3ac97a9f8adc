"""Real checkpoints of other trainers, made by their own libraries with the truth beside: see scripts/make_states."""

from scripts.checkpoints.foreign_states.common import Case


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    from scripts.checkpoints.foreign_states import plain, quantized, sharded, zero

    return {**zero.CASES, **sharded.CASES, **quantized.CASES, **plain.CASES}
