"""What training wraps around a parameter's name."""

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def unwrapped(name: str) -> str:
    """Strip what DDP, torch.compile, FSDP and activation checkpointing put into a name.

    Example:
        >>> unwrapped("module._orig_mod.encoder._checkpoint_wrapped_module.weight")
        'encoder.weight'
    """
    for wrapper in _WRAPPERS[1:]:
        name = name.replace(wrapper, "")
    while name.startswith(_WRAPPERS[0]):
        name = name.removeprefix(_WRAPPERS[0])
    return name
