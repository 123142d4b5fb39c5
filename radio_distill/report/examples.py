"""Predictions beside the truth: drawn, kept beside the scores, and found again for a page.

They lie in ``evaluation/ENCODER/BENCHMARK/N.webp`` beside ``scores.jsonl``, and in
``FILE-evaluation/`` beside a ``FILE.jsonl``.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..evals.examples import Shown, ShownBoxes, ShownMatches
from ..evals.metrics import IGNORED
from ..evals.score_set import ScoreSet
from ..evals.subjects import MODEL, SCORES, Subject
from ..system.files import replacing
from .feature_images import MARGIN, image_grid
from .page import Figure

FOLDER = "evaluation"
SIDE = 256
"""Longer side of an image or a map, in pixels."""
MATCH_SIDE = 360
"""The same of a pair of images with matches, or with boxes."""

_QUALITY = 85
"""Of WebP: a seventh of a PNG's bytes, and colours of classes stay apart."""
_FINER = 2  # lines are drawn so much larger and made smaller, for smooth edges
_FOUND, _MISSED = (63, 193, 255), (255, 122, 26)  # blue and orange: told apart by all eyes
_UNKNOWN = 128  # grey, where there is no truth

LEGEND = {
    "classes": "one colour each in all images; white is none",
    "masks": "one colour for an object in prediction and truth; black is none",
    "depth": "from near (blue) to far (red), in the range of the truth; grey is unknown",
    "normals": "red, green and blue are x, y and z; grey is unknown",
    "matches": "a line ends where a point was found: blue near enough to the truth, orange too "
    "far, with a ring at the truth",
    "boxes": "true ones on the right, as many of the surest on the left; in an image, one colour a "
    "kind",
}
"""Names and texts, for a page that shows examples."""


def draw(example: Shown) -> Image.Image:
    """Draw an example: image, prediction and truth of each task, or two images."""
    if isinstance(example, ShownBoxes):
        return _boxes(example)
    if isinstance(example, ShownMatches):
        return _matches(example)
    first = _fitted(Image.fromarray(_rows(example.pixels)), Image.Resampling.BICUBIC)
    lines = []
    for name, truth in example.truth.items():
        maps = [_painted(name, it, truth) for it in (example.prediction[name], truth)]
        lines.append([first, *maps])
    return image_grid(lines, list(example.truth), ["image", "prediction", "truth"], SIDE)


def _rows(pixels: Tensor) -> np.ndarray:
    return np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())


def _fitted(image: Image.Image, resampling: Image.Resampling, side: int = SIDE) -> Image.Image:
    return ImageOps.contain(image, (side, side), resampling)


def _painted(name: str, values: Tensor, truth: Tensor) -> Image.Image:
    """Paint a map as its name asks for; ``truth`` says in which range, and where it is known."""
    if name in ("segmentation", "parts", "masks"):
        numbers = torch.where(values == IGNORED, 256, values % 256)
        colours = class_colours()[numbers.numpy()]
        return _fitted(Image.fromarray(colours), Image.Resampling.NEAREST)
    if name == "normals":
        colours = _rows(((values + 1) * 127.5).round().clamp(0, 255).to(torch.uint8))
    elif name == "saliency":
        known = values.where(values != IGNORED, 0.5).clamp(0, 1)
        colours = (known * 255).round().to(torch.uint8).numpy()
    else:
        colours = _depth(values, truth)
    return _fitted(Image.fromarray(colours), Image.Resampling.BILINEAR)


def _depth(values: Tensor, truth: Tensor) -> np.ndarray:
    """Paint ``[H, W]`` from the truth's second to its 98th per cent; 0 is unknown."""
    from matplotlib import colormaps

    shown = truth[truth > 0] if (truth > 0).any() else values.flatten()
    low, high = np.quantile(shown.numpy(), [0.02, 0.98])
    share = ((values - low) / max(high - low, 1e-6)).clamp(0, 1)
    colours: np.ndarray = colormaps["turbo"](share.numpy(), bytes=True)[..., :3]
    colours[values.numpy() == 0] = _UNKNOWN
    return np.ascontiguousarray(colours)


@cache
def class_colours() -> np.ndarray:
    """Return ``[257, 3]`` uint8: colours of classes 0 to 255 as in VOC's masks, and white last."""
    numbers = np.arange(256)
    colours = np.zeros((257, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:256, channel] |= (numbers >> (3 * bit + channel) & 1).astype(np.uint8) << (
                7 - bit
            )
    colours[256] = 255
    return colours


def _matches(example: ShownMatches) -> Image.Image:
    """Draw a line from each point of the source to where it was found in the target."""
    sides, scales = [], []
    for pixels in (example.source, example.target):
        image = Image.fromarray(_rows(pixels))
        sides.append(_fitted(image, Image.Resampling.BICUBIC, _FINER * MATCH_SIDE))
        scales.append(sides[-1].width / image.width)
    left = sides[0].width + _FINER * MARGIN  # of the target
    sheet = Image.new("RGB", (left + sides[1].width, max(it.height for it in sides)), "white")
    sheet.paste(sides[0])
    sheet.paste(sides[1], (left, 0))
    draw = ImageDraw.Draw(sheet)
    missed = (example.found - example.truth).norm(dim=1) >= example.within
    starts = example.points * scales[0]
    ends, truths = (
        it * scales[1] + torch.tensor([left, 0]) for it in (example.found, example.truth)
    )
    for start, end, truth, miss in zip(starts, ends, truths, missed.tolist(), strict=True):
        colour = _MISSED if miss else _FOUND
        line, radius = [*start.tolist(), *end.tolist()], 3 * _FINER
        draw.line(line, "black", 2 * _FINER + 1)
        draw.line(line, colour, _FINER + 1)
        draw.circle(start.tolist(), radius, colour, "black")
        draw.circle(end.tolist(), radius, colour, "black")
        if miss:
            draw.circle(truth.tolist(), radius + _FINER, None, "black", 2 * _FINER)
            draw.circle(truth.tolist(), radius, None, "white", _FINER)
    return sheet.reduce(_FINER)


def _boxes(example: ShownBoxes) -> Image.Image:
    """Draw an image with the predicted boxes beside one with the true boxes."""
    plain = Image.fromarray(_rows(example.pixels))
    image = _fitted(plain, Image.Resampling.BICUBIC, _FINER * MATCH_SIDE)
    scale = image.width / plain.width
    kinds = sorted({*example.truth_names, *example.prediction_names})
    sides = []
    for boxes, names in (
        (example.prediction, example.prediction_names), (example.truth, example.truth_names)
    ):  # fmt: skip
        sides.append(image.copy())
        draw = ImageDraw.Draw(sides[-1])
        for box, name in zip((boxes * scale).tolist(), names, strict=True):
            colour = tuple(class_colours()[1 + kinds.index(name)].tolist())
            draw.rectangle(box, None, "white", 2 * _FINER + 1)
            draw.rectangle(box, None, colour, _FINER + 1)
            draw.text(
                box[:2], name, "white", font_size=11 * _FINER, stroke_width=2, stroke_fill=colour
            )
    smaller = [side.reduce(_FINER) for side in sides]
    return image_grid([smaller], [""], ["prediction", "truth"], smaller[0].width)


def write_examples(
    file: Path, subject: Subject, benchmark: str, images: Sequence[Image.Image]
) -> None:
    """Keep a benchmark's examples of a model in the place of earlier ones.

    Args:
        file: score file of the model.
        subject: the model.
        benchmark: what was asked.
        images: the examples, drawn.
    """
    folder = folder_of(file, subject) / benchmark
    for number, image in enumerate(images):
        with replacing(folder / f"{number}.webp") as draft:
            image.save(draft, "WEBP", quality=_QUALITY, method=6)
    for path in _numbered(folder)[len(images) :]:
        path.unlink()


def folder_of(file: Path, subject: Subject) -> Path:
    """Return where the examples of a model lie: one place for what the score file has in one."""
    parts = [subject.title, str(subject.step) if subject.step else ""]
    is_model = subject.reference.startswith(f"{MODEL} ")
    own = file.name == SCORES and Path(subject.folder) == file.absolute().parent
    if not (is_model or own):  # of a run, in a file that may hold those of several
        parts.insert(0, subject.run)
    name = quote("-".join(filter(None, parts)), safe=" +=,()")
    folder = FOLDER if file.name == SCORES else f"{file.stem}-{FOLDER}"
    return file.parent / folder / name


def find_examples(scores: ScoreSet, most: int) -> list[Figure]:
    """Find the examples of scored benchmarks beside their files, ``most`` of each model."""
    found: dict[str, list[Figure]] = {}
    for label, subjects in scores.subjects.items():
        asked = dict.fromkeys(
            name.partition("/")[0] for run in scores.results[label] for name in run
        )
        folders = list(map(folder_of, scores.files[label], subjects))
        for benchmark in asked:
            paths = [path for folder in folders for path in _numbered(folder / benchmark)]
            for path in paths[:most]:
                figure = Figure(f"{benchmark}: {label}", "", path.read_bytes())
                found.setdefault(benchmark, []).append(figure)
    return [figure for figures in found.values() for figure in figures]


def _numbered(folder: Path) -> list[Path]:
    paths = [path for path in folder.glob("*.webp") if path.stem.isdecimal()]
    return sorted(paths, key=lambda path: int(path.stem))
