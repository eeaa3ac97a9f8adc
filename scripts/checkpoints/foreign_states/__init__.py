"""Cases of ``scripts.checkpoints.make``: checkpoints that other trainers' libraries write."""

from scripts.checkpoints.foreign_states.common import Case


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    from scripts.checkpoints.foreign_states import (
        adapters,
        composer,
        layouts,
        megatron,
        nanotron,
        olmo,
        plain,
        quantized,
        sentences,
        sharded,
        torchtitan,
        trainers,
        verl,
        zero,
    )

    modules = (
        zero,
        sharded,
        quantized,
        plain,
        trainers,
        layouts,
        megatron,
        olmo,
        composer,
        verl,
        nanotron,
        torchtitan,
        sentences,
        adapters,
    )
    return {name: case for module in modules for name, case in module.CASES.items()}
