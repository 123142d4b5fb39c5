import base64
import io
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from radio_distill.errors import ConfigError
from radio_distill.report.charts import MAX_POINTS, training_curves
from radio_distill.report.page import Figure, Section, write_page
from radio_distill.report.tables import Column, Table

VOID = {"meta", "img", "br", "link"}
HOSTILE = "<script>alert(1)</script> & \"quoted\" 'text'"


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order, every id used once."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if "h2" in self.open:
            self.headings[-1] += data


def table(title: str) -> Table:
    return Table(title, (Column("Model"), Column("Δm", "+.2f", "higher")), (("a", 1.0), ("b", 0.0)))


def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def records(scale: float = 1.0, steps: int = 20) -> list[dict[str, float]]:
    return [
        {"step": step, "time": 0.5, "loss/low/dino/features": scale / step, "gradient_norm": 1.0}
        for step in range(1, steps + 1)
    ]


def full_report(path: Path) -> Page:
    sections = [
        Section("result", "Result", [table("Headline")]),
        Section("run", "What was run", facts=[("Command", "radio-distill demo"), ("Machine", "2")]),
        Section(
            "training",
            "Training",
            panels=training_curves({"stage1": records(), "stage2": records(0.5)}),
        ),
        Section("nothing", "Nothing"),
        Section("scores", "Scores", [table("Scores of a group"), table("Another")]),
        Section(
            "features",
            "Features",
            sheets=[Figure("A sheet", "Equal colours are equal features.", image())],
        ),
        Section("recipe", "Recipe", settings="name: demo\nseed: 0\n"),
    ]
    write_page(path, "demo", sections)
    return Page(path.read_text(encoding="utf-8"))


def test_write_page__sections_in_order_and_without_the_empty(tmp_path: Path) -> None:
    page = full_report(tmp_path / "new folder" / "report.html")
    assert page.headings == ["Result", "What was run", "Training", "Scores", "Features", "Recipe"]
    for text in ("Headline", "radio-distill demo", "A sheet", "seed: 0", "Scores of a group"):
        assert text in page.text
    assert page.text.index("Headline") < page.text.index("Scores of a group")
    links = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert links == {f"#{a['id']}" for tag, a in page.tags if tag == "section"}


def test_write_page__loads_nothing(tmp_path: Path) -> None:
    page = full_report(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    addresses = [
        value or ""
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "data", "poster", "action", "background")
    ]
    assert addresses
    assert all(address.startswith(("#", "data:image/")) for address in addresses)
    style = (tmp_path / "report.html").read_text(encoding="utf-8").split("</style>")[0]
    assert not re.search(r"https?:|url\(|@import", style)
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style


def test_write_page__images_survive(tmp_path: Path) -> None:
    page = full_report(tmp_path / "report.html")
    sources = [a["src"] or "" for tag, a in page.tags if tag == "img"]
    png = base64.b64decode(sources[-1].removeprefix("data:image/png;base64,"))
    np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(png))), np.array(image()))
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")
    svg = base64.b64decode(sources[0].removeprefix("data:image/svg+xml;base64,"))
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_write_page__all_text_is_escaped(tmp_path: Path) -> None:
    hostile_table = Table(HOSTILE, (Column(HOSTILE),), ((HOSTILE,),), (HOSTILE,))
    section = Section(
        "all",
        HOSTILE,
        [hostile_table],
        facts=[(HOSTILE, HOSTILE)],
        panels=training_curves({HOSTILE: records()}),
        sheets=[Figure(HOSTILE, HOSTILE, image())],
        settings=HOSTILE,
    )
    path = write_page(tmp_path / "report.html", HOSTILE, [section])
    page = Page(path.read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(HOSTILE) == 2 + 2 + 4 + 2 + 2 + 1


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 jpeg", b"", b"<html></html>"])
def test_write_page__figure_of_another_format(tmp_path: Path, content: bytes) -> None:
    figure = Figure("photo", "", content)
    with pytest.raises(ConfigError, match="'photo'"):
        write_page(tmp_path / "r.html", "t", [Section("all", "All", sheets=[figure])])
    assert list(tmp_path.iterdir()) == []


def test_write_page__folder_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ConfigError, match=r"runs/r\.html"):
        write_page(tmp_path / "runs" / "r.html", "t", [])


def test_write_page__no_permission(tmp_path: Path) -> None:
    write_page(tmp_path / "allowed.html", "t", [])  # what it reads, it has read
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # root may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match="Permission denied"):
            write_page(tmp_path / "r.html", "t", [])
    finally:
        os.seteuid(user)


def polylines(svg: bytes | Image.Image) -> list[int]:
    """Number of points of each drawn curve."""
    assert isinstance(svg, bytes)
    root = ElementTree.fromstring(svg)
    namespace = "{http://www.w3.org/2000/svg}"
    axes = next(g for g in root.iter(f"{namespace}g") if g.get("id") == "axes_1")
    lines = [g for g in axes.findall(f"{namespace}g") if (g.get("id") or "").startswith("line2d")]
    return [len(re.findall("[ML]", line.find(f"{namespace}path").get("d") or "")) for line in lines]  # type: ignore[union-attr]


def test_training_curves__a_panel_for_each_teacher_and_kind() -> None:
    rows = [
        {
            "step": step,
            "loss/low/dino/features": 1.0,
            "loss/low/dino/summary": 0.5,
            "loss/high/dino/features": 2.0,
            "learning_rate/body": 0.1,
        }
        for step in (1, 2)
    ]
    curves = training_curves({"stage2": records(), "stage3": rows})
    assert [curve.title for curve in curves] == ["dino features", "dino summary"]
    text = curves[0].image.decode()  # type: ignore[union-attr]
    for label in ("stage2", "stage3, low", "stage3, high"):
        assert f">{label}<" in text
    assert polylines(curves[0].image)[:3] == [20, 2, 2]
    assert "stage2" not in curves[1].image.decode()  # type: ignore[union-attr]


def test_training_curves__colours_follow_the_page() -> None:
    (curve,) = training_curves({"stage1": records()})
    text = curve.image.decode()  # type: ignore[union-attr]
    assert "currentColor" in text
    assert "prefers-color-scheme:dark" in text
    assert "#0a0b0c" not in text


def test_training_curves__long_and_broken_logs() -> None:
    rows = records(steps=10 * MAX_POINTS)
    rows[5] |= {"loss/low/dino/features": math.nan}
    (curve,) = training_curves({"stage1": rows, "short": records(steps=1), "none": []})
    long, short = polylines(curve.image)[:2]
    assert 10 < long <= MAX_POINTS
    assert short == 1
    assert "nan" not in curve.image.decode().lower()  # type: ignore[union-attr]


def test_training_curves__nothing_to_draw() -> None:
    with pytest.raises(ConfigError, match=r"loss/….*stage1.*log\.every"):
        training_curves({"stage1": [{"step": 1, "gradient_norm": 2.0}]})


def test_training_curves__the_total_is_a_panel_and_no_partition():
    row = {"step": 1, "loss/total": 2.0, "loss/low/dino/features": 0.5}
    total, features = training_curves({"stage1": [row, {**row, "step": 2}]})
    assert (total.title, features.title) == ("total", "dino features")
    assert b"stage1, low" not in features.image
