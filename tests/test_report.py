"""The page of a run: nothing to load, everything escaped, the same bytes every time."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from seq2expr.errors import UserError
from seq2expr.report import Report, shown

EVIL = '<script>alert("1")</script> & $x$'


class Page(HTMLParser):
    """Elements and text of a page, and a check that every element is closed."""

    VOID = frozenset({"meta", "img"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.images, self.texts = [], [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] != "style":
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag):
        return [text for parent, text in self.texts if parent == tag]

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def build() -> Report:
    figure = Figure(figsize=(4, 2))
    figure.subplots().plot([0, 1], [1, 0])
    frame = pd.DataFrame(
        {
            "gene_name": [EVIL, "MYC"],
            "n": [12345, 7],
            "r": [0.76543, np.nan],
            "beats": [True, False],
        }
    )
    report = Report(f"Report on {EVIL}")
    report.text("First line\nsecond line", "Another paragraph")
    report.section("Results")
    report.table(frame, f"Genes of {EVIL}")
    report.figure(figure, f"Curve of {EVIL}")
    report.section(f"Data {EVIL}")
    report.facts({EVIL: EVIL, "genes": 18377, "chromosomes": ["chr3", "chr21"]})
    return report


@pytest.fixture
def html(tmp_path):
    return build().write(tmp_path / "report.html").read_text(encoding="utf-8")


def test_page_is_well_formed_and_user_text_is_escaped_but_shown(html):
    page = Page(html)
    assert "<script" not in html
    assert page.of("h1") == page.of("title") == [f"Report on {EVIL}"]
    assert page.of("h2") == ["Results", f"Data {EVIL}"]
    cells = ["12,345", "0.765", "yes", "MYC", "7", "–", "no"]
    assert page.of("td") == [EVIL, *cells, EVIL, "18,377", "chr3, chr21"]
    assert page.of("th") == ["gene_name", "n", "r", "beats", EVIL, "genes", "chromosomes"]
    assert page.of("p") == ["First line\nsecond line", "Another paragraph"]
    assert page.of("caption") == [f"Genes of {EVIL}"]
    assert page.attributes("img")[0]["alt"] == f"Curve of {EVIL}"


def test_page_loads_nothing(html):
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert not re.search(r"https?:|//|url\(|@import|\bon\w+=", re.sub(r"base64,[^\"]*", "", html))
    assert all(
        image["src"].startswith("data:image/png;base64,") for image in page.attributes("img")
    )


def test_embedded_figure_is_a_png_of_the_right_size_with_something_on_it(html):
    (attributes,) = Page(html).attributes("img")
    data = base64.b64decode(attributes["src"].partition("base64,")[2], validate=True)
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG"
    assert image.size == (640, 320)  # 4 × 2 inches at 160 pixels an inch
    assert np.asarray(image.convert("L")).std() > 5
    assert attributes["width"] == "384"


def test_contents_link_to_the_sections(html):
    page = Page(html)
    links = [attributes["href"].removeprefix("#") for attributes in page.attributes("a")]
    assert links == [attributes["id"] for attributes in page.attributes("section")]
    assert page.of("a") == page.of("h2")


def test_one_section_needs_no_contents(tmp_path):
    report = Report("Short")
    report.section("Only")
    assert "<nav" not in report.write(tmp_path / "report.html").read_text()


def test_numbers_are_aligned_right_and_flags_are_not(html):
    classes = [attributes.get("class") for attributes in Page(html).attributes("td")[:4]]
    assert classes == [None, "number", "number", None]


def test_tables_and_figures_are_numbered(tmp_path):
    report = Report("Numbers")
    for _ in range(2):
        report.table(pd.DataFrame({"a": [1]}), "caption")
        report.figure(Figure(figsize=(1, 1)), "caption", alt="nothing")
    page = Page(report.write(tmp_path / "report.html").read_text())
    assert page.of("b") == ["Table 1.", "Figure 1.", "Table 2.", "Figure 2."]
    assert page.attributes("img")[0]["alt"] == "nothing"


def test_formats_index_and_long_tables(tmp_path):
    frame = pd.DataFrame({"p": [0.5, 0.25, np.nan]}, index=pd.Index(["a", "b", "c"], name="fold"))
    report = Report("Table")
    report.table(frame, "Folds.", {"p": ".0%", "fold": str.upper})
    report.table(frame.reset_index(drop=True), "Short.", max_rows=2)
    page = Page(report.write(tmp_path / "report.html").read_text())
    assert page.of("td") == ["A", "50%", "B", "25%", "C", "–", "0.500", "0.250"]
    assert page.of("caption") == ["Folds.", "Short. (The first 2 of 3 rows.)"]
    with pytest.raises(ValueError, match=r"\['q'\].*not columns"):
        report.table(frame, "Wrong.", {"q": ".1f"})


def test_same_content_is_the_same_bytes(tmp_path):
    first, second = (build().write(tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_failed_write_keeps_the_old_page_and_leaves_no_temporary(tmp_path, monkeypatch):
    path = Report("Old").write(tmp_path / "report.html")
    before = path.read_bytes()

    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(UserError, match="Cannot write"):
        Report("New").write(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (1234567, "1,234,567"), (np.int64(-1000), "-1,000"), (0.0, "0"), (-0.0, "0"),
        (0.5, "0.500"), (12.0, "12.0"), (100.0, "100"), (9.999, "10.0"), (999.49, "999"),
        (999.6, "1,000"), (-1234.56, "-1,235"), (1.5e-5, "1.50e-05"), (2e12, "2.00e+12"),
        (np.float32(0.1), "0.100"), (np.inf, "inf"), (np.nan, "–"), (None, "–"), (pd.NA, "–"),
        (True, "yes"), (np.bool_(False), "no"), ("chr1", "chr1"), ([1, 2.5], "1, 2.50"),
        ({"b", "a"}, "a, b"),
    ],
)  # fmt: skip
def test_shown(value, text):
    assert shown(value) == text
