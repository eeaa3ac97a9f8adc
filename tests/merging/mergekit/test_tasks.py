"""Merges by stock ``mergekit-yaml`` on real files, against float64 references on the same files."""

import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from squisher_mergekit.merging.mergekit import tasks
from squisher_mergekit.merging.mergekit.tasks import permute_rows
from squisher_mergekit.merging.read import load_tensor
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.models import DTYPES, entry, mixtral, models_with_fishers, packed_experts, word_tokenizer
from tests.merging.reference import (
    WEIGHTS,
    Tensors,
    assert_squisher,
    assert_ubgm,
    assert_within,
    draw_fisher,
    give_fisher,
    largest,
    llama,
    merge,
    merged,
    planned,
    squisher_reference,
    store_fisher,
    ubgm_reference,
)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squisher_equals_the_reference(tmp_path: Path, count: int, dtype: str) -> None:
    """Fisher merging agrees with float64 for 1 to 5 models in three dtypes, F from 1e-38 to 1e+30, with weights."""
    weights, fishers = models_with_fishers(tmp_path, count, DTYPES[dtype])
    config = {
        "merge_method": "squisher",
        "models": [entry(tmp_path, i, weight=WEIGHTS[i]) for i in range(count)],
        "dtype": dtype,
    }
    result = merged(config, tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {DTYPES[dtype]}
    assert_squisher(result, weights, fishers)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ubgm_equals_the_reference(tmp_path: Path, count: int, dtype: str) -> None:
    """Gradient matching agrees with float64 for 1 to 5 models and a base in fp32, bf16 and fp16, with weights."""
    weights, fishers = models_with_fishers(tmp_path, count + 1, DTYPES[dtype])
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, i + 1, weight=WEIGHTS[i]) for i in range(count)],
        "dtype": dtype,
    }
    assert_ubgm(merged(config, tmp_path / "out"), weights, fishers, WEIGHTS[:count])


def test_ubgm_prior_and_listed_base(tmp_path: Path) -> None:
    """A base listed under models enters once.

    Its Fisher can be given there, and its weight is unused. The prior counts.
    """
    weights, fishers = models_with_fishers(tmp_path, 3)
    other = give_fisher(tmp_path / "m0", weights[0], seed=77, out=tmp_path / "other")
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [
            entry(tmp_path, 0, fisher=str(tmp_path / "other"), weight=9.0),
            entry(tmp_path, 1),
            entry(tmp_path, 2),
        ],
        "parameters": {"prior": 0.25},
    }
    assert_ubgm(merged(config, tmp_path / "out"), weights, [other, *fishers[1:]], (1.0, 1.0), 0.25)


def test_ubgm_base_without_fisher(tmp_path: Path) -> None:
    """`fisher: none` for the base means F_0 = 0, so the base needs no Fisher on disk."""
    weights, fishers = models_with_fishers(tmp_path, 3)
    for file in (tmp_path / "m0").glob("fisher*"):
        file.unlink()
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, 0, fisher="none"), entry(tmp_path, 1), entry(tmp_path, 2)],
    }
    zeros = {name: torch.zeros_like(tensor) for name, tensor in fishers[0].items()}
    assert_ubgm(merged(config, tmp_path / "out"), weights, [zeros, *fishers[1:]], (1.0, 1.0))


def test_ubgm_missing_average(tmp_path: Path) -> None:
    """`missing: average` gives the base plus the weighted mean difference, over all models."""
    weights, fishers = models_with_fishers(tmp_path, 3)
    name = "model.norm.weight"
    del fishers[1][name]
    store_fisher(tmp_path / "partial", fishers[1])
    config = {
        "merge_method": "ubgm_squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, 1, fisher=str(tmp_path / "partial"), weight=0.5), entry(tmp_path, 2)],
        "parameters": {"missing": "average"},
    }
    result = merged(config, tmp_path / "out")
    base, one, two = (model[name].double() for model in weights)
    assert_within(result[name], base + (0.5 * (one - base) + (two - base)) / 1.5, base.abs() + one.abs() + two.abs())


def test_dtype_and_out_dtype(tmp_path: Path) -> None:
    """`dtype` casts the weights and never the Fishers; `out_dtype` casts the result."""
    weights, fishers = models_with_fishers(tmp_path, 2)
    models = [entry(tmp_path, 0), entry(tmp_path, 1)]
    result = merged({"merge_method": "squisher", "models": models, "out_dtype": "bfloat16"}, tmp_path / "out")
    assert {tensor.dtype for tensor in result.values()} == {torch.bfloat16}
    assert_squisher(result, weights, fishers, (1.0, 1.0))
    narrow = merged({"merge_method": "squisher", "models": models, "dtype": "float16"}, tmp_path / "out2")
    halves = [{name: tensor.half() for name, tensor in model.items()} for model in weights]
    assert_squisher(narrow, halves, fishers, (1.0, 1.0))


def test_truncated_vocabulary(tmp_path: Path) -> None:
    """--unsafe-truncate-embeddings truncates the Fishers like the weights."""
    weights = [llama(tmp_path / "m0", 0), llama(tmp_path / "m1", 1, vocab_size=31)]
    fishers = [give_fisher(tmp_path / f"m{i}", tensors, i) for i, tensors in enumerate(weights)]
    models = [entry(tmp_path, 0), entry(tmp_path, 1)]
    config = {"merge_method": "squisher", "models": models}
    result = merged(config, tmp_path / "out", "--unsafe-truncate-embeddings")

    def cut(model: Tensors) -> Tensors:
        return {n: t[:29] if n in ("lm_head.weight", "model.embed_tokens.weight") else t for n, t in model.items()}

    assert_squisher(result, [cut(m) for m in weights], [cut(m) for m in fishers], (1.0, 1.0))


@pytest.mark.parametrize("flags", [["--async-write"], ["--lazy-unpickle"], ["--out-shard-size", "2K"], ["-j", "2"]])
def test_flags_of_mergekit_change_nothing(tmp_path: Path, flags: list[str]) -> None:
    """Options of mergekit do not change the tensors."""
    from tests.merging.reference import merge

    models_with_fishers(tmp_path, 2)
    config = {"merge_method": "squisher", "models": [entry(tmp_path, 0), entry(tmp_path, 1)]}
    plain = merged(config, tmp_path / "out")
    threads = torch.get_num_threads()
    try:
        result = merge(config, tmp_path / "flagged", *flags[:2] if flags[0] != "-j" else ["--write-threads", "2"])
    finally:
        torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    found: Tensors = {}
    for file in (tmp_path / "flagged").glob("*.safetensors"):
        found |= load_file(file)
    assert set(found) == set(plain)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
def test_union_of_vocabularies(tmp_path: Path, method: str, pad: int | None) -> None:
    """Rows follow their tokens. A row that one model lacks has no weight there, so the other model's row stays."""
    words = (["red", "green", "blue", "cyan"], ["blue", "red", "pink", "grey", "teal"])
    weights = []
    fishers = []
    for i, own in enumerate(words):
        weights.append(llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1))
        fishers.append(give_fisher(tmp_path / f"m{i}", weights[i], i))
        word_tokenizer(tmp_path / f"m{i}", own)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            fishers[i][name] = fishers[i][name].clamp(1e-9, 1e9)
        store_fisher(tmp_path / f"m{i}", fishers[i])
    tokenizer: dict[str, Any] = {"source": "union"} | ({"pad_to_multiple_of": pad} if pad else {})
    config: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)],
        "base_model": str(tmp_path / "m0"),
        "tokenizer": tokenizer,
    }
    result = merge(config, tmp_path / "out")
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    vocabulary = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_vocab()
    assert set(vocabulary) == {"<unk>", *words[0], *words[1]}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert found[name].shape[0] == (len(vocabulary) if pad is None else 10)
        for token, row in vocabulary.items():
            old = [(["<unk>", *own]).index(token) if token in ["<unk>", *own] else None for own in words]
            thetas = [weights[i][name][at] for i, at in enumerate(old) if at is not None]
            known = [fishers[i][name][at] for i, at in enumerate(old) if at is not None]
            if method == "squisher" or len(thetas) == 1:
                # mergekit fills a row that one model lacks with the row of the other model.
                reference = squisher_reference(thetas, known, [1.0] * len(thetas))
            else:
                reference = ubgm_reference(thetas[0], known[0], thetas[1:], known[1:], [1.0])
            assert_within(found[name][row], reference, 2 * largest(thetas) + 1)


@pytest.mark.parametrize("source", ["union", "base"])
@pytest.mark.parametrize("options", [{}, {"lambda": 1.5}, {"missing": "average"}])
def test_a_token_of_the_base_alone_keeps_its_row(tmp_path: Path, source: str, options: dict[str, Any]) -> None:
    """A base that is not summed gives its row to a token that no summed model has; no other row changes."""
    words = (["red", "plum", "green"], ["green", "red", "pink"], ["teal", "red", "green", "pink"])
    weights = [llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1) for i, own in enumerate(words)]
    for i, own in enumerate(words):
        word_tokenizer(tmp_path / f"m{i}", own)
    for i in (1, 2):
        names = [name for name in weights[i] if not (options.get("missing") and "embed" in name)]
        store_fisher(tmp_path / f"m{i}", {name: torch.rand(weights[i][name].shape) + 0.1 for name in names})
    config: dict[str, Any] = {
        "merge_method": "squisher",
        "base_model": str(tmp_path / "m0"),
        "models": [entry(tmp_path, i) for i in (1, 2)],
        "tokenizer": {"source": source},
        "parameters": options,
    }
    run = merge(config, tmp_path / "out")
    assert run.exit_code == 0, run.output + repr(run.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    row = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out").get_vocab()["plum"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found[name][row], weights[0][name][2])
        others = torch.cat([found[name][:row], found[name][row + 1 :]])
        assert not torch.isin(weights[0][name][2], others).any()


def test_rows_without_a_source_are_zero() -> None:
    """The permutation moves each old row to its new index along the axis of the vocabulary.

    Rows without a source are 0.
    """
    tensor = torch.arange(1.0, 13.0).reshape(3, 4)
    rows = permute_rows(tensor, {0: 2, 1: -1, 2: 0, 3: 1}, 5, axis=0)
    assert rows.tolist() == [tensor[2].tolist(), [0.0] * 4, tensor[0].tolist(), tensor[1].tolist(), [0.0] * 4]
    columns = permute_rows(tensor, {0: 3, 1: -1}, 2, axis=1)
    assert columns.tolist() == [[4.0, 0.0], [8.0, 0.0], [12.0, 0.0]]


@pytest.mark.parametrize("layout", ["checkpoint", "module"])
def test_packed_experts(tmp_path: Path, layout: str) -> None:
    """Mixtral's experts merge correctly with a Fisher stored per expert, like the weights, or packed."""
    weights = [mixtral(tmp_path / f"m{i}", i) for i in range(2)]
    assert any("experts.2.w1" in name for name in weights[0])
    generator = torch.Generator().manual_seed(1)
    fishers = [{name: draw_fisher(tensor.shape, generator) for name, tensor in w.items()} for w in weights]
    for i in range(2):
        stored = fishers[i] if layout == "checkpoint" else packed_experts(fishers[i])
        store_fisher(tmp_path / f"m{i}", stored, fingerprint(tmp_path / f"m{i}"))
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    result = merged(config, tmp_path / "out")
    packed = [packed_experts(w) for w in weights], [packed_experts(f) for f in fishers]
    assert any("gate_up_proj" in name for name in result)
    for name, tensor in result.items():
        pair = packed if name in packed[0][0] else (weights, fishers)
        thetas = [model[name] for model in pair[0]]
        assert_within(tensor, squisher_reference(thetas, [f[name] for f in pair[1]], [1.0, 1.0]), largest(thetas))


def test_fishers_are_loaded_per_output_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge holds the Fishers of one output tensor at a time."""
    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    loaded: list[tuple[str, weakref.ref[Tensor]]] = []
    peak = 0

    def tracked(source: Any, name: str, **settings: Any) -> Any:
        nonlocal peak
        fisher = load_tensor(source, name, **settings)
        loaded.append((name, weakref.ref(fisher.tensor)))
        peak = max(peak, len({name for name, tensor in loaded if tensor() is not None}))
        return fisher

    monkeypatch.setattr(tasks, "load_tensor", tracked)
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(2)]
    result = merged({"merge_method": "squisher", "models": models}, tmp_path / "out")
    assert (peak, len(loaded)) == (1, 2 * len(result))


def test_a_task_is_hashable_and_runs_after_pickling(tmp_path: Path) -> None:
    """A pickled task opens the Fishers itself in another process, and gives the same merge."""
    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(2)]
    save = planned({"merge_method": "squisher", "models": models}, tmp_path / "out")[0]
    task, copy = save.tensor_task, pickle.loads(pickle.dumps(save.tensor_task))
    assert (isinstance(task, tasks.FisherMergeTask), len({task, task})) == (True, 1)
    read = [
        task.gather_tensors.execute(**{key: load.execute() for key, load in each.items()})
        for each in [task.gather_tensors.arguments()]
    ]
    assert torch.equal(task.execute(*read), copy.execute(*read))
    assert copy.requests[0].opened is not task.requests[0].opened


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [["--cuda"], ["--cuda", "--low-cpu-memory", "--read-to-gpu"]])
def test_on_a_gpu(tmp_path: Path, flags: list[str]) -> None:
    """The merge on a GPU agrees with float64."""
    weights = [llama(tmp_path / f"m{i}", i) for i in range(2)]
    fishers = [give_fisher(tmp_path / f"m{i}", w, i) for i, w in enumerate(weights)]
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    for name, tensor in merged(config, tmp_path / "out", *flags).items():
        thetas = [model[name] for model in weights]
        assert_within(tensor, squisher_reference(thetas, [f[name] for f in fishers], [1.0, 1.0]), largest(thetas))


def test_a_merge_inside_another_default_device(
    pair: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of mergekit for several GPUs run tasks inside ``torch.device``; files are read to the host anyway."""
    expected, execute = merged(pair, tmp_path / "plain"), tasks.FisherMergeTask.execute

    def inside(self: tasks.FisherMergeTask, *args: Any, **kwargs: Any) -> Tensor | None:
        with torch.device("meta"):
            return execute(self, *args, **kwargs)

    monkeypatch.setattr(tasks.FisherMergeTask, "execute", inside)
    found = merged(pair, tmp_path / "inside")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
