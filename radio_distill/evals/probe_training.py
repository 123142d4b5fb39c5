"""The training of a probe: heads on the maps of a frozen encoder, as a task of the training loop.

::

    image, labels ─► augment ─► encoder (frozen) ─► heads (float32) ─► losses

Images come from disk in every step, augmented anew. Which come in a step, and how they look, are
functions of seed and step, the encoder's passes may be of any size, and the heads see all images of
a step as one batch, also where processes share them (:class:`.probe_heads.BatchNorm`). So the heads
are the same for any number of processes but for rounding, and a probe that was killed goes on to
the same bits.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from einops import repeat
from torch import Tensor, nn

from ..config import DataConfig, EngineConfig, LogConfig, Recipe, WatchConfig
from ..data.loader import made_by_workers
from ..data.order import SampleOrder, view_generator
from ..data.rendering import to_float
from ..errors import ConfigError, NoLayersError
from ..stage import Stage
from ..system.distributed import (
    World,
    all_reduce_sum,
    broadcast_object,
    cores_of_process,
    current_world,
    is_shared,
    run_on_main,
)
from ..system.precision import autocast
from ..train import checkpoint as checkpoints
from ..train.deepspeed_engine import build_engine
from ..train.engine import Engine
from ..train.health import Agree, Agreement, NonFiniteGuard
from ..train.optim import build_optimizer
from ..train.trackers import WriteImage
from ..train.trainer import Trainer
from ..types import Features, Score
from .augmentation import padded
from .encoder import Encoder

if TYPE_CHECKING:
    from .trained import TrainedBenchmark

HEADS = "heads"
"""Name of the checkpoint's file of weights."""

Maps = list[Tensor]
"""Of some images, one ``[B, C, h, w]`` for each layer, from early to late."""
_MOST_WORKERS = 12


class Example(NamedTuple):
    """An image as an encoder is to see it, and its labels."""

    key: str
    pixels: Tensor
    """``[3, H, W]`` uint8."""
    labels: dict[str, Tensor]


class ProbeHeads(nn.ModuleDict):
    """The heads of a probe by the name of what they predict."""

    def forward(self, maps: Maps) -> dict[str, Tensor]:
        """Return ``[B, K, h', w']`` of each head."""
        return {name: head(maps) for name, head in self.items()}


@dataclass
class TrainingImages:
    """The training images of a probe; a :class:`radio_distill.protocols.Source`."""

    benchmark: "TrainedBenchmark"
    images: Sequence[Any]
    """``datasets.LabelledImage``."""
    share: range
    """Which images of a step are this process's."""
    device: torch.device
    """Where they go."""

    def __post_init__(self) -> None:
        self._order = SampleOrder([[len(self.images)]], seed=self.benchmark.seed, window=1)

    @property
    def fingerprint(self) -> str:
        """Checksum over the names of the images."""
        names = "\n".join(image.key for image in self.images)
        return sha256(names.encode()).hexdigest()

    def positions(self, step: int) -> range:
        """Return the places in the order of training of this process's images of a step."""
        first = step * self.benchmark.images_per_step
        return range(first + self.share.start, first + self.share.stop)

    def index(self, position: int) -> int:
        """Return which image comes at a position."""
        if not self.benchmark.shuffles:
            return position % len(self.images)
        return self._order.at(position).sample

    def example(self, position: int) -> Example:
        """Make the example of a position."""
        image = self.images[self.index(position)]
        return self.benchmark.training_example(image, view_generator(self.benchmark.seed, position))

    def batches(self, start_step: int) -> Iterator[list[Example]]:
        """Yield this process's examples of each step, augmented."""
        steps = (self.positions(step) for step in itertools.count(start_step))
        with examples(self.example, itertools.chain.from_iterable(steps), self.device) as stream:
            while True:
                yield list(itertools.islice(stream, len(self.share)))


@contextmanager
def examples(
    make: Callable[[Any], Example], tasks: Iterable[Any], device: torch.device | str
) -> Iterator[Iterator[Example]]:
    """Give ``make(task)`` for each task in turn; other processes make them for a GPU."""
    is_gpu = torch.device(device).type == "cuda"
    workers = min(_MOST_WORKERS, cores_of_process(os.environ) - 1) if is_gpu else 0
    with made_by_workers(make, tasks, workers, 4) as stream:
        yield stream


def encode(benchmark: "TrainedBenchmark", encoder: Encoder, pixels: Tensor) -> Maps:
    """Return the float32 maps that a benchmark's heads read of ``[B, 3, H, W]`` uint8.

    On a GPU the encoder computes in bfloat16 where that is native, on a processor in float32.

    Raises:
        NoLayersError: of several layers and their summaries, where the encoder gives neither, or
            layers without class token.
    """
    device, layers = torch.device(encoder.device), benchmark.layers
    passes = []
    for some in pixels.split(benchmark.batch_size):
        some = to_float(some.to(device, non_blocking=True))
        with autocast("auto" if device.type == "cuda" else "float32", device):
            found = encoder.layers(some, layers) if layers > 1 else [encoder(some)]
        if benchmark.reads_summary:
            if layers > 1 and any(layer.summary is None for layer in found):
                raise NoLayersError(
                    f"encoder {encoder.name!r} has layers without class token, which "
                    f"{benchmark.head} reads beside their maps; num_layers: 1 reads the last map"
                )
            passes.append([_with_summary(layer) for layer in found])
        else:
            passes.append([layer.spatial for layer in found])
    # Joined outside of inference mode, they are tensors that gradients may be computed from.
    return [torch.cat(layer).float() for layer in zip(*passes, strict=True)]


def _with_summary(features: Features) -> Tensor:
    """Return a map with the summary, if any, in each cell, ``[B, C + S, h, w]``."""
    summary, spatial = features
    if summary is None:
        return spatial
    height, width = spatial.shape[-2:]
    return torch.cat([spatial, repeat(summary, "b s -> b s h w", h=height, w=width)], dim=1)


def in_whole_patches(
    encoder: Encoder, pixels: Tensor, labels: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Pad an image ``[3, H, W]`` and its labels to the right and below, as the encoder needs."""
    multiple = encoder.size_multiple
    height, width = (-(-side // multiple) * multiple for side in pixels.shape[-2:])
    return padded(pixels, labels, (height, width))


@dataclass
class ProbeTask:
    """A probe in training, on one process; a :class:`radio_distill.protocols.Task`."""

    benchmark: "TrainedBenchmark"
    encoder: Encoder
    engine: Engine
    source: TrainingImages
    world: World
    progress: Callable[[int], None]
    """Told how many steps are done."""
    kept: dict[int, tuple[Maps, dict[str, Tensor]]] = field(default_factory=dict)
    """Maps and labels by image, of a quick probe."""
    evaluate_every = 0

    def __post_init__(self) -> None:
        self._rates = self.benchmark.learning_rates()
        self._terms: dict[str, Tensor] = {}
        self._step = 0

    def batches(self, start_step: int) -> Iterator[list[Example]]:
        """Yield this process's examples of each step; a quick probe reads its own."""
        return itertools.repeat([]) if self.benchmark.quick else self.source.batches(start_step)

    def learning_rates(self, step: int) -> dict[str, float]:
        """Return the rate of a step."""
        return {HEADS: float(self._rates[step])}

    def forward_backward(
        self, step: int, batches: Sequence[Example], guard: NonFiniteGuard, agree: Agree
    ) -> Agreement:
        """Run forward and backward on this process's part of a step."""
        self._step = step
        maps, labels, keys = self._inputs(step, batches)
        guard.add_targets({self.encoder.name: Features(None, maps[-1])}, keys)
        outputs = self.engine.forward(maps)
        part = len(keys) / self.benchmark.images_per_step
        if self.benchmark.pools_step:
            part = 1 / self.world.world_size
            outputs = {name: of_all_processes(output) for name, output in outputs.items()}
            labels = {name: of_all_processes(label) for name, label in labels.items()}
        terms = self.benchmark.losses(outputs, labels)
        self._terms = {name: part * term.detach() for name, term in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        # Of a loss of all images every process has the whole, and the gradient of its own part.
        scaled = loss * part if not self.benchmark.pools_step else loss - loss.detach() * (1 - part)
        guard.add_loss(loss.detach().expand(len(keys)), self._terms, keys)
        agreement = agree(scaled.detach(), guard)
        self.engine.backward(scaled, True, agreement.is_bad)
        return agreement

    def end_step(self, is_taken: bool) -> None:
        """Say how far the probe is."""
        self.progress(self._step + 1)

    def log_values(self) -> dict[str, float]:
        """Return the terms of the last step, and its rate."""
        values = {f"loss/{name}": float(all_reduce_sum(it)) for name, it in self._terms.items()}
        return {**values, "learning_rate": float(self._rates[self._step])}

    def evaluate(self, step: int, beat: Callable[[], None], write_image: WriteImage) -> list[Score]:
        """Score nothing: that is done once, at the end."""
        return []

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Gather what a checkpoint holds, on the host of rank 0; every rank must call."""
        return {
            HEADS: self.engine.model_tensors(),
            checkpoints.OPTIMIZER: self.engine.optimizer_tensors(),
        }

    def _inputs(
        self, step: int, examples: Sequence[Example]
    ) -> tuple[Maps, dict[str, Tensor], list[str]]:
        """Return maps and labels of this process's images of a step, and the images' names."""
        benchmark, device = self.benchmark, self.engine.device
        if benchmark.quick:
            indices = [self.source.index(position) for position in self.source.positions(step)]
            parts = [self._kept(index) for index in indices]
            keys = [self.source.images[index].key for index in indices]
            maps = [
                torch.cat(layer).to(device) for layer in zip(*(it[0] for it in parts), strict=True)
            ]
            all_labels = [labels for _, labels in parts]
        else:
            fitted = [benchmark.fitted(self.encoder, it.pixels, it.labels) for it in examples]
            pixels, all_labels = torch.stack([it[0] for it in fitted]), [it[1] for it in fitted]
            maps = encode(benchmark, self.encoder, pixels)
            keys = [example.key for example in examples]
        labels = {
            name: torch.stack([labels[name] for labels in all_labels]).to(device)
            for name in all_labels[0]
        }
        return maps, labels, keys

    def _kept(self, index: int) -> tuple[Maps, dict[str, Tensor]]:
        """Return maps and labels of an image, which a quick probe keeps.

        Each is encoded alone, so that its bits do not depend on what came before.
        """
        if index not in self.kept:
            example = self.benchmark.training_example(self.source.images[index], None)
            pixels, labels = self.benchmark.fitted(self.encoder, example.pixels, example.labels)
            maps = encode(self.benchmark, self.encoder, pixels[None])
            self.kept[index] = [layer.cpu() for layer in maps], labels
        return self.kept[index]


def of_all_processes(values: Tensor) -> Tensor:
    """Return ``[B, ...]`` of all processes, one after another; gradients go through one's own."""
    if not is_shared():
        return values
    world = current_world()
    counts = torch.zeros(world.world_size, dtype=torch.long, device=values.device)
    counts[world.rank] = len(values)
    parts = [
        values.new_empty(count, *values.shape[1:]) for count in all_reduce_sum(counts).tolist()
    ]
    most = max(map(len, parts))  # all of one size, for gathering
    own = torch.cat([values.detach(), values.new_zeros(most - len(values), *values.shape[1:])])
    gathered = [torch.empty_like(own) for _ in parts]
    dist.all_gather(gathered, own.contiguous())
    parts = [whole[: len(part)] for whole, part in zip(gathered, parts, strict=True)]
    parts[world.rank] = values
    return torch.cat(parts)


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    benchmark: "TrainedBenchmark",
    encoder: Encoder,
    images: Sequence[Any],
    progress: Callable[[int], None],
) -> ProbeHeads:
    """Train the heads of a benchmark, or go on where that was interrupted; every process calls.

    Args:
        benchmark: what is trained, and how.
        encoder: in evaluation mode.
        images: of training, ``datasets.LabelledImage``.
        progress: told how many steps are done.

    Returns:
        The heads, in evaluation mode.

    Raises:
        ConfigError: there are more processes than images in a step.
        InterruptedRunError: a signal asked to stop; what was done is saved.
    """
    world, device = current_world(), torch.device(encoder.device)
    most = -(-benchmark.images_per_step // world.world_size)
    share = range(most * world.rank, min(most * (world.rank + 1), benchmark.images_per_step))
    if benchmark.images_per_step <= most * (world.world_size - 1):
        raise ConfigError(
            f"benchmark {benchmark.name!r}: {world.world_size} processes cannot share the "
            f"{benchmark.images_per_step} images of a step; start fewer"
        )
    source = TrainingImages(benchmark, images, share, device)
    height, width = benchmark.crop
    grey = torch.full((1, 3, height, width), 127, dtype=torch.uint8)
    sample = encode(benchmark, encoder, grey)
    with ExitStack() as stack:
        folder = _folder(encoder, source, world, stack)
        stage = _stage(benchmark, folder)
        with torch.random.fork_rng([]):
            torch.manual_seed(benchmark.seed)
            heads = ProbeHeads(benchmark.heads([layer.shape[1] for layer in sample])).to(device)
        group = {
            "name": HEADS,
            "params": list(heads.parameters()),
            "weight_decay": benchmark.weight_decay,
        }
        optimizer = build_optimizer("adamw", [group], benchmark.betas)
        engine = build_engine(
            heads.train(), optimizer, stage.engine, benchmark.gradient_clip, world, device
        )
        resumed = run_on_main(world, lambda: checkpoints.newest(folder / "checkpoints"))
        if resumed is not None:
            engine.load(resumed.tensors(HEADS), resumed.tensors(checkpoints.OPTIMIZER))
        if resumed is None or resumed.step < benchmark.steps:
            task = ProbeTask(benchmark, encoder, engine, source, world, progress)
            Trainer(stage, task, world, resumed=resumed).run()
    return heads.eval()


def _folder(encoder: Encoder, source: TrainingImages, world: World, stack: ExitStack) -> Path:
    """Return where the probe is saved: beside what is kept of its encoder, else for this time.

    The folder's name sums up all that decides the heads.
    """
    if encoder.cache is None:
        own = Path()
        if world.is_main:  # the folder's name is what messages call the training
            own = Path(stack.enter_context(tempfile.TemporaryDirectory())) / source.benchmark.name
            own.mkdir()
        return Path(broadcast_object(own))
    asked = replace(source.benchmark, batch_size=1)
    version = getattr(asked, "version", 1)
    digest = sha256(f"{asked!r} {version} {source.fingerprint}".encode()).hexdigest()[:16]
    folder = encoder.cache.folder / encoder.cache.encoder / f"{asked.name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _stage(benchmark: "TrainedBenchmark", folder: Path) -> Stage:
    """Return a probe as the stage of a recipe that says what the loop asks for."""
    recipe = Recipe(
        name=benchmark.name,
        seed=benchmark.seed,
        output=str(folder.parent),
        data=DataConfig(shards=()),
        teachers={},
        stages={},
        engine=EngineConfig(zero_stage=0, precision="float32"),
        log=LogConfig(
            every=max(1, min(50, benchmark.steps // 20)),
            save_every=max(20, min(1000, benchmark.steps // 5)),
            keep_last=1,
            trackers=(),
        ),
        # Whoever asks for the score watches for hangs.
        watch=WatchConfig(hang_seconds=0.0),
    )
    images = benchmark.images_per_step
    return Stage(benchmark.name, recipe, folder, benchmark.seed, benchmark.steps, images, (), {})
