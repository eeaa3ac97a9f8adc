"""Reports and previews of merges that need no merge."""

KINDS = ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")


def made_report(models, layers, fell_back=0.0, abstained=0.0, conflicts=0.0):
    """Return the report of a run with equal shares."""
    labels = [f"runs/{chr(ord('a') + i)}" for i in range(models)]
    names = ["embed.weight", *(f"layers.{i}.{kind}.weight" for i in range(layers) for kind in KINDS)]
    figures = {"entries": 7, "fell_back": fell_back, "effective_weight": dict.fromkeys(labels, 1 / models)}
    if abstained:
        figures |= {"silent": 0.0, "abstained": dict.fromkeys(labels, abstained)}
    if conflicts:
        figures["sign_conflicts"] = dict.fromkeys(labels, conflicts)
    return {"method": "squisher", **figures, "by_tensor": {name: dict(figures) for name in names}}


def made_preview(report, **changes):
    """Return the plan that belongs to a report."""
    keys = ("estimator", "layout", "optimizer", "steps", "beta2", "scaling", "normalize", "scale", "density")
    models = [
        {"model": label, "fisher": f"{label}/optimizer.pt", **dict.fromkeys(keys), "covered": 7, "entries": 7}
        for label in report["effective_weight"]
    ]
    size = {"tensors": len(report["by_tensor"]), "entries": 7 * len(report["by_tensor"])}
    empty = {"lost": {}, "fallbacks": {}, "uncoupled": {}, "notes": [], "warnings": []}
    return {"method": "squisher", **size, "whole": size, "models": models, **empty, **changes}
