"""Section of a model card about a Fisher, and its place in a README."""

import pytest
import yaml

from squisher_mergekit.errors import ConfigError
from squisher_mergekit.fisher.config import FisherConfig
from squisher_mergekit.fisher.model_card import BEGIN, END, insert, section

KNOWN = {
    "estimator": "squisher",
    "statistic": "ema",
    "optimizer": {"class": "torch.optim.AdamW", "beta2": 0.95},
    "steps": {"default": 1200, "head.weight": 900},
    "examples_per_step": 64.0,
    "encoding": {"default": "rank1", "norm.weight": "float32"},
    "source": {"layout": "transformers-trainer", "files": ["optimizer.pt"]},
    "coverage": {"with": 8, "without": {"lm_head.weight": "tied"}},
    "weights_fingerprint": "fp1:0123",
}
HEADER = "---\nlicense: mit\ntags:\n- mine\n---\n"


def _table(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return dict(row for row in cells if len(row) == 2)


def test_known_values_are_in_the_table():
    """The table has estimator, optimizer, decay, steps, coverage, layout, encoding, size and fingerprint."""
    table = _table(section(FisherConfig.model_validate(KNOWN), "org/name@fisher", "org/name", "3 kB"))
    assert table == {
        "estimator": "squisher ema",
        "optimizer": "torch.optim.AdamW",
        "beta2": "0.95",
        "steps": "1200, others for some tensors",
        "examples per step": "64",
        "coverage": "8 of 9 tensors",
        "made from": "transformers-trainer",
        "encoding": "float32, rank1",
        "size": "3 kB",
        "fingerprint of the weights": "fp1:0123",
    }


def test_unknown_values_are_shown_as_unknown():
    """A Fisher without metadata has unknown in every row."""
    table = _table(section(FisherConfig(), "org/name@fisher", "org/name", "3 kB"))
    unknown = {key for key, value in table.items() if value == "unknown"}
    assert unknown == set(table) - {"encoding", "size"}


def test_a_computed_fisher_has_its_examples_and_no_optimizer():
    """An estimate from data has a number of examples in place of steps and decay."""
    config = FisherConfig(estimator="empirical", statistic="mean", num_examples=211)
    table = _table(section(config, "org/name@fisher", "org/name", "3 kB"))
    assert table["examples"] == "211"
    assert not {"optimizer", "beta2", "steps"} & set(table)


def test_the_example_is_a_configuration_with_this_fisher():
    """The YAML block parses and gives the model this Fisher."""
    text = section(FisherConfig(), "org/name@fisher", "org/model", "3 kB")
    config = yaml.safe_load(text.split("```yaml")[1].split("```")[0])
    assert config["merge_method"] == "squisher"
    assert config["models"][0] == {"model": "org/model", "parameters": {"fisher": "org/name@fisher"}}
    assert config["base_model"] == "org/model"


def test_the_fisher_of_an_adapter_has_no_merge_of_full_models():
    """The card of an adapter's Fisher has no example merge, because full models refuse it."""
    text = section(FisherConfig(parameters="adapter"), "org/name@fisher", "org/model", "3 kB")
    assert "```yaml" not in text
    assert "LoRA" in text


def test_no_cell_breaks_the_table():
    """A line break or a bar in a value stays in its cell."""
    config = FisherConfig.model_validate({"optimizer": {"class": "a|b\nc"}})
    assert _table(section(config, "s", "m", "1 B"))["optimizer"] == "a/b c"


def test_a_new_readme_has_a_header_of_its_own():
    """A new README has a YAML header with the library and three tags."""
    readme = insert(None, f"{BEGIN}\n{END}")
    _, header, body = readme.split("---\n", 2)
    assert yaml.safe_load(header) == {
        "library_name": "squisher-mergekit",
        "tags": ["mergekit", "fisher", "squisher"],
    }
    assert body == f"\n{BEGIN}\n{END}\n"


@pytest.mark.parametrize(
    "old", [f"{HEADER}# Mine\n\ntext\n", f"{HEADER}# Mine\n\nno line end", "", "# Mine\r\n\r\nwindows\r\n"]
)
def test_an_existing_readme_keeps_every_byte(old):
    """The section goes to the end, and header and text stay. A second push replaces the section."""
    first = insert(old, f"{BEGIN}\nfirst\n{END}")
    assert first.startswith(old)
    assert first.rstrip().endswith(END)
    second = insert(first, f"{BEGIN}\nsecond\n{END}")
    assert second == first.replace("first", "second")


def test_text_around_the_section_stays():
    """Text after the section stays there."""
    old = f"{HEADER}before\n{BEGIN}\nold\n{END}\nafter\n"
    assert insert(old, f"{BEGIN}\nnew\n{END}") == old.replace("old", "new")


@pytest.mark.parametrize("broken", [BEGIN, END, f"{END}\n{BEGIN}", f"{BEGIN}\n{END}\n{BEGIN}\n{END}"])
def test_half_a_section_is_refused(broken):
    """One marker without the other, two sections, and markers in the wrong order are refused."""
    with pytest.raises(ConfigError, match="two marker lines"):
        insert(f"text\n{broken}\n", f"{BEGIN}\nnew\n{END}")
