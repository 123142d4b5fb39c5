"""The resolved recipe: a stage as plain frozen data, from which everything else is made.

:func:`resolve_stage` makes it, once. Planner, statistics, targets, trainer, checkpoint, resume and
evaluation read it, and none of them asks the recipe again. How a teacher sees the images of a
partition is a :class:`TeacherView`: worked out here for each partition, size and teacher.

A step's loss is ``sum_p share_p * mean over the images of p (loss)``, with
``share_p = weight_p / sum(weights)``. That definition knows nothing of processes;
:mod:`.distill.micro_batches` turns it into work for each of them.

The fit of an upsampler is a stage too: named :data:`FIT`, of one partition, which one teacher sees
at ``fit.factor`` times its own grid. Nothing here imports torch.
"""

import itertools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .config import (
    AUTO_MICRO_BATCH,
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    Facts,
    FitConfig,
    LogConfig,
    LossConfig,
    NormalizerConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UpsamplerConfig,
    WatchConfig,
    for_stage,
    partition_sizes,
    resolve,
)
from .errors import ConfigError
from .registry import nearest
from .teacher_view import TeacherView, view_of
from .types import Size, TeacherSpec

FIT = "fit"
"""Name of the stage that fits an upsampler."""


@dataclass(frozen=True)
class Partition:
    """A partition of a step: which of its images are shown to which teachers, at what sizes."""

    name: str
    start: int
    """Index of its first image within the step's images."""
    share: float
    """Its part of the step's loss; the shares of a step sum to one."""
    batch_size: int
    """Its images in one step, over all processes."""
    sizes: tuple[Size, ...]
    """Student inputs, (height, width) in pixels, of which each step draws one."""
    teachers: tuple[str, ...]
    views: Mapping[Size, Mapping[str, TeacherView]] = field(default_factory=dict)
    """How each teacher sees an image, by the student's input; its largest view, if it has more."""
    drawn: Mapping[tuple[Size, str], Mapping[Size, TeacherView]] = field(default_factory=dict)
    """By the student's input and a teacher whose size is drawn too: its views, by their sizes."""
    images_of: str = ""
    """An earlier partition whose images it shows; empty for images of its own."""
    source: str = ""
    """Named entry of the data that its images come from; empty for the mixture of all."""
    ranks: int = 0
    """Share of the processes that work on it alone; 0 for one by its cost."""

    @property
    def image_weight(self) -> float:
        """Weight of one image's loss in the step's loss."""
        return self.share / self.batch_size

    def views_drawn(self, sizes: Mapping[str, Size]) -> dict[str, TeacherView]:
        """Return a step's views of the teachers whose size is drawn, by name.

        Sizes are those of :meth:`.distill.randomness.StepRandomness.sizes`; none is the largest.
        """
        size = sizes[self.name]
        return {
            name: views[sizes[f"{self.name}/{name}"]]
            for (shown, name), views in self.drawn.items()
            if shown == size and f"{self.name}/{name}" in sizes
        }

    @property
    def has_summaries(self) -> dict[str, bool]:
        """Whether a teacher's summaries are of single images, by teacher: not in a mosaic."""
        first = self.views[self.sizes[0]]
        return {name: first[name].mosaic is None for name in self.teachers}


@dataclass(frozen=True)
class ImageWork:
    """What a partition costs at one size, in seconds of a device."""

    image: float
    """Of the student and the upsamplers, for each image."""
    inputs: Mapping[str, float]
    """Of each teacher's encoder, for each of its inputs: an image, or a canvas."""


StageWork = Mapping[tuple[str, Size], ImageWork]
"""By partition and size."""


@dataclass(frozen=True)
class Stage:
    """A stage, or the fit of an upsampler, resolved: everything that decides what is computed."""

    name: str
    recipe: Recipe
    """With plain values for every `auto`, as run folder and checkpoints keep it. The properties
    below are its sections."""
    folder: Path
    """Folder of the stage inside the run folder."""
    seed: int
    """Of everything that is drawn while it trains: each stage has an order and draws of its own."""
    steps: int
    images_per_step: int
    """Images that all processes together decode in one step."""
    partitions: tuple[Partition, ...]
    specs: Mapping[str, TeacherSpec]
    """Of every teacher, by name, in the order of the recipe."""
    work: StageWork = field(default_factory=dict)
    """What the processes share out by; empty where it need not be known."""
    order: tuple[str, ...] = ()
    """Names of all stages of the whole recipe, of its other students too, in their order."""
    micro_batches: Mapping[tuple[str, Size], int] = field(default_factory=dict)
    """Most images of a pass by partition and size, where they were found for a device's memory."""

    @property
    def is_fit(self) -> bool:
        return self.name == FIT

    @property
    def config(self) -> StageConfig:
        """Optimizer, schedule, start and average of a stage; those of a fit are :attr:`fit`'s."""
        return self.recipe.stages[self.name]

    @property
    def fit(self) -> FitConfig:
        return self.recipe.fit

    @property
    def optimizer(self) -> str:
        """Name of the optimizer; that of a fit is NAdam (FeatSharp, arXiv 2502.16025, Table 11)."""
        return "nadam" if self.is_fit else self.config.optimizer

    @property
    def ema_decay(self) -> float:
        """Decay of the student's EMA for each step; 0 for none, as in a fit."""
        return 0.0 if self.is_fit else self.config.ema_decay

    @property
    def anchor(self) -> float:
        """Weight of the distance to the student at its start; none in a fit."""
        return 0.0 if self.is_fit else self.config.anchor

    @property
    def frozen_steps(self) -> int:
        """First steps in which only the heads learn."""
        return self.config.frozen_steps

    @property
    def base_seed(self) -> int:
        """The recipe's seed: of a new student's weights, and of the images of statistics."""
        return self.recipe.seed

    @property
    def run_folder(self) -> Path:
        return self.recipe.folder

    @property
    def statistics_folder(self) -> Path:
        return Path(self.normalizer.cache or self.run_folder / "statistics").expanduser()

    @property
    def teachers(self) -> dict[str, TeacherConfig]:
        return self.recipe.teachers

    @property
    def student(self) -> StudentConfig:
        return self.recipe.student

    @property
    def normalizer(self) -> NormalizerConfig:
        return self.recipe.normalizer

    @property
    def loss(self) -> LossConfig:
        return self.recipe.loss

    @property
    def losses(self) -> dict[str, LossConfig]:
        """The losses by teacher, its own before the recipe's."""
        return self.recipe.losses

    @property
    def augmentation(self) -> AugmentationConfig:
        return self.recipe.augmentation

    @property
    def upsampler(self) -> UpsamplerConfig:
        return self.config.upsampler

    @property
    def engine(self) -> EngineConfig:
        return self.recipe.engine

    @property
    def data(self) -> DataConfig:
        return self.recipe.data

    @property
    def log(self) -> LogConfig:
        return self.recipe.log

    @property
    def watch(self) -> WatchConfig:
        return self.recipe.watch

    @property
    def evaluation(self) -> EvaluationConfig:
        return self.recipe.evaluation

    def micro_batch(self, partition: str, size: Size) -> int:
        """Return the most images in one pass of a partition at a size; 0 for no limit."""
        if self.engine.micro_batch != "auto":
            return self.engine.micro_batch
        return self.micro_batches.get((partition, size), AUTO_MICRO_BATCH)

    def views(self, teacher: str) -> list[tuple[Partition, TeacherView]]:
        """List a teacher's views, for each size of each partition that shows it."""
        return [
            (partition, view)
            for partition in self.partitions
            if teacher in partition.teachers
            for size in partition.sizes
            for view in partition.drawn.get((size, teacher), {}).values()
            or [partition.views[size][teacher]]
        ]

    @property
    def own_sources(self) -> list[tuple[int, int, str]]:
        """Images [start, stop) of each step that come from one named entry of the data."""
        return [
            (item.start, item.start + item.batch_size, item.source)
            for item in self.partitions
            if item.source
        ]

    def statistics_partition(self, teacher: str) -> Partition | None:
        """Return the partition whose images a teacher's statistics are estimated on.

        The first that shows it, one that asks for its summary before others; None where no
        partition shows it (AM-RADIO's first stage has no SAM).
        """
        shown = [item for item in self.partitions if teacher in item.teachers]
        return next(
            (item for item in shown if item.has_summaries[teacher]), next(iter(shown), None)
        )

    def teacher_shares(self) -> dict[str, float]:
        """Return the part of a step's loss in which each teacher takes part, at most one."""
        shares: dict[str, float] = {}
        for partition in self.partitions:
            for name in partition.teachers:
                shares[name] = shares.get(name, 0.0) + partition.share
        return shares


def resolve_stage(
    recipe: Recipe,
    name: str,
    specs: Mapping[str, TeacherSpec],
    facts: Facts | None = None,
    earlier: Recipe | None = None,
    folder: Path | None = None,
) -> Stage:
    """Resolve a stage of a recipe.

    Args:
        recipe: as a person wrote it; the stage's is the part of it that has its student.
        name: of one of its stages, or :data:`FIT`.
        specs: of the recipe's teachers, by name.
        facts: what is known when it starts. Without them, fields that are `auto` stay so: enough to
            check what a stage needs, and to be resolved again.
        earlier: the resolved recipe of the checkpoint that the run goes on from.
        folder: of the stage, if not the one that the recipe says; a fit has to name its own.

    Raises:
        ConfigError: there is no such stage, or teachers cannot give what its partitions ask for.
    """
    order = tuple(recipe.stages)
    if name != FIT:
        check_has_stage(recipe, name)
        recipe = for_stage(recipe, name)
    if facts is not None:
        recipe = resolve(recipe, name, facts, earlier)
    specs = {teacher: specs[teacher] for teacher in recipe.teachers if teacher in specs}
    _check_bands(recipe, name, specs)
    if name == FIT:
        fit, folder = recipe.fit, folder or recipe.folder / FIT
        partition = _fit_partition(fit, specs[fit.teacher])
        return Stage(
            name, recipe, folder, recipe.seed, fit.steps, fit.batch_size, (partition,), specs
        )
    config = recipe.stages[name]
    return Stage(
        name=name,
        recipe=recipe,
        folder=folder or recipe.stage_folder(name),
        seed=zlib.crc32(f"{recipe.seed}/{name}".encode()),
        steps=config.steps,
        images_per_step=config.images_per_step,
        partitions=_partitions(recipe, name, specs),
        specs=specs,
        order=order,
    )


def _check_bands(recipe: Recipe, name: str, specs: Mapping[str, TeacherSpec]) -> None:
    """Raise ConfigError for teachers that do not see what they are shown."""
    upsampled = {recipe.fit.teacher} if name == FIT else set[str]()
    for partition in () if name == FIT else recipe.stages[name].partitions:
        upsampled |= {*partition.upsample}
    problems = []
    for teacher, spec in specs.items():
        shown = len(spec.bands) or recipe.data.bands
        if len(spec.mean) != shown:
            problems.append(
                f"teachers.{teacher}: sees {len(spec.mean)} bands and is shown {shown}; choose "
                "some with bands: [3, 2, 1], or take a timm model with options.create.in_chans"
            )
        elif shown != 3 and teacher in upsampled:
            problems.append(
                f"teachers.{teacher}: upsamplers are guided by three bands, and it sees {shown}"
            )
    if problems:
        raise ConfigError(*problems)


def check_has_stage(recipe: Recipe, name: str) -> None:
    """Raise ConfigError where a recipe has no stage of a name."""
    if name not in recipe.stages:
        known = nearest(name, list(recipe.stages))
        raise ConfigError(f"recipe {recipe.name!r} has no {name} ({known})")


def _partitions(
    recipe: Recipe, name: str, specs: Mapping[str, TeacherSpec]
) -> tuple[Partition, ...]:
    """Lay the partitions of a stage one after another over the images of a step."""
    config = recipe.stages[name]
    total = sum(item.weight for item in config.partitions)
    starts: dict[str, int] = {}
    partitions, problems, end = [], list[str](), 0
    for item in config.partitions:
        start = starts[item.images_of] if item.images_of else end
        starts[item.name] = start
        end = max(end, start + item.batch_size)
        views: dict[Size, dict[str, TeacherView]] = {size: {} for size in partition_sizes(item)}
        drawn: dict[tuple[Size, str], dict[Size, TeacherView]] = {}
        for size, teacher in itertools.product(views, item.teachers):
            sides = item.teacher_sizes.get(teacher)
            try:
                choices = [
                    view_of(recipe, config, item, specs[teacher], size, side)
                    for side in (sides if isinstance(sides, tuple) else [sides])
                ]
            except ConfigError as error:
                problems.append(f"stages.{name}.partitions.{item.name}: {error}")
                continue
            views[size][teacher] = max(choices, key=lambda view: math.prod(view.size))
            if len(choices) > 1:
                drawn[size, teacher] = {view.size: view for view in choices}
        partitions.append(
            Partition(
                name=item.name,
                start=start,
                share=item.weight / total,
                batch_size=item.batch_size,
                sizes=partition_sizes(item),
                teachers=item.teachers,
                views=views,
                drawn=drawn,
                images_of=item.images_of,
                source=item.source,
                ranks=item.ranks,
            )
        )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    return tuple(partitions)


def _fit_partition(fit: FitConfig, spec: TeacherSpec) -> Partition:
    """Return the images of a fit: one teacher sees them, upsampled, at one size."""
    size = (fit.size, fit.size) if fit.size else spec.native_size
    if size[0] % spec.patch_size or (spec.fixed_size and spec.native_size != size):
        near = max(round(size[0] / spec.patch_size), 1) * spec.patch_size
        nearest = max(spec.native_size) if spec.fixed_size else near
        raise ConfigError(
            f"fit.size: teacher {spec.name!r} cannot see {size[0]} px (nearest {nearest})"
        )
    step = 2**fit.halvings * spec.patch_size
    if fit.halvings and (spec.fixed_size or size[0] % step):
        hint = "it takes one" if spec.fixed_size else f"take a multiple of {step}"
        raise ConfigError(
            f"fit.halvings: teacher {spec.name!r} cannot see {size[0]} px halved {fit.halvings} "
            f"times ({hint})"
        )
    rows, columns = spec.grid(size)
    grid = rows * fit.factor, columns * fit.factor
    view = TeacherView(spec.name, size, grid, True, fit.factor)
    views = {size: {spec.name: view}}
    return Partition(FIT, 0, 1.0, fit.batch_size, (size,), (spec.name,), views)
