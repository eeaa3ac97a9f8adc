"""Choice of the k largest of four scores, on disk and in memory."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from squisher_mergekit.applications.fish_mask.files import select_files
from squisher_mergekit.applications.fish_mask.heads import in_memory, parts_on_disk
from squisher_mergekit.applications.fish_mask.recipe import FishMaskRecipe, select
from squisher_mergekit.applications.masks import read_mask
from squisher_mergekit.errors import ConfigError, MismatchError, NotFoundError, UnsupportedStateError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.files import read_fisher
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.models.weights import open_weights
from squisher_mergekit.tensors.safetensors import MemoryStore
from tests.applications.fish_mask.fish import Pair, fisher_of
from tests.estimators.models import make

TUNED = {"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([4.0, 5.0])}
BASE = {"a": torch.tensor([[1.0, 1.0, 1.5]]), "b": torch.tensor([3.0, 10.0])}
FISHER = {"a": torch.tensor([[9.0, 4.0, 2.0]]), "b": torch.tensor([8.0, 0.1])}


@pytest.mark.parametrize(
    ("score", "order"),
    [
        ("fisher", ["a0", "b0", "a1", "a2", "b1"]),  # scores 9, 8, 4, 2, 0.1
        ("reset", ["b0", "a2", "a1", "b1", "a0"]),  # scores 1x8, 1.5^2 x 2, 1x4, 25 x 0.1, 0
        ("movement", ["b1", "a2", "a1", "b0", "a0"]),  # scores 5, 1.5, 1, 1, 0; the first of equal ones
    ],
)
def test_scores_by_hand(score, order):
    """For each k, the mask has the first k entries of an order computed by hand."""
    for count in range(1, 6):
        mask = select(TUNED, FISHER, count / 5, base=BASE, score=score)
        kept = {f"{name}{i}" for name in mask for i, one in enumerate(mask[name].flatten().tolist()) if one}
        assert kept == set(order[:count])


def _slow(score, tuned, base, fisher, keep):
    """Sort all entries in float64; equal ones keep the order of names."""
    entries = []
    for name in sorted(tuned):
        t, b, f = (one[name].double().flatten().tolist() for one in (tuned, base, fisher))
        for place, (x, y, z) in enumerate(zip(t, b, f, strict=True)):
            value = {"fisher": z, "reset": (x - y) ** 2 * z / 2, "movement": abs(x - y)}[score]
            entries.append((-value, name, place))
    return {(name, place) for _, name, place in sorted(entries)[:keep]}


@given(
    seed=st.integers(0, 99),
    keep=st.integers(1, 37),
    score=st.sampled_from(["fisher", "reset", "movement"]),
    few=st.booleans(),
)
def test_the_largest_are_kept(seed, keep, score, few):
    """The mask has exactly the k largest entries of a full sort, also with many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"z": (7, 3), "a": (11,), "m": (5, 1)}

    def draw(power=1):
        values = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        return {name: one.mul(3).round() if few else one**power for name, one in values.items()}

    tuned, base, fisher = draw(), draw(), draw(30)
    mask = select(tuned, fisher, keep / 37, base=base, score=score)
    assert mask.kept == keep
    kept = {(name, place) for name in mask for place in mask[name].flatten().nonzero()[:, 0].tolist()}
    assert kept == _slow(score, tuned, base, fisher, keep)


def test_the_share_counts_the_head_and_no_excluded_tensor():
    """The mask keeps floor(keep n) entries, the head among them. Excluded tensors do not count."""
    tuned = {"x.weight": torch.rand(7, 3), "classifier.weight": torch.rand(5), "words": torch.rand(41)}
    mask = select(tuned, {name: torch.rand(one.shape) for name, one in tuned.items()}, 0.3, exclude=("words",))
    assert (mask["classifier.weight"].all(), mask["words"].any()) == (True, False)
    assert mask.kept == 7 == int(0.3 * (21 + 5))
    assert int(mask["x.weight"].sum()) == 2
    assert mask.metadata["kept"] == 7
    assert mask.metadata["entries"] == 26
    everything = select(tuned, None, 1.0, score="random")
    assert everything.kept == everything.entries == 67
    none = select(tuned, None, 1 / 67, score="random", head=())
    assert none.kept == 1


def test_within_each_tensor():
    """With scope=layer, each tensor keeps the largest share of its own entries, to the entry."""
    mask = select(TUNED, FISHER, 0.4, scope="layer")
    assert mask["a"].tolist() == [[True, False, False]]
    assert mask["b"].tolist() == [True, False]


def test_random_draws_from_the_same_entries():
    """The random score keeps as many entries as any other score, and none of an excluded tensor.

    Another seed draws others.
    """
    tuned = {"a": torch.zeros(101, 97), "b": torch.zeros(1009), "words": torch.zeros(5000)}
    masks = [select(tuned, None, 0.1, score="random", exclude=("^words$",), seed=seed) for seed in (0, 0, 1)]
    assert [mask.kept for mask in masks] == [int(0.1 * (101 * 97 + 1009))] * 3
    assert not masks[0]["words"].any()
    assert torch.equal(masks[0]["a"], masks[1]["a"])
    assert not torch.equal(masks[0]["a"], masks[2]["a"])
    assert abs(masks[0]["a"].float().mean() - 0.1) < 0.01


def test_tensors_of_other_steps_are_on_one_scale():
    """Accumulators with different step counts are compared as v / (1 - beta2^t)."""
    config = FisherConfig(
        estimator="squisher", statistic="ema", optimizer={"beta2": 0.9}, steps={"default": 100, "b": 1}
    )
    fisher = Fisher(MemoryStore({"a": torch.tensor([2.0, 0.5]), "b": torch.tensor([0.15, 0.3])}), config)
    tuned = {"a": torch.zeros(2), "b": torch.zeros(2)}
    mask = select(tuned, fisher, 0.5)  # scores 2, 0.5 and 1.5, 3
    assert (mask["a"].tolist(), mask["b"].tolist()) == ([True, False], [False, True])
    unknown = Fisher(MemoryStore(fisher._store._tensors), FisherConfig(estimator="squisher", statistic="ema"))
    assert select(tuned, unknown, 0.5)["a"].tolist() == [True, True]


HEADS = {
    "bert": {"classifier.weight", "classifier.bias"},
    "roberta": {f"classifier.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")},
    "distilbert": {f"{part}.{kind}" for part in ("pre_classifier", "classifier") for kind in ("weight", "bias")},
    "vit": {"classifier.weight", "classifier.bias"},
    "bert-mlm": set(),
    "llama": set(),
    "llama-tied": set(),
    "mixtral": set(),
    "t5": set(),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_a_model(tmp_path, name):
    """The classifier counts as the head, but the output layer of a language model does not. Disk and memory agree."""
    model = make(name)
    model.save_pretrained(tmp_path)
    _, live = in_memory(model)
    assert live.heads == HEADS[name]
    assert live == parts_on_disk(open_weights(tmp_path))
    (tmp_path / "config.json").unlink()
    assert parts_on_disk(open_weights(tmp_path)).heads <= live.heads


def test_the_head_of_a_plain_network_is_its_last_layer():
    """The last layer of a plain network is its head. Statistics of BatchNorm are kept without being counted."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 5))
    mask = select(model, None, 0.5, score="random")
    assert mask["3.weight"].all()
    assert mask["3.bias"].all()
    assert mask["1.running_mean"].all()
    assert mask["1.running_var"].all()
    weights = sum(p.numel() for p in model.parameters())
    assert mask.kept - 6 == weights // 2
    assert "1.num_batches_tracked" not in mask


@pytest.mark.parametrize("score", ["fisher", "reset", "movement", "random"])
@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        ("bert", torch.float32, "2GB"),
        ("bert", torch.bfloat16, "5KB"),
        ("llama-tied", torch.float32, "2GB"),
        ("mixtral", torch.float32, "9KB"),
        ("mixtral", torch.float16, "2GB"),
    ],
)
def test_files_and_memory_give_equal_masks(tmp_path, name, dtype, shard, score):
    """Masks on disk and in memory are equal bit for bit, with shards, packed experts, ties and other base names."""
    pair = Pair(tmp_path, name, dtype, shard)
    options = {"score": score, "keep": 0.21, "exclude": ("embed",), "scope": "global", "seed": 5}
    report = select_files(pair.tuned, pair.fisher, tmp_path / "mask.safetensors", base=pair.base, **options)
    found = read_mask(tmp_path / "mask.safetensors")
    live = select(pair.load(pair.tuned), read_fisher(pair.fisher), base=pair.load_base(), **options)
    assert set(found) == set(live)
    assert all(torch.equal(found[name], live[name]) for name in live)
    assert found.kept == report.kept == int(0.21 * report.entries)
    assert report.layers == {name: int(live[name].sum()) for name in live}
    found.check(open_weights(pair.tuned).infos, pair.tuned)
    for key, parameter_mask in found.by_parameter(pair.load(pair.tuned)).items():
        assert not parameter_mask.any() or "embed" not in key
    assert {key: value for key, value in found.metadata.items() if key != "weights_fingerprint"} == {
        **live.metadata,
        "head": None,
        "exclude": ["embed"],
    }


def test_buffers_on_disk_are_kept(tmp_path):
    """The running statistics of a transformers network are kept and not counted; its config tells them."""
    import transformers

    config = transformers.ResNetConfig(
        num_channels=3, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path)
    report = select_files(tmp_path, fisher_of(tmp_path), tmp_path / "mask.safetensors", 0.3)
    mask = read_mask(tmp_path / "mask.safetensors")
    buffers = [name for name in mask if "running_" in name]
    assert buffers
    assert all(mask[name].all() for name in buffers)
    assert report.entries == sum(p.numel() for p in model.parameters())
    assert mask.kept == report.kept + sum(mask[name].numel() for name in buffers)
    live = select(model, fisher_of(tmp_path), 0.3)
    assert set(live) == set(mask)
    assert all(torch.equal(live[name], mask[name]) for name in mask)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, float("nan"), float("inf"), 50])
def test_a_share_that_is_none_is_refused(keep):
    """A share must be above 0 and at most 1."""
    with pytest.raises(ConfigError, match=rf"keep must be in \(0, 1\], found {re.escape(str(keep))}; give it as"):
        FishMaskRecipe(keep)


CASES = {
    "no Fisher": (None, {}, "score fisher needs a Fisher; give --fisher"),
    "no base": (FISHER, {"score": "reset"}, "score reset needs the pre-trained model; give --base"),
    "unknown score": (FISHER, {"score": "magnitude"}, "score must be one of fisher, reset, movement, random, found"),
    "unknown scope": (FISHER, {"scope": "tensor"}, "scope must be one of global, layer, found 'tensor'"),
    "lacks a tensor": (
        {"a": FISHER["a"]},
        {},
        "lacks b of memory .*give a Fisher that has it, or leave the tensor out",
    ),
    "strange tensor": (
        FISHER | {"c": torch.ones(1)},
        {},
        "c in memory is not in memory; give the Fisher of this model",
    ),
    "other shape": ({"a": torch.ones(3), "b": FISHER["b"]}, {}, r"weight's shape \[1, 3\]"),
    "head too large": (FISHER, {"head": ("^a$",)}, r"0\.4 of 5 entries are 2 and the head \(a\) has 3; keep more"),
    "nothing kept": (FISHER, {"keep": 0.1}, "a share of one entry at least, but 0.1 of 5 entries is less; keep more"),
    "no such head": (
        FISHER,
        {"head": ("zz",)},
        "head must match the name of a tensor, but 'zz' matches none; a name is",
    ),
    "no expression": (FISHER, {"exclude": ("(",)}, r"exclude must be a name or a regular expression, found '\('"),
    "both": (FISHER, {"exclude": ("b",), "head": ("b",)}, "kept as head or excluded, but b is to be both"),
    "negative": (FISHER | {"b": torch.tensor([-1.0, 1.0])}, {}, "b in memory has 1 negative of 2 entries"),
    "NaN": (FISHER | {"b": torch.tensor([float("nan"), 1.0])}, {}, "b in memory has 1 NaN of 2 entries"),
    "base of other shapes": (
        FISHER,
        {"score": "reset", "base": BASE | {"b": torch.ones(3)}},
        r"b must be alike in both models, but memory has \[2\] of torch.float32 and memory has \[3\]",
    ),
    "base lacks one": (FISHER, {"score": "movement", "base": {"a": BASE["a"]}}, "b must be alike .* memory has none"),
    "weights not finite": (
        FISHER,
        {"score": "movement", "base": BASE | {"b": torch.tensor([float("inf"), 0.0])}},
        "weights must be finite, but b of the base model is not",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_does_not_fit_is_refused(case):
    """A model or Fisher that does not fit is refused with one line that states the mismatch."""
    fisher, options, message = CASES[case]
    with pytest.raises((ConfigError, MismatchError, ValuesError), match=message) as caught:
        select(TUNED, fisher, **{"keep": 0.4} | options)
    assert "\n" not in str(caught.value)


def test_files_are_refused_and_nothing_is_written(tmp_path):
    """A taken target, a missing model, a foreign Fisher and, with strict, other weights are refused.

    Nothing is written.
    """
    pair = Pair(tmp_path, "bert")
    out = tmp_path / "out" / "mask.safetensors"
    with pytest.raises(NotFoundError):
        select_files(tmp_path / "no/such/folder", pair.fisher, out, 0.2)
    with pytest.raises(ConfigError, match=r"but .* is a folder; give .*mask\.safetensors"):
        select_files(pair.tuned, pair.fisher, tmp_path, 0.2)
    other = Pair(tmp_path / "other", "llama")
    with pytest.raises(MismatchError, match=r"a Fisher must cover every tensor|names of a Fisher"):
        select_files(pair.tuned, other.fisher, out, 0.2)
    with pytest.raises(MismatchError, match="must be alike in both models"):
        select_files(pair.tuned, pair.fisher, out, 0.2, score="reset", base=other.base)
    broken = fisher_of(pair.tuned)
    broken["bert.pooler.dense.weight"][3, 2] = float("nan")
    with pytest.raises(ValuesError, match=r"bert\.pooler\.dense\.weight in memory has 1 NaN"):
        select_files(pair.tuned, broken, out, 0.2)
    elsewhere = Pair(tmp_path / "again", "bert")
    moved = fisher_of(elsewhere.tuned)
    moved.config = moved.config.model_copy(update={"weights_fingerprint": "fp1:1-2"})
    with pytest.raises(MismatchError, match=r"the Fisher was made at other weights .* or leave out --strict"):
        select_files(pair.tuned, moved, out, 0.2, strict=True)
    assert not list((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True
    assert select_files(pair.tuned, moved, out, 0.2).fisher_differs is not None
    assert [file.name for file in out.parent.iterdir()] == ["mask.safetensors"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_is_refused():
    """An adapter is refused, because its weights are not those of a model."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UnsupportedStateError, match="a model must be saved whole to be chosen from"):
        select(model, None, 0.5, score="random")


def test_the_report_is_plain(tmp_path):
    """The report is plain data: it prints, and it converts to JSON."""
    pair = Pair(tmp_path, "bert")
    report = select_files(pair.tuned, pair.fisher, tmp_path / "m.safetensors", 0.2, exclude=("embeddings",))
    assert report.as_dict() == dataclasses.asdict(report)
    assert report.heads == ("classifier.bias", "classifier.weight")
    assert all("embeddings" in name for name in report.excluded)
    assert sum(report.layers.values()) == report.kept


def test_compiled_inner_modules_change_no_name():
    """The mask of a model with a block compiled by itself has the names of the plain model, buffers included."""
    model = nn.Sequential(nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), nn.Linear(7, 2))
    plain = select(model, keep=0.5, score="random")
    model[0] = torch.compile(model[0], backend="eager")
    found = select(model, keep=0.5, score="random")
    assert list(found) == list(plain)
    assert all(torch.equal(found[name], mask) for name, mask in plain.items())


def test_a_folder_called_memory_is_not_read(tmp_path, monkeypatch):
    """Tensors in memory have nothing to do with files of the working directory."""
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "model.safetensors").write_text("damaged")
    monkeypatch.chdir(tmp_path)
    fisher = Fisher(MemoryStore(FISHER), FisherConfig(statistic="mean", weights_fingerprint="fp1:0-0"))
    assert select(TUNED, fisher, 0.4)["a"].tolist() == [[True, False, False]]
