"""Batches as CUDA graphs: captured shapes, inputs of a replay, checks beside them, and the eager fallback."""

import contextlib
import types

import pytest
import torch
from torch import nn

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators import accumulator as accumulator_module
from squisher_mergekit.estimators.accumulator import FisherAccumulator
from squisher_mergekit.estimators.cuda_graph import (
    BatchGraphs,
    Cuda,
    Timing,
    graphs_for,
    shape_of,
    tensors_of,
    with_tensors,
)
from squisher_mergekit.estimators.estimate import estimate_fisher
from squisher_mergekit.tensors.devices.streams import SecondStream
from tests.estimators.models import assert_close, batch_of, make


class _Recorder:
    """Device that replays captured work by running it again on the captured tensors, like a graph."""

    device = torch.device("cpu")

    def __init__(self, host=1.0, memory=0.0, error=None):
        self.timing = Timing(host, lambda: 1.0, memory)
        self.error, self.captures, self.replays = error, 0, 0
        self.second = SecondStream(self.device)

    def capture(self, work, generator):
        self.captures += 1
        if self.error is not None:
            raise self.error
        totals = [total.clone() for total in self.totals()]
        count = work()
        for total, before in zip(self.totals(), totals, strict=True):
            total.copy_(before)  # a capture runs nothing

        def replay():
            self.replays += 1
            work()

        return count, replay

    def timed(self, work):
        return work(lambda: None), self.timing


@pytest.fixture
def recorder(monkeypatch):
    """Let the accumulators of this test capture with a recorder."""
    recorder = _Recorder()
    monkeypatch.setattr(accumulator_module, "graphs_for", lambda _: BatchGraphs(recorder))
    return recorder


def _accumulator(recorder, model, *args, **options):
    accumulator = FisherAccumulator(model, *args, **options)
    recorder.totals = lambda: list(accumulator.accumulators.values())
    return accumulator


def _classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def _batches(count, size=4):
    generator = torch.Generator().manual_seed(size)
    return [(torch.randn(size, 5, generator=generator), torch.arange(size) % 3) for _ in range(count)]


@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_replays_add_what_eager_batches_add(recorder, labels):
    """Each replay reads its own batch and draws labels for it."""
    model, batches = _classifier(), _batches(9)
    accumulator = _accumulator(recorder, model, labels, task="classification")
    for batch in batches:
        accumulator.add(batch)
    expected = estimate_fisher(model, batches, labels, statistic="sum", task="classification", cuda_graph=False)
    assert recorder.replays == 7  # batch 0 is verified, and batch 1 is timed
    assert accumulator.examples == 36
    for parameter, name in accumulator.names.items():
        torch.testing.assert_close(accumulator.accumulators[parameter], expected[name])


def test_a_language_model_is_captured_too(recorder):
    """Dicts with a mask, padding and several tokens count their tokens at each replay."""
    torch.manual_seed(0)
    model, batches = make("llama"), [batch_of("causal-lm", seed=n) for n in range(6)]
    accumulator = _accumulator(recorder, model, datum="token")
    for batch in batches:
        accumulator.add(batch)
    expected = estimate_fisher(model, batches, statistic="sum", datum="token", cuda_graph=False)
    assert recorder.replays == 4
    assert accumulator.examples == expected.config.num_examples
    assert_close(accumulator.fisher(statistic="sum", num_examples=accumulator.examples), expected, model=model)


class _Mixing(nn.Linear):
    """Layer that can begin to mix its examples."""

    mixes = False

    def forward(self, x):
        return super().forward(x.roll(1, 0) if self.mixes else x)


def test_a_replayed_batch_is_checked_too(recorder):
    """A layer that begins to mix its examples in a checked batch is refused there, though a graph adds the batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), _Mixing(7, 3))
    accumulator = _accumulator(recorder, model, task="classification")
    for batch in _batches(7):
        accumulator.add(batch)
    model[2].mixes = True
    with pytest.raises(UnsupportedStateError, match="in batch 8 its module gets other parts"):
        accumulator.add(_batches(1)[0])
    assert recorder.replays == 6


class _LoggedStream:
    """Second stream of a CPU that logs what runs beside what."""

    def __init__(self):
        self.log = []

    @contextlib.contextmanager
    def beside(self, launch):
        self.log.append("launch")
        launch()
        yield
        self.log.append("checked")

    def reserve(self, share):
        self.log.append(f"reserve {share}")


@pytest.mark.parametrize("verify", [True, False])
def test_checks_run_beside_their_graph(recorder, verify):
    """The fourth and the eighth batch are checked beside the launch of their graph; memory is reserved at the capture.

    Without verification nothing is.
    """
    recorder.second, recorder.timing = _LoggedStream(), Timing(1.0, lambda: 1.0, 0.125)
    accumulator = _accumulator(recorder, _classifier(), task="classification", verify=verify)
    for batch in _batches(9):
        accumulator.add(batch)
    assert recorder.replays == 7
    assert recorder.second.log == (["reserve 0.125", *["launch", "checked"] * 2] if verify else [])


def test_a_model_that_writes_to_a_buffer_runs_eagerly(recorder, caplog):
    """A check beside the graph would write to the buffer that the graph reads."""

    class _Scratch(nn.Linear):
        def __init__(self):
            super().__init__(5, 3)
            self.register_buffer("scratch", torch.zeros(4, 5))

        def forward(self, x):
            return super().forward(x + self.scratch[: len(x)].copy_(x.detach()).roll(1, 1))

    torch.manual_seed(0)
    accumulator = _accumulator(recorder, _Scratch(), task="classification")
    for batch in _batches(4):
        accumulator.add(batch)
    assert recorder.replays == 0
    assert "must not write to a buffer of the model" in caplog.text


def test_each_shape_has_its_graph(recorder):
    """A shape is captured at its second batch. A shape that occurs once is not captured."""
    accumulator = _accumulator(recorder, _classifier(), task="classification", verify=False)
    for size in (4, 4, 3, 4, 3, 2, 4):
        accumulator.add(_batches(1, size)[0])
    assert (recorder.captures, recorder.replays) == (2, 3)


def test_other_weights_need_another_graph(recorder):
    """Changed parameters need a new capture, because a graph reads the old memory."""
    model = _classifier()
    accumulator = _accumulator(recorder, model, task="classification", verify=False)
    for batch in _batches(4):
        accumulator.add(batch)
    model[0].weight.data = model[0].weight.data.clone()
    accumulator.add(_batches(1)[0])
    assert (recorder.captures, recorder.replays) == (1, 2)


@pytest.mark.parametrize(("host", "memory"), [(0.5, 0.0), (1.0, 0.5)], ids=["kernels take longer", "much memory"])
def test_other_models_stay_eager(monkeypatch, host, memory):
    """A device with hidden launches, or a graph that would keep much memory, captures nothing."""
    recorder = _Recorder(host, memory)
    monkeypatch.setattr(accumulator_module, "graphs_for", lambda _: BatchGraphs(recorder))
    accumulator = _accumulator(recorder, _classifier(), task="classification", verify=False)
    for batch in _batches(4):
        accumulator.add(batch)
    assert recorder.captures == 0


def test_a_failed_capture_runs_eagerly(recorder, caplog):
    """One line gives the reason, and the sums are complete."""
    recorder.error = RuntimeError("called a synchronizing CUDA operation")
    model, batches = _classifier(), [*_batches(5), *_batches(4, 3)]
    accumulator = _accumulator(recorder, model, task="classification", verify=False)
    for batch in batches:
        accumulator.add(batch)
    expected = estimate_fisher(model, batches, statistic="sum", task="classification", cuda_graph=False)
    for parameter, name in accumulator.names.items():
        torch.testing.assert_close(accumulator.accumulators[parameter], expected[name])
    assert recorder.captures == 2  # one for each shape
    assert [record.message for record in caplog.records] == [
        "no CUDA graph of this model (called a synchronizing CUDA operation); its batches run eagerly"
    ]


def test_parameters_of_a_later_batch_end_a_capture(recorder, caplog):
    """Parameters of a later batch have to be verified first, and the host reads values for that."""

    class _Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.seldom, self.out, self.late = nn.Linear(5, 5), nn.Linear(5, 3), False

        def forward(self, x):
            return self.out(self.seldom(x) if self.late else x)

    torch.manual_seed(0)
    model, batches = _Late(), _batches(3)
    accumulator = _accumulator(recorder, model, task="classification")
    for number, batch in enumerate(batches):
        model.late = number == 2
        accumulator.add(batch)
    expected = estimate_fisher(model, batches[2:], statistic="sum", task="classification", cuda_graph=False)
    torch.testing.assert_close(accumulator.accumulators[model.seldom.weight], expected["seldom.weight"])
    assert "must use the parameters of the batches before" in caplog.text


def test_a_user_can_opt_out(recorder):
    """cuda_graph=False never captures."""
    accumulator = _accumulator(recorder, _classifier(), task="classification", verify=False, cuda_graph=False)
    for batch in _batches(4):
        accumulator.add(batch)
    assert recorder.captures == 0


def test_a_cpu_has_no_graphs():
    """Models on a CPU run eagerly."""
    assert graphs_for(list(_classifier().parameters())) is None


def test_tensors_are_found_and_replaced_by_place():
    """Pairs, dicts and lists keep their structure and their other values."""
    batch = ({"x": torch.zeros(2), "scale": 2.0}, [torch.ones(3)])
    places = dict(tensors_of(batch))
    assert set(places) == {(0, "x"), (1, 0)}
    doubled = with_tensors(batch, {place: tensor + 1 for place, tensor in places.items()})
    assert doubled[0]["scale"] == 2.0
    assert doubled[0]["x"].tolist() == [1, 1]
    assert doubled[1][0].tolist() == [2, 2, 2]


def test_a_shape_is_everything_but_the_entries():
    """Another value that is no tensor, another dtype or another stride is another shape."""
    x = torch.zeros(2, 3)
    assert shape_of((x, 1)) == shape_of((x + 1, 1))
    others = [(x.double(), 1), (x[:1], 1), (x, 2), (torch.zeros(3, 2).T, 1), {"x": x}]
    assert len({shape_of((x, 1)), *map(shape_of, others)}) == 6


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("labels", ["true", "sampled"])
def test_gpu_replays_agree_with_eager_batches(device, name, labels):
    """Graphs and eager batches agree within rounding, also with drawn labels."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    torch.manual_seed(0)
    kind = {"bert": "classification", "llama": "causal-lm"}[name]
    model = make(name).to(device).eval()
    batches = [{k: v.to(device) for k, v in batch_of(kind, seed=n).items()} for n in range(7)]
    sums = []
    for graph in (False, True):
        accumulator = FisherAccumulator(model, labels, cuda_graph=graph)
        for batch in batches:
            accumulator.add(batch)
        sums.append(accumulator)
    assert sums[1]._graphs._graphs
    for parameter, total in sums[0].accumulators.items():
        torch.testing.assert_close(sums[1].accumulators[parameter], total, rtol=1e-3, atol=1e-6 * float(total.max()))


@pytest.mark.gpu
def test_a_gpu_draws_random_numbers_after_a_failed_capture(device, caplog):
    """A model that reads a value runs eagerly, and random numbers are drawn as before."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")

    class _Asking(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.sum()) > -1e9 else 0.0)

    torch.manual_seed(0)
    accumulator = FisherAccumulator(_Asking(5, 3).to(device), "sampled", task="classification")
    for x, y in _batches(7):
        accumulator.add((x.to(device), y.to(device)))
    assert "its batches run eagerly" in caplog.text
    assert bool(torch.randn(5, device=device).isfinite().all())


def _with_checks_beside(device, beside, mixes):
    """Return the sums of nine batches, the last one but one checked, and the streams that ran the layers of that one.

    Args:
        device: A GPU.
        beside: If True, the check runs on the second stream; else on that of the graph.
        mixes: If True, a layer mixes the examples of the checked batch.
    """
    torch.manual_seed(0)
    model, streams = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), _Mixing(7, 3)).to(device), []
    accumulator = FisherAccumulator(model, "sampled", task="classification")
    if not beside:
        accumulator._graphs._cuda.second = SecondStream(torch.device("cpu"))
    for number, (x, y) in enumerate(_batches(9)):
        if number == 7:
            assert accumulator._graphs._graphs
            model[2].mixes = mixes
            model[0].register_forward_hook(lambda *_: streams.append(torch.cuda.current_stream(device)))
        # The inputs are late, so that a stream that does not wait for them reads others.
        late, x, y = torch.full_like(x, torch.nan, device=device), x.to(device), y.to(device)
        torch.cuda._sleep(10_000_000)
        accumulator.add((late.copy_(x), y))
    return list(accumulator.accumulators.values()), streams


@pytest.mark.gpu
def test_gpu_checks_on_a_second_stream_change_no_digit(device):
    """Right batches pass, and the sums are those of a check on the stream of the graph."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    current = torch.cuda.current_stream(device)
    sums, streams = _with_checks_beside(device, True, False)
    others, inline = _with_checks_beside(device, False, False)
    assert (len(streams), len(inline), inline[0] == current, streams[0] == current) == (1, 1, True, False)
    for total, other in zip(sums, others, strict=True):
        torch.testing.assert_close(total, other, rtol=0, atol=0)
        assert bool(total.any())


@pytest.mark.gpu
def test_gpu_checks_on_a_second_stream_find_mixing(device):
    """A layer that mixes the examples of a checked batch is refused there, though its graph does not mix them."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    with pytest.raises(UnsupportedStateError, match="in batch 8 its module gets other parts"):
        _with_checks_beside(device, True, True)
    assert bool(torch.ones(3, device=device).sum() == 3)


def test_a_pass_is_timed_on_the_stream_of_its_gpu(monkeypatch):
    """An event that names no stream would measure the current GPU, which another one than the model's can be."""
    recorded = []

    class _Event:
        def __init__(self, enable_timing):
            pass

        def record(self, stream=None):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=1))
    count, _ = Cuda(torch.device("cuda", 1)).timed(lambda mark: 7)
    assert (count, recorded) == (7, ["stream of cuda:1"] * 2)


def test_a_new_buffer_is_another_state():
    """A graph reads the memory of the buffers that it was captured with."""
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))
    accumulator = FisherAccumulator(model, task="classification")
    accumulator.add(_batches(1)[0])
    before, old = accumulator._graph_state(), model[1].running_mean
    assert accumulator._graph_state() == before
    model[1].running_mean = old.clone()
    assert accumulator._graph_state() != before
