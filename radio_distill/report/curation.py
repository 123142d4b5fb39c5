"""The page of a curation: numbers, some clusters, near-duplicates and leaks to look at."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..curation.curate import Curated, Verdict
from ..data.folder import spread
from .feature_images import image_grid
from .page import Figure, Section, write_page
from .tables import Column, Table

_SIDE = 112  # of an image, in pixels
_CLUSTERS, _IMAGES, _PAIRS = 16, 8, 12  # shown of each kind

Open = Callable[[int], Image.Image]
"""Reads an image by its number."""


def counts_table(curated: Curated) -> Table:
    """Return how many images there are of each verdict."""
    texts = {
        Verdict.BAD: "cannot be used",
        Verdict.LEAKED: "alike to images of evaluation sets",
        Verdict.DUPLICATE: "near-duplicates of images that stay",
        Verdict.NOT_DRAWN: "not drawn, for balance",
        Verdict.KEPT: "kept",
    }
    numbers = np.bincount(curated.verdicts, minlength=len(Verdict))
    rows = [(text, int(numbers[verdict])) for verdict, text in texts.items()]
    rows.append(("in all", len(curated.verdicts)))
    columns = (Column("what becomes of them"), Column("images", ",d"))
    return Table("Images", columns, tuple(rows))


def balance_table(curated: Curated) -> Table:
    """Return how evenly the clusters of each level are filled, before images are drawn and after.

    The effective number is exp(entropy): that of equally full clusters with the same entropy.
    """
    rows = []
    kept = curated.kept[curated.candidates]
    for level, clusters in enumerate(curated.levels):
        labels, number = curated.at_level(level), len(clusters.centroids)
        parts = [np.bincount(part) / len(part) for part in (labels, labels[kept])]
        cells = [cell for it in parts for cell in (effective_number(it), 100 * float(it.max()))]
        rows.append((level + 1, number, *cells))
    names = ("effective, before", "largest, before (%)", "effective, after", "largest, after (%)")
    numbers = Column("level", "d"), Column("clusters", ",d")
    columns = (*numbers, *(Column(name, ",.1f") for name in names))
    return Table("Balance", columns, tuple(rows))


def effective_number(shares: np.ndarray) -> float:
    """Return exp(entropy) of shares that sum to 1."""
    filled = shares[shares > 0]
    return float(np.exp(-(filled * np.log(filled)).sum()))


def write_curation_page(
    path: Path,
    curated: Curated,
    open_image: Open,
    open_tested: Open,
    facts: Mapping[str, str],
) -> Path:
    """Write the page.

    Args:
        path: of the HTML file.
        curated: what it shows.
        open_image: reads an image of the shards.
        open_tested: reads an image of the evaluation sets.
        facts: what was asked, by name.
    """
    copies = _pairs(curated, Verdict.DUPLICATE, "kept", open_image, open_image)
    leaks = _pairs(curated, Verdict.LEAKED, "evaluation", open_image, open_tested)
    tables = (counts_table(curated), balance_table(curated))
    sections = [
        Section("result", "Result", tables=tables, facts=list(facts.items())),
        Section("clusters", "Clusters", sheets=_clusters(curated, open_image)),
        Section("duplicates", "Near-duplicates, the least alike first", sheets=copies),
        Section("leaks", "Leaks, the least alike first", sheets=leaks),
    ]
    return write_page(path, "Curation", sections)


def _clusters(curated: Curated, open_image: Open) -> list[Figure]:
    """Show clusters of the first level, from the largest to the smallest, a row each."""
    clusters = curated.levels[0]
    labels, sizes = clusters.labels.numpy(), clusters.sizes.numpy()
    kept = np.bincount(labels, weights=curated.kept[curated.candidates], minlength=len(sizes))
    rows, names = [], []
    for number in spread(np.argsort(-sizes, kind="stable").tolist(), _CLUSTERS):
        members = curated.candidates[labels == number]
        row = [_small(open_image(index)) for index in spread(members.tolist(), _IMAGES)]
        rows.append(row + [_empty()] * (_IMAGES - len(row)))
        names.append(f"cluster {number}: {sizes[number]:,} images, {kept[number]:,.0f} kept")
    sheet = image_grid(rows, names, [""] * _IMAGES, _SIDE)
    caption = "Images of a row should show one thing, and rows different things."
    return [Figure(f"{len(rows)} of {len(sizes)} clusters", caption, sheet)]


def _pairs(
    curated: Curated, verdict: Verdict, other: str, open_image: Open, open_other: Open
) -> list[Figure]:
    """Show images that are left out beside what they are alike to, by rising cosine."""
    images = np.flatnonzero(curated.verdicts == verdict)
    if not len(images):
        return []
    rising = images[np.argsort(curated.cosine[images], kind="stable")]
    # The threshold is judged where it cuts: half of them are the least alike.
    least, rest = rising[: _PAIRS // 2].tolist(), rising[_PAIRS // 2 :].tolist()
    cells: list[Image.Image] = []
    columns: list[str] = []
    for index in [*least, *spread(rest, _PAIRS // 2)]:
        cells += [_small(open_image(index)), _small(open_other(int(curated.like[index])))]
        columns += [f"{curated.cosine[index]:.3f}", other]
    rows = _in_rows(cells, _IMAGES)
    labels = _in_rows(columns, _IMAGES)
    sheets = [
        image_grid([row], [""], names, _SIDE) for row, names in zip(rows, labels, strict=True)
    ]
    title = f"{len(columns) // 2} of {len(images):,}"
    caption = "Each image that is left out, and to its right what it is alike to; raise the "
    caption += "threshold where they are no copies."
    return [Figure(title, caption, _stacked(sheets))]


def _in_rows(items: Sequence, length: int) -> list[list]:
    return [list(items[start : start + length]) for start in range(0, len(items), length)]


def _stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    whole = Image.new(
        "RGB", (max(it.width for it in sheets), sum(it.height for it in sheets)), "white"
    )
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _small(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image, (_SIDE, _SIDE), color="white")


def _empty() -> Image.Image:
    return Image.new("RGB", (_SIDE, _SIDE), "white")
