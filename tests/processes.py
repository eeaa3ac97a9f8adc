"""Processes of a distributed test, forked from a server that has imported the libraries once.

Each process would otherwise import torch and transformers anew, which takes longer than the test itself.
"""

import faulthandler
import importlib
import multiprocessing
import os
import socket
import sys
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path

import torch.distributed as dist

PRELOADED = ["torch", "torch.distributed", "transformers", "accelerate", "peft", "tests.training.worker"]


def run(
    module: str, kind: str, folder: Path, world: int, timeout: float = 240, *, as_torchrun: bool = False
) -> tuple[list[int | None], list[str]]:
    """Run ``main(kind, folder, rank, world)`` of a module in a process for each rank.

    Args:
        module: Name of the module.
        kind: First argument.
        folder: Second argument; made if it is missing.
        world: Number of processes.
        timeout: Seconds after which a process is killed.
        as_torchrun: Set the environment variables that torchrun sets.

    Returns:
        Exit codes (negative: ended by a signal), and what each wrote to standard output and standard error.
    """
    folder.mkdir(exist_ok=True)
    context = _context()
    outputs = [folder / f".output-{rank}" for rank in range(world)]
    port = _free_port()
    arguments = [
        (module, kind, folder, rank, world, output, timeout, _variables(rank, world, port) if as_torchrun else {})
        for rank, output in enumerate(outputs)
    ]
    processes = [context.Process(target=_work, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        process.kill()
        process.join()
    said = [output.read_text(errors="replace") for output in outputs]
    for output in outputs:
        output.unlink()
    return [process.exitcode for process in processes], said


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _variables(rank: int, world: int, port: int) -> dict[str, str]:
    """Return the environment variables of a rank."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    return {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _work(
    module: str,
    kind: str,
    folder: Path,
    rank: int,
    world: int,
    output: Path,
    timeout: float,
    variables: dict[str, str],
) -> None:
    """Run the module's ``main`` with its output in a file; a failed one ends with exit code 1.

    A process that is not done shortly before the timeout writes the stacks of its threads. Process groups stay until
    the process ends: the destructor of a gloo group joins a thread that may need the GIL, which the caller of the
    destructor holds (torch 2.13), for example where the last reference to a DDP model goes.
    """
    os.environ |= variables
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    os.dup2(sys.stderr.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    faulthandler.dump_traceback_later(timeout * 0.9)
    try:
        importlib.import_module(module).main(kind, folder, rank, world)
        if dist.is_initialized():
            dist.barrier()  # no process leaves while another one still communicates
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    sys.stderr.flush()
    os._exit(0)  # without the clean-up of a process that imported pytest's modules
