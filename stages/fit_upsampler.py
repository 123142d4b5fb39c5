"""Fit an upsampler to one frozen teacher, and measure it on held-out images.

    radio-distill fit-upsampler demo --teacher dino --upsampler featsharp
    radio-distill fit-upsampler mine.yaml --teacher siglip --preset long --resume
    torchrun --nproc-per-node 8 -m stages.cli fit-upsampler mine.yaml --teacher siglip

Writes RUN/fit/TEACHER-UPSAMPLER-FACTORx/upsampler.safetensors, which stage 3 of the same recipe
finds by itself. Options of the network that are not its defaults, and a fit without de-bias, are
part of the folder's name; stage 3 takes that one where the recipe's section `fit` says the same.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file: put the checkout, and only it, first on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from radio_distill.config import Recipe, check, plain_teacher
from radio_distill.errors import ConfigError
from radio_distill.stage import FIT, Stage, resolve_stage
from radio_distill.system.progress import Progress
from stages.arguments import add_training_arguments, run_script
from stages.fits import FITTED, fit_folder
from stages.recipes import load_recipe

if TYPE_CHECKING:
    import torch

    from radio_distill.system.distributed import World
    from radio_distill.train.checkpoint import Checkpoint
    from radio_distill.train.run_dir import RunLock
    from radio_distill.types import Size
    from stages.launch import Options, Train
    from upsamplers.fit.batches import FitBatch
    from upsamplers.fit.task import Fit

TAKES_FIELDS = True

PRESETS: dict[str, dict[str, object]] = {
    # FeatSharp (arXiv 2502.16025), table 11. Its FeatUp column normalises with LayerNorm, which has
    # no way back to the teacher's space; here the recipe's normalizer serves all three.
    "featup": {
        "steps": 2000, "batch_size": 4, "learning_rate": 1e-3, "crf": 0.001,
        "view_range": "featup", "de_bias": False,
    },
    "regular": {"steps": 3000, "batch_size": 32, "learning_rate": 1e-4},
    "long": {"steps": 9000, "batch_size": 32, "learning_rate": 1e-4},
    # The own training of both, at 448 px on ImageNet-1k: one epoch, and five.
    "uplift": {
        "upsampler": "uplift", "size": 448, "steps": 40_000, "batch_size": 32, "halvings": 3,
        "learning_rate": 1e-3, "de_bias": False,
    },
    "lift": {
        "upsampler": "lift", "size": 448, "steps": 25_000, "batch_size": 256, "halvings": 2,
        "chain": False, "distance": "cosine", "learning_rate": 1e-3, "de_bias": False,
    },
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the script."""
    add_training_arguments(parser)
    add = parser.add_argument
    add("--teacher", metavar="NAME", help="a teacher of the recipe")
    add("--upsampler", metavar="NAME", help="network to fit (default: featsharp)")
    add("--factor", type=int, help="how much finer (default: 2)")
    add("--preset", choices=sorted(PRESETS), help="settings of FeatSharp's table 11, UPLiFT, LiFT")


def run(arguments: argparse.Namespace) -> int:
    """Fit, write the file, measure."""
    recipe = fit_recipe(load_recipe(arguments.recipe, _overrides(arguments)))
    path = fit_upsampler(
        recipe, arguments.resume, arguments.allow_changed_recipe, arguments.take_over
    )
    print(path)
    return 0


def _overrides(arguments: argparse.Namespace) -> list[str]:
    """Return fields, the most particular last: preset, flags, --fit.FIELD."""
    values: dict[str, object] = {}
    if arguments.preset:
        values |= {f"fit.{name}": value for name, value in PRESETS[arguments.preset].items()}
    for name in ("teacher", "upsampler", "factor"):
        if getattr(arguments, name) is not None:
            values[f"fit.{name}"] = getattr(arguments, name)
    return [*(f"{name}={value}" for name, value in values.items()), *arguments.fields]


def fit_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe with nothing but the fit: one teacher, one stage that shows it.

    Raises ConfigError where the recipe has several teachers and ``fit.teacher`` names none, and for
    a normalizer without inverse.
    """
    from radio_distill.normalize import NORMALIZERS
    from radio_distill.normalize.normalizers import LayerNorm
    from upsamplers.networks import NETWORKS

    NETWORKS.get(recipe.fit.upsampler)  # an unknown name ends here
    if issubclass(NORMALIZERS.get(recipe.normalizer.name), LayerNorm):
        raise ConfigError(
            f"normalizer.name: {recipe.normalizer.name} has no way back to the teacher's space, "
            "which a fitted upsampler needs; fit with phi_s"
        )
    name = recipe.fit.teacher or next(iter(recipe.teachers))
    if not recipe.fit.teacher and len(recipe.teachers) > 1:
        known = ", ".join(recipe.teachers)
        raise ConfigError(f"fit.teacher: name one of the recipe's teachers with --teacher: {known}")
    fitted = replace(
        recipe,
        teachers={name: plain_teacher(recipe, name)},
        fit=replace(recipe.fit, teacher=name),
        stages={},
    )
    check(fitted)
    return fitted


def fit_upsampler(
    recipe: Recipe,
    resume: bool = False,
    allow_changed: bool = False,
    take_over: bool = False,
    pool: "list[list[FitBatch]] | None" = None,
) -> Path:
    """Fit what ``recipe.fit`` says; returns the file.

    The folder is claimed when everything is checked and built, just before the first step.

    Args:
        recipe: of :func:`fit_recipe`.
        resume: go on from the newest checkpoint; a fit that is complete is not run again.
        allow_changed: resume although the recipe or the shards differ from the checkpoint's.
        take_over: claim the folder although a living process owns it; that one stops.
        pool: ``Fit.pool``, for fits that share their encoded images.

    Raises:
        ChangedError: the fit to resume was made of something else, unless that is allowed.
    """
    from stages.launch import Options, launch
    from teachers import teacher_specs

    folder = fit_folder(recipe, recipe.fit)
    stage = resolve_stage(recipe, FIT, teacher_specs(recipe), folder=folder)
    options = Options(resume=resume, allow_changed=allow_changed, take_over=take_over)
    launch(stage, partial(build_task, pool), options, lambda: has_result(stage))
    return stage.folder / FITTED


def has_result(stage: Stage) -> bool:
    """Tell whether a fit's file is there, and measured where it can be.

    It is not written again then, so that its checksum stays that which students know.
    """
    from upsamplers.fitted_files import read_header

    path = stage.folder / FITTED
    measured = stage.evaluation.images and not stage.fit.halvings
    return path.is_file() and bool(read_header(path).measures or not measured)


def build_task(
    pool: "list[list[FitBatch]] | None",
    stage: Stage,
    world: "World",
    device: "torch.device",
    resumed: "Checkpoint | None",
    options: "Options",
) -> "Train":
    """Build the parts of a fit; returns what fits, and writes its result."""
    from radio_distill.train.trainer import Trainer

    task = build_fit(stage, world, device, resumed, options.allow_changed)
    task.pool = task.pool if pool is None else pool

    def train_with(lock: "RunLock | None") -> Path:
        if resumed is None or resumed.step < stage.steps:
            Trainer(task.stage, task, world, lock, resumed).run()
            share = 100 * task.timer.share
            logging.info("%s: %.0f %% of a step is the teacher", stage.folder.name, share)
        if world.is_main:
            write_result(task)
        return stage.folder / FITTED

    return train_with


def build_fit(
    stage: Stage,
    world: "World",
    device: "torch.device",
    resumed: "Checkpoint | None",
    allow_changed: bool = False,
) -> "Fit":
    """Build everything that this process needs; what is cheap to check comes first.

    Nothing in the stage's folder is touched.
    """
    import torch

    from radio_distill.data.folder import list_images
    from radio_distill.data.loader import ShardBatches, in_every_step
    from radio_distill.normalize.fit import fit_normalizers
    from radio_distill.normalize.normalizers import build_normalizers
    from radio_distill.system.distributed import run_on_main
    from radio_distill.system.files import make_private
    from stages.build import check_room
    from stages.resume import check_same_teachers, check_shards
    from teachers import build_teacher
    from upsamplers.fit.batches import assign_images
    from upsamplers.fit.consistency import Consistency
    from upsamplers.fit.halvings import Halvings
    from upsamplers.fit.task import Fit, build_fit_engine, passes_of_step
    from upsamplers.fitted import UpsamplerModel
    from upsamplers.networks import build_network

    config = stage.fit
    if stage.evaluation.images:
        list_images(stage.evaluation.images)  # none there: known before the fit, not after
    torch.manual_seed(stage.base_seed)
    is_compiled = stage.engine.compile is True
    teacher = build_teacher(config.teacher, stage.teachers[config.teacher], device, is_compiled)
    spec, (_, view) = teacher.spec, stage.views(config.teacher)[0]
    stage = replace(stage, specs={spec.name: spec})  # with the fingerprint of its weights
    micro_batch = stage.micro_batch(FIT, view.size)
    network = build_network(config.upsampler, spec.channels, config.factor, config.options)
    slices = assign_images(config, world, micro_batch, view.rendered)
    source = ShardBatches(
        stage.data,
        seed=stage.seed,
        images_per_step=stage.images_per_step,
        slices=in_every_step(slices),
    )
    if resumed is not None:
        check_shards(resumed, source.fingerprint, allow_changed)
        check_same_teachers(resumed, stage.specs, allow_changed)
    run_on_main(world, lambda: check_room(stage.folder, network))
    run_on_main(world, lambda: make_private(stage.run_folder))
    normalizers = build_normalizers(stage.normalizer.name, [spec.name])
    fit_normalizers(stage, {spec.name: teacher}, normalizers, world, device)
    # Statistics that are not in the cache have drawn numbers.
    torch.manual_seed(stage.base_seed + 1)
    grid = spec.grid(view.size) if config.de_bias else None
    model = UpsamplerModel(network, normalizers[spec.name], spec.channels, grid)
    consistency: Consistency | Halvings
    if config.halvings:
        consistency = Halvings(model, config)
    else:
        consistency = Consistency(model, config, spec.channels)
    engine = build_fit_engine(consistency, stage, world, device)
    num_passes = passes_of_step(stage, world.world_size, micro_batch, len(slices))
    task = Fit(stage, world, teacher, consistency, engine, source, slices, num_passes)
    if resumed is not None:
        task.restore(resumed)
        logging.info("resuming %s after step %d", stage.folder.name, resumed.step)
    return task


def write_result(task: "Fit") -> None:
    """Write the fitted file, with what was measured on the held-out images in its header."""
    from radio_distill.train import checkpoint as checkpoints
    from upsamplers.fit.task import MODULES
    from upsamplers.fitted import save_model
    from upsamplers.fitted_files import FittedHeader

    stage, spec, config = task.stage, task.teacher.spec, task.stage.fit
    weights = checkpoints.find(task.stage.folder).tensors(MODULES)
    for name, parameter in task.consistency.named_parameters():
        parameter.data = parameter.data.view(weights[name].shape)  # ZeRO has no scalars
    task.consistency.load_state_dict(weights)
    header = FittedHeader(
        upsampler=config.upsampler,
        teacher=spec.name,
        weights_hash=spec.weights_hash,
        channels=spec.channels,
        factor=config.factor,
        size=task.size,
        options=dict(config.options),
        normalizer=stage.normalizer.name,
        fit={**asdict(config), "shards": list(stage.data.shards), "seed": stage.seed},
        measures=_measure(task),
    )
    downsampler = task.consistency.downsampler.state_dict()
    save_model(task.stage.folder / FITTED, task.consistency.model, header, downsampler)


def _measure(task: "Fit") -> dict[str, float]:
    """Measure the fitted upsampler on the recipe's held-out images, where it names some."""
    from upsamplers.fit.halvings import Halvings
    from upsamplers.metrics import measure

    evaluation, factor = task.stage.evaluation, task.stage.fit.factor
    if isinstance(task.consistency, Halvings):
        logging.info("a fit of halvings has no downsampler to measure views through")
        return {}
    if not evaluation.images:
        logging.info("evaluation.images names no held-out images: nothing is measured")
        return {}
    batches = held_out(evaluation.images, task.size, factor, evaluation.limit)
    with Progress(f"{task.stage.folder.name}: held-out images", len(batches)) as progress:
        values = measure(
            task.consistency,
            task.teacher,
            batches,
            task.size,
            factor,
            progress.report,
            task.stage.engine.precision,
        )
    logging.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    return {**values, "images": float(sum(map(len, batches)))}


def held_out(source: str, size: "Size", factor: int, limit: int = 0) -> "list[torch.Tensor]":
    """Load held-out images in batches of 8, ``factor`` times ``size`` pixels."""
    import torch

    from radio_distill.data.folder import load_images
    from radio_distill.evals.encoder import to_pixels

    fine = (size[0] * factor, size[1] * factor)
    images = [to_pixels(image, fine) for _, image in load_images(source, limit or None)]
    return list(torch.stack(images).split(8))


def main(argv: Sequence[str] | None = None) -> int:
    """Run as a script; returns the exit status."""
    return run_script(sys.modules[__name__], argv)


if __name__ == "__main__":
    sys.exit(main())
