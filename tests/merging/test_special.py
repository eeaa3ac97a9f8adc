"""The less usual ways into a merge: other tokenizers, packed experts, raw files, several steps, devices."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from squisher_mergekit.merging.mergekit.tasks import permute_rows
from squisher_mergekit.models.fingerprint import fingerprint
from tests.merging.reference import (
    Tensors,
    assert_within,
    draw_fisher,
    give_fisher,
    largest,
    llama,
    merge,
    merged,
    squisher_reference,
    store_fisher,
    ubgm_reference,
)


def _tokenizer(folder: Path, words: list[str]) -> None:
    vocabulary = {word: i for i, word in enumerate(["<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.mark.parametrize("pad", [None, 5])
@pytest.mark.parametrize("method", ["squisher", "ubgm_squisher"])
def test_union_of_vocabularies(tmp_path: Path, method: str, pad: int | None) -> None:
    """Rows follow their tokens; a row that a model lacks carries no weight, so that it is the other model's alone."""
    words = (["red", "green", "blue", "cyan"], ["blue", "red", "pink", "grey", "teal"])
    weights = []
    fishers = []
    for i, own in enumerate(words):
        weights.append(llama(tmp_path / f"m{i}", i, vocab_size=len(own) + 1))
        fishers.append(give_fisher(tmp_path / f"m{i}", weights[i], i))
        _tokenizer(tmp_path / f"m{i}", own)
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
                # A token of one model alone: mergekit gives the other model the same row.
                reference = squisher_reference(thetas, known, [1.0] * len(thetas))
            else:
                reference = ubgm_reference(thetas[0], known[0], thetas[1:], known[1:], [1.0])
            assert_within(found[name][row], reference, 2 * largest(thetas) + 1)


def test_rows_without_a_source_are_zero() -> None:
    """Permuting puts each old row at its new place along the vocabulary's axis, and 0 where there is none."""
    tensor = torch.arange(1.0, 13.0).reshape(3, 4)
    rows = permute_rows(tensor, {0: 2, 1: -1, 2: 0, 3: 1}, 5, axis=0)
    assert rows.tolist() == [tensor[2].tolist(), [0.0] * 4, tensor[0].tolist(), tensor[1].tolist(), [0.0] * 4]
    columns = permute_rows(tensor, {0: 3, 1: -1}, 2, axis=1)
    assert columns.tolist() == [[4.0, 0.0], [8.0, 0.0], [12.0, 0.0]]


def _mixtral(folder: Path, seed: int) -> Tensors:
    torch.manual_seed(seed)
    config = MixtralConfig(
        vocab_size=29, hidden_size=22, intermediate_size=13, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=3,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def _packed(tensors: Tensors) -> Tensors:
    """Put the experts of each layer together, as transformers 5 names and shapes them in memory."""
    packed = {n.replace("block_sparse_moe", "mlp"): t for n, t in tensors.items() if ".experts." not in n}
    for layer in range(2):
        old = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (torch.stack([tensors[f"{old}.{k}.{w}.weight"] for k in range(3)]) for w in ("w1", "w2", "w3"))
        packed[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([w1, w3], dim=1)
        packed[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return packed


@pytest.mark.parametrize("layout", ["checkpoint", "module"])
def test_packed_experts(tmp_path: Path, layout: str) -> None:
    """Mixtral's experts merge right whether the Fisher is stored per expert, as the weights are, or packed."""
    weights = [_mixtral(tmp_path / f"m{i}", i) for i in range(2)]
    assert any("experts.2.w1" in name for name in weights[0])
    generator = torch.Generator().manual_seed(1)
    fishers = [{name: draw_fisher(tensor.shape, generator) for name, tensor in w.items()} for w in weights]
    for i in range(2):
        stored = fishers[i] if layout == "checkpoint" else _packed(fishers[i])
        store_fisher(tmp_path / f"m{i}", stored, fingerprint(tmp_path / f"m{i}"))
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    result = merged(config, tmp_path / "out")
    packed = [_packed(w) for w in weights], [_packed(f) for f in fishers]
    assert any("gate_up_proj" in name for name in result)
    for name, tensor in result.items():
        pair = packed if name in packed[0][0] else (weights, fishers)
        thetas = [model[name] for model in pair[0]]
        assert_within(tensor, squisher_reference(thetas, [f[name] for f in pair[1]], [1.0, 1.0]), largest(thetas))


def _raw(tmp_path: Path, config: dict[str, Any], *flags: str) -> Any:
    from mergekit.scripts.merge_raw_pytorch import main

    file = tmp_path / "raw.yml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return CliRunner().invoke(main, [str(file), str(tmp_path / "out"), *flags])


def _nets(tmp_path: Path, count: int) -> tuple[list[Tensors], list[Tensors]]:
    generator = torch.Generator().manual_seed(2)
    shapes = {"stem.weight": (11, 3, 3, 3), "stem.bias": (11,), "steps": ()}
    weights, fishers = [], []
    for i in range(count):
        folder = tmp_path / f"n{i}"
        folder.mkdir()
        tensors: Tensors = {n: torch.randn(*s, generator=generator) for n, s in shapes.items() if s}
        tensors["steps"] = torch.tensor(7)
        save_file(tensors, folder / "net.safetensors")
        fisher = {n: draw_fisher(t.shape, generator) for n, t in tensors.items() if t.is_floating_point()}
        store_fisher(folder, fisher, fingerprint(folder / "net.safetensors"))
        weights.append(tensors)
        fishers.append(fisher)
    return weights, fishers


def test_mergekit_pytorch(tmp_path: Path) -> None:
    """`mergekit-pytorch` merges single files by the Fishers in their folders, and copies integer buffers."""
    weights, fishers = _nets(tmp_path, 3)
    entries = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(3)]
    config = {"merge_method": "squisher", "models": entries[1:], "base_model": entries[0]["model"]}
    result = _raw(tmp_path, config)
    assert result.exit_code == 0, result.output + repr(result.exception)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert int(found["steps"]) == 7
    for name in fishers[0]:
        thetas = [model[name] for model in weights[1:]]
        reference = squisher_reference(thetas, [f[name] for f in fishers[1:]], [1.0, 1.0])
        assert_within(found[name], reference, largest(thetas))


def test_mergekit_pytorch_refuses(tmp_path: Path) -> None:
    """`mergekit-pytorch` names misspelt keys and missing tensors as `mergekit-yaml` does."""
    _nets(tmp_path, 2)
    entries = [{"model": str(tmp_path / f"n{i}" / "net.safetensors")} for i in range(2)]
    entries[1]["parameters"] = {"wieght": 1.0}  # type: ignore[assignment]
    result = _raw(tmp_path, {"merge_method": "squisher", "models": entries})
    assert (result.exit_code, "did you mean weight?" in result.output) == (1, True)
    assert not (tmp_path / "out").exists()


def test_mergekit_multi(tmp_path: Path) -> None:
    """`mergekit-multi` runs several of our merges in one process, the second on the result of the first."""
    from mergekit.scripts.multimerge import main

    weights = [llama(tmp_path / f"m{i}", i) for i in range(3)]
    fishers = [give_fisher(tmp_path / f"m{i}", w, i) for i, w in enumerate(weights)]
    first = {
        "name": "first",
        "merge_method": "squisher",
        "models": [{"model": str(tmp_path / f"m{i}")} for i in (0, 1)],
    }
    second = {
        "merge_method": "squisher",
        "models": [
            {"model": "first", "parameters": {"fisher": str(tmp_path / "m0")}},
            {"model": str(tmp_path / "m2")},
        ],
    }
    file = tmp_path / "multi.yml"
    file.write_text(yaml.safe_dump_all([first, second]), encoding="utf-8")
    arguments = [str(file), "-I", str(tmp_path / "steps"), "--out-path", str(tmp_path / "out"), "--no-copy-tokenizer"]
    result = CliRunner().invoke(main, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output + repr(result.exception)
    between = load_file(tmp_path / "steps" / "first" / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        thetas: list[Tensor] = [between[name], weights[2][name]]
        reference = squisher_reference(thetas, [fishers[0][name], fishers[2][name]], [1.0, 1.0])
        assert_within(tensor, reference, largest(thetas))


def test_every_tensor_is_planned_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planning and the graph share one plan a tensor: nothing is looked up on disk twice."""
    from squisher_mergekit.merging import tensor_plan

    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    planned = []
    stock = tensor_plan.plan_tensor

    def counted(method: str, name: str, *rest: Any, **options: Any) -> Any:
        planned.append(name)
        return stock(method, name, *rest, **options)

    monkeypatch.setattr(tensor_plan, "plan_tensor", counted)
    result = merged(
        {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}, tmp_path / "out"
    )
    assert sorted(planned) == sorted(result)


def test_fishers_are_loaded_just_before_use(tmp_path: Path) -> None:
    """The schedule never holds the Fishers of more than one output tensor at a time."""
    from mergekit.architecture import get_architecture_info
    from mergekit.graph import Executor
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import _model_out_config
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    from squisher_mergekit.merging.mergekit.commands import read_config
    from squisher_mergekit.merging.mergekit.tasks import GatherFishers

    for i in range(2):
        give_fisher(tmp_path / f"m{i}", llama(tmp_path / f"m{i}", i), i)
    models = [{"model": str(tmp_path / f"m{i}")} for i in range(2)]
    config = read_config(yaml.safe_dump({"merge_method": "squisher", "models": models}))
    options = MergeOptions(quiet=True)
    architecture = get_architecture_info(config, options)
    LoaderCache().setup(options=options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    executor = Executor(planner.plan_to_disk(str(tmp_path / "out")))
    live, peak = set(), 0
    for at, handle in enumerate(executor.schedule.tasks):
        if isinstance(handle.task(), GatherFishers):
            live.add(handle)
        peak = max(peak, len(live))
        live = {one for one in live if executor.schedule.last_use_index[one] > at}
    assert peak == 1


@pytest.mark.gpu
@pytest.mark.parametrize("flags", [["--cuda"], ["--cuda", "--low-cpu-memory", "--read-to-gpu"]])
def test_on_a_gpu(tmp_path: Path, flags: list[str]) -> None:
    """On a GPU the merge agrees with float64 as on the CPU."""
    weights = [llama(tmp_path / f"m{i}", i) for i in range(2)]
    fishers = [give_fisher(tmp_path / f"m{i}", w, i) for i, w in enumerate(weights)]
    config = {"merge_method": "squisher", "models": [{"model": str(tmp_path / f"m{i}")} for i in range(2)]}
    for name, tensor in merged(config, tmp_path / "out", *flags).items():
        thetas = [model[name] for model in weights]
        assert_within(tensor, squisher_reference(thetas, [f[name] for f in fishers], [1.0, 1.0]), largest(thetas))
