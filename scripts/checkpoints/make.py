"""Make real checkpoints of other trainers with their own libraries, and the second moments next to them.

    python -m scripts.checkpoints.make OUT [--only NAME ...] [--list]
    python -m scripts.checkpoints.check OUT                              # in the project's environment

Each case is a folder in OUT as a training run leaves it, plus ``expected.safetensors``, the second moments of the live
optimizer by parameter name, and ``case.json``, the expected behaviour of a reader. Runs have a few steps on the CPU, in
one to four gloo processes where the trainer shards.

The command needs environments of its own, because the project must not have these libraries, and because they exclude
each other. All of them begin with

    python3.11 -m venv libs && . libs/bin/activate
    pip install torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 peft==0.21.2 einops psutil setuptools wheel

``--only`` then makes the cases of the installed packages. ``--no-deps`` keeps packages from bringing torchvision or
another torch; where an import asks for a further package, install it in the same way. For DeepSpeed, FSDP,
adapters and optimizers:

    pip install hjson msgpack ninja py-cpuinfo
    DS_BUILD_OPS=0 pip install --no-build-isolation --no-deps deepspeed==0.19.8
    pip install --no-deps bitsandbytes==0.50.2 torchao==0.18.0 schedulefree==1.4.1 torch-optimi==0.3.3 \
        pytorch-optimizer==4.1.0 ivon-opt==0.1.3 galore-torch==1.0 apollo-torch==1.0.3 lomo-optim==0.1.1

Trainers with names of their own, one environment for each line:

    pip install --no-deps diffusers==0.42.1 timm==1.0.31 torchvision importlib_metadata zipp lazy-importer
    pip install torchtune==0.6.1 torchao==0.9.0
    pip install litgpt==0.5.13
    pip install --no-deps megatron-core==0.16.1
    pip install --no-deps ai2-olmo-core==3.0.0 rich cached_path bettermap dataclass-extensions omegaconf boto3 requests
    pip install --no-deps ai2-olmo==0.6.0 omegaconf antlr4-python3-runtime==4.9.3 rich cached_path importlib_resources
    pip install --no-deps mosaicml==0.32.1 torchvision torchmetrics coolname py-cpuinfo importlib_metadata lazy-importer
    pip install --no-deps nanotron==0.4 dacite
    pip install --no-deps verl==0.9.1 ray jsonschema tensordict pyvers orjson omegaconf hydra-core codetiming dacite
    pip install --no-deps torchtitan==0.3.0 tyro spmd-types==0.2.3 torch_checkpointing torchdata datasets
    pip install --no-deps sentence-transformers==6.2.0 datasets scikit-learn scipy

torchvision's compiled part does not fit a torch of another build; its two operators are declared then, as no case calls
them. GPT-NeoX, nanoGPT, BLOOM (Megatron-DeepSpeed) and Megatron-Core with stacked layers need no library: own code
writes their layouts.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from scripts import ROOT

SECONDS = 300  # limit for one case


def main() -> int:
    """Make the cases, or one rank's part of a case in a process that ``run`` started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for the cases")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make only these cases; * and ? are wildcards")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--rank-of", metavar="NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    from scripts.checkpoints.foreign_states import cases

    if arguments.list:
        print("\n".join(f"{name:32} {case.note}".rstrip() for name, case in cases().items()))
        return 0
    if arguments.out is None:
        parser.error("OUT is missing")
    if arguments.rank_of:
        return make(arguments.out, arguments.rank_of)
    wanted = [
        name for name in cases() if not arguments.only or any(fnmatch.fnmatch(name, one) for one in arguments.only)
    ]
    if not wanted:
        parser.error("no case has such a name; --list prints them")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = [name for name in wanted if not run(arguments.out, name, cases()[name].ranks)]
    print(f"{len(wanted) - len(failed)} made, {len(failed)} failed{': ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


def run(out: Path, name: str, ranks: int) -> bool:
    """Make one case in one process for each rank; a case that fails leaves a log and no folder."""
    began, making, log = time.monotonic(), out / f".{name}", out / f"{name}.log"
    for old in (making, out / name):
        shutil.rmtree(old, ignore_errors=True)
    making.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu"}
    ranked = {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "NODE_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "scripts.checkpoints.make", str(making.resolve()), "--rank-of", name]
    with log.open("w") as file:
        processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **quiet, **ranked, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]
        made = _wait(processes, began + SECONDS)
    if made:
        making.rename(out / name)
        log.unlink()
    else:
        shutil.rmtree(making)
    print(f"{name:32} {'made' if made else f'FAILED, see {log}'} in {time.monotonic() - began:.0f} s", flush=True)
    return made


def _wait(processes: list[subprocess.Popen[bytes]], until: float) -> bool:
    """Wait for all processes; kill the others when one fails."""
    while time.monotonic() < until and all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return True
        time.sleep(0.1)
    for process in processes:
        process.kill()
        process.wait()
    return False


def make(out: Path, name: str) -> int:
    """Make one rank's part of a case."""
    from scripts.checkpoints.foreign_states import cases
    from scripts.checkpoints.foreign_states.common import declare_torchvision, keep_case

    declare_torchvision()
    case, rank = cases()[name], os.environ["RANK"]
    made = case.make(out, **case.options)
    if rank == "0":
        keep_case(out, name, case, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
