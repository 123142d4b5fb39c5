"""One HTML page that tells a run: gains, scores, training curves, images, recipe.

A page is sections of tables, figures and definitions (:func:`write_page`); :func:`write_report` is
that of a run. It is one file and loads nothing: style is inline, images are base64. It follows
the reader's light or dark setting, fits a phone, and prints on white. There is no script in it.
"""

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from .. import __version__
from ..errors import ConfigError
from ..system.files import reason_of, replacing
from .tables import Table

if TYPE_CHECKING:
    from PIL.Image import Image

STYLE = Path(__file__).parent / "report.css"
PALETTE = ("#2f80d0", "#d9730d", "#2a9d6f", "#b6499a", "#8a7a00", "#6f6fd8", "#c9423f", "#3d9db3")
INK = "#0a0b0c"  # drawn in place of the page's own text colour, which depends on light or dark
MAX_POINTS = 300

_DARK = (
    "<style>svg{color:#3a3f45}@media screen and (prefers-color-scheme:dark){svg{color:#b9c0c8}}"
    "</style>"
)


@dataclass(frozen=True, slots=True)
class Figure:
    """An image with a title and a caption."""

    title: str
    caption: str
    image: "Image | bytes"
    """A PIL image, or the bytes of a PNG or SVG file."""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Sequence[tuple[str, str]],
    tables: Sequence[Table],
    beside: Sequence[Table] = (),
    figures: Sequence[Figure] = (),
    curves: Sequence[Figure] = (),
    recipe_text: str = "",
) -> Path:
    """Write the page, whole or not at all, and return its path.

    Args:
        path: the file; its folder is made.
        title: heading of the page.
        summary: what was run (commands, machine, versions, time), as name and text.
        tables: the headline first, then the scores. All text is escaped.
        beside: what is shown with the headline and is no part of it.
        figures: images of features.
        curves: small images set side by side, as :func:`training_curves` makes them.
        recipe_text: the resolved recipe.

    Raises:
        ConfigError: the file cannot be written, or a figure is neither PNG nor SVG.
    """
    sections = [
        Section("result", "Result", "".join(t.to_html() for t in (*tables[:1], *beside))),
        Section("run", "What was run", definitions(summary)),
        Section("training", "Training", figures_html(curves, "panels")),
        Section("scores", "Scores", "".join(table.to_html() for table in tables[1:])),
        Section("features", "Features", figures_html(figures, "sheets")),
        Section("recipe", "Recipe", settings(recipe_text)),
    ]
    return write_page(path, title, sections)


class Section(NamedTuple):
    """A part of a page, with a link to it at the top."""

    key: str
    """Letters, for the link."""
    heading: str
    content: str
    """HTML, of ``Table.to_html``, :func:`definitions`, :func:`figures_html`, :func:`settings`."""


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Write a page of those sections that have content, whole or not at all; return its path.

    Raises:
        ConfigError: the file cannot be written.
    """
    page = _page(title, [section for section in sections if section.content])
    path = Path(path)
    try:
        with replacing(path) as draft:
            draft.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {reason_of(error)}") from error
    return path


def training_curves(
    metrics: Mapping[str, Sequence[Mapping[str, float]]], prefix: str = "loss/"
) -> list[Figure]:
    """Draw one panel for each teacher and kind of loss, with a line for each stage and partition.

    Args:
        metrics: label (a stage) to its log records ``{"step": ..., name: value}``.
        prefix: which names to draw; ``PREFIX[PARTITION/]TEACHER/KIND`` as the training loop logs,
            and ``PREFIXtotal``.

    Raises:
        ConfigError: no record has a name with that prefix.
    """
    panels = _panels(metrics, prefix)
    if not panels:
        raise ConfigError(
            f"no values named {prefix}… in the logs of {', '.join(metrics) or 'nothing'}"
        )
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}
    return [
        Figure(name, "", line_chart(lines, "step", prefix.strip("/_"), colours))
        for name, lines in panels.items()
    ]


Points = list[tuple[float, float]]


def _panels(
    metrics: Mapping[str, Sequence[Mapping[str, float]]], prefix: str
) -> dict[str, dict[str, Points]]:
    """Sort records into ``{panel: {line: points}}``."""
    panels: dict[str, dict[str, Points]] = {}
    for label, records in metrics.items():
        names = dict.fromkeys(key for row in records for key in row if key.startswith(prefix))
        split = {name: _split(name.removeprefix(prefix)) for name in names}
        several = len({partition for partition, _ in split.values() if partition}) > 1
        for name, (partition, panel) in split.items():
            line = f"{label}, {partition}" if several and partition else label
            points = [(row["step"], row[name]) for row in records if name in row]
            panels.setdefault(panel, {})[line] = _thin(points)
    return panels


def _split(name: str) -> tuple[str, str]:
    """``high/dino/features`` to its partition and its panel, ``("high", "dino features")``."""
    *partition, teacher, kind = ["", *name.split("/")]
    return "/".join(filter(None, partition)), f"{teacher} {kind}".strip()


def _thin(points: Points) -> Points:
    """Average neighbours until at most ``MAX_POINTS`` remain; points that are not finite go."""
    points = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), max(size, 1))]
    return [(_mean(x for x, _ in group), _mean(y for _, y in group)) for group in groups]


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return math.fsum(values) / len(values)


def line_chart(
    lines: Mapping[str, Points],
    x_label: str,
    y_label: str,
    colours: Mapping[str, str] | None = None,
) -> bytes:
    """Draw lines as SVG whose axes and text take the reader's light or dark setting."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    colours = colours or dict(zip(lines, itertools.cycle(PALETTE), strict=False))
    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "font.family": ["sans-serif"],
        "font.sans-serif": ["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "DejaVu Sans"],
        "font.size": 10,
    } | dict.fromkeys(
        ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK
    )
    with rc_context(style):
        canvas = Canvas(figsize=(4.4, 2.7 + 0.2 * math.ceil(len(lines) / 2)), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        for label, points in lines.items():
            marker = "o" if len(points) == 1 else ""
            axes.plot(
                *zip(*points, strict=True) if points else ([], []),
                color=colours[label], label=label, linewidth=1.6, marker=marker, markersize=4,
            )  # fmt: skip
        _dress(axes, lines)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        file = io.BytesIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().decode().replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    return (text[:start] + _DARK + text[start:]).encode()


def _dress(axes: Any, lines: Mapping[str, Points]) -> None:
    """Choose the scale, and take away what is not data."""
    values = [value for points in lines.values() for _, value in points]
    if values and min(values) > 0 and max(values) > 10 * min(values):
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#808080", alpha=0.25, linewidth=0.6)
    axes.margins(x=0.02)
    # Below the axes, where it can hide no line.
    axes.figure.legend(
        loc="outside lower center", ncols=2, frameon=False, fontsize=9, handlelength=1.4
    )


def _page(title: str, sections: Sequence[Section]) -> str:
    links = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(
        f'<section id="{key}">\n<h2>{name}</h2>\n{content}</section>\n'
        for key, name, content in sections
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n"
        f"<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n<body>\n"
        f"<header><h1>{html.escape(title)}</h1>\n<nav>{links}</nav></header>\n"
        f"<main>\n{body}</main>\n"
        f"<footer>radio_distill {html.escape(__version__)}. This page is one file and loads "
        "nothing else.</footer>\n</body>\n</html>\n"
    )


def definitions(summary: Sequence[tuple[str, str]]) -> str:
    """Write names and texts as an HTML list."""
    rows = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>\n"
        for name, text in summary
    )
    return f"<dl>\n{rows}</dl>\n" if rows else ""


def figures_html(figures: Sequence[Figure], kind: Literal["panels", "sheets"]) -> str:
    """Write figures as HTML: small ones side by side (panels), or large ones (sheets)."""
    drawn = "".join(_figure(figure) for figure in figures)
    return f'<div class="{kind}">\n{drawn}</div>\n' if drawn else ""


def _figure(figure: Figure) -> str:
    title, caption = html.escape(figure.title), html.escape(figure.caption)
    return (
        f'<figure>\n<h3>{title}</h3>\n<div class="scroll">'
        f'<img src="{_data_address(figure)}" alt="{title}"></div>\n'
        + (f"<figcaption><p>{caption}</p></figcaption>\n" if caption else "")
        + "</figure>\n"
    )


def _data_address(figure: Figure) -> str:
    """Put an image into an address. An SVG stays an image: nothing in it can run or load."""
    content = figure.image
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        content.save(buffer, format="PNG", optimize=True)
        content = buffer.getvalue()
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif content.lstrip().startswith((b"<svg", b"<?xml")):
        kind = "svg+xml"
    else:
        raise ConfigError(f"figure {figure.title!r} is neither PNG nor SVG; pass a PIL image")
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def settings(text: str) -> str:
    """Write the resolved recipe as HTML, folded up."""
    if not text:
        return ""
    return (
        "<details>\n<summary>Every setting of the run</summary>\n"
        f"<pre><code>{html.escape(text)}</code></pre>\n</details>\n"
    )
