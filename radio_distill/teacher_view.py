"""How a teacher sees an image: at what size, on what canvas, and at which grid its target is.

A :class:`TeacherView` is worked out once, when a stage is resolved (:mod:`.stage`), for each
partition, size and teacher. Nothing here imports torch.
"""

from dataclasses import dataclass

from .config import PartitionConfig, Recipe, StageConfig
from .errors import ConfigError
from .types import Size, TeacherSpec


@dataclass(frozen=True, slots=True)
class Mosaic:
    """The places of images on a canvas, each in the top left corner of its tile.

    Images follow one another along the rows, canvas after canvas. :func:`plan_mosaic` makes one
    from sizes that it has checked; :mod:`.distill.targets` fills canvases and cuts maps.
    """

    canvas: Size
    """The teacher's input, in pixels."""
    view: Size
    """What one image measures on the canvas, in pixels; a multiple of ``patch_size``."""
    patch_size: int
    """The teacher's: pixels a side of one cell of its map."""
    most: int = 0
    """Most images on a canvas; 0 for as many as fit."""

    @property
    def _layout(self) -> tuple[int, int]:
        """Rows and columns: as many as fit, of which the more are made fewer where a limit is."""
        rows, columns = (side // of for side, of in zip(self.canvas, self.view, strict=True))
        while self.most and rows * columns > self.most:
            rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
        return rows, columns

    @property
    def rows(self) -> int:
        """Images above one another."""
        return self._layout[0]

    @property
    def columns(self) -> int:
        """Images side by side."""
        return self._layout[1]

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
    """The way in which one teacher sees an image. Equal views of an image give equal targets."""

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


def view_of(
    recipe: Recipe,
    config: StageConfig,
    partition: PartitionConfig,
    spec: TeacherSpec,
    size: Size,
    side: int | None = None,
) -> TeacherView:
    """Return how a teacher sees a partition's images where the student's input has a size.

    ``side``, one of the partition's ``teacher_sizes``, goes before the teacher's ``input_size``.

    Raises:
        ConfigError: where the teacher cannot give what is asked of it.
    """
    teacher = recipe.teachers[spec.name]
    if spec.summary_channels is None and teacher.summary_weight:
        raise ConfigError(
            f"teachers.{spec.name}.summary_weight: this teacher has no summary; set it to 0"
        )
    in_mosaic = spec.name in partition.mosaic
    wanted = side or ("match" if in_mosaic else teacher.input_size)
    own = input_size(spec, wanted, size, recipe.student.patch_size, in_mosaic)
    if in_mosaic:
        mosaic = plan_mosaic(
            spec.name, spec.native_size, own, spec.patch_size, partition.mosaic_images
        )
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


def plan_mosaic(teacher: str, canvas: Size, view: Size, patch_size: int, most: int = 0) -> Mosaic:
    """Lay images on a teacher's canvas, each axis by itself: as many as fit, or ``most``.

    Sizes are in pixels.

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
    return Mosaic(canvas, view, patch_size, most)
