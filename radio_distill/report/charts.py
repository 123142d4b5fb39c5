"""Line charts: training curves, and whatever else is drawn over a number.

They are SVG that takes the reader's light or dark setting from the page it lies in.
"""

import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError
from ..evals.score_set import ScoreSet
from .page import Figure

PALETTE = ("#2f80d0", "#d9730d", "#2a9d6f", "#b6499a", "#8a7a00", "#6f6fd8", "#c9423f", "#3d9db3")
INK = "#0a0b0c"  # drawn in place of the page's own text colour, which depends on light or dark
MAX_POINTS = 300

_DARK = (
    "<style>svg{color:#3a3f45}@media screen and (prefers-color-scheme:dark){svg{color:#b9c0c8}}"
    "</style>"
)


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
            f"no values named {prefix}… in the logs of {', '.join(metrics) or 'nothing'}: train on "
            "until a step is logged (log.every)"
        )
    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    colours = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}
    return [
        Figure(name, "", line_chart(lines, "step", prefix.strip("/_"), colours))
        for name, lines in panels.items()
    ]


def size_curves(scores: ScoreSet) -> list[Figure]:
    """Draw headline metrics over the shorter side of the input, a line an encoder.

    A panel is drawn where an encoder has a metric at several sizes, each out of a file of its own.
    """
    titles: dict[str, str] = {}  # by weights, which say whether two results are of one encoder
    panels: dict[str, dict[str, Points]] = {}
    for label, subjects in scores.subjects.items():
        first, many = subjects[0], len(subjects) > 1
        title = label if many or first.title in titles.values() else first.title
        title = titles.setdefault(first.weights or label, title)
        for name, metric in scores.definitions.items():
            values = [run[name] for run in scores.results[label] if name in run]
            side = _side(scores.measured[label][name].pixels) if values else None
            if metric.headline and side is not None:
                panels.setdefault(name, {}).setdefault(title, []).append((side, _mean(values)))
    return [
        Figure(name, "", line_chart(lines, "shorter side, px", scores.definitions[name].unit))
        for name in panels
        if any(len(points) > 1 for points in panels[name].values())
        for lines in [{title: sorted(points) for title, points in panels[name].items()}]
    ]


def _side(pixels: str) -> int | None:
    """Return the shorter side of sizes ``HEIGHTxWIDTH``; None unless all share it."""
    sides = {min(map(int, size.split("x"))) for size in pixels.split(", ") if size}
    return sides.pop() if len(sides) == 1 else None


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
            marker = "o" if len(points) < 10 else ""
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
