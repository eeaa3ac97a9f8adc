"""Reset of the weights outside the mask to their pre-trained values, on disk and in memory."""

import pytest
import torch
from torch import nn

from squisher_mergekit.applications.fish_mask.difference import DIFFERENCE_NAME
from squisher_mergekit.applications.fish_mask.files import reset_files, select_files
from squisher_mergekit.applications.fish_mask.resetting import reset
from squisher_mergekit.applications.masks import MASK_NAME, Mask, read_mask, write_mask
from squisher_mergekit.errors import ConfigError, MismatchError
from squisher_mergekit.models.weights import open_weights
from tests.applications.fish_mask.fish import Pair, bits, same
from tests.estimators.models import make


def _base_name(pair, name):
    """Return the name of a tensor in the base, or None."""
    known = open_weights(pair.base).infos
    return next((one for one in (name, name.partition(".")[2]) if one in known), None)


@pytest.mark.parametrize(
    ("name", "dtype", "shard"),
    [
        ("bert", torch.float32, "2GB"),
        ("bert", torch.bfloat16, "5KB"),
        ("llama-tied", torch.float32, "7KB"),
        ("mixtral", torch.float16, "9KB"),
    ],
)
def test_off_the_mask_the_base(tmp_path, name, dtype, shard):
    """The reset model has trained bits on the mask and in the head, and the bits of the base elsewhere.

    Disk and memory agree.
    """
    pair, out = Pair(tmp_path, name, dtype, shard), tmp_path / "out"
    select_files(pair.tuned, pair.fisher, tmp_path / MASK_NAME, 0.2, score="reset", base=pair.base)
    reset_files(pair.tuned, pair.base, out, mask=tmp_path / MASK_NAME)
    tuned, base, found, mask = (*map(open_weights, (pair.tuned, pair.base, out)), read_mask(tmp_path))
    assert found.infos == tuned.infos
    for key in mask:
        kept, now, before = mask[key], bits(found.read(key)), _base_name(pair, key)
        assert torch.equal(now[kept], bits(tuned.read(key))[kept])
        if before is not None:
            assert torch.equal(now[~kept], bits(base.read(before))[~kept])
        else:
            assert key.startswith("classifier.")
            assert kept.all()
    live = pair.load(pair.tuned)
    reset(live, pair.load_base(), read_mask(tmp_path))
    live.save_pretrained(tmp_path / "live", max_shard_size=shard)
    assert same(tmp_path / "live", out)
    loaded = pair.load(out)
    assert all(torch.equal(bits(p), bits(q)) for p, q in zip(loaded.parameters(), live.parameters(), strict=True))
    assert {file.name for file in pair.tuned.iterdir()} | {DIFFERENCE_NAME} == {file.name for file in out.iterdir()}


def test_select_and_reset_in_one(tmp_path):
    """One call that selects and resets gives the files of two calls.

    The mask is next to the model. On request no model is written.
    """
    pair, mask = Pair(tmp_path, "bert"), tmp_path / "mine.safetensors"
    options = {"score": "reset", "scope": "layer", "exclude": ("word_embeddings",), "seed": 3}
    selected = select_files(pair.tuned, pair.fisher, mask, 0.2, base=pair.base, **options)
    apart = reset_files(pair.tuned, pair.base, tmp_path / "apart", mask=mask)
    assert apart.selected is None
    at_once = reset_files(pair.tuned, pair.base, tmp_path / "at_once", fisher=pair.fisher, keep=0.2, **options)
    assert at_once.selected == selected
    assert same(tmp_path / "apart", tmp_path / "at_once")
    assert all(torch.equal(read_mask(mask)[n], one) for n, one in read_mask(tmp_path / "at_once").items())
    reset_files(pair.tuned, pair.base, tmp_path / "only", mask=mask, difference_only=True)
    assert [file.name for file in (tmp_path / "only").iterdir()] == [DIFFERENCE_NAME]


def test_a_mask_by_names_in_memory():
    """A mask by names in memory resets a plain network. A parameter that is kept whole needs no base."""
    torch.manual_seed(0)
    model, base = (nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)) for _ in range(2))
    mask = {name: torch.rand(p.shape) < 0.5 for name, p in model.named_parameters()}
    mask["1.weight"], mask["1.bias"] = torch.ones(2, 5).bool(), torch.ones(2).bool()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    anchors = {name: p.detach() for name, p in base.named_parameters() if name.startswith("0.")}
    reset(model, anchors, mask)
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.where(mask[name], before[name], anchors.get(name, before[name])))


def test_a_live_model_is_as_before_when_refused():
    """A refused reset leaves the live model unchanged.

    A weight missing in the base, another shape and a foreign mask are refused.
    """
    model = make("bert")
    before = [p.detach().clone() for p in model.parameters()]
    mask = {name: torch.zeros(p.shape).bool() for name, p in model.named_parameters()}
    base = {name: p.detach() + 1 for name, p in model.named_parameters()}
    for other, one, message in (
        (base | {"classifier.bias": torch.ones(4)}, mask, r"of classifier\.bias, \[3\], memory has \[4\]; give the"),
        ({k: v for k, v in base.items() if "pooler" not in k}, mask, r"pooler\.dense\..* memory has none; give the"),
        (base, {k: v for k, v in mask.items() if "pooler" not in k}, "a mask must be of these weights"),
        (base | {"classifier.bias": torch.ones(3).half()}, mask, r"classifier\.bias must be alike in both models"),
    ):
        with pytest.raises(MismatchError, match=message):
            reset(model, other, one)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_files_are_refused_and_nothing_is_written(tmp_path):
    """A foreign mask, other shapes, a head that is not kept, a taken folder and a missing choice are refused."""
    pair, other = Pair(tmp_path / "one", "bert"), Pair(tmp_path / "two", "llama")
    mask, out = tmp_path / MASK_NAME, tmp_path / "out"
    select_files(pair.tuned, None, mask, 0.2, score="random")
    with pytest.raises(MismatchError, match="a mask must be of these weights"):
        reset_files(other.tuned, other.base, out, mask=mask)
    with pytest.raises(MismatchError, match=r"a weight off the mask takes its pre-trained value, but of bert\."):
        reset_files(pair.tuned, other.base, out, mask=mask)
    select_files(pair.tuned, None, tmp_path / "no_head.safetensors", 0.2, score="random", head=())
    with pytest.raises(
        MismatchError, match=r"but of classifier\.bias, \[3\], .* has none; .*keeps it whole \(--head\)"
    ):
        reset_files(pair.tuned, pair.base, out, mask=tmp_path / "no_head.safetensors")
    with pytest.raises(ConfigError, match="must be new or empty"):
        reset_files(pair.tuned, pair.base, pair.fisher, mask=mask)
    for both in ({}, {"mask": mask, "keep": 0.2}):
        with pytest.raises(ConfigError, match="either a mask or a share to keep must be given"):
            reset_files(pair.tuned, pair.base, out, **both)
    stale = Mask(dict(read_mask(mask)), {"weights_fingerprint": "fp1:1-2"})
    write_mask(stale, mask)
    with pytest.raises(MismatchError, match=r"was made at other weights than .*; or leave out --strict"):
        reset_files(pair.tuned, pair.base, out, mask=mask, strict=True)
    assert {file.name for file in tmp_path.iterdir()} == {"one", "two", MASK_NAME, "no_head.safetensors"}
    reset_files(pair.tuned, pair.base, out, mask=mask)
    assert out.is_dir()
