"""Run the GPU tests and the benchmarks on a GPU, and write check_gpu.json into a folder.

The machine needs torch with Triton, transformers, safetensors, accelerate, peft, click, pytest, pytest-xdist and
hypothesis. ``--wheels`` prints the other packages with their releases. On a machine without a network, fetch their
wheels elsewhere, add the wheel of this package (``pip wheel --no-deps .``), and name the folder by ``--install``: the
script then installs them into a new environment beside the packages that are there. Every step has a time limit, and
the file is written anew after each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scripts import ROOT

# mergekit, its requirements beyond the packages above, and theirs.
PACKAGES = (
    "mergekit",
    "annotated-types",
    "datasets",
    "dill",
    "immutables",
    "multiprocess",
    "pydantic",
    "pydantic-core",
    "typing-inspection",
)
TESTS = ("tests/tensors", "tests/fisher", "tests/merging", "tests/estimators", "tests/applications", "tests/training")
# 1.1e9 parameters.
LLAMA = {"hidden": 2048, "layers": 19, "intermediate": 5632, "vocab": 32000, "shards": 4}
TAIL = 6000


class Step(NamedTuple):
    """Command with its name, its limit in seconds, and its JSON file ``report``."""

    name: str
    limit: int
    command: list[str]
    report: Path | None = None
    environment: tuple[tuple[str, str], ...] = ()


def steps(work: Path, small: bool = False) -> list[Step]:
    """Return the commands, the most important ones first.

    Args:
        work: Folder for models and reports.
        small: If True, use tiny sizes on the CPU for a trial of the script.
    """
    device = "cpu" if small else "cuda"
    which = ["-m", "gpu", *TESTS, "-n", "8"] if not small else ["tests/merging/test_fused.py", "-k", "tie"]
    settings = ["-o", "filterwarnings=default", "--continue-on-collection-errors", "--durations=8"]
    found = [_module("tests", 150, "pytest", "-q", "--device", device, *settings, *which)]
    kernel = ["--device", device, *(["--shape", "7", "11", "--counts", "2", "--rounds", "2"] if small else [])]
    found.append(_reporting(work, "kernel", 90, "gpu_kernel", *kernel))
    for method in ("squisher", "ubgm prior"):
        cache = (("TRITON_CACHE_DIR", str(work / f"triton {method}")),)
        first = _module(f"first call {method}", 40, "scripts.benchmarks.gpu_kernel", *kernel, "--first", "--methods")
        found.append(first._replace(command=[*first.command, method], environment=cache))
    estimator = ["--device", device, "--seconds", "50", *(["--quick"] if small else [])]
    found.append(_reporting(work, "estimator", 75, "fisher_gpu", *estimator))
    sizes = LLAMA if not small else {"hidden": 36, "layers": 2, "intermediate": 47, "vocab": 61, "shards": 2}
    merge = [f"--{name}={size}" for name, size in sizes.items()] + ["--repeat", "1"]
    merge += ["--work", str(work / "models"), "--made-on", device]
    found.append(_reporting(work, "merges in one process", 150, "gpu_merge", *merge, "--device", device))
    merge += [] if small else ["--options=--cuda"]
    found.append(_reporting(work, "merge", 100, "merge", *merge, "--only", "squisher", "ubgm_squisher"))
    feed = ["--device", device, "--megabytes", "1" if small else "2048", "--rounds", "1" if small else "2"]
    found.append(_reporting(work, "feed", 40, "gpu_feed", *feed, "--work", str(work)))
    found.append(_reporting(work, "read-ahead", 90, "read_ahead", *merge))
    return found


def _module(name: str, limit: int, module: str, *arguments: str) -> Step:
    return Step(name, limit, [sys.executable, "-m", module, *arguments])


def _reporting(work: Path, name: str, limit: int, module: str, *arguments: str) -> Step:
    report = work / f"{name}.json"
    step = _module(name, limit, f"scripts.benchmarks.{module}", "--json", str(report), *arguments)
    return step._replace(report=report)


def run(step: Step, left: float) -> dict[str, Any]:
    """Run a step and return its exit code (None: stopped at its limit), seconds, end of its output, and report.

    A step is stopped with all processes that it started. One for which no time is left does not begin.
    """
    if left <= 0:
        return {"code": None, "seconds": 0.0, "output": "left out: no time left"}
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **dict(step.environment)}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, preexec_fn=os.setpgrp
        )
        try:
            code: int | None = process.wait(min(step.limit, left))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - TAIL))
        printed = output.read().decode(errors="replace")
    found: dict[str, Any] = {"code": code, "seconds": round(time.perf_counter() - began, 1), "output": printed}
    if step.report is not None and step.report.exists():
        with contextlib.suppress(ValueError):  # a step that was stopped while it wrote
            found["report"] = json.loads(step.report.read_text())
    return found


def machine() -> dict[str, Any]:
    """Return card, driver, and versions."""
    import torch

    found: dict[str, Any] = {"python": sys.version.split()[0], "torch": torch.__version__, "cores": os.cpu_count()}
    for name in ("triton", "transformers", "mergekit"):
        try:
            found[name] = importlib.metadata.version(name)
        except ModuleNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        found |= {"card": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):  # not in every container
            found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    return found


def install(wheels: Path, folder: Path) -> Path:
    """Make an environment with these wheels that also sees the packages of this one; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    program = folder / "bin" / "python"
    site = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"]
    files = sorted(map(str, wheels.glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--python", str(program), "install", "-q", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-compile", "--no-cache-dir", *files], check=True)
    # After the wheels on the path, and after pip, which would leave out packages that it sees here.
    Path(site, "zz_outer.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    return program


def releases() -> list[str]:
    """Return the requirements that a machine with torch lacks, pinned as in constraints.txt."""
    pins = dict(line.split(";")[0].split("#")[0].strip().split("==") for line in _pins())
    known = {name.lower().replace("_", "-"): release for name, release in pins.items()}
    return [f"{name}=={known[name]}" for name in PACKAGES]


def _pins() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if "==" in line and not line.startswith("#")]


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; return 0 if all succeeded."""
    began, options = time.perf_counter(), parse(arguments)
    if options.wheels:
        print("\n".join(releases()))
        return 0
    if options.install:
        with tempfile.TemporaryDirectory(prefix="check-gpu-") as folder:
            program = install(options.install, Path(folder) / "environment")
            rest = ["--out", str(options.out.absolute()), *(["--small"] if options.small else [])]
            rest += ["--seconds", str(options.seconds - (time.perf_counter() - began))]
            rest += ["--work", str(options.work.absolute())] if options.work else []
            rest += ["--only", *options.only] if options.only else []
            command = [str(program), "-m", "scripts.benchmarks.gpu_check", *rest]
            return subprocess.run(command, cwd=ROOT, check=False).returncode
    options.out.mkdir(parents=True, exist_ok=True)
    ended = began + options.seconds
    report: dict[str, Any] = {"machine": machine(), "steps": {}}
    with tempfile.TemporaryDirectory(prefix="check-gpu-", dir=options.work) as work:
        for step in steps(Path(work), options.small):
            if options.only and step.name not in options.only:
                continue
            found = run(step, ended - time.perf_counter())
            report["steps"][step.name] = found
            (options.out / "check_gpu.json").write_text(json.dumps(report, indent=1))
            print(
                f"== {step.name}: exit code {found['code']} after {found['seconds']} s\n{found['output']}", flush=True
            )
    return int(any(found["code"] != 0 for found in report["steps"].values()))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("check_gpu"), help="folder for check_gpu.json")
    parser.add_argument("--seconds", type=float, default=360, help="limit for all steps together (default: 360)")
    parser.add_argument("--work", type=Path, help="folder for 16 GB of models (default: the system's temporary folder)")
    parser.add_argument("--wheels", action="store_true", help="print the packages to bring along, and stop")
    parser.add_argument("--install", type=Path, metavar="FOLDER", help="install these wheels into a new environment")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="run these steps only, such as kernel or feed")
    parser.add_argument("--small", action="store_true", help="tiny sizes on the CPU, to try the script")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
