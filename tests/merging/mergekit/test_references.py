"""Merges of LoRA adapters to a full model, by YAML: stock mergekit-yaml, plan and merge, the Fishers lifted."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from squisher_mergekit import extract, load_fisher
from squisher_mergekit.cli.merge import command as merge_command
from tests import hub_server
from tests.adapters import save_merged, train
from tests.merging.reference import (
    Tensors,
    assert_config_refused,
    assert_within,
    give_fisher,
    largest,
    merged,
    preview_of,
    squisher_reference,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's call

LORAS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "llama": ("llama", [{}, {"r": 5, "use_rslora": True}]),
    "Conv1D": ("gpt2", [{"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}] * 2),
    "a head of its own": ("bert", [{"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}] * 2),
}


def _runs(root: Path, name: str, loras: list[dict[str, Any]]) -> list[Tensors]:
    """Train adapters of one base in ``root/lN``; return the merged weights as peft writes them."""
    merged_weights = []
    for i, lora in enumerate(loras):
        adapted, _ = train(root / f"l{i}", name, seed=i, **lora)
        merged_weights.append(load_file(save_merged(adapted, root / f"l{i}" / "merged") / "model.safetensors"))
    (root / "l0" / "base").rename(root / "base")
    return merged_weights


def _config(root: Path, form: str = "BASE+ADAPTER", count: int = 2, **further: Any) -> dict[str, Any]:
    """Return the configuration of a merge of adapters, in one of the two forms."""
    names = [f"{root / 'base'}+{root / f'l{i}' / 'adapter'}" for i in range(count)]
    if form == "ADAPTER":
        for i in range(count):
            _name_base(root / f"l{i}" / "adapter", str(root / "base"))
        names = [name.partition("+")[2] for name in names]
    return {"merge_method": "squisher", "models": [{"model": name} for name in names], **further}


def _name_base(adapter: Path, base: str | None) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))


def _lifted(root: Path, i: int) -> Any:
    return load_fisher(root / f"l{i}" / "adapter", base=root / "base", lift=True)


@pytest.mark.parametrize("form", ["BASE+ADAPTER", "ADAPTER"])
@pytest.mark.parametrize("run", LORAS)
def test_adapters_merge_by_their_lifted_fishers(tmp_path: Path, run: str, form: str) -> None:
    """Stock mergekit-yaml gives Eq. 13 on W0 + s B A with the lifted F; weights that no LoRA changes are the base's."""
    weights = _runs(tmp_path, *LORAS[run])
    found = merged(_config(tmp_path, form), tmp_path / "out")
    fishers = [_lifted(tmp_path, i) for i in range(2)]
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert set(found) == set(base)
    for name, tensor in found.items():
        if not any(name in fisher for fisher in fishers):
            assert torch.equal(tensor, base[name]), name
            continue
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0, 1.0])
        assert_within(tensor, reference, largest(thetas))


@pytest.mark.parametrize("form", ["BASE+ADAPTER", "ADAPTER"])
def test_a_plan_needs_no_copy_of_the_model(tmp_path: Path, form: str) -> None:
    """``squisher plan`` names the lifted Fishers and the copied weights, and writes nothing."""
    _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path, form)
    before = sorted(tmp_path.rglob("*"))
    preview = preview_of(tmp_path, config)
    assert [model["estimator"] for model in preview["models"]] == ["lifted_lora"] * 2
    assert [model["covered"] == model["entries"] > 0 for model in preview["models"]] == [True, True]
    assert "24 tensors are copied from the base, as no LoRA changes them" in preview["text"]
    assert "every structure merged LoRAs worse" not in preview["text"]
    assert sorted(path for path in tmp_path.rglob("*") if path.suffix not in (".yml", ".json")) == [
        path for path in before if path.suffix not in (".yml", ".json")
    ]


def test_squisher_merge_writes_the_same_as_mergekit_yaml(tmp_path: Path) -> None:
    """Both commands run one merge; the report has the effective weights of the changed entries."""
    _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path)
    stock = merged(config, tmp_path / "stock")
    file, report = tmp_path / "stock.yml", tmp_path / "report.json"
    arguments = [str(file), str(tmp_path / "ours"), "--json", str(report), "--no-copy-tokenizer"]
    result = CliRunner().invoke(merge_command, arguments)
    assert result.exit_code == 0, result.output
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(ours[name], stock[name]) for name in stock)
    shares = json.loads(report.read_text())["effective_weight"]
    assert set(shares) == {item["model"] for item in config["models"]}


def test_the_result_takes_the_config_of_the_base(tmp_path: Path) -> None:
    """The merged model loads by transformers, and has no file of an adapter."""
    import transformers

    _runs(tmp_path, "llama", [{}, {}])
    found = merged(_config(tmp_path, "ADAPTER"), tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.state_dict()["lm_head.weight"], found["lm_head.weight"])
    assert not list((tmp_path / "out").glob("adapter*"))


def test_with_mergekits_own_cache_the_merge_is_the_same(tmp_path: Path) -> None:
    """With --lora-merge-cache mergekit adds the LoRAs to copies; the lifted Fishers and the result are the same."""
    _runs(tmp_path, "llama", [{}, {"r": 2}])
    config = _config(tmp_path)
    ours = merged(config, tmp_path / "ours")
    cached = merged(config, tmp_path / "cached", "--lora-merge-cache", str(tmp_path / "cache"))
    assert all(torch.equal(ours[name], cached[name]) for name in ours)


@pytest.mark.parametrize("targets", [["q_proj"], ["down_proj", "o_proj"]])
def test_a_layer_that_one_lora_left_alone_has_the_mean_of_its_kind(tmp_path: Path, targets: list[str]) -> None:
    """Its F is unknown, not 0: the mean of that model's lifted F over layers of the same kind, and the plan says so."""
    loras = [{"target_modules": targets}, {"target_modules": targets, "layers_to_transform": [0, 2]}]
    weights = _runs(tmp_path, "llama", loras)
    config = _config(tmp_path)
    found, fishers = merged(config, tmp_path / "out"), [_lifted(tmp_path, i) for i in range(2)]
    alone = sorted(set(fishers[0]) - set(fishers[1]))
    assert len(alone) == len(targets)
    for name in alone:
        alike = [fishers[1][name.replace(".1.", f".{layer}.")].double() for layer in (0, 2)]
        value = torch.cat([tensor.flatten() for tensor in alike]).mean().expand_as(alike[0])
        thetas = [model[name] for model in weights]
        assert_within(found[name], squisher_reference(thetas, [fishers[0][name], value], [1.0, 1.0]), largest(thetas))
    text = preview_of(tmp_path, config)["text"]
    label = config["models"][1]["model"]
    assert f"{len(alone)} tensors that the LoRA of {label} left alone and another one changed have the mean" in text


@pytest.mark.parametrize("normalize", ["mean", "l2"])
def test_layers_left_alone_do_not_enter_the_norm(tmp_path: Path, normalize: str) -> None:
    """``normalize`` divides by the mean or norm of the known F alone."""
    weights = _runs(tmp_path, "llama", [{}, {"layers_to_transform": [0]}])
    found = merged(_config(tmp_path, parameters={"normalize": normalize}), tmp_path / "out")
    fishers = [_lifted(tmp_path, i) for i in range(2)]
    flat = [torch.cat([fisher[name].double().flatten() for name in fisher]) for fisher in fishers]
    sizes = [part.mean() if normalize == "mean" else part.norm() for part in flat]
    for name in fishers[1]:
        thetas = [model[name] for model in weights]
        scaled = [fisher[name].double() / size for fisher, size in zip(fishers, sizes, strict=True)]
        assert_within(found[name], squisher_reference(thetas, scaled, [1.0, 1.0]), largest(thetas))


@pytest.mark.parametrize("kind", ["of the adapter", "of the merged weights", "optimizer state"])
def test_a_named_fisher_is_lifted_where_it_is_of_the_adapter(tmp_path: Path, kind: str) -> None:
    """``fisher: PATH`` may be of A and B, of the merged weights, or the state itself: the merge is the same."""
    _runs(tmp_path, "llama", [{}, {}])
    reference = merged(_config(tmp_path), tmp_path / "plain")
    config = _config(tmp_path)
    for i, item in enumerate(config["models"]):
        adapter = tmp_path / f"l{i}" / "adapter"
        if kind == "optimizer state":
            shutil.copytree(adapter, tmp_path / f"state{i}")
            (adapter / "optimizer.pt").unlink()
            item["parameters"] = {"fisher": str(tmp_path / f"state{i}" / "optimizer.pt")}
            continue
        extract(adapter, tmp_path / f"f{i}", base=tmp_path / "base", lift=kind == "of the merged weights")
        item["parameters"] = {"fisher": str(tmp_path / f"f{i}")}
    found = merged(config, tmp_path / "out")
    assert all(torch.equal(found[name], reference[name]) for name in reference)


@pytest.mark.parametrize("structure", ["rows", "columns", "kron"])
def test_structures_take_the_lifted_fishers(tmp_path: Path, structure: str) -> None:
    """The merge equals that of the merged models with the lifted Fishers on disk: d = s B A, and v lifted."""
    _runs(tmp_path, "llama", [{}, {"r": 4}])
    parameters = {"structure": structure, "block": 4}
    found = merged(_config(tmp_path, parameters=parameters), tmp_path / "out")
    models = []
    for i in range(2):
        extract(tmp_path / f"l{i}" / "adapter", tmp_path / f"f{i}", base=tmp_path / "base", lift=True)
        folder = str(tmp_path / f"l{i}" / "merged")
        models.append({"model": folder, "parameters": {"fisher": str(tmp_path / f"f{i}")}})
    full = {"merge_method": "squisher", "models": models, "base_model": str(tmp_path / "base")}
    reference = merged(full | {"parameters": parameters | {"missing": "average"}}, tmp_path / "full")
    for name in _lifted(tmp_path, 0):
        assert torch.equal(found[name], reference[name]), name


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_density_starts_from_the_common_base(tmp_path: Path, density: float) -> None:
    """Without base_model: the base of the adapters is theta_0."""
    _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path, parameters={"density": density})
    found = merged(config, tmp_path / "out")
    named = merged(config | {"base_model": str(tmp_path / "base")}, tmp_path / "named")
    assert all(torch.equal(found[name], named[name]) for name in found)


def test_an_adapter_and_a_full_model(tmp_path: Path) -> None:
    """A LoRA and a full model merge where both have F; elsewhere the plan says that the LoRA has none."""
    weights = _runs(tmp_path, "llama", [{}, {}])
    extract(tmp_path / "l1" / "adapter", tmp_path / "f1", base=tmp_path / "base", lift=True)
    config = _config(tmp_path, count=1)
    full = {"model": str(tmp_path / "l1" / "merged"), "parameters": {"fisher": str(tmp_path / "f1")}}
    config["models"].append(full)
    assert_config_refused(tmp_path, config, "must cover every merged tensor", "not adapted, kept as in the base")
    found = merged(config | {"parameters": {"missing": "average"}}, tmp_path / "out")
    fishers = [_lifted(tmp_path, i) for i in range(2)]
    for name in fishers[0]:
        thetas = [model[name] for model in weights]
        reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0, 1.0])
        assert_within(found[name], reference, largest(thetas))


@pytest.mark.parametrize("options", [{}, {"density": 0.5}, {"density": 0.3, "density_scope": "model"}, {"lambda": 0.5}])
def test_weights_that_a_lora_left_alone_are_those_of_the_full_models(tmp_path: Path, options: dict[str, Any]) -> None:
    """Beside full models with F everywhere, F of a LoRA is 0 where it knows no layer of the kind; the plan says so."""
    adapted = _runs(tmp_path, "llama", [{}])[0]
    base = load_file(tmp_path / "base" / "model.safetensors")
    full, fishers = [], [_lifted(tmp_path, 0)]
    for i in range(2):
        torch.manual_seed(i)
        full.append({name: tensor + torch.randn_like(tensor) for name, tensor in base.items()})
        shutil.copytree(tmp_path / "base", tmp_path / f"m{i}")
        save_file(full[i], tmp_path / f"m{i}" / "model.safetensors", metadata={"format": "pt"})
        fishers.append(give_fisher(tmp_path / f"m{i}", full[i], i, tmp_path / f"f{i}"))
    config = _config(tmp_path, count=1, base_model=str(tmp_path / "base"), parameters=options)
    config["models"] += [
        {"model": str(tmp_path / f"m{i}"), "parameters": {"fisher": str(tmp_path / f"f{i}")}} for i in range(2)
    ]
    text = preview_of(tmp_path, config)["text"]
    assert "tensors that the LoRA of" in text
    assert "are left to the other models" in text
    assert "lack a Fisher" not in text
    found = merged(config, tmp_path / "out")
    without = merged(config | {"models": config["models"][1:]}, tmp_path / "without")
    for name, tensor in found.items():
        if name not in fishers[0]:
            known = fishers[1][name] + fishers[2][name] > 0  # elsewhere nobody has F, and all vote
            assert known.float().mean() > 0.5
            torch.testing.assert_close(tensor[known], without[name][known], rtol=1e-6, atol=1e-6)
        elif not options:
            thetas = [model[name] for model in (adapted, *full)]
            reference = squisher_reference(thetas, [fisher[name] for fisher in fishers], [1.0] * 3)
            assert_within(tensor, reference, largest(thetas))


def test_a_full_model_without_some_f_is_refused_as_before(tmp_path: Path) -> None:
    """Where the full model has no F either, nobody knows the weight's F, and the merge is refused."""
    _runs(tmp_path, "llama", [{}])
    full = {name: tensor + 1 for name, tensor in load_file(tmp_path / "base" / "model.safetensors").items()}
    shutil.copytree(tmp_path / "base", tmp_path / "m0")
    save_file(full, tmp_path / "m0" / "model.safetensors", metadata={"format": "pt"})
    some = {name: tensor for name, tensor in full.items() if "norm" not in name}
    give_fisher(tmp_path / "m0", some, 0, tmp_path / "f0")
    config = _config(tmp_path, count=1)
    config["models"].append({"model": str(tmp_path / "m0"), "parameters": {"fisher": str(tmp_path / "f0")}})
    assert_config_refused(tmp_path, config, "must cover every merged tensor", "norm")


def test_a_plan_says_that_structures_merge_loras_worse(tmp_path: Path) -> None:
    """The evidence is against it: whoever asks for a structure reads so before the merge."""
    _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path)
    config |= {"base_model": str(tmp_path / "base"), "parameters": {"structure": "columns", "block": 4}}
    assert "every structure merged LoRAs worse than the diagonal" in preview_of(tmp_path, config)["text"]


@pytest.mark.parametrize("layers", [(0, 2), (2, 1)])
def test_slices_of_different_layers_are_not_copied(tmp_path: Path, layers: tuple[int, int]) -> None:
    """Layers at different places are different weights, even where no LoRA changes them."""
    _runs(tmp_path, "llama", [{}, {}])
    names = [item["model"] for item in _config(tmp_path)["models"]]
    sources = [{"model": name, "layer_range": [i, i + 1]} for name, i in zip(names, layers, strict=True)]
    config = {"merge_method": "squisher", "slices": [{"sources": sources}], "parameters": {"missing": "average"}}
    config["base_model"] = str(tmp_path / "base")
    found, base = merged(config, tmp_path / "out"), load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.{}.mlp.up_proj.weight"
    thetas = [base[name.format(i)] for i in layers]
    assert_within(found[name.format(0)], sum(theta.double() for theta in thetas) / 2, largest(thetas))  # type: ignore[arg-type]


def test_files_that_are_replaced_between_merges_are_read_again(tmp_path: Path) -> None:
    """A second merge of the process has the new files of a LoRA under its old name."""
    _, second = _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path)
    merged(config, tmp_path / "before")
    shutil.rmtree(tmp_path / "l0" / "adapter")
    shutil.copytree(tmp_path / "l1" / "adapter", tmp_path / "l0" / "adapter")
    found = merged(config, tmp_path / "after")
    for name, theta in second.items():
        torch.testing.assert_close(found[name], theta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["shards", "pytorch_model.bin", "bfloat16"])
def test_bases_in_other_forms(tmp_path: Path, form: str) -> None:
    """Shards and pickled weights give the tensors of one file; bfloat16 is kept as by peft's own merge."""
    import transformers

    _runs(tmp_path, "llama", [{}, {}])
    other = tmp_path / "other"
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = model.bfloat16() if form == "bfloat16" else model
    model.save_pretrained(other, max_shard_size="5KB" if form == "shards" else "5GB")
    if form == "pytorch_model.bin":
        torch.save(load_file(other / "model.safetensors"), other / form)
        (other / "model.safetensors").unlink()
    config = _config(tmp_path)
    changed = json.loads(json.dumps(config).replace(f"{tmp_path / 'base'}+", f"{other}+"))
    if form == "bfloat16":
        reference = merged(changed, tmp_path / "cached", "--lora-merge-cache", str(tmp_path / "cache"))
    else:
        reference = merged(config, tmp_path / "plain")
    found = merged(changed, tmp_path / "out")
    assert found["lm_head.weight"].dtype == (torch.bfloat16 if form == "bfloat16" else torch.float32)
    assert all(torch.equal(found[name], reference[name]) for name in reference)


def test_an_adapter_that_is_not_on_the_hub(tmp_path: Path) -> None:
    """A name after the + that is no folder is looked up on the Hub, and refused in one line."""
    _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path)
    config["models"][1]["model"] = f"{tmp_path / 'base'}+nobody/adapter"
    assert_config_refused(tmp_path, config, "a LoRA must be a local folder or on the Hub", "nobody/adapter")


def _publish(root: Path, served: hub_server.Hub, fisher: str) -> None:
    """Put two adapters on a server, one at a revision, with the Fisher of the adapter or the lifted one."""
    for i, revision in enumerate(("main", "v2")):
        adapter, made = root / f"l{i}" / "adapter", root / f"f{i}"
        extract(adapter, made, base=root / "base", lift=fisher == "lifted")
        _name_base(adapter, str(root / "base"))
        served.add(f"org/l{i}", hub_server.read(adapter) | hub_server.read(made), revision)


@pytest.mark.parametrize("fisher", ["adapter's", "lifted"])
@pytest.mark.parametrize("form", ["BASE+ADAPTER", "ADAPTER"])
def test_adapters_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, fisher: str) -> None:
    """``BASE+ORG/ADAPTER`` and ``ORG/ADAPTER`` merge as local adapters do, with the Fishers of their repositories."""
    _runs(tmp_path, "llama", [{}, {}])
    wanted = merged(_config(tmp_path), tmp_path / "local")
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch, token=None)
        _publish(tmp_path, served, fisher)
        base = f"{tmp_path / 'base'}+" if form == "BASE+ADAPTER" else ""
        models = [{"model": f"{base}{name}"} for name in ("org/l0", "org/l1@v2")]
        config = {"merge_method": "squisher", "models": models}
        assert [model["estimator"] for model in preview_of(tmp_path, config)["models"]] == ["lifted_lora"] * 2
        found = merged(config, tmp_path / "out", "--transformers-cache", str(tmp_path / "cache"))
        fetched = served.fetched()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        again = merged(config, tmp_path / "offline", "--transformers-cache", str(tmp_path / "cache"))
    assert "optimizer.pt" not in fetched
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)
        assert torch.equal(again[name], found[name])


@pytest.mark.parametrize("named", [None, "/home/nobody/base"])
def test_an_adapter_on_the_hub_whose_base_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    """A base on another machine, or none, is refused in one line with the form that names it."""
    _runs(tmp_path, "llama", [{}])
    _name_base(tmp_path / "l0" / "adapter", named)
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch, token=None)
        served.add("org/l0", hub_server.read(tmp_path / "l0" / "adapter"))
        config = {"merge_method": "squisher", "models": [{"model": "org/l0"}, {"model": str(tmp_path / "base")}]}
        assert_config_refused(tmp_path, config, "models[0].model", "write BASE+org/l0")


def test_gradient_matching_of_adapters(tmp_path: Path) -> None:
    """``ubgm_squisher`` starts from the base, whose Fisher may be none."""
    weights = _runs(tmp_path, "llama", [{}, {}])
    config = _config(tmp_path) | {"merge_method": "ubgm_squisher", "base_model": str(tmp_path / "base")}
    config["models"].append({"model": str(tmp_path / "base"), "parameters": {"fisher": "none"}})
    found, base = merged(config, tmp_path / "out"), load_file(tmp_path / "base" / "model.safetensors")
    fishers = [_lifted(tmp_path, i) for i in range(2)]
    for name, tensor in found.items():
        if name not in fishers[0]:
            assert torch.equal(tensor, base[name])
            continue
        parts = [fisher[name].double() for fisher in fishers]
        steps = [model[name].double() - base[name].double() for model in weights]
        wanted = base[name].double() + sum(f * s for f, s in zip(parts, steps, strict=True)) / sum(parts)
        size = base[name].double().abs() + sum(step.abs() for step in steps)
        assert_within(tensor, wanted, size)


def test_the_folder_of_a_run_is_its_last_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run of adapters merges as its last checkpoint, after the + and alone, and a warning says so."""
    _runs(tmp_path, "llama", [{}, {}])
    for form in ("BASE+ADAPTER", "ADAPTER"):
        config = _config(tmp_path, form)
        folder = tmp_path / form.replace("+", "_")
        reference = merged(config, folder / "plain")
        run = folder / "run"
        shutil.copytree(tmp_path / "l1" / "adapter", run / "checkpoint-20")
        shutil.copytree(tmp_path / "l0" / "adapter", run / "checkpoint-8")
        config["models"][1]["model"] = config["models"][1]["model"].replace(str(tmp_path / "l1" / "adapter"), str(run))
        with caplog.at_level(logging.WARNING, "squisher_mergekit"):
            found = merged(config, folder / "out")
        assert all(torch.equal(found[name], reference[name]) for name in reference)
        assert any("taking its last checkpoint" in record.message for record in caplog.records)
        caplog.clear()


def test_the_final_adapter_of_a_run_finds_the_state_of_its_checkpoint(tmp_path: Path) -> None:
    """``trainer.save_model`` writes no optimizer state: that of the checkpoint with equal weights is taken."""
    _runs(tmp_path, "llama", [{}, {}])
    reference = merged(_config(tmp_path), tmp_path / "plain")
    for i in range(2):
        adapter = tmp_path / f"l{i}" / "adapter"
        shutil.copytree(adapter, adapter / "checkpoint-3")
        (adapter / "optimizer.pt").unlink()
    found = merged(_config(tmp_path), tmp_path / "out")
    assert all(torch.equal(found[name], reference[name]) for name in reference)


def _other_base(root: Path) -> dict[str, Any]:
    shutil.copytree(root / "base", root / "other")
    state = load_file(root / "other" / "model.safetensors")
    from safetensors.torch import save_file

    save_file(
        {name: tensor + 1 for name, tensor in state.items()}, root / "other" / "model.safetensors", {"format": "pt"}
    )
    config = _config(root)
    config["models"][1]["model"] = f"{root / 'other'}+{root / 'l1' / 'adapter'}"
    return config


def _without_state(root: Path) -> dict[str, Any]:
    (root / "l1" / "adapter" / "optimizer.pt").unlink()
    return _config(root)


def _dora(root: Path) -> dict[str, Any]:
    file = root / "l1" / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": True}))
    return _config(root)


def _no_base_named(root: Path) -> dict[str, Any]:
    config = _config(root, "ADAPTER")
    _name_base(root / "l1" / "adapter", None)
    return config


def _base_that_is_gone(root: Path) -> dict[str, Any]:
    config = _config(root, "ADAPTER")
    _name_base(root / "l1" / "adapter", str(root / "gone"))
    return config


def _no_adapter_after_the_plus(root: Path) -> dict[str, Any]:
    config = _config(root)
    config["models"][1]["model"] = f"{root / 'base'}+{root / 'base'}"
    return config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_base, ["LoRAs must be of one base", "other", "merge LoRAs of one base"]),
        (_without_state, ["no Fisher for", "neither fisher.safetensors nor optimizer state", "checkpoint-N"]),
        (_dora, ["is DoRA", "--lora-merge-cache DIR"]),
        (_no_base_named, ["models[1].model", "names no base", "write BASE+"]),
        (_base_that_is_gone, ["models[1].model must be the base of the LoRA adapter", "gone"]),
        (_no_adapter_after_the_plus, ["models[1].model", "after the +", "has no adapter_config.json"]),
    ],
)
def test_wrong_input_is_refused_in_one_line(tmp_path: Path, change: Any, words: list[str]) -> None:
    """The message has the place, the reason and the cure; the output folder does not appear."""
    _runs(tmp_path, "llama", [{}, {}])
    assert_config_refused(tmp_path, change(tmp_path), *words)


@pytest.mark.parametrize("targets", [["k_proj"], ["up_proj", "gate_proj"]])
def test_other_target_modules_are_refused_with_the_cure(tmp_path: Path, targets: list[str]) -> None:
    """Without any layer of the kind there is no F; ``missing: average`` merges those by the mean."""
    _runs(tmp_path, "llama", [{}, {"target_modules": targets}])
    words = ["must cover every merged tensor", "not adapted, kept as in the base", "missing: average"]
    assert_config_refused(tmp_path, _config(tmp_path), *words)
    average = _config(tmp_path, parameters={"missing": "average"})
    assert_config_refused(tmp_path, average, "LoRAs must change layers of a common kind", "common target_modules")


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["up_proj", "down_proj"]])
def test_target_modules_in_common_suffice_for_missing_average(tmp_path: Path, targets: list[str]) -> None:
    """Layers of a kind that one LoRA alone changed are the mean, as asked for; the others take the lifted F."""
    weights = _runs(tmp_path, "llama", [{}, {"target_modules": targets}])
    assert_config_refused(tmp_path, _config(tmp_path), "must cover every merged tensor", "missing: average")
    found = merged(_config(tmp_path, parameters={"missing": "average"}), tmp_path / "out")
    fishers = [_lifted(tmp_path, i) for i in range(2)]
    for name in {*fishers[0], *fishers[1]}:
        thetas = [model[name] for model in weights]
        both = all(name in fisher for fisher in fishers)
        parts = [fisher[name] if both else torch.ones(()) for fisher in fishers]
        assert_within(found[name], squisher_reference(thetas, parts, [1.0, 1.0]), largest(thetas))
