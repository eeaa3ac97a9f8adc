"""Read the checkpoints of ``scripts.checkpoints.make``, and compare them with the second moments next to them.

    python -m scripts.checkpoints.check FOLDER [--only NAME ...]

Prints one line for each case: ok (names, shapes and bits of every second moment are right, and so are beta2, steps and
bias correction), "refused as wanted", or WRONG with the difference. Exits with 1 if a case is WRONG. The environment
must not have the libraries of the other trainers, because no reader may need them.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import logging
import multiprocessing
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

FOREIGN = (
    "deepspeed", "bitsandbytes", "torchao", "schedulefree", "optimi", "pytorch_optimizer", "ivon", "litgpt",
    "torchtune", "diffusers", "timm", "megatron", "olmo", "olmo_core", "composer", "nanotron", "verl", "torchtitan",
    "sentence_transformers",
)  # fmt: skip


def main() -> int:
    """Check the cases in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="output folder of scripts.checkpoints.make")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="check only these cases; * and ? are wildcards")
    arguments = parser.parse_args()
    installed = [name for name in FOREIGN if importlib.util.find_spec(name)]
    if installed:
        parser.error(f"{installed[0]} must not be installed here: no reader may need it; use the project's environment")
    cases = sorted(path.parent for path in arguments.folder.glob("[!.]*/case.json"))
    if arguments.only:
        cases = [case for case in cases if any(fnmatch.fnmatch(case.name, one) for one in arguments.only)]
    if not cases:
        parser.error(f"no case in {arguments.folder}; make some with python -m scripts.checkpoints.make")
    logging.getLogger("squisher_mergekit").setLevel(logging.ERROR)
    import squisher_mergekit.optimizers.load  # noqa: F401  # imported once, for all processes

    wrong = 0
    # One process for each case: a module that one case imports could hide a missing import of another.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for folder, outcome in zip(cases, pool.imap(check, cases, chunksize=1), strict=True):
            wrong += outcome.startswith("WRONG")
            print(f"{folder.name:32} {outcome}", flush=True)
    print(f"{len(cases)} cases, {wrong} WRONG")
    return 1 if wrong else 0


def check(folder: Path) -> str:
    """Read one case and return its verdict."""
    from squisher_mergekit import extract, load_fisher
    from squisher_mergekit.errors import RefusedError

    case = json.loads((folder / "case.json").read_text())
    source = folder / (case.get("optimizer_file") or "")
    base = next((folder / name for name in ("base", "base_config") if (folder / name).is_dir()), None)
    named = case.get("model", "model_config")
    model = folder / named if (folder / named).is_dir() else None
    refuse = case["expect"].startswith("refuse")
    wanted = case.get("errors")
    try:
        fisher = load_fisher(source, model, base)
        read = {name: fisher[name] for name in fisher}
        lift = fisher.config.parameters == "adapter" and base is not None and base.name == "base"
        with tempfile.TemporaryDirectory() as scratch:  # checks the values as well
            extract(source, Path(scratch) / "out", model, base, lift=lift)
    except RefusedError as error:
        kind = type(error).__name__
        if not refuse or kind not in (wanted or [kind]):
            return f"WRONG: {kind}: {error}"
        return f"refused as wanted: {kind}: {error}"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"WRONG: {type(error).__name__} from {Path(place.filename).name}:{place.lineno}: {error!s:.200}"
    if refuse:
        return f"WRONG: read, but should be refused: {case['expect'].partition(':')[2]}"
    tolerance = 1e-6 if case["optimizer"].endswith("Adafactor") else 0.0
    faults = [*compare(read, folder / "expected.safetensors", tolerance), *described(fisher.config, case)]
    return f"WRONG: {'; '.join(faults[:4])}" if faults else f"ok, {len(read)} tensors"


def compare(read: dict[str, Any], truth: Path, tolerance: float) -> list[str]:
    """Return the differences between a Fisher and its reference beyond a relative tolerance."""
    import torch
    from safetensors.torch import load_file

    expected = load_file(truth)
    faults = [f"no {name}" for name in sorted(set(expected) - set(read))]
    faults += [f"{name} should not be there" for name in sorted(set(read) - set(expected))]
    for name in sorted(set(read) & set(expected)):
        found, right = read[name], expected[name]
        if found.shape != right.shape or found.dtype != right.dtype:
            faults.append(f"{name} is {found.dtype} {list(found.shape)}, not {right.dtype} {list(right.shape)}")
        elif count := int((~torch.isclose(found, right, tolerance, 0.0)).sum()):
            faults.append(f"{name} differs in {count} of {right.numel()} entries")
    return faults


def described(config: Any, case: dict[str, Any]) -> list[str]:
    """Return the entries of the metadata that differ from the case."""
    beta2 = (
        case["beta2"] if case["optimizer"].endswith("Adafactor") else config.optimizer.beta2
    )  # Adafactor has no beta2
    rules = {"beta2": beta2, "step": config.steps, "bias_corrected": config.bias_corrected}
    return [f"{key} is {found}, not {case[key]}" for key, found in rules.items() if case.get(key) not in (None, found)]


if __name__ == "__main__":
    sys.exit(main())
