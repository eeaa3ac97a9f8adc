"""The page of a merge: one file, all figures, nothing from the network, and texts that cannot become markup."""

from html.parser import HTMLParser

import pytest

from squisher_mergekit.merging.reports.page import page
from tests.merging.reports.made import made_preview, made_report


class Parsed(HTMLParser):
    """Texts, tags and attributes of a page; every opened tag is closed in order."""

    VOID = ("meta", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.mark.parametrize(("models", "layers"), [(2, 3), (8, 32)])
def test_the_page_has_all_figures_and_needs_no_network(models, layers):
    """Each tensor has a row, each model a heat map, and no attribute names another file."""
    report = made_report(models, layers, fell_back=0.125, abstained=0.5)
    found = Parsed(page(made_preview(report), "merge_method: squisher\n", "Merge of a.yml", report))
    assert found.tags.count("h3") == 2 * models + 1
    assert all(name in found.texts for name in report["by_tensor"])
    assert "12.5%" in found.texts
    assert not {"src", "href", "srcset", "action"} & {name for name, _ in found.attributes}
    assert not any("http" in text or "@import" in text for text in found.texts)


def test_the_page_counts_sign_conflicts_apart():
    """Each model has a heat map and a column for its abstentions, and another for its sign conflicts."""
    report = made_report(2, 1, abstained=0.5, conflicts=0.0625)
    found = Parsed(page(made_preview(report), "merge_method: squisher\n", "Merge of a.yml", report))
    assert found.tags.count("h3") == 6
    assert {"A without a vote", "B against the elected sign"} <= set(found.texts)
    assert found.texts.count("6.2%") == 2 * (1 + len(report["by_tensor"]))


def test_the_page_of_a_plan_has_no_shares():
    """A plan has models, warnings, reasons and the recipe."""
    report = made_report(2, 1)
    preview = made_preview(report, warnings=["other weights"], fallbacks={"x.bias": "a: no Fisher"}, notes=["1 buffer"])
    found = Parsed(page(preview, "merge_method: squisher\n", "Plan of a.yml"))
    assert {"other weights", "x.bias", "a: no Fisher", "1 buffer", "runs/a/optimizer.pt"} <= set(found.texts)
    assert "Share of each model" not in found.texts
    assert found.tags.count("table") == 2


def test_names_cannot_become_markup():
    """Names of files, models and tensors are shown as they are."""
    evil = '</pre><script>alert("x")</script>'
    report = made_report(2, 1)
    report["by_tensor"][evil] = report["by_tensor"]["embed.weight"]
    preview = made_preview(report, warnings=[evil], notes=[evil], fallbacks={evil: evil})
    preview["models"][0]["fisher"] = evil
    found = Parsed(page(preview, evil, evil, report))
    assert found.tags.count("script") == 1
    # Title, heading, warning, Fisher, a row in each of two heat maps, tensor and reason, note, recipe, row of a table.
    assert found.texts.count(evil) == 11


def test_a_structure_has_its_table_by_layer():
    """Shares of the merged step, conflict and rank stand in one row for each layer."""
    report = made_report(2, 1)
    share = dict.fromkeys(report["effective_weight"], 0.5)
    figures = {"share": share, "conflict": 0.375, "effective_rank": {"rows": dict.fromkeys(share, 2.5)}}
    report["structure"] = {**figures, "layers": {"layers.0": figures}, "tensors": {}}
    found = Parsed(page(made_preview(report), "", "Merge", report))
    assert {"share of A", "conflict", "rank over rows of B", "37.5%", "2.5"} <= set(found.texts)
