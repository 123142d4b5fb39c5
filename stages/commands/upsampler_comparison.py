"""Measures the upsamplers of one teacher for ``radio-distill upsampler-report``, writes its page.

Tables 7 to 10 of FeatSharp (arXiv 2502.16025, appendix B) and its Figures 10 and 13, of one's own
teacher and images.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from radio_distill.config import FitConfig, Recipe, dump
from radio_distill.data.folder import load_images
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.evals.encoder import to_pixels
from radio_distill.evals.masks import SegmentationSet, open_set
from radio_distill.evals.probes import LinearProbe
from radio_distill.protocols import Teacher
from radio_distill.report.page import Section, machine_facts, write_page
from radio_distill.report.tables import print_tables, render
from radio_distill.stage import FIT, resolve_stage
from radio_distill.system.distributed import World, choose_device
from radio_distill.system.files import write_text
from radio_distill.system.precision import resolved_dtype
from radio_distill.system.progress import Progress
from radio_distill.types import Size, format_size
from teachers import build_teacher
from upsamplers import UPSAMPLERS
from upsamplers import comparison as compare
from upsamplers.fit.consistency import Consistency
from upsamplers.metrics import measure

from ..arguments import check_output
from ..fit_upsampler import held_out
from ..fits import fit_name, fit_of
from . import upsampler_tables as show
from .upsampler_rows import Request, is_network

logger = logging.getLogger(__name__)

Scores = dict[str, float]
BATCH = 8


@dataclass
class Comparison:
    """One teacher of a recipe at one input size, its fitted files, and what was measured."""

    recipe: Recipe
    """Of :func:`.fit_upsampler.fit_recipe`: with this teacher alone."""
    request: Request
    teacher: Teacher
    size: Size
    """The teacher's input, in pixels."""
    device: torch.device
    segmentation: SegmentationSet | None
    files: dict[str, Path] = field(default_factory=dict)
    """Fitted files by the names of their fits (:func:`.common.fit_name`)."""
    missing: list[str] = field(default_factory=list)
    """Commands that would fit the others."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """Measures of upsamplers by the same names; of those of Table 9 also ``preservation`` and
    ``preservation_low``."""
    notes: list[str] = field(default_factory=list)
    """A line for each thing that could not be measured, and why."""
    num_images: int = 0

    @classmethod
    def of(cls, recipe: Recipe, request: Request) -> "Comparison":
        """Build the teacher and read the segmentation set, before anything is fitted."""
        name, evaluation = recipe.fit.teacher, recipe.evaluation
        device = choose_device(recipe.engine.device, World())
        teacher = build_teacher(name, recipe.teachers[name], device)
        labelled = None
        if 9 in request.tables and evaluation.segmentation:
            labelled = open_set(
                evaluation.segmentation, evaluation.limit, evaluation.segmentation_ignore
            )
        stage = resolve_stage(recipe, FIT, {teacher.spec.name: teacher.spec})
        return cls(recipe, request, teacher, stage.partitions[0].sizes[0], device, labelled)

    @property
    def precision(self) -> str:
        return self.recipe.engine.precision

    def announce(self, missing: int, fit: bool) -> None:
        """Say what is compared, before it takes its time."""
        config, evaluation = self.recipe.fit, self.recipe.evaluation
        plan = f"{missing} to fit, {config.steps} steps of {config.batch_size} images each"
        logger.info(
            "teacher %s at %s px, factors %s: %d fitted upsamplers found, %s; %d held-out images",
            self.teacher.spec.name, format_size(self.size),
            ", ".join(map(str, self.request.factors)),
            len(self.request.fits(self.recipe)) - missing,
            plan if fit and missing else f"{missing} missing",
            len(load_images(evaluation.images, evaluation.limit or None)),
        )  # fmt: skip

    def note(self, text: str) -> None:
        """Keep, once, what could not be measured."""
        if text not in self.notes:
            self.notes.append(text)
            logger.warning("%s", text)

    def load(self, config: FitConfig) -> Consistency | None:
        """Load an upsampler onto the device; None, once with a note, where it is not there."""
        name = fit_name(config)
        if name in self.files:
            return compare.load_fitted(self.files[name]).to(self.device)
        if is_network(config.upsampler):
            return None
        bilinear = fit_of(self.recipe, self.recipe.fit.teacher, "bilinear", config.factor)
        reference = self.load(bilinear)
        if reference is None:
            self.note(f"{name} is not measured: its downsampler would be that of a fitted bilinear")
            return None
        upsampler = UPSAMPLERS.get(config.upsampler)(factor=config.factor)
        return compare.without_parameters(upsampler, self.teacher, reference).to(self.device)

    def batches(self, factor: int) -> list[Tensor]:
        """Load the held-out images, ``factor`` times the teacher's input."""
        evaluation = self.recipe.evaluation
        return held_out(evaluation.images, self.size, factor, evaluation.limit)

    def measure(self) -> None:
        """Measure the upsamplers of all tables."""
        for factor in self.request.factors:
            batches = self.batches(factor)
            self.num_images = sum(map(len, batches))
            for name, config in self.request.configs(self.recipe).items():
                if config.factor == factor:
                    self._measure_one(name, config, batches)
        if self.segmentation is not None:
            self._measure_preservation(self.segmentation)

    def _measure_one(self, name: str, config: FitConfig, batches: Sequence[Tensor]) -> None:
        try:
            consistency = self.load(config)
            if consistency is None:
                return
            with Progress(f"{name}: held-out images", len(batches), "batches") as bar:
                self.scores[name] = measure(
                    consistency, self.teacher, batches, self.size, config.factor, bar.report,
                    self.precision,
                )  # fmt: skip
        except (ConfigError, WeightsError) as error:
            # A teacher that cannot be shown so much; a converted file, without a downsampler.
            self.note(f"{name} is not measured: {error}")

    def _measure_preservation(self, data: SegmentationSet) -> None:
        """Add what a probe of the teacher's maps makes of the upsampled ones of Table 9."""
        train = self._labelled(data, "train", self.size[0])
        probe: LinearProbe | None = None
        for factor, rows in self.request.rows(9, self.recipe).items():
            images = self._labelled(data, "val", self.size[0] * factor)
            for _, config in rows:
                name = fit_name(config)
                consistency = self.load(config) if name in self.scores else None
                if consistency is None:
                    continue
                probe = probe or compare.fit_probe(self.teacher, train, len(data.classes))
                with Progress(f"{name}: segmentation", len(images), "batches") as bar:
                    fine, low = compare.preservation(
                        consistency.model, self.teacher, probe, images, self.size, factor,
                        bar.report, self.precision,
                    )  # fmt: skip
                self.scores[name] |= {"preservation": fine, "preservation_low": low}

    def _labelled(
        self, data: SegmentationSet, split: Literal["train", "val"], side: int
    ) -> compare.Labelled:
        """Load images with their classes, ``side`` pixels a side, in batches."""
        pairs = data.train if split == "train" else data.val
        return [
            (
                torch.stack([to_pixels(pair.image, (side, side)) for pair in part]).to(self.device),
                torch.stack([data.mask(pair, side) for pair in part]),
            )
            for part in (pairs[at : at + BATCH] for at in range(0, len(pairs), BATCH))
        ]


def write_report(report: Comparison) -> Path:
    """Measure, print the tables, and write RUN/upsampler_report/TEACHER; returns the page's path.

    Raises ConfigError where a file cannot be written.
    """
    folder = report.recipe.folder / "upsampler_report" / report.teacher.spec.name
    check_output(folder / "index.html")
    report.measure()
    tables = show.tables_of(report)
    print_tables(tables)
    sections = [
        Section("scores", "Upsamplers compared", tables),
        Section("run", "What was compared", facts=_summary(report)),
        Section("fits", "Fits", [show.fits_table(report)]),
        Section("features", "Features", sheets=show.feature_sheets(report)),
        Section("recipe", "Recipe", settings=dump(report.recipe)),
    ]
    texts = {
        "tables.md": render(tables, "markdown"),
        "scores.json": json.dumps(_scores(report), indent=2) + "\n",
    }
    for name, text in texts.items():
        write_text(folder / name, text)
    title = f"Upsamplers of teacher {report.teacher.spec.name}"
    return write_page(folder / "index.html", title, sections)


def _summary(report: Comparison) -> list[tuple[str, str]]:
    spec, config = report.teacher.spec, report.recipe.teachers[report.teacher.spec.name]
    dtype = resolved_dtype(config.dtype, report.device)
    lines = {
        "teacher": f"{spec.name} ({config.preset}, {dtype}), {spec.channels} channels",
        "input": f"{format_size(report.size)} px, patch {spec.patch_size}",
        "held-out images": f"{report.num_images} of {report.recipe.evaluation.images}",
        "not fitted": "\n".join(report.missing),
        "not measured": "\n".join(report.notes),
    }
    known = [(name, text) for name, text in lines.items() if text]
    return [*known, *machine_facts(report.device)]


def _scores(report: Comparison) -> dict[str, Any]:
    """Return everything that was measured, unrounded, for programs."""

    def described(name: str, config: FitConfig) -> dict[str, Any]:
        values: dict[str, Any] = {"upsampler": config.upsampler, "factor": config.factor}
        if name in report.files:
            values |= {"options": config.options, "de_bias": config.de_bias}
            values["file"] = str(report.files[name])
        return values | report.scores[name]

    configs = report.request.configs(report.recipe).items()
    return {
        "teacher": report.teacher.spec.name,
        "weights_hash": report.teacher.spec.weights_hash,
        "size": list(report.size),
        "images": {"source": report.recipe.evaluation.images, "number": report.num_images},
        "upsamplers": {n: described(n, config) for n, config in configs if n in report.scores},
        "missing": report.missing,
        "notes": report.notes,
    }
