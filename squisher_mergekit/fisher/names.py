"""What parameter names tell."""


def kind_of(name: str) -> str:
    """Return the kind of layer a parameter belongs to: its name without indices, ``weight`` and ``bias``.

    Example:
        >>> kind_of("model.layers.3.mlp.up_proj.weight"), kind_of("bert.embeddings.LayerNorm.bias")
        ('mlp.up_proj', 'embeddings.LayerNorm')
    """
    parts = name.split(".")
    if len(parts) > 1 and parts[-1] in ("weight", "bias"):
        parts = parts[:-1]
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    inner = [part for part in parts[(first or 0) :] if not part.isdigit()]
    if first is None:
        inner = inner[-2:] if len(inner) > 2 else inner[-1:]
    return ".".join(inner) or name
