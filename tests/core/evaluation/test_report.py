"""The figures as tables, plots and files."""

import base64
import re
from collections import Counter

import numpy as np
import pytest

from treeflash.errors import ConfigError
from treeflash.evaluation import report
from treeflash.evaluation.records import compute_records
from treeflash.evaluation.report import check_report, tables, write_report
from treeflash.evaluation.run import METRICS, BestDraft, Case, CaseRun, DepthMetrics, Sample

PNG = b"\x89PNG\r\n"


def found(head: bool = True, depths: bool = True, drafts: bool = True):
    """Records of one prompt."""
    sums = np.full((3, len(METRICS)), 0.25)
    sources = {"marginal": sums} | ({"corrected": sums} if head else {})
    cases = [Case("dflash", 16), Case("ddtree", 4), Case("ddtree", 16)] * drafts
    cases = [Case("ar", 1), *cases, *[Case("treeflash", 16)] * head]
    best = Counter([BestDraft(1, True, True), BestDraft(1, True, False)])
    runs = {case: CaseRun(4, (1, 2), Counter(child=2), best) for case in cases}
    metrics = DepthMetrics(np.ones(3, np.int64), sources) if depths else None
    return compute_records({"a<b": [Sample(runs, metrics)]}, 0)


def test_tables_hold_every_figure():
    rows, ratios, depths, lost, branches = tables(found())
    names = ["set", "method", "budget", "block efficiency", "low", "high", "prompts", "tokens"]
    assert rows.columns == names
    assert rows.rows[0] == ["a<b", "ar", "1", "1.500", "1.500", "1.500", "1", "4"]
    assert {row[0] for row in rows.rows} == {"a<b", "mean"}
    assert ratios.rows[0] == ["a<b", "treeflash", "ddtree", "16", "1.000", "1.000", "1.000"]
    assert depths.columns == ["depth", "anchors", "drafter", *METRICS]
    assert [row[:3] for row in depths.rows[:2]] == [["1", "1", "marginal"], ["1", "1", "corrected"]]
    assert lost.rows[0] == ["a<b", "dflash", "16", "0", "2", "0", "0"]
    assert branches.rows[0] == ["dflash", "16", "1", "0.500", "2", "", "0"]


def test_tables_without_rows_are_left_out():
    assert len(tables(found(head=False, depths=False))) == 4
    (depths,) = [table for table in tables(found(head=False)) if "Depth" in table.title]
    assert {row[2] for row in depths.rows} == {"marginal"}


@pytest.mark.sample(1)
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("depths", [True, False])
def test_a_page_needs_no_other_file(tmp_path, recwarn, head, depths):
    pytest.importorskip("matplotlib")
    path = tmp_path / "r.html"
    write_report(path, found(head, depths), "dtype <x>")
    page = path.read_text(encoding="utf-8")
    (image,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(image).startswith(PNG)
    assert "http" not in page
    assert "<h1>dtype &lt;x&gt;</h1>" in page
    assert "<td>a&lt;b</td><td>ddtree</td><td>16</td>" in page
    assert page.count("<table>") == len(tables(found(head, depths)))
    assert not recwarn.list


@pytest.fixture
def figures(monkeypatch):
    """Collect the figures that are written."""
    figure = pytest.importorskip("matplotlib.figure")
    written = []

    class Kept(figure.Figure):
        def savefig(self, *args, **kwargs):
            written.append(self)
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(figure, "Figure", Kept)
    return written


def test_settings_are_told_once_and_legends_hide_no_line(tmp_path, figures):
    write_report(tmp_path / "r.html", found(), "title", "the settings")
    assert (tmp_path / "r.html").read_text(encoding="utf-8").count("the settings") == 1
    (drawn,) = figures
    assert drawn.get_suptitle() == ""
    legends = [(axis, axis.get_legend()) for axis in drawn.axes if axis.get_legend()]
    assert legends
    for axis, legend in legends:
        assert legend.get_window_extent().x0 >= axis.get_window_extent().x1


def test_joined_records_have_a_line_and_a_color_for_each_name(tmp_path, figures):
    names = "ddtree, greedy", "ddtree, sampled"
    joined = {
        key: [
            {**record, "method": name}
            for name in names
            for record in found()[key]
            if record["method"] == "ddtree"
        ]
        for key in ("rows", "accepted")
    }
    for path in (tmp_path / "r.png", tmp_path / "r.html"):
        write_report(path, joined, "joined")
    for drawn in figures:
        efficiencies, lengths = drawn.axes  # and no empty plots of depth metrics
        for axis in (efficiencies, lengths):
            labels = axis.get_legend_handles_labels()[1]
            assert [label.removesuffix(", 16") for label in labels] == list(names)
        first, second = (line[0].get_color() for line in efficiencies.containers)
        assert first != second


def test_an_image_of_plain_decoding(tmp_path):
    pytest.importorskip("matplotlib")
    write_report(tmp_path / "r.png", found(head=False, depths=False, drafts=False), "x")
    assert (tmp_path / "r.png").read_bytes().startswith(PNG)


def test_a_narrow_terminal_loses_no_figure(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    report.publish(found(), {}, "", None, None)
    lines = [re.split("  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    for table in tables(found()):
        for row in table.rows:
            assert [cell for cell in row if cell] in lines


def test_what_cannot_be_written_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: object())
    check_report(tmp_path / "r.png")
    with pytest.raises(ConfigError, match=r"FILE\.html or FILE\.png, not .*r\.pdf"):
        check_report(tmp_path / "r.pdf")
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as raised:
        check_report(tmp_path / "r.html")
    assert (
        str(raised.value)
        == "--report needs matplotlib; pip install '.[report]' in a clone of treeflash"
    )
