"""Plain safetensors of second moments, without metadata: read as stored, by the names of the weights."""

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save, save_file

from squisher_mergekit import load_fisher
from squisher_mergekit.cli.main import main
from squisher_mergekit.errors import ConfigError, CorruptFileError, MismatchError, NotFoundError, ValuesError
from squisher_mergekit.optimizers.load import extract
from squisher_mergekit.tensors.hub import parse_file
from tests import hub_server
from tests.merging.reference import assert_squisher, draw_fisher, llama, merged

SHAPES = {"a.weight": (7, 5), "b.bias": (7,), "c.weight": (3, 5, 2)}


def _moments(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator).to(dtype) * 1e-6 for name, shape in SHAPES.items()}


def _assert_read(fisher, moments):
    assert set(fisher) == set(moments)
    for name, tensor in moments.items():
        assert torch.equal(fisher[name], tensor)
        assert torch.equal(fisher.scaled(name), tensor.float())


@pytest.mark.parametrize("suffix", ["", ".exp_avg_sq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["exp_avg_sq.safetensors", "squares.safetensors"])
def test_a_file_and_its_folder_are_read_as_stored(name, dtype, suffix, tmp_path, caplog):
    """The entries have no other scale than the stored one, and a warning says so."""
    moments = _moments(dtype=dtype)
    save_file({key + suffix: tensor for key, tensor in moments.items()}, tmp_path / name)
    for source in (tmp_path / name, tmp_path):
        _assert_read(load_fisher(source), moments)
    assert "taken as stored (scaling: raw)" in caplog.text


def test_shards_are_read(tmp_path):
    """An index names the shards, as Hugging Face shards weights."""
    moments = _moments(3)
    files = {key: f"exp_avg_sq-0000{k + 1}-of-00003.safetensors" for k, key in enumerate(moments)}
    for key, file in files.items():
        save_file({key: moments[key]}, tmp_path / file)
    (tmp_path / "exp_avg_sq.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    _assert_read(load_fisher(tmp_path), moments)


def test_other_tensors_of_the_optimizer_are_left_out(tmp_path):
    """With the suffix, first moments may be in the file, and the steps are read."""
    moments = _moments(1)
    saved = {f"{key}.exp_avg_sq": tensor for key, tensor in moments.items()}
    saved |= {f"{key}.exp_avg": -tensor for key, tensor in moments.items()}
    saved |= {f"{key}.step": torch.tensor(40.0) for key in moments}
    save_file(saved, tmp_path / "state.safetensors")
    fisher = load_fisher(tmp_path / "state.safetensors")
    _assert_read(fisher, moments)
    assert fisher.config.steps == 40


def test_steps_and_beta2_are_supplied(tmp_path):
    """With both, the entries are debiased like those of any optimizer's state."""
    moments = _moments(2)
    save_file(moments, tmp_path / "exp_avg_sq.safetensors")
    arguments = ["extract", str(tmp_path / "exp_avg_sq.safetensors"), "--steps", "100", "--beta2", "0.99"]
    result = CliRunner().invoke(main, [*arguments, "-o", str(tmp_path / "out"), "--quiet"])
    assert result.exit_code == 0, result.output
    fisher = load_fisher(tmp_path / "out")
    for name, tensor in moments.items():
        assert torch.equal(fisher[name], tensor)
        torch.testing.assert_close(fisher.scaled(name), tensor / (1 - 0.99**100))


def test_a_number_that_the_source_records_is_not_replaced(tmp_path):
    """A Fisher with metadata refuses other steps."""
    save_file(_moments(), tmp_path / "exp_avg_sq.safetensors")
    extract(tmp_path / "exp_avg_sq.safetensors", tmp_path / "a", steps=7, beta2=0.9)
    with pytest.raises(ConfigError, match=r"--steps is for sources that do not record it, but .* records 7"):
        extract(tmp_path / "a", tmp_path / "b", steps=8)
    assert not (tmp_path / "b").exists()


def test_extracted_without_numbers_it_stays_as_stored(tmp_path):
    """The portable file has no scale but the stored one either."""
    save_file(_moments(), tmp_path / "exp_avg_sq.safetensors")
    extract(tmp_path, tmp_path / "out")
    _assert_read(load_fisher(tmp_path / "out"), _moments())


def test_weights_are_no_second_moments(tmp_path):
    """Negative entries are those of weights, whatever the name of the file."""
    save_file(
        {name: tensor - tensor.mean() for name, tensor in _moments().items()}, tmp_path / "exp_avg_sq.safetensors"
    )
    with pytest.raises(ValuesError, match=r"weights in the place of second moments\?.*negative"):
        load_fisher(tmp_path / "exp_avg_sq.safetensors")


@pytest.mark.parametrize("beside", ["nothing", "a Fisher"])
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"])
def test_weights_are_no_fisher(name, beside, tmp_path):
    """A file of weights is refused by its name, also beside a Fisher, whose metadata are not those of the weights."""
    save_file(_moments(), tmp_path / name)
    if beside == "a Fisher":
        save_file(_moments(), tmp_path / "moments.safetensors")
        extract(tmp_path / "moments.safetensors", tmp_path / "fisher")
        for file in (tmp_path / "fisher").iterdir():
            file.rename(tmp_path / file.name)
    with pytest.raises(NotFoundError, match=rf"{name} is a file of weights; .* or make a Fisher by squisher extract"):
        load_fisher(tmp_path / name)


def test_the_index_of_weights_is_no_fisher(tmp_path):
    """Nor is the index of its shards."""
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"model\.safetensors\.index\.json is a file of weights"):
        load_fisher(tmp_path / "model.safetensors.index.json")


def test_a_portable_fisher_needs_its_metadata(tmp_path):
    """A portable Fisher that lost its metadata is not read as second moments."""
    name = "fisher.safetensors"
    save_file(_moments(), tmp_path / name)
    with pytest.raises(NotFoundError, match=r"fisher_config\.json must be in the folder"):
        load_fisher(tmp_path / name)


def test_several_files_are_not_guessed(tmp_path):
    """The refusal names the files."""
    for name in ("exp_avg_sq", "old_exp_avg_sq"):
        save_file(_moments(), tmp_path / f"{name}.safetensors")
    with pytest.raises(NotFoundError, match="found exp_avg_sq, old_exp_avg_sq; give the file to read"):
        load_fisher(tmp_path)


@pytest.mark.parametrize("change", [{"d": torch.ones(2)}, {"a.weight": torch.ones(5, 7)}])
def test_names_and_shapes_are_those_of_the_weights(change, tmp_path):
    """An unknown name and a transposed matrix are refused."""
    (tmp_path / "model").mkdir()
    save_file(_moments(), tmp_path / "model" / "model.safetensors")
    save_file(_moments() | change, tmp_path / "exp_avg_sq.safetensors")
    with pytest.raises(MismatchError):
        load_fisher(tmp_path / "exp_avg_sq.safetensors", tmp_path / "model")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("org/name:x.safetensors", ("org/name", None, "x.safetensors")),
        ("org/na.me@refs/pr/3:a/b/x.safetensors", ("org/na.me", "refs/pr/3", "a/b/x.safetensors")),
        ("org/name/a/b/x.safetensors", ("org/name", None, "a/b/x.safetensors")),
        ("org/name@v1/x.safetensors", ("org/name", "v1", "x.safetensors")),
        ("org/name", None),
        ("org/name:../x.safetensors", None),
        ("/org/name/x.safetensors", None),
        ("./org/name/x.safetensors", None),
        ("name.safetensors", None),
    ],
)
def test_a_file_of_a_repository_is_named(source, expected):
    """The newer and the older form name repository, revision and path; paths outside of a repository are none."""
    found = parse_file(source)
    assert (None if found is None else (found.repo, found.revision, found.path)) == expected


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Return an empty stand-in for the Hub that this process uses."""
    with hub_server.serve() as served:
        hub_server.point_at(served, tmp_path / "home", monkeypatch, token=None)
        yield served


@pytest.mark.parametrize("form", ["{}@main:export/exp_avg_sq.safetensors", "{}/export/exp_avg_sq.safetensors"])
def test_a_merge_fetches_the_named_file_alone(form, server, tmp_path, caplog):
    """Both forms of the reference merge by the published second moments, as stored."""
    weights, fishers, models = [], [], []
    for i in range(2):
        weights.append(llama(tmp_path / f"m{i}", i))
        generator = torch.Generator().manual_seed(i)
        fishers.append({name: draw_fisher(w.shape, generator) for name, w in weights[i].items()})
        published = save({f"{name}.exp_avg_sq": tensor for name, tensor in fishers[i].items()})
        others = {"export/exp_avg.safetensors": b"large", "model.safetensors": b"large", "optimizer.pt": b"large"}
        server.add(f"org/m{i}", {"export/exp_avg_sq.safetensors": published} | others)
        models.append({"model": str(tmp_path / f"m{i}"), "parameters": {"fisher": form.format(f"org/m{i}")}})
    result = merged({"merge_method": "squisher", "models": models}, tmp_path / "out")
    assert_squisher(result, weights, fishers, (1.0, 1.0))
    assert server.fetched() == ["exp_avg_sq.safetensors"]
    assert "taken as stored (scaling: raw)" in caplog.text


def test_a_missing_file_of_a_repository_is_one_line(server):
    """The refusal names the path, the revision and the repository."""
    server.add("org/m", {"config.json": b"{}"})
    with pytest.raises(NotFoundError, match=r"^x\.safetensors must be .* at revision v9 of org/m on the Hub"):
        load_fisher("org/m@v9:x.safetensors")


@pytest.mark.parametrize("steps", [-1.0, float("nan"), float("inf"), 1e300])
def test_steps_that_are_no_count_are_refused(steps, tmp_path):
    """A damaged number of steps is refused in one line that names it."""
    tensors = {"w.exp_avg_sq": torch.rand(5, 7), "w.step": torch.tensor(steps, dtype=torch.float64)}
    save_file(tensors, tmp_path / "exp_avg_sq.safetensors")
    with pytest.raises(CorruptFileError, match=r"w\.step in .* must be a number of steps, found .*; export it again"):
        load_fisher(tmp_path)
