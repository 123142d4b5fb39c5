"""Which fitted upsamplers the tables of FeatSharp compare, where they are, and fitting the others.

FeatSharp (arXiv 2502.16025), appendix B: Table 7 de-bias, Table 8 inputs, Table 9 upsamplers, Table
10 modules. Most fits serve several tables. Each has a folder of its own in the run folder, as
``radio-distill fit-upsampler`` gives it, so the two commands find each other's work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from radio_distill.config import FitConfig, Recipe
from radio_distill.errors import ConfigError
from radio_distill.registry import nearest

from ..common import FITTED, changed_options, fit_folder, fit_name, fit_of
from ..fit_upsampler import fit_recipe, fit_upsampler

if TYPE_CHECKING:
    import torch

    from radio_distill.protocols import Teacher
    from radio_distill.types import Size
    from upsamplers.fit.lessons import Lesson
    from upsamplers.fitted import FittedHeader

INPUTS = (
    ("bilinear",),
    ("featup",),
    ("tiles",),
    ("bilinear", "tiles"),
    ("featup", "tiles"),
    ("tiles", "bilinear"),
    ("tiles", "featup"),
    ("bilinear", "featup", "tiles"),
    ("featup", "bilinear", "tiles"),
    ("tiles", "bilinear", "featup"),
)
"""Of Table 8; the first is the residual path."""

BLOCKS = {"linear": "linear", "attention": "attention", "mlp": "MLP", "both": "attention + MLP"}
"""Of Table 10, which takes the inputs bilinear + tiles."""

TABLES = (7, 8, 9, 10)
FREE = ("bicubic", "tile", "s2", "strided", "native")
"""Upsamplers without parameters that Table 9 can show beside the fitted ones."""


@dataclass(frozen=True)
class Subject:
    """What a report is about: one teacher of a recipe, at one input size."""

    recipe: Recipe
    """Of :func:`.fit_upsampler.fit_recipe`: with this teacher alone."""
    teacher: "Teacher"
    size: "Size"
    """The teacher's input, in pixels."""
    device: "torch.device"

    @property
    def name(self) -> str:
        return self.recipe.fit.teacher


class Row(NamedTuple):
    """A row of a table: an upsampler and what it is called there."""

    label: str
    config: FitConfig
    """How it is fitted; of one without parameters, only name and factor count."""


def is_network(upsampler: str) -> bool:
    """Return whether it is a network; Table 9 compares some that have no parameters too."""
    from upsamplers.networks import NETWORKS

    return upsampler in NETWORKS.names()


def rows_of(table: int, recipe: Recipe, factor: int, upsamplers: Sequence[str]) -> list[Row]:
    """Return the rows of one table at one factor.

    ``upsamplers`` are those of Tables 7 and 9; what is not fitted is in Table 9 alone.
    """

    def fit(name: str, **options: Any) -> FitConfig:
        config = fit_of(recipe, recipe.fit.teacher, name, factor)
        return replace(config, options={**config.options, **options})

    if table == 7:
        return [
            Row(name, replace(fit(name), de_bias=de_bias))
            for name in upsamplers
            if is_network(name)
            for de_bias in (False, True)
        ]
    if table == 8:
        return [Row(" + ".join(order), fit("featsharp", inputs=list(order))) for order in INPUTS]
    inputs = ["bilinear", "tiles"]
    if table == 9:
        rows = []
        for name in upsamplers:
            rows.append(Row(name, fit(name)))
            if name == "featsharp":
                rows.append(Row("featsharp, bilinear residual", fit(name, inputs=inputs)))
        return rows
    return [
        Row(label, fit("featsharp", inputs=inputs, block=block)) for block, label in BLOCKS.items()
    ]


@dataclass(frozen=True)
class Request:
    """What a report shows."""

    tables: tuple[int, ...] = TABLES
    factors: tuple[int, ...] = (2, 4)
    upsamplers: tuple[str, ...] = ("bilinear", "featup", "featsharp")
    """Of Tables 7 and 9."""
    images: int = 4
    """Photographs that are painted."""
    throughput: bool = True

    def __post_init__(self) -> None:
        """Raise ConfigError for a number or an upsampler that cannot be."""
        from upsamplers.networks import NETWORKS

        if self.images < 1:
            raise ConfigError(f"--num-images {self.images}: paint at least 1")
        for factor in self.factors:
            if factor < 2:
                raise ConfigError(f"--factors {factor}: an upsampler's factor is at least 2")
        known = [*NETWORKS.names(), *FREE]
        for name in self.upsamplers:
            if name not in known:
                raise ConfigError(
                    f"--upsamplers {name}: cannot compare it ({nearest(name, known)})"
                )

    def fits(self, recipe: Recipe) -> dict[str, FitConfig]:
        """Return the fits that the tables compare, by name."""
        configs = [
            row.config
            for table in self.tables
            for rows in self.rows(table, recipe).values()
            for row in rows
            if is_network(row.config.upsampler)
        ]
        return {fit_name(config): config for config in configs}

    def rows(self, table: int, recipe: Recipe) -> dict[int, list[Row]]:
        """Return the rows of a table, for each factor."""
        return {factor: rows_of(table, recipe, factor, self.upsamplers) for factor in self.factors}


def find(subject: Subject, config: FitConfig) -> tuple[Path | None, str]:
    """Return the file of a fit: that of the run folder, or the one that comes with the project.

    Where the project's own was fitted at another size, the text says so.

    Raises:
        ConfigError: the run folder holds another fit under this name.
        WeightsError: a file of another teacher, or one that cannot be read.
    """
    from upsamplers.fitted import check_fitted_for, read_header, shipped

    path = fit_folder(subject.recipe, config) / FITTED
    if path.is_file():
        header = read_header(path)
        check_fitted_for(header, config.upsampler, subject.teacher.spec, config.factor)
        problem = _other_model(header, config) or _other_size(header, subject.size)
        if problem:
            raise ConfigError(
                f"{path} was fitted {problem}; set the recipe's section fit as it was, or choose "
                "another run folder with --name"
            )
        return path, ""
    own = shipped(config.upsampler, config.factor, subject.teacher.spec)
    if own is None or _other_model(read_header(own), config):
        return None, ""
    problem = _other_size(read_header(own), subject.size)
    return (None, f"the project's own was fitted {problem}") if problem else (own, "")


def _other_model(header: "FittedHeader", config: FitConfig) -> str:
    """Say how a file's model differs from what is asked for; its header decides, not its name."""
    own = changed_options(config.upsampler, header.options)
    asked = changed_options(config.upsampler, config.options)
    if own != asked:
        return f"with the options {own}, not {asked}"
    if header.fit.get("de_bias", True) != config.de_bias:
        return f"{'without' if config.de_bias else 'with'} de-bias"
    return ""


def _other_size(header: "FittedHeader", size: "Size") -> str:
    return "" if header.size == size else "at {}x{} px, not at {}x{}".format(*header.size, *size)


def fit_missing(subject: Subject, configs: Sequence[FitConfig], allow_changed: bool) -> None:
    """Fit one after the other; those of one factor share the pool of encoded images.

    One that was stopped goes on. Those with most tiles come first: the first fit fills the pool.
    """
    for factor in sorted({config.factor for config in configs}):
        pool: list[list[Lesson]] = []
        same = [config for config in configs if config.factor == factor]
        for config in sorted(same, key=lambda item: -_num_tile_levels(item, subject)):
            recipe = fit_recipe(replace(subject.recipe, fit=config))
            fit_upsampler(recipe, resume=True, allow_changed=allow_changed, pool=pool)


def _num_tile_levels(config: FitConfig, subject: Subject) -> int:
    import torch

    from upsamplers.networks import build_network

    with torch.device("meta"):
        network = build_network(
            config.upsampler, subject.teacher.spec.channels, config.factor, config.options
        )
    return len(network.tile_levels)  # type: ignore[arg-type]
