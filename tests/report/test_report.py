"""The HTML report and the charts: what they say, what they embed, and that nothing hostile or broken gets through."""

import base64
import io
import logging
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from neucore_plugin.common.errors import DataError
from neucore_plugin.report import Interval, Panel, results_chart_svg, search_page, write_report
from neucore_plugin.report.charts import bar_chart_svg
from neucore_plugin.report.curves import interval_chart_svg, line_chart_svg
from neucore_plugin.report.page import heat_overlay
from neucore_plugin.retrieval import Hit

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> &amp; {{ 1234567*7654321 }} ' é 猫"
VOID = {"meta", "img", "br", "link", "input"}
SVG = "{http://www.w3.org/2000/svg}"


class Page(HTMLParser):
    """Reads a page: tags with attributes, the text, and whether every element is closed."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.open = [], [], []
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    def classed(self, name):
        return [(tag, attrs) for tag, attrs in self.tags if name in (attrs.get("class") or "").split()]


RECALLS = ("R@1", "R@5", "R@10", "R@50")


def recalls(*values, median=1.0, queries=1234):
    return {**dict(zip(RECALLS, values, strict=True)), "median_rank": median, "queries": queries}


RESULTS = {
    "val": {
        "neucore": recalls(70.123, 90, 95, 100),
        "text_only": recalls(1.5, 5, 10, 40, median=61.5),
        "image_only": recalls(11, 30, 50, 80, median=12),
    },
    "test_word": {"neucore": recalls(20, 40, 60, 80, median=7), "text_only": recalls(1, 2, 65, 70, median=40)},
}


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for number in range(12):
        path = tmp_path / f"picture{number}.png"
        Image.new("RGB", (300, 200), (20 * number, 200, 90)).save(path)
        paths.append(path)
    return paths


def example(pictures, rank=2, split="val", **more):
    retrieved = [
        {"id": f"image {place}", "path": pictures[place], "score": 3 - place / 10, "correct": place == rank}
        for place in range(1, 11)
    ]
    return {
        "split": split,
        "query_id": "q17",
        "reference": pictures[0],
        "caption": "now with a red hat",
        "change": "hat",
        "rank": rank,
        "targets": ["image 2"],
        "retrieved": retrieved,
        "maps": None,
        "target": {"id": "the wanted one", "path": pictures[11]},
        **more,
    }


def embedded(attrs):
    kind, data = attrs["src"].split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True))).convert("RGB")


def test_report_says_everything(tmp_path, pictures):
    maps = [{"concept": "hat", "reference": torch.rand(7, 7), "candidate": torch.rand(7, 7)}]
    missing = write_report(
        tmp_path / "deep" / "report.html",
        "A run",
        RESULTS,
        [example(pictures, maps=maps), example(pictures, rank=1057, split="test_word")],
        settings={"run": {"seed": 42, "splits": ["a", "b"]}, "model": {"checkpoint": None}, "torch": "2.15"},
        credit="Drawings: OpenMoji, CC BY-SA 4.0",
        per_change={"val": {"role": recalls(50, 60, 70, 80, queries=9), "": recalls(5, 6, 7, 8)}},
    )
    assert missing == []
    page = Page(tmp_path / "deep" / "report.html")
    for words in (
        "A run",
        "70.12",
        "61.5",
        "1,234 queries",
        "NEUCORE",
        "text only",
        "image only",
        "test_word",
        "role 9 queries",
        "(none)",
        "now with a red hat",
        "target at rank 2",
        "target at rank 1,057",
        "The target, not among the images above: the wanted one",
        "query q17",
        "run.seed 42",
        "run.splits a, b",
        "model.checkpoint –",
        "Drawings: OpenMoji, CC BY-SA 4.0",
        "Where concepts land",
        "Where its concepts land",
        "wrong answer at rank 1",
    ):
        assert words in page.text, words
    tiles = [attrs for _, attrs in page.classed("tile")]
    assert ["right" in attrs["class"] for attrs in tiles[:10]] == [place == 2 for place in range(1, 11)]
    assert tiles[1]["title"] == "image 2, score 2.800"
    assert page.text.count("The target, not among") == 1  # only where it is not in the top ten
    assert len(page.classed("right")) == 2  # the framed answer of one query, the target of the other
    assert len(page.named("img")) == 2 * (1 + 10) + 1 + 2 + 2  # maps; the pictures beside them
    assert len(page.named("svg")) == 2
    names = {attrs["href"] for attrs in page.named("a")}
    assert names == {"#results", "#changes", "#concepts", "#maps-1", "#examples-1", "#examples-2", "#settings"}
    assert names == {f"#{attrs['id']}" for attrs in page.named("section") + page.named("article") if "id" in attrs}


def test_best_values_are_marked(tmp_path):
    write_report(tmp_path / "r.html", "t", RESULTS)
    page = Page(tmp_path / "r.html")
    # val: all five columns by neucore; test_word: text_only is ahead at R@10
    assert len(page.classed("best")) == 10
    row = page.source.split("test_word\n")[1].split("text only")[1]
    assert '<td class="number best">65.00</td>' in row.split("</tr>")[0]


def test_nothing_is_fetched_or_run(tmp_path, pictures):
    write_report(tmp_path / "r.html", "t", RESULTS, [example(pictures)], credit="see https://openmoji.org")
    page = Page(tmp_path / "r.html")
    assert page.named("script") == page.named("link") == page.named("iframe") == []
    for _, attrs in page.tags:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href", "action", "data", "poster"):
            assert attrs.get(name, "#").startswith(("#", "data:image/"))
    assert "@import" not in page.source
    assert "url(" not in page.source
    policy = [attrs["content"] for attrs in page.named("meta") if "http-equiv" in attrs]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert [attrs for attrs in page.named("meta") if attrs.get("name") == "viewport"]
    assert all(attrs.get("alt") for attrs in page.named("img"))


def test_hostile_text_is_escaped(tmp_path, pictures):
    maps = [{"concept": HOSTILE, "reference": torch.ones(2, 2), "candidate": torch.ones(2, 2)}]
    nasty = example(
        pictures, query_id=HOSTILE, caption=HOSTILE, change=HOSTILE, split=HOSTILE, rank=99, maps=maps,
        retrieved=[{"id": HOSTILE, "path": pictures[1], "score": 1.0, "correct": True}],
        target={"id": HOSTILE, "path": tmp_path / HOSTILE.replace("/", "")},
    )  # fmt: skip
    results = {HOSTILE: {HOSTILE: recalls(1, 2, 3, 4), "b": recalls(1, 2, 3, 4)}}
    missing = write_report(
        tmp_path / "r.html",
        HOSTILE,
        results,
        [nasty],
        {HOSTILE: {HOSTILE: HOSTILE}},
        HOSTILE,
        {HOSTILE: results[HOSTILE]},
    )
    assert len(missing) == 1
    page = Page(tmp_path / "r.html")
    assert page.named("script") == []
    assert not [attrs for attrs in page.named("img") if "onerror" in attrs]
    shown = " ".join(HOSTILE.split())
    assert page.text.count(shown) >= 10
    assert str(1234567 * 7654321) not in page.text  # the template engine does not look into values
    search_page(tmp_path / "s.html", pictures[0], HOSTILE, [Hit(1, HOSTILE, 0.5, pictures[1])], HOSTILE, HOSTILE)
    page = Page(tmp_path / "s.html")
    assert page.named("script") == []
    assert page.text.count(shown) == 5  # title, heading, caption, name, credit


def test_broken_pictures_leave_empty_frames(tmp_path, pictures, caplog):
    broken, gone = tmp_path / "broken.png", tmp_path / "gone.png"
    broken.write_bytes(pictures[0].read_bytes()[:60])
    maps = [{"concept": "hat", "reference": torch.ones(3, 3), "candidate": torch.ones(3, 3)}]
    retrieved = [{"id": "a", "path": broken, "score": 1.0, "correct": False}] * 2
    retrieved += [{"id": "b", "path": pictures[3], "score": None, "correct": False}]
    with caplog.at_level(logging.WARNING):
        missing = write_report(
            tmp_path / "r.html",
            "t",
            {},
            [example(pictures, reference=gone, retrieved=retrieved, maps=maps, target=None)],
        )
    assert missing == [str(broken), str(gone)] or missing == [str(gone), str(broken)]
    page = Page(tmp_path / "r.html")
    assert len(page.classed("gone")) == 1 + 2 + 2 + 2  # query, retrieved, maps, the pictures beside them
    assert len(page.named("img")) == 1
    assert "2 pictures could not be read" in page.text
    assert "broken.png" in page.text
    assert "2 pictures could not be read" in caplog.text


def test_results_with_holes(tmp_path):
    results = {"val": {"neucore": {"R@1": 10.0, "R@5": float("nan"), "median_rank": None}, "other": {}}, "empty": {}}
    write_report(tmp_path / "r.html", "t", results)
    text = Page(tmp_path / "r.html").text
    assert "10.00 – –" in text
    assert "nan" not in text.lower()
    write_report(tmp_path / "none.html", "nothing at all", {}, None)
    assert "nothing at all" in Page(tmp_path / "none.html").text


def test_thumbnails_are_small_and_whole(tmp_path, pictures):
    write_report(tmp_path / "r.html", "t", {}, [example(pictures)])
    images = [embedded(attrs) for attrs in Page(tmp_path / "r.html").named("img")]
    assert images[0].size == (300, 200)  # never enlarged
    assert {image.size for image in images[1:]} == {(192, 128)}
    assert np.allclose(np.asarray(images[1])[60, 90], (20, 200, 90), atol=3)


def test_a_failed_write_keeps_the_earlier_report(tmp_path, pictures):
    path = tmp_path / "r.html"
    path.write_text("earlier")
    unfinished = example(pictures)
    del unfinished["rank"]
    with pytest.raises(KeyError, match="rank"):
        write_report(path, "t", {}, [example(pictures), unfinished])
    assert path.read_text() == "earlier"
    write_report(path, "t", {})
    assert [p.name for p in tmp_path.iterdir() if p.suffix in (".html", ".tmp")] == ["r.html"]


def test_heat_lies_where_the_map_says():
    image = Image.new("RGB", (64, 64), "white")
    values = torch.zeros(8, 8)
    values[:4, 4:] = 1  # upper right
    heat = np.asarray(heat_overlay(image, values, size=64)).astype(int)
    cold = heat[40:, :24]
    assert np.all(cold >= 250)  # white stays white
    hot = heat[4:24, 40:60]
    assert np.all(hot[..., 0] > 180)
    assert np.all(hot[..., 1] < 120)
    assert np.all(heat_overlay(image, torch.zeros(1, 1), 32).getextrema() == np.array([(255, 255)] * 3))


def test_heat_follows_the_processors_fit():
    wide = Image.new("RGB", (200, 100), (0, 0, 0))
    none = torch.zeros(4, 4)
    dark = {fit: np.asarray(heat_overlay(wide, none, 80, fit))[..., 0] < 200 for fit in ("pad", "crop", "stretch")}
    assert dark["stretch"].all()
    assert dark["crop"].all()
    assert dark["pad"][30:50].all()
    assert not dark["pad"][:15].any()  # the white bars that the model saw
    assert not dark["pad"][65:].any()


def test_odd_maps_do_no_harm():
    image = Image.new("RGB", (10, 20), (9, 9, 9))
    for values in (torch.full((3, 3), torch.nan), torch.full((2, 5), 7.0), torch.rand(4, 4).half(), torch.rand(1, 1)):
        assert heat_overlay(image, values, 16).size == (16, 16)
    values = torch.rand(3, 3, requires_grad=True)
    assert heat_overlay(image, values, 16).mode == "RGB"


def test_search_page(tmp_path, pictures):
    hits = [Hit(rank, f"name {rank}", 2.0 - rank, pictures[rank]) for rank in (1, 2, 3)]
    assert search_page(tmp_path / "s.html", pictures[0], "with a hat", hits, credit="by someone") == []
    page = Page(tmp_path / "s.html")
    assert "3 images, best first" in page.text
    assert "with a hat" in page.text
    assert "by someone" in page.text
    assert [attrs["alt"] for attrs in page.named("img")] == ["picture0.png", "name 1", "name 2", "name 3"]
    search_page(tmp_path / "text.html", None, "with a hat", hits)  # text alone
    assert len(Page(tmp_path / "text.html").named("img")) == 3
    search_page(tmp_path / "image.html", Image.new("RGBA", (9, 9)), None, hits)  # a picture in memory alone
    page = Page(tmp_path / "image.html")
    assert embedded(page.named("img")[0]).getpixel((4, 4)) == (255, 255, 255)
    assert page.classed("caption") == []


def test_search_page_of_a_long_query(tmp_path, pictures):
    hits = [
        Hit(1, "name 1", 0.75, pictures[1], terms={"fused": 1.0, "background": -0.25}),
        Hit(2, "b", 0.1, pictures[2]),
    ]
    asked = {"without_images": [pictures[3]], "without_texts": ["a coat", HOSTILE]}
    concepts = [("with a hat", ["hat"]), ("make it so", [])]
    search_page(
        tmp_path / "s.html", [pictures[0], pictures[1]], ["with a hat", "in red"], hits, **asked, concepts=concepts
    )
    page = Page(tmp_path / "s.html")
    alts = [attrs["alt"] for attrs in page.named("img")]
    assert alts == ["picture0.png", "picture1.png", "picture3.png", "name 1", "b"]
    for text in ("with a hat", "in red", "a coat", "not like", "Concepts of “with a hat”: hat", "make it so”: none"):
        assert text in " ".join(page.text.split()), text
    assert "fused" in page.text and "+1.000" in page.text and "-0.250" in page.text


def bars(svg):
    """Height in percent of each bar, from the drawing itself."""
    root = ET.fromstring(svg)
    lines = sorted({float(line.get("y1")) for line in root.iter(f"{SVG}line")})
    scale = (lines[4] - lines[0]) / 100
    return [float(bar.get("height")) / scale for bar in root.iter(f"{SVG}rect") if bar.find(f"{SVG}title") is not None]


def test_chart_bars_have_their_heights():
    svg = results_chart_svg(RESULTS)
    expected = [70.123, 1.5, 11, 20, 1, 0, 95, 10, 50, 60, 65, 0]  # R@1 then R@10; image_only is missing in test_word
    assert bars(svg) == pytest.approx(expected, abs=0.1)
    root = ET.fromstring(svg)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    for words in ("NEUCORE", "text only", "image only", "R@1 (%)", "R@10 (%)", "val", "test_word", "70.1", "–"):
        assert words in texts
    assert root.get("role") == "img"
    assert "R@10 (%), val: NEUCORE 95.0, text only 10.0, image only 50.0" in root.find(f"{SVG}desc").text
    assert root.find(f"{SVG}style") is not None
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x"):
            assert float(rect.get("x")) + float(rect.get("width")) <= width
            assert float(rect.get("y")) + float(rect.get("height")) <= height


def numbers(svg, tag, *names):
    return [float(found.get(name)) for found in ET.fromstring(svg).iter(f"{SVG}{tag}") for name in names]


@pytest.mark.parametrize("values", [[0.0], [50.0], [0.0, 0.0], [1e-6, 2e-6], [-3.0, 99.5], [12.0, 12.0, 12.0]])
def test_curves_and_intervals_stay_within_their_pictures(values):
    """Also where one value stands alone, or all are equal: every mark is a number within the frame."""
    lines = {HOSTILE: list(enumerate(values, start=1)), "gone": [(1, float("nan"))]}
    panels = [Panel("p", "epoch", lines, percent, (1, "best")) for percent in (False, True)]
    rows = [Interval(HOSTILE * 3, value, value - 1, value + 1, [value]) for value in values]
    bare = [Interval("r", value) for value in values]
    drawn = [line_chart_svg(panel) for panel in panels if not (panel.percent and min(values) < 0)]
    drawn += [interval_chart_svg("t", some, zero) for some in (rows, bare) for zero in (False, True)]
    for svg in drawn:
        width, height = (float(ET.fromstring(svg).get(name)) for name in ("width", "height"))
        across, down = numbers(svg, "circle", "cx"), numbers(svg, "circle", "cy")
        assert len(across) >= len(values)
        assert all(0 <= x <= width for x in across + numbers(svg, "line", "x1", "x2"))
        assert all(0 <= y <= height for y in down + numbers(svg, "line", "y1", "y2"))
        assert not list(ET.fromstring(svg).iter(f"{SVG}script"))


def test_curves_lie_where_their_values_are():
    svg = line_chart_svg(Panel("p", "epoch", {"R@1": [(1, 0.0), (2, 25.0), (3, 100.0)]}, percent=True))
    points = [
        tuple(map(float, p.split(","))) for p in next(ET.fromstring(svg).iter(f"{SVG}polyline")).get("points").split()
    ]
    (x1, y1), (x2, y2), (x3, y3) = points
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert (y1 - y2) / (y1 - y3) == pytest.approx(0.25, abs=0.01) and y3 < y1
    svg = interval_chart_svg("t", [Interval("a", 1.0, 0.0, 4.0)], zero=True)
    (value,) = numbers(svg, "circle", "cx")
    (span,) = [line for line in ET.fromstring(svg).iter() if line.get("class") == "span"]
    start, end = (float(span.get(name)) for name in ("x1", "x2"))
    assert (value - start) / (end - start) == pytest.approx(0.25, abs=0.01)
    assert "a +1.00 [+0.0, +4.0]" in svg


def test_chart_escapes_and_refuses():
    svg = results_chart_svg({HOSTILE: {HOSTILE: {"R@1": 5, "R@10": 6}}})
    assert not list(ET.fromstring(svg).iter(f"{SVG}script"))
    for empty in ({}, {"val": {}}):
        with pytest.raises(DataError, match="no results to draw"):
            results_chart_svg(empty)
    assert bars(bar_chart_svg([("p", [("g", [120.0, -5.0])])], ["a", "b"], "t")) == [100, 0]  # kept inside the plot
