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

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .config import (
    AugmentationConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    Facts,
    FitConfig,
    LogConfig,
    LossConfig,
    NormalizerConfig,
    PartitionConfig,
    Recipe,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    UpsamplerConfig,
    WatchConfig,
    partition_sizes,
    resolve,
)
from .errors import ConfigError
from .registry import nearest
from .types import Size, TeacherSpec

FIT = "fit"
"""Name of the stage that fits an upsampler."""


@dataclass(frozen=True, slots=True)
class Mosaic:
    """Where images lie on a canvas: each in the top left corner of its tile.

    Images follow one another along the rows, canvas after canvas. :func:`plan_mosaic` makes one
    from sizes that it has checked; :mod:`.distill.mosaic` fills canvases and cuts maps.
    """

    canvas: Size
    """The teacher's input, in pixels."""
    view: Size
    """What one image measures on the canvas, in pixels; a multiple of ``patch_size``."""
    patch_size: int
    """The teacher's: pixels a side of one cell of its map."""

    @property
    def rows(self) -> int:
        """Images that fit above one another."""
        return self.canvas[0] // self.view[0]

    @property
    def columns(self) -> int:
        """Images that fit side by side."""
        return self.canvas[1] // self.view[1]

    @property
    def images(self) -> int:
        """Images that a full canvas shows."""
        return self.rows * self.columns

    @property
    def pitch(self) -> Size:
        """Distance from one tile's corner to the next, in pixels: the canvas divided evenly.

        Floored to whole cells. A tile that began inside a cell would share that cell with its
        neighbour, and every patch of its image would be cut elsewhere than the student's is.
        """
        height, width = self.cells(self.canvas)
        return height // self.rows * self.patch_size, width // self.columns * self.patch_size

    def canvases(self, images: int) -> int:
        """Return how many canvases some images take; the last may be partly empty."""
        return -(-images // self.images)

    def cells(self, size: Size) -> Size:
        """Return how many cells of the teacher's map a size in pixels covers."""
        return size[0] // self.patch_size, size[1] // self.patch_size


@dataclass(frozen=True, slots=True)
class TeacherView:
    """How one teacher sees an image of a partition. Equal views of an image give equal targets."""

    teacher: str
    size: Size
    """What one image measures at the teacher's own resolution, in pixels."""
    grid: Size
    """Grid of one image's target, in cells."""
    is_upsampled: bool = False
    factor: int = 1
    """How much finer the target's grid is than the teacher's own; 1 without an upsampler."""
    mosaic: Mosaic | None = None
    """How images share a canvas; None where each is an input of its own."""

    @property
    def rendered(self) -> Size:
        """Size at which the image is rendered, in pixels.

        For an upsampled teacher ``factor`` times its own, the most that an upsampler looks at. So
        tiles and guidance are the photograph's own pixels, and a comparison of upsamplers shows all
        of them the same. The upsampler resizes the low-resolution input down from it, as a fit
        does: the one view that is resampled twice.
        """
        return self.size[0] * self.factor, self.size[1] * self.factor

    @property
    def encoded(self) -> Size:
        """Size of the encoder's input, in pixels: that of the canvas in a mosaic."""
        return self.size if self.mosaic is None else self.mosaic.canvas

    @property
    def images_per_input(self) -> int:
        """Images on one input of the encoder: 1, or those of a full canvas."""
        return 1 if self.mosaic is None else self.mosaic.images

    def inputs(self, images: int) -> int:
        """Return how many inputs of the encoder show some images."""
        return images if self.mosaic is None else self.mosaic.canvases(images)

    def without_upsampler(self) -> "TeacherView":
        """Return the view at the teacher's own grid, which statistics are taken of."""
        grid = self.grid[0] // self.factor, self.grid[1] // self.factor
        return TeacherView(self.teacher, self.size, grid, mosaic=self.mosaic)


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
    """How each teacher sees an image, by the student's input."""
    images_of: str = ""
    """An earlier partition whose images it shows; empty for images of its own."""
    ranks: int = 0
    """Share of the processes that work on it alone; 0 for one by its cost."""

    @property
    def image_weight(self) -> float:
        """Weight of one image's loss in the step's loss."""
        return self.share / self.batch_size

    @property
    def has_summaries(self) -> dict[str, bool]:
        """Whether a teacher's summaries are of single images, by teacher: not in a mosaic."""
        first = self.views[self.sizes[0]]
        return {name: first[name].mosaic is None for name in self.teachers}


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
        return Path(self.normalizer.cache or self.run_folder / "statistics")

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

    def views(self, teacher: str) -> list[tuple[Partition, TeacherView]]:
        """List a teacher's views, one for each size of each partition that shows it."""
        return [
            (partition, partition.views[size][teacher])
            for partition in self.partitions
            if teacher in partition.teachers
            for size in partition.sizes
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
        recipe: as a person wrote it.
        name: of one of its stages, or :data:`FIT`.
        specs: of the recipe's teachers, by name.
        facts: what is known when it starts. Without them, fields that are `auto` stay so: enough to
            check what a stage needs, and to be resolved again.
        earlier: the resolved recipe of the checkpoint that the run goes on from.
        folder: of the stage, if not the one that the recipe says; a fit has to name its own.

    Raises:
        ConfigError: there is no such stage, or teachers cannot give what its partitions ask for.
    """
    if name != FIT:
        check_has_stage(recipe, name)
    if facts is not None:
        recipe = resolve(recipe, name, facts, earlier)
    specs = {teacher: specs[teacher] for teacher in recipe.teachers if teacher in specs}
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
    )


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
        views: dict[Size, dict[str, TeacherView]] = {}
        for size in partition_sizes(item):
            views[size] = {}
            for teacher in item.teachers:
                try:
                    views[size][teacher] = view_of(recipe, config, item, specs[teacher], size)
                except ConfigError as error:
                    problems.append(f"stages.{name}.partitions.{item.name}: {error}")
        partitions.append(
            Partition(
                name=item.name,
                start=start,
                share=item.weight / total,
                batch_size=item.batch_size,
                sizes=partition_sizes(item),
                teachers=item.teachers,
                views=views,
                images_of=item.images_of,
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
    rows, columns = spec.grid(size)
    grid = rows * fit.factor, columns * fit.factor
    view = TeacherView(spec.name, size, grid, True, fit.factor)
    views = {size: {spec.name: view}}
    return Partition(FIT, 0, 1.0, fit.batch_size, (size,), (spec.name,), views)


def view_of(
    recipe: Recipe, config: StageConfig, partition: PartitionConfig, spec: TeacherSpec, size: Size
) -> TeacherView:
    """Return how a teacher sees a partition's images where the student's input has a size.

    The partition's ``teacher_sizes`` goes before the teacher's ``input_size``.

    Raises:
        ConfigError: where the teacher cannot give what is asked of it.
    """
    teacher = recipe.teachers[spec.name]
    if spec.summary_channels is None and teacher.summary_weight:
        raise ConfigError(
            f"teachers.{spec.name}.summary_weight: this teacher has no summary; set it to 0"
        )
    in_mosaic = spec.name in partition.mosaic
    wanted = partition.teacher_sizes.get(spec.name, "match" if in_mosaic else teacher.input_size)
    own = input_size(spec, wanted, size, recipe.student.patch_size, in_mosaic)
    if in_mosaic:
        mosaic = plan_mosaic(spec.name, spec.native_size, own, spec.patch_size)
        return TeacherView(spec.name, own, spec.grid(own), mosaic=mosaic)
    if spec.name in partition.upsample:
        (rows, columns), factor = spec.grid(own), config.upsampler.factor
        return TeacherView(spec.name, own, (rows * factor, columns * factor), True, factor)
    return TeacherView(spec.name, own, spec.grid(own))


def input_size(
    spec: TeacherSpec,
    wanted: int | str,
    size: Size,
    student_patch_size: int,
    in_mosaic: bool = False,
) -> Size:
    """Return the size at which a teacher sees an image, in pixels.

    A teacher of fixed size sees that size, and no other may be asked for, unless in a mosaic.

    Args:
        spec: the teacher's.
        wanted: ``match`` is the size whose grid equals the student's. A number, or ``native``, is
            the side of a square; for views that are not square it stands for their longer side, and
            the shorter side keeps the aspect ratio to the nearest whole patch.
        size: student input, (height, width) in pixels.
        student_patch_size: the student's.
        in_mosaic: whether images share a canvas.

    Raises:
        ConfigError: where the patch does not divide a given side, or the teacher cannot take it.
    """
    if spec.fixed_size and not in_mosaic:
        if wanted not in ("native", *spec.native_size):
            raise ConfigError(
                f"teacher {spec.name!r} takes {spec.native_size[0]}x{spec.native_size[1]} pixels "
                f"only, not {wanted}; set its size to native, or show it in a mosaic"
            )
        return spec.native_size
    if wanted == "match":
        height, width = (side // student_patch_size * spec.patch_size for side in size)
        return _within(spec, (height, width))
    longest = max(spec.native_size) if wanted == "native" else int(wanted)
    if longest < 1 or longest % spec.patch_size:
        near = max(round(longest / spec.patch_size), 1) * spec.patch_size
        raise ConfigError(
            f"teacher {spec.name!r}: input size {longest} is not a multiple of its patch "
            f"{spec.patch_size} (nearest {near})"
        )
    cells = longest // spec.patch_size
    rows, columns = (max(round(cells * side / max(size)), 1) for side in size)
    return _within(spec, (rows * spec.patch_size, columns * spec.patch_size))


def _within(spec: TeacherSpec, size: Size) -> Size:
    if spec.max_size is not None and max(size) > spec.max_size:
        raise ConfigError(
            f"teacher {spec.name!r} would see {size[0]}x{size[1]} pixels, above its largest "
            f"{spec.max_size}; set teacher_sizes.{spec.name} of the partition"
        )
    return size


def plan_mosaic(teacher: str, canvas: Size, view: Size, patch_size: int) -> Mosaic:
    """Lay as many images as fit on a teacher's canvas, each axis by itself; sizes in pixels.

    Raises:
        ConfigError: an image larger than the canvas, or sides that are not whole patches.
    """
    shown = f"mosaic for teacher {teacher!r}"
    for what, size in (("canvas", canvas), ("view", view)):
        if min(size) < 1 or any(side % patch_size for side in size):
            near = [max(round(side / patch_size), 1) * patch_size for side in size]
            raise ConfigError(
                f"{shown}: the {what} measures {size[0]}x{size[1]} pixels, which are not whole "
                f"patches of {patch_size}; nearest {near[0]}x{near[1]}"
            )
    if view[0] > canvas[0] or view[1] > canvas[1]:
        raise ConfigError(
            f"{shown}: a view of {view[0]}x{view[1]} pixels is larger than the canvas of "
            f"{canvas[0]}x{canvas[1]}; make the partition's size smaller, or take the teacher out "
            "of its `mosaic`"
        )
    return Mosaic(canvas, view, patch_size)
