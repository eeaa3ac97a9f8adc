"""Read the checkpoints that scripts/make_states made, and hold them against the truth beside; opt-in.

    scripts/check_states FOLDER [--only NAME ...]

Prints for each case: ok (names, shapes and bits of every second moment are right, and so are beta2, steps and the kind
of average), "refused as wanted", or WRONG with what was found; exits with 1 if anything is WRONG. Run it where the
other trainers' libraries are not installed, as no reader may need them.
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

FOREIGN = ("deepspeed", "bitsandbytes", "torchao", "schedulefree", "optimi", "pytorch_optimizer", "ivon")


def main() -> int:
    """Check the cases in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what scripts/make_states made")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases alone; * and ? stand for anything")
    arguments = parser.parse_args()
    installed = [name for name in FOREIGN if importlib.util.find_spec(name)]
    if installed:
        parser.error(f"{installed[0]} must not be installed here: no reader may need it; use the project's environment")
    cases = sorted(path.parent for path in arguments.folder.glob("[!.]*/case.json"))
    if arguments.only:
        cases = [case for case in cases if any(fnmatch.fnmatch(case.name, one) for one in arguments.only)]
    if not cases:
        parser.error(f"no case in {arguments.folder}; make some with scripts/make_states")
    logging.getLogger("squisher_mergekit").setLevel(logging.ERROR)
    import squisher_mergekit.optimizers.load  # noqa: F401  # imported once, for all processes

    wrong = 0
    # A process for each, as what one case makes its process import can be what another needs.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for folder, outcome in zip(cases, pool.imap(check, cases, chunksize=1), strict=True):
            wrong += outcome.startswith("WRONG")
            print(f"{folder.name:32} {outcome}", flush=True)
    print(f"{len(cases)} cases, {wrong} WRONG")
    return 1 if wrong else 0


def check(folder: Path) -> str:
    """Read one case and say how it went."""
    from squisher_mergekit import extract, load_fisher
    from squisher_mergekit.errors import RefusedError

    case = json.loads((folder / "case.json").read_text())
    source = folder / (case.get("optimizer_file") or "")
    base = next((folder / name for name in ("base", "base_config") if (folder / name).is_dir()), None)
    refuse = case["expect"].startswith("refuse")
    wanted = case.get("errors")
    try:
        fisher = load_fisher(source, base=base)
        read = {name: fisher[name] for name in fisher}
        with tempfile.TemporaryDirectory() as scratch:  # which looks at the values as well
            extract(source, Path(scratch) / "out", base=base)
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
    """Return what differs between what was read and the truth, by more than a relative tolerance."""
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
    """Return what the metadata say of training, where the case knows otherwise."""
    beta2 = case["beta2"] if case["optimizer"].endswith("Adafactor") else config.optimizer.beta2  # it has none
    rules = {"beta2": beta2, "step": config.steps, "bias_corrected": config.bias_corrected}
    return [f"{key} is {found}, not {case[key]}" for key, found in rules.items() if case.get(key) not in (None, found)]


if __name__ == "__main__":
    sys.exit(main())
