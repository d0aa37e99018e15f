"""A page that stands alone, its pictures and its sheets."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from study_folder import HARM, write_study

from pocketrec import report
from pocketrec.report import chart, formats
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow


class Outline(HTMLParser):
    """Balanced tags, identifiers, links, and what would be fetched."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.fetched, self.texts = [], [], [], [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if "href" in given else []
        self.fetched += [tag] if tag in ("script", "link", "img", "iframe") or "src" in given else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_is_whole_light_and_needs_nothing_else(written, page):
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert outline.fetched == []
    assert "url(" not in page
    assert "@import" not in page
    assert len(outline.ids) == len(set(outline.ids))
    for link in outline.links:
        if link.startswith("#"):
            assert link[1:] in outline.ids
        else:
            assert (written.page.parent / link).is_file()
    assert len(page.encode()) < 1_500_000


def test_the_page_shows_every_method_and_every_part(page):
    for method in ("original", *HARM):
        assert f'id="method-{method}"' in page
    for heading in (
        "Quality against size and speed",
        "Quality and size on criteo",
        "Time and memory",
        "Training",
        "Ranks across",
    ):
        assert heading in page
    for name in ("By learned values", "By bytes of the table", "By bytes of the file", "By median latency"):
        assert page.count(name) == 3
    assert "training.learning_rate" in page


def test_labels_are_shown_as_text_and_never_as_markup(tmp_path):
    study = write_study(tmp_path / "named", seeds=(0,), gaps=False)
    content = (study / "plan.json").read_text()
    (study / "plan.json").write_text(content.replace('"made-up"', json.dumps("<b>&amp;</b><script>")))
    page = report.write(study, replicates=100).page.read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("scale", ["linear", "log", "binary"])
@pytest.mark.parametrize("spread", [1.0, 1.0001, 30.0, 1e6])
def test_nothing_is_drawn_outside_of_a_figure_and_no_ticks_touch(scale, spread):
    dots = tuple(chart.Marker(1000.0 * spread**i, 0.7 + 0.01 * i, 0.001) for i in (0.0, 0.5, 1.0))
    drawn = chart.svg(chart.Figure("t", "x", "y", (chart.Line(0, dots),), formats.size, None, scale, dots[0]))
    for x, y in re.findall(r"translate\((-?[\d.]+) (-?[\d.]+)\)", drawn):
        assert chart.LEFT - 1 <= float(x) <= chart.WIDTH - chart.RIGHT + 1
        assert chart.TOP - 1 <= float(y) <= chart.HEIGHT - chart.BOTTOM + 1
    below = re.findall(rf'<text x="([\d.]+)" y="{chart.HEIGHT - chart.BOTTOM + 16:.1f}"[^>]*>([^<]*)<', drawn)
    ends = [(float(x) - 3 * len(t), float(x) + 3 * len(t)) for x, t in below]
    assert all(a[1] < b[0] for a, b in pairwise(ends))
    left = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawn)
    assert 2 <= len(left) <= 5
    assert len(left) == len(set(left))


@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-9, 1e-5, 1e-3, 0.1])
def test_numbers_at_the_left_fit_there_however_close_the_points_are(gap):
    dots = (chart.Marker(1.0, 0.685061), chart.Marker(2.0, 0.685061 + gap))
    drawn = chart.svg(chart.Figure("t", "x", "y", (chart.Line(0, dots),)))
    left = re.findall(r'text-anchor="end"[^>]*>([^<]*)<', drawn)
    assert 2 <= len(set(left)) == len(left)
    assert max(len(text) for text in left) <= 5


def test_bars_are_as_long_as_their_numbers():
    drawn = chart.bars("t", [chart.Bar("a", (4.0,), "4"), chart.Bar("b", (1.0, 2.0), "3")])
    lengths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)" height="8" fill', drawn)]
    assert lengths == [chart.WIDTH, chart.WIDTH / 4, chart.WIDTH / 2]


def test_colours_can_be_read_on_white():
    def luminance(color):
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for color in (*chart.COLORS, chart.INK, chart.FAINT):
        assert 1.05 / (luminance(color) + 0.05) >= 4.5, color


def test_sheets_write_plain_values_and_marked_text():
    columns = (SheetColumn("a", words=True), SheetColumn("b"), SheetColumn("c", hidden=True))
    row = SheetRow((SheetEntry.of("x|y"), SheetEntry("1.2 MiB", 1234, "best"), SheetEntry("", 5)), "one")
    sheet = Sheet("s", "Title", columns, (row,), ("note",), "kind")
    assert sheet.csv() == "kind,a,b,c\none,x|y,1234,5\n"
    assert sheet.markdown() == "## Title\n\n|  | a | b |\n| --- | --- | ---: |\n| one | x\\|y | **1.2 MiB** |\n\nnote\n"


def test_pictures_are_files_of_their_own_with_every_line_named(written):
    assert len(written.pictures) == len({p.stem for p in written.pictures}) > 0
    for path in written.pictures:
        root = ElementTree.fromstring(path.read_text())  # noqa: S314
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        words = {e.text for e in root.iter("{http://www.w3.org/2000/svg}text")}
        assert {"uncompressed", "By learned values", "By bytes of the table"} <= words
        inside = [e for e in root if e.tag.endswith("svg")]
        width, height = float(root.get("width")), float(root.get("height"))
        assert all(0 <= float(e.get("x")) <= width - float(e.get("width")) for e in inside)
        assert all(0 <= float(e.get("y")) <= height - float(e.get("height")) for e in inside)
