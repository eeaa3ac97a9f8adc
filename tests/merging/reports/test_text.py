"""Report of a merge on the terminal: the figures of the vote."""

from squisher_mergekit.merging.reports.text import report_text
from tests.merging.reports.made import made_report


def _text(**figures):
    report = made_report(3, 1) | {"kinds": {}} | figures
    return report_text(report | {"entries": 12}).splitlines()


def test_abstentions_and_sign_conflicts_have_lines_of_their_own():
    """Each line has the share of each model; a figure that is 0 for all models has no line."""
    abstained = {"runs/a": 0.5, "runs/b": 0.25, "runs/c": 0.0}
    conflicts = {"runs/a": 0.125, "runs/b": 0.0, "runs/c": 0.375}
    lines = _text(silent=0.01, abstained=abstained, sign_conflicts=conflicts)
    assert lines[1:4] == [
        "  1.000% without a vote: base value",
        "  entries without a vote: A 50.0%, B 25.0%, C 0.0%",
        "  entries against the elected sign: A 12.5%, B 0.0%, C 37.5%",
    ]
    lines = _text(silent=0.0, abstained=dict.fromkeys(abstained, 0.0), sign_conflicts=conflicts)
    assert lines[2] == "  entries against the elected sign: A 12.5%, B 0.0%, C 37.5%"


def test_a_merge_in_which_all_vote_has_no_such_line():
    """Without options of the vote there is nothing to count."""
    assert not [line for line in _text() if "vote" in line or "elected" in line]


def test_tensors_without_a_fisher_are_told_apart_from_entries_without_a_signal():
    """The first line has two shares, which sum to that of all entries that no Fisher weighs."""
    assert _text(fell_back=0.5, without_fisher=0.375)[0] == (
        "squisher: 12.500% of 12 entries, no signal in any model (mostly unseen tokens): plain mean; "
        "37.500% in tensors without a Fisher: weighted mean"
    )
