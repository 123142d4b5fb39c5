"""The sections of a recipe that say what a student is asked for, on images changed how."""

from dataclasses import dataclass
from typing import Annotated, Literal

from .fields import AboveZero, Auto, Count, Positive, Range, Share, Weight, option, our_option
from .models import FeatureLoss, RelationLoss, SummaryLoss


@dataclass(frozen=True, kw_only=True, slots=True)
class NormalizerConfig:
    """The scale that teachers are brought to."""

    name: str = option("phi_s", "name in `radio-distill list normalizers`, for features")
    summary: str = option("none", "the same for summaries")
    images: int | float | Auto = option(
        "auto",
        "images that mean and covariance are estimated on, anew in every stage; a number below 1 is a share of the stage's images; auto: a tenth of them, 1,024 to 3,072,000, for a fit at most 100,000, and never more than there are",
        "images",
    )
    cache: str = option("", "folder for statistics; empty for `statistics` in the run folder")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Losses between student and teachers."""

    summary: SummaryLoss | dict[SummaryLoss, Weight] = option(
        "cosine",
        "loss between summaries, or several with their weights: {cosine: 0.5, smooth_l1: 0.5}; angle is the squared angle over the dispersion of the teacher's (C-RADIOv4)",
    )
    feature: FeatureLoss | dict[FeatureLoss, Weight] = option(
        "mse",
        "loss between feature maps, or several with their weights; am_radio is 0.9 cosine + 0.1 smooth L1 of beta 2",
    )
    smooth_l1_beta: AboveZero = our_option(
        1.0, "error at which smooth_l1 turns from quadratic to linear"
    )
    relation: dict[RelationLoss, Weight] = option(
        dict,
        "losses between the pairs of a partition's images, with their weights: {arkd: 1}; times the teacher's summary_weight",
    )
    alignment: Literal["student_down", "teacher_down", "teacher_up", "smaller", "larger"] = option(
        "smaller",
        "which of the two feature grids is resampled to the other before they are compared",
    )
    interpolation: Literal["bilinear", "bicubic"] = option(
        "bilinear", "how it is resampled; bicubic as in EUPE"
    )
    reduction: Literal["image", "token"] = option(
        "image",
        "what counts alike in a feature loss: each image's mean over its cells, or each cell of a step (TAO)",
    )
    drop_teachers: Share = option(
        0.0,
        "probability that a teacher is left out for an image, but for the one whose loss is largest there; the loss is then a mean over those that stay (UNIC, DUNE: 0.5)",
    )
    rebalance: bool = our_option(False, "weigh a teacher that few partitions see as if all did")
    weighting: Literal["fixed", "adaloss", "uncertainty"] = option(
        "fixed",
        "weights of the terms: those of the teachers, or times 1 / mean of the term's past (adaloss), or learned (uncertainty)",
    )
    adaloss_momentum: Annotated[float, Range(0, 0.999999)] = option(
        0.99, "share of the past in adaloss's mean of a term"
    )
    mesa: Weight = our_option(
        0.0, "weight of the distance to the EMA's features (MESA); needs ema_decay"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """Draws that are made anew in every step, beside crops and positions; see C-RADIOv4."""

    shift: Count = our_option(
        0, "most by which each encoder's crop is shifted; losses cover the overlap", "patches"
    )
    window_share: Share = our_option(0.0, "share of the steps with attention in windows")
    window_sizes: tuple[Positive, Positive] = option(
        (6, 32), "smallest and largest of these windows", "tokens"
    )
    weight_noise: Weight = our_option(
        0.0, "standard deviation of noise that multiplies the body's matrices (DAMP)"
    )
    jitter: tuple[Weight, Weight, Weight, Share] = option(
        (0.0, 0.0, 0.0, 0.0),
        "most by which brightness, contrast and saturation change (0.4: times 0.6 to 1.4), and hue, in turns of the circle; the same for all encoders",
    )
    jitter_share: Share = option(0.8, "share of the images whose colours are jittered")
    grey_share: Share = option(0.0, "share of the images that lose their colours")
    blur_share: Share = option(0.0, "share of the images that are blurred")
    blur_sigma: tuple[AboveZero, AboveZero] = option(
        (0.1, 2.0),
        "smallest and largest standard deviation of the blur, in the student's view",
        "px",
    )
    solarise_share: Share = option(0.0, "share of the images whose bright pixels are inverted")
