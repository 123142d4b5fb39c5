"""The sections of a recipe, as frozen dataclasses.

Everything that changes a number of a run is a field here, with its explanation, which ``--help``
prints. The types say which numbers it takes.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from .fields import (
    AboveZero,
    Auto,
    Count,
    Positive,
    Range,
    Seconds,
    Share,
    SmallCount,
    Weight,
    option,
    our_option,
    share_of,
    size_pair,
)
from .models import StudentConfig, TeacherConfig
from .objective import AugmentationConfig, LossConfig, NormalizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class UpsamplerConfig:
    """The upsampler of the teachers that a partition upsamples."""

    name: str = option("bilinear", "name in `radio-distill list upsamplers`")
    factor: Positive = option(2, "how much finer than the teacher's own grid", "x")
    micro_batch: Count = option(
        0, "images in one call (tiles count); 0 for the teacher's", "images"
    )
    weights: dict[str, str] = option(
        dict,
        "file of a fitted upsampler for each teacher name, `shipped:NAME` for one that comes with the project; a run writes down which it takes",
    )
    sha256: dict[str, str] = option(
        dict, "sha256 that the file of a teacher's must have; a run writes down what it has"
    )
    sizes: dict[str, int | tuple[int, int]] = option(
        dict,
        "teacher's input, side or (height, width), that its file must have been fitted at; a run writes it down",
        "px",
    )
    options: dict[str, Any] = option(
        dict, "further arguments of the upsampler, for instance beta: 0.5 for s2"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class PartitionConfig:
    """One group of images of a step: which student size learns from which teachers."""

    name: str = option(help="name of the partition, for logs")
    size: int | tuple[int, int] = option(
        0, "student input, side or (height, width); 0 where `sizes` are given", "px"
    )
    sizes: tuple[int | tuple[int, int], ...] = option(
        tuple, "instead of `size`: sizes of which each step draws one", "px"
    )
    teachers: tuple[str, ...] = option(help="names of the teachers that these images are shown to")
    batch_size: Positive = option(help="images in one step, over all processes", unit="images")
    weight: AboveZero = option(1.0, "weight of the partition's mean loss in the step")
    upsample: tuple[str, ...] = option(tuple, "names of the teachers that are upsampled")
    teacher_sizes: dict[str, Positive | tuple[Positive, ...]] = option(
        dict,
        "input side of a teacher, if not its input_size; of several each step draws one, whatever the student's",
        "px",
    )
    mosaic: tuple[str, ...] = option(
        tuple,
        "names of the teachers that see several images on one canvas of their native size, at the student's grid and without summary",
    )
    mosaic_images: Count = our_option(
        0, "most images on one canvas, whose images go to one process; 0 for as many as fit"
    )
    images_of: str = our_option(
        "", "an earlier partition whose images are shown; what both ask of a teacher runs once"
    )
    source: str = option(
        "", "name of the entry of data.shards that its images come from; empty for the mixture"
    )
    ranks: Count = option(
        0, "share of the processes, relative to other partitions; 0 for one by cost"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """One stage of training."""

    steps: Positive = option(300_000, "optimizer steps", "steps")
    partitions: tuple[PartitionConfig, ...] = option(help="what a step is made of")
    student: StudentConfig | None = option(
        None,
        "the whole section of another student than the recipe's, which stages that start from this one go on with",
    )
    start_from: str = option(
        "", "stage name or checkpoint whose weights the stage starts from; empty for a new student"
    )
    reset_heads: bool = our_option(
        False, "begin with new heads instead of those of `start_from`, which may then be others"
    )
    optimizer: Literal["adamw", "lamb"] = option("lamb", "optimizer")
    learning_rate: Weight = option(1e-3, "highest learning rate")
    final_learning_rate: Weight = our_option(0.0, "learning rate at the last step")
    warmup_steps: Count = our_option(0, "steps of linear warm-up", "steps")
    weight_decay: Weight = option(0.02, "decoupled weight decay of matrices")
    betas: tuple[Share, Share] = our_option((0.9, 0.999), "moment decays of the optimizer")
    gradient_clip: Weight = our_option(1.0, "largest norm of the gradient; 0 for no limit")
    freeze_body_steps: int | float | Auto = option(
        "auto",
        "first steps in which only the heads learn; a number below 1 is a share of the steps; auto: 0 for a student without a start, else a sixtieth of the steps, at most 5,000",
        "steps",
    )
    ema_decay: Share = our_option(0.0, "decay of the student's EMA for each step; 0 for none")
    anchor: Weight = our_option(
        0.0,
        "weight of the distance to the features of the student that the stage starts from, measured as loss.mesa's",
    )
    upsampler: UpsamplerConfig = option(UpsamplerConfig, "how upsampled teachers are upsampled")

    @property
    def frozen_steps(self) -> int:
        """First steps in which only the heads learn, of a stage that is resolved."""
        return share_of(self.freeze_body_steps, self.steps)

    @property
    def largest_size(self) -> tuple[int, int]:
        """The largest input of its student, (height, width) in pixels."""
        sizes = [size for item in self.partitions for size in partition_sizes(item)]
        return max(sizes, key=lambda size: size[0] * size[1])

    @property
    def images_per_step(self) -> int:
        """Images that all processes together decode in one step."""
        return sum(item.batch_size for item in self.partitions if not item.images_of)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """The fit of an upsampler to a teacher; defaults are FeatSharp's `regular` (its table 11)."""

    teacher: str = option("", "name of the teacher; empty where the recipe has only one")
    upsampler: str = option(
        "featsharp",
        "name of the network: featsharp, featup, bilinear, carafe, sapa, fade, a2u, indexnet, resfu, resize_conv, deconvolution, uplift, lift",
    )
    factor: Positive = option(2, "how much finer than the teacher's own grid", "x")
    options: dict[str, Any] = option(dict, "arguments of the network, for instance window: 5")
    size: Count = option(0, "side of the teacher's input; 0 for its native size", "px")
    de_bias: bool = option(True, "learn what the teacher adds to each position, and take it out")
    steps: Positive = option(3000, "optimizer steps", "steps")
    batch_size: Positive = option(32, "images of one step, over all processes", "images")
    views: Positive = option(5, "random views of each image that must be met", "views")
    pool: Count = our_option(
        0,
        "images whose views are encoded once and met again; 0 for new ones in every step",
        "images",
    )
    view_range: Literal["featup", "featsharp"] = option(
        "featsharp", "how views differ: scale, shift, flip, or rotation and perspective too"
    )
    downsampler: Literal["attention", "featup", "simple"] = option(
        "attention",
        "how a fine map is compared with a view's coarse one; featup is attention as FeatUp's program has it, with a blur and a flat start",
    )
    downsampler_kernel: Positive = option(7, "side of the downsampler's window", "cells")
    learning_rate: Weight = option(1e-4, "highest learning rate of NAdam")
    rates: dict[str, Weight] = option(
        dict, "learning rates of parts of the network instead, by a part of their name: block: 1e-4"
    )
    warmup_steps: Count | Auto = option(
        "auto", "steps of linear warm-up; auto: a thirtieth of the steps, at most 100", "steps"
    )
    gradient_clip: Weight = our_option(5.0, "largest norm of the gradient; 0 for no limit")
    uncertainty: bool = option(False, "learn how uncertain each cell is, and weigh by it")
    total_variation: Weight = option(0.0, "weight of the total variation of fine maps")
    crf: Weight = option(0.0, "weight of the conditional random field loss (FeatUp: 0.001)")
    halvings: Count = option(
        0,
        "in place of views, for networks of steps of 2x (uplift, lift): how often the image is halved; the map of each smaller one is to become those of the larger ones (UPLiFT: 3, LiFT: 2)",
    )
    chain: bool = option(
        True,
        "with halvings: take each map step by step to the whole image's, compared at every step (UPLiFT), or one step (LiFT)",
    )
    distance: Literal["mse", "cosine"] = option(
        "mse", "with halvings: how maps are compared; cosine as LiFT"
    )
    images_every: Count = our_option(500, "steps between images of fine maps", "steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Images, and what is done to them."""

    shards: tuple[str, ...] = option(
        help="tar shards, folders of shards, patterns with * or braces, or text files that list shards"
    )
    weights: tuple[Weight, ...] = option(tuple, "share of each entry; empty for all images alike")
    names: tuple[str, ...] = option(
        tuple, "name of each entry, for `homogeneous` and for `source` of partitions"
    )
    homogeneous: dict[str, Share] = option(
        dict, "share of the steps whose images all come from one named entry: imagenet: 0.1"
    )
    bands: Positive = option(
        3, "bands of an image: 3 of photographs; of arrays and multi-band TIFFs any number", "bands"
    )
    band_range: tuple[tuple[float, float], ...] = option(
        tuple,
        "numbers in the files that become 0 and 1, one pair for all bands or one for each: [[0, 10000]]; empty for the whole range of 8 or 16 bits",
    )
    curation: str = our_option(
        "", "file of `radio-distill curate` that says which images of the shards are used"
    )
    index: Auto | tuple[str, ...] = our_option(
        "auto",
        "folders that are tried in turn for the indexes of shards; `beside` is the shards' own folder; auto: beside, then OUTPUT/indexes",
    )
    crop_scale: tuple[Share, Share] = our_option((0.5, 1.0), "share of the area that a crop covers")
    crop_ratio: tuple[AboveZero, AboveZero] = our_option(
        (0.75, 1.3333333333333333), "aspect ratio of a random crop"
    )
    flip: Share = our_option(0.5, "probability of a horizontal flip")
    min_size: Positive = our_option(32, "shortest side that an image must have", "px")
    max_pixels: Positive = our_option(100_000_000, "largest image that is decoded", "px")
    shuffle_shards: Positive = our_option(
        16, "shards whose samples are shuffled together", "shards"
    )
    workers: SmallCount | Auto = our_option(
        "auto", "decoding processes of each process; auto: its cores but one, 1 to 12", "processes"
    )
    cache: str = our_option(
        "",
        "folder on a local disk for copies of shards that lie elsewhere (`s3://`, `https://`, …)",
    )
    cache_gb: AboveZero = our_option(100.0, "size that the copies may take together", "GB")
    commands: bool = our_option(
        False, "let entries of shards that begin with `pipe:` be run by a shell"
    )
    max_bad_share: Share = our_option(0.01, "share of bad images at which the run stops")
    max_bad_shards: Share = our_option(0.0, "share of the shards that may be damaged and left out")
    read_timeout: Annotated[float, Range(0, 1e9, including=False)] = our_option(
        60.0, "time after which a read counts as stalled, and its image as bad", "s"
    )

    @property
    def photographs(self) -> bool:
        """Whether images are read as photographs, and not as the arrays that they are."""
        return self.bands == 3 and not self.band_range


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Processes, precision and memory."""

    name: Literal["auto", "single", "deepspeed"] = option(
        "auto", "auto: deepspeed with several processes, else single"
    )
    zero_stage: Literal["auto", 0, 1, 2, 3] = our_option(
        "auto", "ZeRO stage of DeepSpeed; auto: 0 for a stage with lamb and for a fit, else 1"
    )
    precision: Literal["auto", "float32", "bfloat16"] = our_option(
        "auto",
        "type of the matrix products of students and upsamplers, whose weights stay float32; auto: bfloat16 where the device has instructions for it, else float32",
    )
    float32_matmul: Literal["ieee", "tf32"] = our_option(
        "ieee",
        "products of float32 on a GPU in training: as they are, or of inputs rounded to 10 bits (relative error 5e-4 each) by units several times as fast; cuDNN's convolutions alike",
    )
    micro_batch: Count | Auto = option(
        0,
        "most images in one forward pass; 0 for all of a partition; auto: the most that the GPU's memory holds by the plan's model, at each size of each partition, 128 at most; 16 on a CPU and in a fit",
        "images",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "where to run")
    compile: bool | Auto = our_option(
        "auto",
        "torch.compile each transformer block of teachers and student; auto: on a GPU with Triton and a C compiler, for 1,000 steps or more, but not with `deterministic` or ZeRO 3",
    )
    deterministic: bool = our_option(
        False,
        "add in a fixed order on a GPU too, so that the same run ends with the same bits; slower, and not for a fit",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig:
    """Logs and checkpoints, and how often they are written."""

    every: Positive | Auto = option(
        "auto", "steps between log lines; auto: a twentieth of the steps, at most 50", "steps"
    )
    save_every: Positive | Auto = option(
        "auto", "steps between checkpoints; auto: a fifth of the steps, 20 to 1,000", "steps"
    )
    keep_last: Positive = option(3, "newest checkpoints that are kept", "checkpoints")
    keep_every: Count = our_option(0, "steps whose multiples are kept too; 0 for none", "steps")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...] = option(
        ("tensorboard",),
        "where numbers go besides metrics.jsonl: tensorboard, wandb, trackio, mlflow",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchConfig:
    """Signs of trouble that a run is watched for."""

    max_skipped: Count = our_option(
        10,
        "steps in a row that may be skipped because a number is not finite; then the run stops",
        "steps",
    )
    hang_seconds: Seconds = our_option(
        1800.0,
        "time without a finished step after which a run writes its stacks and ends; 0 for never",
        "s",
    )
    loss_spike: Weight = our_option(
        8.0, "warn of a loss this many deviations above its mean; 0 for never"
    )
    slow_share: Weight = our_option(
        0.5, "warn of a rate below this share of the median; 0 for never"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Benchmarks, and the images of each."""

    benchmarks: tuple[str, ...] = option(
        ("fidelity", "correspondence", "agreement"), "names in `radio-distill list benchmarks`"
    )
    every: Count = option(
        0, "steps between evaluations during training, and one at its end; 0 for none", "steps"
    )
    during: tuple[str, ...] = option(
        tuple, "benchmarks that are run during training; empty for all of `benchmarks`"
    )
    of: Literal["ema", "student"] = option(
        "ema", "weights that are scored during training; the student's in a stage without EMA"
    )
    best: str = option(
        "", "score whose best checkpoint is kept, for instance knn/top1; empty for none"
    )
    images: str = option(
        "", "shards or folder of held-out images, for fidelity, agreement and correspondence"
    )
    labels: str = option("", "folder with train/CLASS and val/CLASS, for knn")
    segmentation: str = option("", "folder of the segmentation set, for segmentation")
    segmentation_ignore: int | tuple[int, ...] | Literal["unset"] = our_option(
        "unset",
        "numbers in its masks that are no class: 255 as in VOC, 0 as in ADE20K, [0, 255], or [] for none; unset: 0, and masks that show 255 are refused",
    )
    data: dict[str, str] = option(
        dict, "folders of published data sets by name, as in `radio-distill data list`"
    )
    cache: str = option(
        "", "folder in which summaries of images, and trained probes, are kept; empty for none"
    )
    size: Positive = option(224, "student input for summaries", "px")
    dense_size: Positive = option(448, "student input for dense benchmarks", "px")
    limit: Count = option(0, "most images of each benchmark; 0 for all", "images")
    options: dict[str, Any] = option(dict, "arguments of single benchmarks, by benchmark name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides a run."""

    name: str = option(help="name of recipe and run folder; by default the file's")
    seed: int = option(0, "seed of every random draw")
    output: str = option("runs", "folder that run folders are made in")
    data: DataConfig = option(help="images")
    student: StudentConfig = option(StudentConfig, "the student")
    teachers: dict[str, TeacherConfig] = option(help="the teachers by name")
    normalizer: NormalizerConfig = option(NormalizerConfig, "scale of the targets")
    loss: LossConfig = option(LossConfig, "losses")
    augmentation: AugmentationConfig = option(AugmentationConfig, "draws of a step")
    stages: dict[str, StageConfig] = option(help="stage1, stage2, stage3")
    fit: FitConfig = option(FitConfig, "fitting an upsampler")
    engine: EngineConfig = option(EngineConfig, "processes, precision and memory")
    log: LogConfig = option(LogConfig, "logs and checkpoints")
    watch: WatchConfig = option(WatchConfig, "what the run is watched for")
    evaluation: EvaluationConfig = option(EvaluationConfig, "scoring")

    @property
    def folder(self) -> Path:
        """The run folder of this recipe: ``output/name``."""
        return Path(self.output).expanduser() / self.name

    def stage_folder(self, stage: str) -> Path:
        """The folder of a stage, named after its upsampler too where it uses one."""
        config = self.stages[stage]
        upsampled = any(partition.upsample for partition in config.partitions)
        return self.folder / (f"{stage}-{config.upsampler.name}" if upsampled else stage)

    @property
    def losses(self) -> dict[str, LossConfig]:
        """The losses by teacher, its own before the recipe's; relations without weight left out."""
        losses = {}
        for name, teacher in self.teachers.items():
            relation = teacher.relation or self.loss.relation
            losses[name] = replace(
                self.loss,
                summary=teacher.summary_loss or self.loss.summary,
                feature=teacher.feature_loss or self.loss.feature,
                relation={kind: weight for kind, weight in relation.items() if weight},
            )
        return losses

    @property
    def normalizers(self) -> dict[str, str]:
        """Names of the normalizers: of each teacher's features under its name, of its summaries
        under :func:`of_summary` where they have one."""
        names = {}
        for name, teacher in self.teachers.items():
            names[name] = teacher.feature_normalizer or self.normalizer.name
            summary = teacher.summary_normalizer or self.normalizer.summary
            if summary != "none":
                names[of_summary(name)] = summary
        return names

    def stages_before(self, stage: str) -> list[str]:
        """Return the names of the stages that led to ``stage``, itself the last."""
        chain = [stage]
        while (start := self.stages[chain[0]].start_from) in self.stages and start not in chain:
            chain.insert(0, start)
        return chain


def of_summary(teacher: str) -> str:
    """Return what the normalizer of a teacher's summaries is called beside that of its features."""
    return f"{teacher}.summary"


def partition_sizes(partition: PartitionConfig) -> tuple[tuple[int, int], ...]:
    """Return the sizes (height, width) that a partition's images may have."""
    return tuple(size_pair(size) for size in partition.sizes or (partition.size,))
