"""A summary with fields of other types, from an older version or from a stranger, still gives a page and a comparison."""

import json

import pytest

from vitkit.report.compare_page import write_comparison
from vitkit.report.comparison import read_runs
from vitkit.report.page import page
from vitkit.report.record import read_record

ODD = (None, True, -1, 1e400, "<script>", [["a", 1]], {"a": {"b": [1]}})


def paths(value, prefix=()):
    """The path of every field of a summary, the inner ones too."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*prefix, key)
            yield from paths(item, (*prefix, key))


def replaced(value, path, odd):
    if not path:
        return odd
    return {**value, path[0]: replaced(value[path[0]], path[1:], odd)}


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_page_is_written_whatever_one_field_holds(make_run, odd):
    directory = make_run()
    summary = json.loads((directory / "summary.json").read_text())
    for path in paths(summary):
        (directory / "summary.json").write_text(json.dumps(replaced(summary, path, odd)))
        text = page(read_record(directory), [], [], [])
        assert "<script" not in text, path
        assert text.endswith("</html>\n"), path


@pytest.mark.parametrize("odd", ODD, ids=repr)
def test_a_comparison_is_made_whatever_one_field_holds(make_run, tmp_path, odd, monkeypatch):
    monkeypatch.setattr("vitkit.report.comparison.Comparison.columns", {})  # curves come from the tables
    runs = [make_run("a"), make_run("b")]
    summary = json.loads((runs[1] / "summary.json").read_text())
    for path in paths(summary):
        (runs[1] / "summary.json").write_text(json.dumps(replaced(summary, path, odd)))
        write_comparison(read_runs(runs), tmp_path / "compare.html")
        assert "<script" not in (tmp_path / "compare.html").read_text(), path
