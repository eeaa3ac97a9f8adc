"""CUDA graphs of whole batches, for models whose kernels take less time than their launches.

A batch of a new shape runs eagerly, and is timed. If launching took most of the time, the next batch of this shape is
captured: forward pass, backward pass and the rules of all layers become one launch. The captured work adds to the same
accumulators, and draws the same labels. A check of the batch is launched on a second stream meanwhile. Nothing is
captured that waits for the host, such as experts in a loop; one log line says so, and batches stay eager.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from squisher_mergekit.estimators.tasks import Batch
from squisher_mergekit.tensors.devices.streams import SecondStream
from squisher_mergekit.tensors.sharded import is_sharded

LOG = logging.getLogger("squisher_mergekit")
Count = Tensor | int
Work = Callable[[Any, torch.Generator], Count]

MOST_GRAPHS = 8  # each keeps the activations of a pass
_MOST_MEMORY = 1 / 8  # of the GPU, that the activations of a captured pass may take
_LAUNCH_BOUND = 0.7  # share of the time on the GPU that the host was busy launching


@dataclass(frozen=True)
class Timing:
    """Cost of an eager pass.

    Attributes:
        host: Seconds until everything was launched.
        device: Returns the seconds on the GPU.
        memory: Share of the GPU's memory that the activations take.
    """

    host: float
    device: Callable[[], float]
    memory: float


@dataclass(frozen=True)
class Graph:
    """A captured pass.

    Attributes:
        inputs: Tensors that it reads, by their place in the batch.
        generator: Generator that it draws with.
        count: Number of data that it adds.
        replay: Launches it.
    """

    inputs: Mapping[Any, Tensor]
    generator: torch.Generator
    count: Count
    replay: Callable[[], None]


class Cuda:
    """Access to the graphs, clocks and streams of a CUDA device.

    Attributes:
        device: The device.
        second: Stream of the checks.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.second = SecondStream(device)
        self._pool: Any = None
        self._stream: Any = None

    def capture(self, work: Callable[[], Count], generator: torch.Generator) -> tuple[Count, Callable[[], None]]:
        """Capture work that draws with a generator; return its result and the function that repeats it.

        Raises:
            RuntimeError: The work waits for the host, or has an operation that no graph can repeat.
        """
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        capturing = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        try:
            with capturing, _refusing_waits(), _uncached_autocast(self.device):
                count = work()
        except Exception:
            self._end_capture(generator)
            raise
        return count, graph.replay

    def _end_capture(self, generator: torch.Generator) -> None:
        """Let generators draw eagerly again, which a capture that broke off leaves in their captured state."""
        with contextlib.suppress(Exception):
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros((), device=self.device).add_(1)

    def timed(self, work: Callable[[Callable[[], None]], Count]) -> tuple[Count, Timing]:
        """Run work, which calls its argument when activations are most; return its result and its cost."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        memory = [torch.cuda.memory_allocated(self.device)]
        total = torch.cuda.get_device_properties(self.device).total_memory
        began = time.perf_counter()
        stream = torch.cuda.current_stream(self.device)  # an event's own default is that of the current device
        start.record(stream)
        count = work(lambda: memory.append(torch.cuda.memory_allocated(self.device)))
        end.record(stream)
        host = time.perf_counter() - began

        def device() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return count, Timing(host, device, (max(memory) - memory[0]) / total)


@contextlib.contextmanager
def _refusing_waits() -> Iterator[None]:
    """Raise where the host would wait for the device, before CUDA makes the whole capture invalid."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """Leave the weights that autocast has cast out of a graph: they are freed when autocast ends."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, torch.get_autocast_dtype(device.type), cache_enabled=False):
        yield


class BatchGraphs:
    """Captured passes, one for each shape of a batch.

    Args:
        cuda: The device; tests give another one.
    """

    def __init__(self, cuda: Cuda) -> None:
        self._cuda = cuda
        self._timings: dict[Any, Timing] = {}
        self._graphs: dict[Any, Graph] = {}
        self._refused: set[Any] = set()
        self._logged = False

    def add(
        self,
        batch: Batch,
        seed: int,
        state: Any,
        eager: Callable[[Callable[[], None]], Count],
        work: Work,
        check: Callable[[], None] | None = None,
        *,
        due: bool = False,
    ) -> Count:
        """Add a batch, eagerly or by its graph.

        Args:
            batch: The batch.
            seed: Seed of its drawn labels.
            state: Everything else that the pass depends on and that may change from batch to batch.
            eager: Adds the batch, and calls its argument between forward and backward pass.
            work: Adds a batch with the labels that a generator draws; never waits for the host.
            check: Checks the batch, while its graph runs; it writes to nothing that ``work`` uses. None: there are no
                checks. ``eager`` has checks of its own.
            due: True if this batch is to be checked.

        Returns:
            The number of data of the batch.
        """
        inputs = dict(tensors_of(batch))
        key = (state, shape_of(batch))
        graph = self._graphs.get(key)
        if graph is None and self._is_worth_it(key):
            graph = self._capture(key, batch, inputs, work)
            if graph is not None and check is not None:
                self._cuda.second.reserve(self._timings[key].memory)  # the capture has freed all memory
        if graph is not None:
            for place, tensor in inputs.items():
                graph.inputs[place].copy_(tensor, non_blocking=True)
            graph.generator.manual_seed(seed)
            if check is None or not due:
                graph.replay()
            else:
                with self._cuda.second.beside(graph.replay):
                    check()
            return graph.count
        if key in self._timings or key in self._refused or any(t.device != self._cuda.device for t in inputs.values()):
            return eager(lambda: None)
        count, self._timings[key] = self._cuda.timed(eager)
        return count

    def _is_worth_it(self, key: Any) -> bool:
        """Return True if a shape was seen before and its launches took longer than its kernels."""
        if key not in self._timings or key in self._refused or len(self._graphs) == MOST_GRAPHS:
            return False
        timing = self._timings[key]
        if timing.memory <= _MOST_MEMORY and timing.host >= _LAUNCH_BOUND * timing.device():
            return True
        self._refused.add(key)
        return False

    def _capture(self, key: Any, batch: Batch, inputs: Mapping[Any, Tensor], work: Work) -> Graph | None:
        """Capture the work on a copy of a batch; None if it cannot be, which is logged once."""
        copies = {place: tensor.clone() for place, tensor in inputs.items()}
        generator = torch.Generator(self._cuda.device)
        try:
            count, replay = self._cuda.capture(lambda: work(with_tensors(batch, copies), generator), generator)
        except torch.OutOfMemoryError:
            self._refused.add(key)
            return None
        except Exception as error:  # whatever a model does that no graph can repeat
            self._refused.add(key)
            if not self._logged:
                reason = " ".join(str(error).split())[:200]
                LOG.warning("no CUDA graph of this model (%s); its batches run eagerly", reason)
                self._logged = True
            return None
        self._graphs[key] = Graph(copies, generator, count, replay)
        return self._graphs[key]


def graphs_for(parameters: Sequence[nn.Parameter]) -> BatchGraphs | None:
    """Return storage for the CUDA graphs of a model; None if it is sharded or not on one GPU."""
    devices = {parameter.device for parameter in parameters}
    one_gpu = len(devices) == 1 and parameters[0].is_cuda and torch.version.cuda is not None
    return BatchGraphs(Cuda(devices.pop())) if one_gpu and not any(map(is_sharded, parameters)) else None


def tensors_of(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Yield the tensors of a batch with their places in it.

    Example:
        >>> [place for place, _ in tensors_of(({"x": torch.zeros(2), "k": 3}, torch.zeros(2)))]
        [(0, 'x'), (1,)]
    """
    if isinstance(value, Tensor):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_of(item, (*place, key))
    elif isinstance(value, tuple | list):
        for number, item in enumerate(value):
            yield from tensors_of(item, (*place, number))


def with_tensors(value: Any, tensors: Mapping[tuple[Any, ...], Tensor], place: tuple[Any, ...] = ()) -> Any:
    """Return a batch with other tensors in the same places."""
    if isinstance(value, Tensor):
        return tensors[place]
    if isinstance(value, Mapping):
        return {key: with_tensors(item, tensors, (*place, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(with_tensors(item, tensors, (*place, number)) for number, item in enumerate(value))
    return value


def shape_of(value: Any) -> Any:
    """Return a hashable description of a batch: shapes, strides and dtypes of its tensors, and all other values."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, Mapping):
        return tuple((key, shape_of(item)) for key, item in value.items())
    if isinstance(value, tuple | list):
        return tuple(shape_of(item) for item in value)
    return repr(value)
