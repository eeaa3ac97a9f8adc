"""``squisher task2vec`` as a command: files, tables, report, picture, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from squisher_mergekit.applications.task2vec.distances import distance, distance_matrix
from squisher_mergekit.applications.task2vec.embedding import read_embedding
from squisher_mergekit.cli.task2vec import command
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.mapping import Fisher
from squisher_mergekit.fisher.write import write_fisher
from squisher_mergekit.tensors.safetensors import MemoryStore

STATES = Path(__file__).parents[1] / "fixtures" / "optimizer_states"
NAMES = ["movies", "products", "news"]
PNG = b"\x89PNG\r\n\x1a\n"


def _run(*arguments):
    return CliRunner().invoke(command, [*map(str, arguments), "--quiet"])


def _done(*arguments):
    result = _run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def _refused(*arguments):
    """Run a command that must fail, and return its only line."""
    result = _run(*arguments)
    assert result.exit_code == 1, result.output
    assert len(result.output.strip().splitlines()) == 1
    return result.output


def _write(folder, seed, change=None, **config):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (17, 5), "a.bias": (17,), "b.weight": (13, 3, 2), "classifier.weight": (2, 13)}
    tensors = {name: torch.rand(shape, generator=generator) ** 3 for name, shape in shapes.items()} | (change or {})
    config = {"estimator": "empirical", "statistic": "mean", "num_examples": 100 + seed} | config
    write_fisher(Fisher(MemoryStore(tensors), FisherConfig(**config)), folder)
    return folder


def _squisher(folder):
    known = {"steps": 5, "optimizer": {"beta2": 0.9}, "num_examples": None}
    return _write(folder / "run", 7, estimator="squisher", statistic="ema", **known)


@pytest.fixture
def fishers(tmp_path):
    """Return three Fishers of one architecture."""
    return [_write(tmp_path / name, seed) for seed, name in enumerate(NAMES)]


@pytest.fixture
def tasks(fishers, tmp_path):
    """Return the embeddings of the Fishers."""
    _done("embed", *fishers, "-o", tmp_path / "tasks")
    return [tmp_path / "tasks" / f"{name}.safetensors" for name in NAMES]


def test_embed_writes_a_file_a_task(fishers, tmp_path):
    """Each embedding has the name of its folder.

    The report lists excluded tensors with reasons and has no absolute path.
    """
    output = _done("embed", *fishers, "-o", tmp_path / "tasks", "--json", tmp_path / "report.json")
    assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == sorted(f"{n}.safetensors" for n in NAMES)
    lines = output.splitlines()
    assert lines[0].startswith("movies    30 values, one a row of 2 tensors; empirical, debiased, mean ")
    assert "left out, head: 1 (classifier.weight)" in lines
    assert "left out, one axis: 1 (a.bias)" in lines
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["news"]["tensors"] == {"a.weight": 17, "b.weight": 13}
    assert report["news"]["excluded"] == {"a.bias": "one axis", "classifier.weight": "head"}
    found = read_embedding(tmp_path / "tasks" / "news.safetensors")
    assert found.mean == report["news"]["mean"]
    assert found.info.num_examples == 102
    assert str(tmp_path).encode() not in (tmp_path / "tasks" / "news.safetensors").read_bytes()


def test_embed_options(fishers, tmp_path):
    """One Fisher goes into one file. Granularity, vectors, scaling and expressions are passed on."""
    options = ("--per", "entry", "--with-vectors", "--scaling", "raw", "--exclude", "^b")
    _done("embed", f"mine={fishers[0]}", "-o", tmp_path / "one.safetensors", *options)
    found = read_embedding(tmp_path / "one.safetensors")
    assert {name: values.numel() for name, values in found.tensors.items()} == {"a.weight": 85, "a.bias": 17}
    assert (found.info.name, found.info.per, found.info.scaling) == ("mine", "entry", "raw")
    assert found.info.excluded["b.weight"] == "matches ^b"


def test_a_checkpoint_is_embedded_like_the_fisher_made_of_it(tmp_path):
    """Optimizer state is embedded like its Fisher. One --model serves all states, or each has its own."""
    state, model = STATES / "plain_adam" / "optimizer.pt", STATES / "plain_adam"
    for count in (1, 2):
        out = tmp_path / str(count)
        _done("embed", f"a={state}", f"b={state}", *(["--model", model] * count), "-o", out)
        a, b = (read_embedding(out / f"{name}.safetensors") for name in "ab")
        assert a.size == b.size > 0
        assert a.info.estimator == "squisher"
        assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    checkpoint = STATES / "trainer_sharded_index"
    _done("embed", checkpoint, "-o", tmp_path / "three")
    assert (tmp_path / "three" / "trainer_sharded_index.safetensors").is_file()


def test_distance_of_files_is_that_of_the_fishers(fishers, tasks, tmp_path):
    """Table, JSON and Python agree, for embeddings and for Fishers embedded on the fly."""
    wanted = distance_matrix({name: read_embedding(file) for name, file in zip(NAMES, tasks, strict=True)})
    outputs = []
    for number, sources in enumerate((tasks, fishers)):
        outputs.append(_done("distance", *sources, "--json", tmp_path / f"{number}.json"))
        report = json.loads((tmp_path / f"{number}.json").read_text())
        assert report["tasks"] == NAMES
        assert report["distances"] == wanted.tolist()
        assert sorted(report["order"]) == sorted(NAMES)
        assert (report["metric"], report["normalize"], report["alpha"]) == ("cosine", "mean", None)
    assert outputs[0] == outputs[1]
    lines = [line.split() for line in outputs[0].splitlines()]
    assert lines[1] == [*NAMES, "nearest"]
    values = wanted.fill_diagonal_(9).tolist()
    for place, (line, row) in enumerate(zip(lines[2:], values, strict=True)):
        cells = ["-" if place == other else f"{value:.4f}" for other, value in enumerate(row)]
        assert line == [NAMES[place], *cells, NAMES[row.index(min(row))]]


def test_long_names_are_numbered(fishers):
    """Long names are numbered in the column titles, and rows show number and name."""
    output = _done("distance", f"a-rather-long-name={fishers[0]}", f"other={fishers[1]}")
    lines = [line.split() for line in output.splitlines()]
    assert lines[1] == ["1", "2", "nearest"]
    assert lines[2][:3] == ["1", "a-rather-long-name", "-"]
    assert lines[3][:2] == ["2", "other"]


def test_metrics_and_normalisation(fishers, tasks, tmp_path):
    """All options reach the equation. alpha belongs to the asymmetric metric."""
    a, b = (read_embedding(file) for file in tasks[:2])
    for options, arguments in (
        (("--metric", "kl"), {"metric": "kl"}),
        (
            ("--metric", "normalized_cosine", "--normalize", "none"),
            {"metric": "normalized_cosine", "normalize": "none"},
        ),
        (("--normalize", "l2"), {"normalize": "l2"}),
        (("--normalize", "norm"), {"normalize": "l2"}),  # the old name
        (("--metric", "asymmetric", "--alpha", 0.5), {"metric": "asymmetric", "alpha": 0.5}),
    ):
        _done("distance", *tasks[:2], *options, "--json", tmp_path / "d.json")
        found = json.loads((tmp_path / "d.json").read_text())
        assert found["distances"][0][1] == distance(a, b, **arguments)
        assert found["alpha"] == arguments.get("alpha")
    assert _run("distance", *tasks, "--alpha", 0.5).exit_code == 2
    assert "from / to" in _done("distance", *tasks, "--metric", "asymmetric")


def test_other_estimators_are_noted(fishers, tmp_path):
    """A comparison of a Squisher with computed Fishers has a note."""
    output = _done("distance", _squisher(tmp_path), *fishers)
    assert "note: F is estimated in different ways (empirical, squisher)" in output
    assert "note" not in _done("distance", *fishers)


@pytest.mark.parametrize("count", [2, 17])
def test_plot_is_a_png(fishers, tmp_path, count):
    """Heat maps are drawn for two tasks and for many without numbers in the cells, symmetric or not."""
    sources = [f"task{number}={fishers[number % 3]}" for number in range(count)]
    for metric in ("cosine", "asymmetric"):
        _done("distance", *sources, "--metric", metric, "--plot", tmp_path / "made" / f"{metric}.png")
        assert (tmp_path / "made" / f"{metric}.png").read_bytes().startswith(PNG)


def test_rank_orders_by_distance(tasks):
    """The nearest source comes first, and the first task is the target."""
    embeddings = {name: read_embedding(file) for name, file in zip(NAMES, tasks, strict=True)}
    values = {name: distance(embeddings[name], embeddings["movies"]) for name in NAMES[1:]}
    lines = _done("rank", *tasks).splitlines()
    assert lines[1] == "sources for movies:"
    order = sorted(values, key=values.get)
    assert [line.split() for line in lines[2:]] == [
        [str(place), name, f"{values[name]:.4f}"] for place, name in enumerate(order, 1)
    ]


def test_rank_is_judged_by_known_transfers(tasks, tmp_path):
    """The report has reciprocal rank, NDCG and position for each target, next to the orders by size and at random."""
    table = tmp_path / "transfer.csv"
    rows = [(a, b) for a in NAMES for b in NAMES if a != b]
    table.write_text("target,source,score\n" + "".join(f"{a},{b},{len(b)}\n" for a, b in rows))
    output = _done("rank", *tasks, "--each", "--transfer", table, "--json", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["sizes"] == {"movies": 100, "products": 101, "news": 102}
    distances = report["distances"]
    places = {t: sorted(keys, key=keys.get).index(max(keys, key=len)) + 1 for t, keys in distances.items()}
    found = {target: row["best_rank"] for target, row in report["quality"]["distance"].items()}
    assert found.pop("mean") == pytest.approx(sum(places.values()) / 3)
    assert found == places
    assert report["quality"]["size"]["movies"]["reciprocal_rank"] == 0.5  # news is larger, products transfers best
    assert report["quality"]["random"]["mean"]["reciprocal_rank"] == 0.75
    assert "score 8" in output
    assert [line.split()[-3:] for line in output.splitlines() if line.startswith(("recip", "NDCG", "place"))] == [
        ["distance", "size", "random"]
    ] * 3


def test_sizes_may_be_unknown_or_given(tmp_path):
    """Without sizes the order by size is absent, and the report says how to give them."""
    places = [_write(tmp_path / name, seed, num_examples=None) for seed, name in enumerate(NAMES)]
    (tmp_path / "t.json").write_text(json.dumps({"movies": {"products": 0.5, "news": 0.7}}))
    (tmp_path / "s.csv").write_text("task,size\nmovies,9\nproducts,9\nnews,10\n")
    output = _done("rank", *places, "--transfer", tmp_path / "t.json")
    assert "give --sizes" in output
    assert "size    random" not in output
    output = _done(
        "rank", *places, "--transfer", tmp_path / "t.json", "--sizes", tmp_path / "s.csv", "--json", tmp_path / "r.json"
    )
    assert "size    random" in output
    quality = json.loads((tmp_path / "r.json").read_text())["quality"]
    assert quality["size"]["movies"] == {"reciprocal_rank": 1, "ndcg": 1, "best_rank": 1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c.weight": torch.ones(3, 3)}, "other has c.weight and movies lacks it"),
        ({"a.weight": torch.ones(11, 5)}, "a.weight has 17 values in movies and 11 in other"),
        ({"a.weight": torch.ones(5)}, "movies has a.weight and other lacks it"),
        ({"a.weight": torch.zeros(17, 5), "b.weight": torch.zeros(13, 3, 2)}, "all means over 2 tensors"),
    ],
)
def test_a_mismatch_is_one_line(fishers, tmp_path, change, words):
    """Other networks and all-zero Fishers exit with 1 and one line, without a file."""
    other = _write(tmp_path / "other", 9, change)
    files = ("--json", tmp_path / "no.json")
    for arguments in (("distance", *fishers, other, *files, "--plot", tmp_path / "no.png"), ("rank", *fishers, other)):
        assert words in _refused(*arguments)
    assert not list(tmp_path.glob("no.*"))


def test_refusals_leave_nothing(fishers, tasks, tmp_path):
    """Fewer than two tasks, duplicates, damaged files, unknown names and taken paths are refused without leftovers."""
    out, per_example = tmp_path / "new", ("--scaling", "per_example")
    assert "at least two tasks, found 1" in _refused("distance", tasks[0])
    assert "two are 'movies'" in _refused("distance", tasks[0], fishers[0])
    assert "two are 'movies'" in _refused("embed", fishers[0], fishers[0], "-o", out)
    assert "are left out" in _refused("embed", *fishers, "--exclude", "weight", "-o", out)
    refused = _refused("embed", _squisher(tmp_path), *per_example, "-o", out)
    assert f"per_example needs examples_per_step, which {tmp_path}" in refused
    assert "is in none of" in _refused("embed", *fishers, "--exclude", "query", "-o", out)
    assert "already" in _refused("embed", *fishers, "-o", tmp_path / "tasks")
    assert "3 embeddings need a folder" in _refused("embed", *fishers, "-o", tmp_path / "one.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(tasks[0].read_bytes()[:-5])
    assert "cut.safetensors must be a whole safetensors file" in _refused(
        "distance", tasks[1], tmp_path / "cut.safetensors"
    )
    (tmp_path / "t.csv").write_text("target,source,score\nmovies,books,1\n")
    assert "found 'books'" in _refused("rank", *tasks, "--transfer", tmp_path / "t.csv", "--json", tmp_path / "no.json")
    assert "nowhere.csv" in _refused("rank", *tasks, "--sizes", tmp_path / "nowhere.csv")
    broken = _write(tmp_path / "broken", 4)
    file = broken / "fisher.safetensors"
    tensors = load_file(file)
    tensors["b.weight"].view(-1)[3] = float("nan")
    save_file(tensors, file)  # without digests, as by another writer
    assert "1 NaN" in _refused("embed", *fishers, broken, "-o", out)
    assert not out.exists()
    assert not list(tmp_path.glob("no.*"))
    assert not list(tmp_path.glob(".*"))


def test_an_embedding_is_no_fisher(tasks, tmp_path):
    """An embedding as input of embed is a usage error."""
    assert _run("embed", tasks[0], "-o", tmp_path / "new").exit_code == 2


def test_help_needs_no_torch():
    """The help of the group and its subcommands imports neither torch nor scipy, and has an example."""
    script = (
        "import sys; from click.testing import CliRunner; from squisher_mergekit.cli.task2vec import command\n"
        "for verb in ([], ['embed'], ['distance'], ['rank']):\n"
        "    result = CliRunner().invoke(command, [*verb, '--help']); assert 'Example' in result.output\n"
        "print([name for name in ('torch', 'scipy', 'matplotlib') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
