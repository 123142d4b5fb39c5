"""The fit of an upsampler to a frozen teacher, by the consistency of random views, as a task.

::

    image ─┬─► teacher (whole, tiles) ─► model ─► fine map ─► warp ─► downsample ─┐
           │                                                                      ├─► loss
           └─► render views ────────────► teacher ─► PHI-S, + bias ───────────────┘

A fine map is right where each view of it, made as coarse as the teacher, is what the teacher says
of that view of the image (FeatUp, arXiv 2403.10516, section 3; FeatSharp, arXiv 2502.16025,
section 3.1). Every draw is a function of seed and step, so an interrupted fit goes on with the same
numbers, and the images and views of a step do not depend on the number of processes.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from radio_distill.config import FitConfig, plain
from radio_distill.data.device import on_device
from radio_distill.data.loader import StepSlice
from radio_distill.errors import ConfigError
from radio_distill.protocols import BatchSource, Teacher
from radio_distill.registry import nearest
from radio_distill.stage import FIT, Stage
from radio_distill.system.distributed import World, all_reduce_sum
from radio_distill.system.memory import explain_oom, lower
from radio_distill.system.transfer import to_device
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train.checkpoint import Checkpoint
from radio_distill.train.deepspeed_engine import build_engine
from radio_distill.train.engine import Engine
from radio_distill.train.health import Agree, Agreement, NonFiniteGuard
from radio_distill.train.optim import build_optimizer, cosine
from radio_distill.train.trackers import WriteImage
from radio_distill.types import Features, ImageBatch, Score, Size

from .batches import FitBatch, TeacherTimer, halved, step_homographies
from .consistency import Consistency
from .halvings import Halvings
from .views import render

logger = logging.getLogger(__name__)

MODULES = "upsampler"
"""Name of the checkpoint's file of weights."""


@dataclass
class Fit:
    """A fit on one process; a :class:`radio_distill.protocols.Task`."""

    stage: Stage
    world: World
    teacher: Teacher
    consistency: Consistency | Halvings
    """Everything that is trained, on the engine's device."""
    engine: Engine
    source: BatchSource
    """This process's images, at the size that their views are rendered from."""
    slices: Sequence[StepSlice]
    """Which images of a step they are, one slice for each pass."""
    num_passes: int
    """Passes of a step on this process; those beyond the slices add zeros to the gradients."""
    pool: list[list[FitBatch]] = field(default_factory=list)
    """What is kept with ``fit.pool``; fits of one teacher, size and factor can share one list,
    where the first of them looks at all tiles that any looks at."""

    def __post_init__(self) -> None:
        config = self.stage.fit
        self.timer = TeacherTimer()
        self._view = self.stage.views(config.teacher)[0][1]
        self._decay = cosine(self.stage.steps, 1.0, 0.0, plain(config.warmup_steps))
        groups = parameter_groups(self.consistency, config)
        self._peaks: dict[str, float] = {group["name"]: group["lr"] for group in groups}
        self._kept = config.pool // config.batch_size  # steps whose batches are in the pool
        self._step = 0
        self._terms: dict[str, Tensor] = {}
        self._shown: FitBatch | None = None

    @property
    def size(self) -> Size:
        """The teacher's input, in pixels."""
        return self._view.size

    @property
    def evaluate_every(self) -> int:
        """Steps between images of fine maps, which a fit draws in the place of scores."""
        return self.stage.fit.images_every or self.stage.steps

    def batches(self, start_step: int) -> Iterator[Sequence[ImageBatch]]:
        """Yield this process's images of each step; none where the pool has them."""
        if not self._kept:
            yield from self.source.batches(start_step)
        new = self.source.batches(len(self.pool))
        for step in range(len(self.pool), min(start_step, self._kept)):  # of a resumed fit
            self._fill_pool(step, next(new))
        step = start_step
        while True:
            yield next(new) if step == len(self.pool) < self._kept else ()
            step += 1

    def fit_batches(self, step: int, images: Sequence[ImageBatch]) -> list[FitBatch]:
        """Return what the teacher says of a step's images and views, one batch for each pass.

        With ``fit.pool`` the batches of the first steps are kept in memory, in half precision, and
        come again.
        """
        if not self._kept:
            return self._encode(step, images)
        if images:
            self._fill_pool(step, images)
        return [batch.to(torch.float32) for batch in self.pool[step % self._kept]]

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rate of each group of parameters in a step."""
        return {name: peak * float(self._decay[step]) for name, peak in self._peaks.items()}

    def forward_backward(
        self, step: int, batches: Sequence[ImageBatch], guard: NonFiniteGuard, agree: Agree
    ) -> Agreement:
        """Run forward and backward on this process's part of a step."""
        fit_batches = self.fit_batches(step, batches)
        # Dropout of the networks and of the downsampler draws from the global generator.
        torch.manual_seed(self.stage.seed * 7919 + step * 131 + self.world.rank)
        self._step, self._shown, self._terms = step, fit_batches[0], {}
        agreement = None
        for number in range(self.num_passes):
            if number < len(fit_batches):
                loss = self._loss(step, fit_batches[number], guard)
            else:
                zero = self.engine.zero()
                assert zero is not None, "ZeRO 3 is refused, and a pass came before"
                loss = zero
            is_last = number == self.num_passes - 1
            if is_last:
                agreement = agree(self._terms["loss"], guard)
            skip = agreement.is_bad if agreement else None
            self.engine.backward(loss, is_last, skip)
        assert agreement is not None, "a step has a pass"
        return agreement

    def _loss(self, step: int, batch: FitBatch, guard: NonFiniteGuard) -> Tensor:
        """Return a pass's part of the loss of a step, and add up what is logged of it."""
        for maps, keys in batch.maps():
            guard.add_targets({self.teacher.spec.name: Features(None, maps)}, keys)
        generator = torch.Generator().manual_seed(self.stage.seed + step)
        with self._explain_oom(batch):
            loss, terms = self.engine.forward(batch.output, batch.homographies, generator)
        means = {name: value.detach().mean() for name, value in terms.items()}
        guard.add_loss(loss, means, batch.keys)
        for name, value in {"loss": loss, **terms}.items():
            part = value.detach().sum() / self.stage.fit.batch_size
            self._terms[name] = self._terms.get(name, torch.zeros_like(part)) + part
        return loss.sum() / self.stage.fit.batch_size

    def end_step(self, is_taken: bool) -> None:
        """Do nothing: nothing follows the update."""

    def log_values(self) -> dict[str, float]:
        """Return the terms of the last step, its learning rate, and the teacher's share of time."""
        values = {name: float(all_reduce_sum(value)) for name, value in self._terms.items()}
        values["learning_rate"] = self.stage.fit.learning_rate * float(self._decay[self._step])
        return {**values, "teacher_share": self.timer.share}

    @torch.no_grad()
    def evaluate(self, step: int, beat: Callable[[], None], write_image: WriteImage) -> list[Score]:
        """Draw images, coarse and fine maps side by side, for the trackers and as a file."""
        del beat
        if not self.world.is_main:
            return []
        from PIL import Image

        from radio_distill.report.feature_images import image_grid, pca_images

        assert self._shown is not None, "a step comes before"
        observation, model = self._shown.output.observation, self.consistency.model.eval()
        with self.engine.autocast():
            fine = model(observation).float()
        model.train()
        low = model.de_biased(observation.low)
        photographs = rearrange((observation.guidance * 255).byte().cpu(), "b c h w -> b h w c")
        rows = [
            [Image.fromarray(image.numpy()).resize((224, 224)), *pca_images(maps)]
            for image, *maps in zip(photographs[:4], low, fine, strict=False)
        ]
        sheet = image_grid(rows, [""] * len(rows), ["image", "teacher", "upsampled"])
        write_image(step, "features", np.asarray(sheet))
        folder = self.stage.folder / "images"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step-{step:08d}.png")
        return []

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather what a checkpoint holds, on the host of rank 0; every rank must call."""
        return {
            MODULES: self.engine.model_tensors(),
            checkpoints.OPTIMIZER: self.engine.optimizer_tensors(),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Load weights and optimizer state of a fit's checkpoint."""
        self.engine.load(checkpoint.tensors(MODULES), checkpoint.tensors(checkpoints.OPTIMIZER))

    def _fill_pool(self, step: int, images: Sequence[ImageBatch]) -> None:
        name = self.teacher.spec.name
        self.pool.append([halved(batch, name) for batch in self._encode(step, images)])

    def _encode(self, step: int, images: Sequence[ImageBatch]) -> list[FitBatch]:
        device = self.engine.device
        return [
            self.timer.time(partial(self._encode_pass, step, part, batch), device)
            for part, batch in zip(self.slices, on_device(images, device), strict=True)
        ]

    def _encode_pass(self, step: int, part: StepSlice, batch: ImageBatch) -> FitBatch:
        """Encode images, their tiles and their views in one batch."""
        config, device, view = self.stage.fit, self.engine.device, self._view
        pixels = self.teacher.spec.seen(batch.pixels)  # [B, 3, H, W]
        drawn = step_homographies(self.stage.seed, step, config)[part.start : part.stop]
        model, views, drawn = self.consistency.model, None, to_device(drawn, device)
        if config.halvings:
            drawn = drawn[:, :0]
        else:
            views = render(pixels, drawn.flatten(0, 1), view.size)  # [(B V), 3, H', W']
        output = model.encode(self.teacher, pixels, view.grid, config.factor, further=views)
        if config.halvings:
            halves = model.encode_halves(self.teacher, pixels, view.size, config.halvings)
            output = output._replace(halves=halves)
        return FitBatch(output, drawn, batch.keys)

    def _explain_oom(self, batch: FitBatch) -> Any:
        config, limit = self.stage.fit, self.stage.micro_batch(FIT, self._view.size)
        (height, width), images = self._view.size, len(batch.keys)
        size = f"{height}x{width} px, {images} images, {config.views} views"
        hint = lower("engine.micro_batch", limit, images, "lower fit.size")
        return explain_oom(f"the fit of {config.upsampler}", size, hint)


def build_fit_engine(
    consistency: Consistency | Halvings, stage: Stage, world: World, device: torch.device
) -> Engine:
    """Make the engine of a fit, with NAdam; moves ``consistency`` to the device.

    Raises ConfigError for ZeRO 3, which takes weights away that a fit reads outside of forward.
    """
    if stage.engine.zero_stage == 3:
        raise ConfigError(
            "engine.zero_stage: a fit reads its bias where ZeRO 3 has taken it away; set it to 2"
        )
    _warn_of_unknown_rates(consistency, stage.fit)
    optimizer = build_optimizer(
        stage.optimizer, parameter_groups(consistency.to(device), stage.fit)
    )
    clip = stage.fit.gradient_clip
    return build_engine(consistency.train(), optimizer, stage.engine, clip, world, device)


def parameter_groups(modules: nn.Module, config: FitConfig) -> list[dict[str, Any]]:
    """Group parameters by learning rate: ``fit.rates`` by a part of the name, else the common."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in modules.named_parameters():
        parts = name.split(".")
        own = [rate for part, rate in config.rates.items() if part in parts]
        groups.setdefault(own[0] if own else config.learning_rate, []).append(parameter)
    return [
        {"name": f"rate{number}", "params": members, "lr": peak}
        for number, (peak, members) in enumerate(groups.items())
    ]


def _warn_of_unknown_rates(modules: nn.Module, config: FitConfig) -> None:
    """Warn of parts that this network does not have: a recipe may serve several networks."""
    names = [name for name, _ in modules.named_parameters()]
    known = sorted({piece for name in names for piece in name.split(".")})
    for part in config.rates:
        if part not in known:
            logger.warning(
                "fit.rates: no parameter of %s is part of %r (%s)",
                config.upsampler, part, nearest(part, known),
            )  # fmt: skip


def passes_of_step(stage: Stage, world_size: int, micro_batch: int, own: int) -> int:
    """Return the passes of a step on a process: its ``own`` slices, or as many as the busiest has.

    ZeRO 2 reduces gradients in each backward pass, so there all processes must run equally many.
    """
    if stage.engine.zero_stage in (0, 1):
        return own
    images = -(-stage.fit.batch_size // world_size)
    return math.ceil(images / micro_batch) if micro_batch else 1
