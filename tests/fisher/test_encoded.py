"""Compact Fishers on disk: writing, reading per tensor, refusals, extraction and merging."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from squisher_mergekit import extract
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import ConfigError, CorruptFileError, RefusedError, ValuesError
from squisher_mergekit.fisher import compact
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.encoded import EncodedStore, RankOneStore
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.summary import summarize
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore, safetensors_notes, tensor_infos
from tests.merging.reference import llama, merged, store_fisher

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"
BOUNDS = {"log8": 0.04, "log4": 0.40}
CONFIG = {
    "estimator": "squisher",
    "statistic": "ema",
    "steps": {"default": 3, "b.weight": 2},
    "optimizer": {"class": "torch.optim.AdamW", "beta2": 0.9},
    "coverage": {"with": 6, "without": {"head.weight": "tied to a.weight"}},
}
SHAPES = {"a.weight": (37, 29), "b.weight": (211,), "c.weight": (3, 13, 11), "d.weight": (), "e.weight": (0, 3)}
WHOLE = {"log8": ["d.weight", "e.weight"], "log4": ["d.weight", "e.weight"]} | {
    "rank1": ["b.weight", "d.weight", "e.weight"]
}


def _drawn(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tensor = (10 ** (torch.randn(shape, generator=generator, dtype=torch.float64) - 9)).float()
    return torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, tensor)


def _tensors():
    return {name: _drawn(shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}


def _fisher(tensors=None, **changes):
    return Fisher(MemoryStore(tensors or _tensors()), FisherConfig.model_validate(CONFIG | changes))


def _written(out, code, tensors=None, **options):
    write_fisher(_fisher(tensors), out, compress=code, **options)
    return read_fisher(out)


def _expected(tensor, code):
    parts = compact.encode(tensor, code, 4 * tensor.numel())
    return tensor if parts is None else compact.decode(parts, code, tensor.shape)


def _change(out, change, metadata=None):
    """Rewrite the file of a Fisher with other tensors or other header metadata."""
    file = out / "fisher.safetensors"
    with safe_open(file, "pt") as opened:
        # Without digests, as by another writer: they would reveal the change before it is looked at.
        noted = {key: value for key, value in opened.metadata().items() if not key.endswith(".crc32")}
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata=noted if metadata is None else metadata(noted))


class _Counting:
    """Store that records its reads."""

    def __init__(self, tensors):
        self._inside = MemoryStore(tensors)
        self.location, self.infos, self.reads = "here", self._inside.infos, []

    def read(self, name):
        self.reads.append(name)
        return self._inside.read(name)


@pytest.mark.parametrize("code", compact.NAMES)
def test_written_fishers_come_back_decoded(tmp_path, code):
    """Names, shapes and metadata come back, with the decoded tensors. The exceptions are named."""
    found = _written(tmp_path / "out", code)
    assert list(found) == list(SHAPES)
    assert found.config.encoding == {"default": code} | dict.fromkeys(WHOLE[code], "float32")
    for name, tensor in _tensors().items():
        assert torch.equal(found[name], _expected(tensor, code)), name
    assert torch.equal(found["head.weight"], found["a.weight"])
    assert found.config.steps == CONFIG["steps"]
    assert found.config.coverage.with_ == len(SHAPES)


@pytest.mark.parametrize("code", compact.NAMES)
def test_headers_alone_tell_shape_and_bytes(tmp_path, code):
    """The headers give the original shape, a float dtype and the bytes on disk, even with damaged or missing codes."""
    _written(tmp_path / "out", code)
    sizes = {name: info.nbytes for name, info in tensor_infos(tmp_path / "out" / "fisher.safetensors").items()}
    file = tmp_path / "out" / "fisher.safetensors"
    data = file.read_bytes()
    total = sum(sizes.values())
    file.write_bytes(data[: len(data) - total] + b"\xff" * total)
    found = read_fisher(tmp_path / "out")
    assert {name: found.info(name).shape for name in found} == SHAPES
    assert {found.info(name).dtype for name in found} == {torch.float32}
    assert sum(found.info(name).nbytes for name in found) == total
    assert found.info("a.weight").nbytes == sum(sizes["a.weight" + suffix] for suffix in compact.suffixes(code))


@pytest.mark.parametrize("code", compact.NAMES)
def test_reading_one_tensor_reads_no_other(tmp_path, code):
    """Opening reads no tensor. A look-up reads the two parts of that tensor alone."""
    _written(tmp_path / "out", code)
    parts = _Counting(load_file(tmp_path / "out" / "fisher.safetensors"))
    notes = safetensors_notes(tmp_path / "out" / "fisher.safetensors")
    store = EncodedStore(parts, read_fisher(tmp_path / "out").config.encoding, notes)
    assert parts.reads == []
    store.read("a.weight")
    assert sorted(parts.reads) == sorted("a.weight" + suffix for suffix in compact.suffixes(code))
    store.read("d.weight")
    assert parts.reads[2:] == ["d.weight"]


@pytest.mark.parametrize("code", compact.NAMES)
def test_mean_and_norm_are_those_of_the_decoded_entries(tmp_path, code):
    """The recorded mean and norm are over the decoded entries at the debiased scale, in float64."""
    found = _written(tmp_path / "out", code)
    values = torch.cat([
        (found[name].double() / (1 - 0.9 ** (2 if name == "b.weight" else 3))).flatten() for name in SHAPES
    ])  # fmt: skip
    assert found.config.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert found.config.norm == pytest.approx(values.norm().item(), rel=1e-12)
    assert summarize(found, scaling="debiased").mean == pytest.approx(found.config.mean, rel=1e-12)


def test_tensors_that_are_not_compact_have_the_dtype(tmp_path):
    """Tensors that are not compact are stored in bfloat16. A code that is not smaller is not used."""
    tensors = _tensors() | {"wide.weight": 10 ** torch.linspace(-38, 30, 1013)}
    tensors["wide.weight"] = tensors["wide.weight"][torch.randperm(1013, generator=torch.Generator().manual_seed(0))]
    write_fisher(_fisher(tensors), tmp_path / "out", torch.bfloat16, compress="log8")
    found = read_fisher(tmp_path / "out")
    whole = dict.fromkeys(["d.weight", "e.weight", "wide.weight"], "bfloat16")
    assert found.config.encoding == {"default": "log8"} | whole
    assert torch.equal(found["wide.weight"], tensors["wide.weight"].bfloat16())
    assert torch.equal(found["d.weight"], tensors["d.weight"].bfloat16())


def test_a_file_without_compact_tensors_is_plain(tmp_path):
    """A file is plain if no tensor would get smaller."""
    found = _written(tmp_path / "out", "rank1", {"b.weight": _drawn((211,))})
    assert found.config.encoding == {"default": "float32"}


@pytest.mark.parametrize("code", compact.NAMES)
def test_parameters_may_be_called_like_parts(tmp_path, code):
    """The names `norm.scale` and `x.row` next to `norm` and `x` are separate parameters, whether compact or not."""
    names = ["norm", "norm.scale", "norm.scale.code", "x", "x.row", "x.row.col", "y.code", "z.weight", "default.weight"]
    tensors = {name: _drawn((17, 23), seed) for seed, name in enumerate(names)}
    tensors |= {"small.scale": torch.ones(()), "small.col": torch.ones(()), "small": _drawn((31, 37))}
    found = _written(tmp_path / "out", code, tensors)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        whole = found.config.encoding.get(name) == "float32"
        assert torch.equal(found[name], tensor if whole else _expected(tensor, code)), name
    assert "z.weight" not in found.config.encoding


@pytest.mark.parametrize("code", compact.NAMES)
def test_shards_keep_the_parts_of_a_tensor_together(tmp_path, code):
    """Shards give the same tensors, and both parts of a tensor are in one file."""
    one = _written(tmp_path / "one", code)
    many = _written(tmp_path / "many", code, shard_bytes=300)
    assert all(torch.equal(one[name], many[name]) for name in SHAPES)
    index = json.loads((tmp_path / "many" / "fisher.safetensors.index.json").read_text())
    files = index["weight_map"]
    assert len(set(files.values())) > 1
    first, second = compact.suffixes(code)
    assert files["a.weight" + first] == files["a.weight" + second]
    assert index["metadata"]["total_size"] == sum(one.info(name).nbytes for name in one)


@pytest.mark.parametrize("code", compact.NAMES)
def test_adagrads_start_is_subtracted_before_rounding(tmp_path, code):
    """Sums close to their start keep the error bound, and no entry falls below 0."""
    start = torch.tensor(0.1).item()
    grown = _drawn((31, 29)) * 1e3
    optimizer = {"class": "torch.optim.Adagrad", "initial_accumulator_value": 0.1}
    fisher = _fisher({"w": (grown + start)}, statistic="sum", optimizer=optimizer)
    write_fisher(fisher, tmp_path / "out", compress=code)
    found = read_fisher(tmp_path / "out")
    assert found.config.optimizer.initial_accumulator_value is None
    exact, decoded = fisher.scaled("w").double(), found.scaled("w").double()
    assert bool((decoded >= 0).all())
    assert found.config.mean == pytest.approx(decoded.mean().item(), rel=1e-6)
    if code in BOUNDS:
        assert torch.equal(exact == 0, decoded == 0)
        assert bool(((decoded - exact).abs() <= BOUNDS[code] * exact * 1.00001).all())


@pytest.mark.parametrize("code", compact.NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_entries_leave_nothing_behind(tmp_path, code, bad):
    """NaN, infinite and negative entries are refused as in a plain file, without leftovers."""
    tensors = _tensors()
    tensors["c.weight"][1, 2, 3] = bad
    with pytest.raises(ValuesError, match=r"c\.weight"):
        write_fisher(_fisher(tensors), tmp_path / "out", compress=code)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_form_is_refused(tmp_path):
    """An unknown form is refused with the list of known forms."""
    with pytest.raises(ConfigError, match="log8, log4, rank1, found 'log2'"):
        write_fisher(_fisher(), tmp_path / "out", compress="log2")
    assert list(tmp_path.iterdir()) == []


def _drop(name):
    return lambda tensors: tensors.pop(name)


def _put(name, change):
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("log8", _drop("a.weight.code")),
        ("log8", _drop("a.weight.scale")),
        ("log4", _put("a.weight.code", lambda part: part[:-1].clone())),
        ("log4", _put("a.weight.code", lambda part: part.view(torch.int8).clone())),
        ("log4", _put("a.weight.code", lambda part: part[None].clone())),
        ("log8", _put("a.weight.scale", lambda part: part.float())),
        ("log8", _put("a.weight.scale", lambda part: part[:-1].clone())),
        ("log8", _put("a.weight.scale", lambda part: part.flatten())),
        ("log8", _put("a.weight.scale", lambda part: torch.full_like(part, 20000))),
        ("log8", lambda tensors: tensors.update({"a.weight": torch.ones(37, 29)})),
        ("rank1", _drop("a.weight.row")),
        ("rank1", _drop("a.weight.col")),
        ("rank1", _put("a.weight.row", lambda part: part.double())),
        ("rank1", _put("a.weight.col", lambda part: part.bfloat16())),
        ("rank1", _put("a.weight.row", lambda part: part[None].clone())),
        ("rank1", _put("a.weight.row", lambda part: torch.tensor(1.0))),
    ],
)
def test_damaged_parts_name_their_tensor(tmp_path, code, change):
    """A part that is missing, truncated, or of another dtype or shape is refused with the name of the tensor."""
    _written(tmp_path / "out", code)
    _change(tmp_path / "out", change)
    with pytest.raises(CorruptFileError, match=r"a\.weight must be kept as"):
        read_fisher(tmp_path / "out")["a.weight"]


@pytest.mark.parametrize(
    "noted", [None, "", "37", "[37, 31]", "[37, 290]", "[-37, -29]", '["37", 29]', "[true, 1073]", "[" * 9999]
)
def test_a_shape_that_does_not_fit_is_refused(tmp_path, noted):
    """A missing shape, an invalid shape and a shape with another number of entries than codes are refused."""
    _written(tmp_path / "out", "log4")
    others = {} if noted is None else {"a.weight.shape": noted}
    without = "a.weight.shape"
    _change(
        tmp_path / "out",
        lambda tensors: None,
        lambda notes: {key: value for key, value in notes.items() if key != without} | others,
    )
    with pytest.raises(CorruptFileError, match=r"a\.weight must be kept as log4"):
        read_fisher(tmp_path / "out")["a.weight"]


@pytest.mark.parametrize("code", compact.NAMES)
def test_flipped_bytes_give_a_tensor_or_our_error(tmp_path, code):
    """A flipped byte of parts or metadata gives a tensor of the right shape or an error of one line."""
    _written(tmp_path / "out", code, {"a.weight": _drawn((37, 29))})
    file = tmp_path / "out" / "fisher.safetensors"
    whole = file.read_bytes()
    begin = whole.index(b"{")
    places = {*range(len(whole) - 200, len(whole)), *(whole.index(b"shape") + i for i in range(20)), begin + 2}
    for place in sorted(places)[::3]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            found = read_fisher(tmp_path / "out")
            tensors = {name: found[name] for name in found}
        except RefusedError:
            continue
        assert all(tensors[name].shape == found.info(name).shape for name in tensors)


@pytest.mark.parametrize("code", compact.NAMES)
def test_a_real_checkpoint_is_extracted_and_inspected(tmp_path, code):
    """`squisher extract --compress` keeps the accumulators within the bound, and both commands print the encoding."""
    checkpoint = STATES / "trainer_llama_decay"
    arguments = ["extract", str(checkpoint), "-o", str(tmp_path / "out"), "--compress", code, "--quiet"]
    result = CliRunner().invoke(main, [*arguments, "--json", str(tmp_path / "report.json")])
    assert result.exit_code == 0, result.output
    expected = load_file(checkpoint / "expected.safetensors")
    found = read_fisher(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], _expected(tensor, code))
        if code in BOUNDS:
            assert torch.equal(found[name] == 0, tensor == 0)
            assert bool(((found[name].double() - tensor.double()).abs() <= BOUNDS[code] * tensor.double()).all())
    size = sum(info.nbytes for info in tensor_infos(tmp_path / "out" / "fisher.safetensors").values())
    assert size < {"log8": 0.27, "log4": 0.15, "rank1": 0.15}[code] * 4 * sum(t.numel() for t in expected.values())
    assert json.loads((tmp_path / "report.json").read_text())["bytes"] == size
    said = f" of {code}" + (" (5 as float32)" if code == "rank1" else "")
    inspected = CliRunner().invoke(main, ["inspect", str(tmp_path / "out"), "--quiet"])
    assert inspected.exit_code == 0, inspected.output
    assert f"{said}\n" in result.output
    assert f"{said}\n" in inspected.output


def test_python_extracts_compact_fishers_too(tmp_path):
    """`extract(compress=...)` returns the decoded Fisher.

    With a dtype, tensors that are not compact have that dtype.
    """
    found = extract(STATES / "plain_adam", tmp_path / "out", dtype="bfloat16", compress="rank1")
    assert set(found.config.encoding.values()) == {"rank1", "bfloat16"}
    expected = load_file(STATES / "plain_adam" / "expected.safetensors")
    name = "model.norm.weight"
    assert torch.equal(found[name], expected[name].bfloat16())


@pytest.mark.parametrize("code", compact.NAMES)
def test_a_stock_merge_takes_compact_fishers(tmp_path, code):
    """`mergekit-yaml` on compact Fishers gives the merge of the decoded tensors, bit for bit. The plan reads them."""
    models = [llama(tmp_path / f"m{seed}", seed) for seed in range(2)]
    entries = {"compact": [], "decoded": []}
    for seed, weights in enumerate(models):
        out = tmp_path / f"compact{seed}"
        tensors = {name: _drawn(tensor.shape, seed) for name, tensor in weights.items()}
        store_fisher(tmp_path / f"given{seed}", tensors)
        write_fisher(read_fisher(tmp_path / f"given{seed}"), out, compress=code)
        decoded = read_fisher(out)
        store_fisher(tmp_path / f"decoded{seed}", {name: decoded[name] for name in decoded})
        for kind, found in entries.items():
            found.append(
                {"model": str(tmp_path / f"m{seed}"), "parameters": {"fisher": str(tmp_path / f"{kind}{seed}")}}
            )
    results = {}
    for kind, found in entries.items():
        config = {"merge_method": "squisher", "models": found, "dtype": "float32"}
        results[kind] = merged(config | {"parameters": {"normalize": "mean"}}, tmp_path / "out" / kind)
    for name, tensor in results["decoded"].items():
        assert torch.equal(results["compact"][name], tensor), name
    planned = CliRunner().invoke(main, ["plan", str(tmp_path / "out" / "compact.yml")])
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize("shape", [(3, 5), (40, 7)])
def test_means_are_written_as_they_are_known(shape, tmp_path):
    """A tensor known by row means and column means keeps them, bit for bit, with any other compact form asked for."""
    rows, columns = torch.rand(shape[0], dtype=torch.float64), torch.rand(shape[1], dtype=torch.float64)
    columns *= rows.mean() / columns.mean()
    store = RankOneStore({"w": (rows, columns)}, {"bias": torch.rand(600)}, "memory")
    fisher = Fisher(store, FisherConfig(estimator="lifted_lora", statistic="ema", bias_corrected=True))
    for code in (None, "log8", "rank1"):
        fisher.save(tmp_path / str(code), compress=code)
        parts = load_file(tmp_path / str(code) / "fisher.safetensors")
        assert torch.equal(parts["w.row"], rows.float())
        assert torch.equal(parts["w.col"], columns.float())
        read = read_fisher(tmp_path / str(code))
        assert torch.equal(read["w"], fisher["w"])
        assert read["bias"].shape == (600,)
