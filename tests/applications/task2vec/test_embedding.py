"""Embeddings of tasks: averages, excluded tensors, and the file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from squisher_mergekit.applications.task2vec.embedding import (
    HEAD,
    default_name,
    embed,
    open_tasks,
    read_embedding,
    split_name,
    write_embedding,
    write_embeddings,
)
from squisher_mergekit.errors import ConfigError, CorruptFileError, NotFoundError, ValuesError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore


def _fisher(tensors, **config):
    return Fisher(MemoryStore(tensors, "runs/digits"), FisherConfig(**config))


def _network(seed=0):
    """Return the tensors of a small network with a convolution, a matrix, vectors and a head, some with tiny values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "conv.weight": (5, 3, 7, 2),
        "conv.bias": (5,),
        "fc1.weight": (11, 13),
        "norm.weight": (11,),
        "scale": (),
        "classifier.weight": (2, 11),
        "classifier.bias": (2,),
    }
    return {name: 1e-14 * torch.rand(shape, generator=generator) ** 4 for name, shape in shapes.items()}


def test_a_value_is_the_mean_over_a_filter():
    """A value is the mean of a filter or row over all axes but the first, as computed by float64 loops."""
    tensors = _network()
    found = embed(_fisher(tensors)).tensors
    assert list(found) == ["conv.weight", "fc1.weight"]
    for name, values in found.items():
        assert values.dtype == torch.float32
        wanted = [sum(float(entry) for entry in row.reshape(-1)) / row.numel() for row in tensors[name]]
        assert values.tolist() == pytest.approx(wanted, rel=1e-6)


def test_granularity():
    """The granularity gives one value per tensor, per filter or per entry. Vectors are added per entry on request."""
    tensors = _network()
    whole = embed(_fisher(tensors), per="tensor")
    assert {name: values.shape for name, values in whole.tensors.items()} == {"conv.weight": (1,), "fc1.weight": (1,)}
    assert whole.tensors["fc1.weight"].item() == pytest.approx(tensors["fc1.weight"].double().mean().item(), rel=1e-6)
    entries = embed(_fisher(tensors), per="entry")
    assert torch.equal(entries.tensors["conv.weight"], tensors["conv.weight"].reshape(-1))
    vectors = embed(_fisher(tensors), with_vectors=True)
    assert list(vectors.tensors) == ["conv.weight", "conv.bias", "fc1.weight", "norm.weight", "scale"]
    assert torch.equal(vectors.tensors["norm.weight"], tensors["norm.weight"])
    assert torch.equal(vectors.tensors["scale"], tensors["scale"].reshape(1))
    assert vectors.size == 5 + 5 + 11 + 11 + 1


def test_scaling():
    """The mean is over the debiased F, per tensor, or over the stored values with raw."""
    steps = {"default": 10, "fc1.weight": 3}
    fisher = _fisher(
        _network(), estimator="squisher", statistic="ema", steps=steps, optimizer={"beta2": 0.9}, examples_per_step=4
    )
    raw, debiased, per_example = (embed(fisher, scaling=one) for one in ("raw", "debiased", "per_example"))
    for name, count in (("conv.weight", 10), ("fc1.weight", 3)):
        wanted = raw.tensors[name] / (1 - 0.9**count)
        assert debiased.tensors[name].tolist() == pytest.approx(wanted.tolist(), rel=1e-6)
        assert per_example.tensors[name].tolist() == pytest.approx((4 * wanted).tolist(), rel=1e-6)
    with pytest.raises(ConfigError, match="steps"):
        embed(_fisher(_network(), estimator="squisher", statistic="ema", optimizer={"beta2": 0.9}))


def test_a_large_tensor_is_averaged_in_blocks():
    """Rows beyond the first block have the mean of the scaled entries too, less the start of Adagrad's sums."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"w": 0.7 + torch.rand(10007, 53, generator=generator), "zero": torch.full((3, 5), 0.7)}
    optimizer = {"initial_accumulator_value": 0.7}
    fisher = _fisher(tensors, estimator="squisher", statistic="sum", steps=5, optimizer=optimizer)
    found = embed(fisher).tensors
    for name in tensors:
        assert torch.allclose(found[name], fisher.scaled(name).double().mean(1).float(), rtol=1e-6, atol=1e-9)
    assert found["zero"].tolist() == [0, 0, 0]
    assert torch.equal(fisher["w"], tensors["w"])
    double = _fisher({"w": tensors["w"].double()})
    before = double["w"].clone()
    embed(double)
    assert torch.equal(double["w"], before)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("classifier.weight", True),
        ("classifier.dense.weight", True),
        ("base_model.model.score.weight", True),
        ("lm_head.weight", True),
        ("qa_outputs.weight", True),
        ("cls.predictions.decoder.weight", True),
        ("fc.weight", True),
        ("head.weight", True),
        ("bert.pooler.dense.weight", False),
        ("model.layers.0.mlp.fc1.weight", False),
        ("encoder.layer.0.attention.heads.weight", False),
        ("embeddings.cls_token", False),
        ("layers.0.scores.weight", False),
    ],
)
def test_heads_are_known_by_name(name, head):
    """Heads are matched by whole parts of the name. A pooler or a layer with a similar prefix is no head."""
    assert bool(HEAD.search(name)) is head


def test_excluded_tensors_are_listed():
    """Each excluded tensor is listed with its reason: head, expression, or one axis."""
    found = embed(_fisher(_network()), exclude=["^conv", "classi"])
    assert list(found.tensors) == ["fc1.weight"]
    assert found.info.excluded == {
        "conv.weight": "matches ^conv",
        "conv.bias": "matches ^conv",
        "norm.weight": "one axis",
        "scale": "one axis",
        "classifier.weight": "head",
        "classifier.bias": "head",
    }


def test_one_tensor_is_read_at_a_time():
    """Only one tensor of the Fisher is in memory at a time, and excluded tensors are not read."""
    import weakref

    class Store(MemoryStore):
        alive: list = []  # noqa: RUF012
        names: list = []  # noqa: RUF012

        def read(self, name):
            assert not [key for key, ref in self.alive if ref() is not None and key != name]
            tensor = super().read(name).clone()
            self.alive.append((name, weakref.ref(tensor)))
            self.names.append(name)
            return tensor

    embed(Fisher(Store(_network()), FisherConfig()))
    assert set(Store.names) == {"conv.weight", "fc1.weight"}


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({"fc1.weight": torch.full((11, 13), float("nan"))}, {}, ValuesError, "143 NaN"),
        ({"fc1.weight": -torch.ones(11, 13)}, {}, ValuesError, "143 negative"),
        ({"conv.weight": torch.zeros(5, 3), "fc1.weight": torch.zeros(3, 2)}, {}, ValuesError, "all means over 2"),
        ({}, {"exclude": ["weight"]}, ConfigError, "all 7 of runs/digits are left out"),
        ({}, {"exclude": ["("]}, ConfigError, "regular expression"),
        ({}, {"exclude": ["attention"]}, ConfigError, "'attention' is in none of runs/digits"),
    ],
)
def test_refusals(changes, options, error, words):
    """Invalid values, an empty selection, and expressions that are wrong or match nothing are refused."""
    with pytest.raises(error) as caught:
        embed(_fisher(_network() | changes), **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_invalid_excluded_tensor_is_ignored():
    """NaN in an excluded head changes nothing, because the head is not read."""
    found = embed(_fisher(_network() | {"classifier.weight": torch.full((2, 2), float("nan"))})).tensors
    sound = embed(_fisher(_network())).tensors
    assert found.keys() == sound.keys()
    assert all(torch.equal(found[name], sound[name]) for name in sound)


def test_file_round_trip(tmp_path):
    """Values and metadata come back to the bit. Any reader of safetensors gets the vectors."""
    config = {"estimator": "empirical", "statistic": "mean", "num_examples": 96, "weights_fingerprint": "fp1:00"}
    made = embed(_fisher(_network(), **config), name="digits")
    write_embedding(made, tmp_path / "new" / "digits.safetensors")
    found = read_embedding(tmp_path / "new" / "digits.safetensors")
    assert found.info == made.info
    assert (found.info.num_examples, found.info.weights_fingerprint, found.info.source) == (96, "fp1:00", "digits")
    plain = load_file(tmp_path / "new" / "digits.safetensors")
    for tensors in (found.tensors, plain):
        assert tensors.keys() == made.tensors.keys()
        assert all(torch.equal(tensors[name], made.tensors[name]) for name in made.tensors)
    assert str(tmp_path) not in made.info.model_dump_json()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["digits.safetensors"]
    with pytest.raises(ConfigError, match="already"):
        write_embedding(made, tmp_path / "new" / "digits.safetensors")


def test_all_embeddings_are_written_or_none(tmp_path):
    """An existing file refuses the whole write. Several embeddings do not fit into one file."""
    made = {name: embed(_fisher(_network(seed)), name=name) for seed, name in enumerate("ab")}
    (tmp_path / "b.safetensors").write_text("mine")
    with pytest.raises(ConfigError, match=r"b\.safetensors already"):
        write_embeddings(made, tmp_path)
    with pytest.raises(ConfigError, match="2 embeddings need a folder"):
        write_embeddings(made, tmp_path / "one.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["b.safetensors"]


def test_damaged_files_are_refused(tmp_path):
    """Foreign and truncated files, inconsistent metadata, a later version and invalid values are refused."""
    made = embed(_fisher(_network()))
    good = made.info.model_dump()

    def refused(error, words, tensors=made.tensors, **metadata):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        save_file(dict(tensors), path, metadata)
        with pytest.raises(error, match=words):
            read_embedding(path)
        return path

    refused(NotFoundError, "must be an embedding", format="pt")
    refused(CorruptFileError, "an embedding with metadata", squisher_task2vec="{")
    refused(CorruptFileError, "an embedding with metadata", squisher_task2vec="[]")
    refused(ConfigError, "format_version 1, found 2", squisher_task2vec=json.dumps(good | {"format_version": 2}))
    refused(CorruptFileError, "per", squisher_task2vec=json.dumps(good | {"per": "layer"}))
    broken = {"w": torch.tensor([1.0, float("inf")])}
    refused(ValuesError, "1 infinite", tensors=broken, squisher_task2vec=json.dumps(good))
    write_embedding(made, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-3])
    with pytest.raises(CorruptFileError, match="cut"):
        read_embedding(tmp_path / "cut.safetensors")
    with pytest.raises(NotFoundError, match="nowhere"):
        read_embedding(tmp_path / "nowhere.safetensors")


def test_names_of_tasks(tmp_path, monkeypatch):
    """The name is the NAME= prefix, or the name in the embedding, or that of the folder. A path with = stays a path."""
    monkeypatch.chdir(tmp_path)
    config = FisherConfig(estimator="empirical", statistic="mean")
    for folder in ("a", "runs=2"):
        write_fisher(Fisher(MemoryStore(_network()), config), tmp_path / folder)
    write_embedding(embed(_fisher(_network()), name="digits"), tmp_path / "other.safetensors")
    assert list(open_tasks(["a", "b=a", "runs=2", "other.safetensors", "x=a/fisher.safetensors"])) == [
        "a",
        "b",
        "runs=2",
        "digits",
        "x",
    ]
    assert split_name("runs=2") == (None, "runs=2")
    assert split_name("runs=3") == ("runs", "3")
    assert default_name(".") == tmp_path.name
    assert default_name("a/fisher.safetensors") == "a"
    for sources, words in ((["a", "a"], "two are 'a'"), (["b/c=a"], "'b/c'"), ([".=a"], "one that a file can have")):
        with pytest.raises(ConfigError, match=words):
            open_tasks(sources)
    with pytest.raises(ConfigError, match="one for each of 3 Fishers, found 2"):
        open_tasks(["a", "b=a", "c=a"], ["a", "a"])


def test_tensors_without_entries_are_left_out():
    """A mean over no entries would be NaN."""
    found = embed(_fisher({"empty": torch.ones(3, 0), "conv.weight": torch.ones(3, 2)}))
    assert list(found.tensors) == ["conv.weight"]
    assert found.info.excluded == {"empty": "no entries"}
