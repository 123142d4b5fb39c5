"""The sections of a recipe that describe its teachers and its student."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from .fields import (
    AboveZero,
    Count,
    Positive,
    Range,
    Share,
    Side,
    SmallCount,
    Weight,
    option,
    our_option,
)

SummaryLoss = Literal["cosine", "mse", "angle", "smooth_l1", "dampened_mse"]
FeatureLoss = Literal[
    "mse", "cosine", "am_radio", "smooth_l1", "dampened_mse", "map_cosine", "gram", "channel_kl"
]
_VIT_FIELDS = (
    "pretrained_grid",
    "max_size",
    "registers",
    "position_dropout",
    "window_size",
    "global_blocks",
    "spectral_reparametrization",
)
_TIMM_FIELDS = "options", "map", "summary"

RelationLoss = Literal["rkd_distance", "rkd_angle", "arkd"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One frozen encoder."""

    preset: str = option(
        help="name in `radio-distill list teachers`, or a source: timm, open_clip, transformers, radio, student"
    )
    weights: str = option("", "local weights file or folder; empty takes the preset's own source")
    stage: str = option(
        "",
        "of `preset: student`: an earlier stage of this recipe whose student it is; `weights` then only says where that stage lies, if not in this run",
    )
    sha256: str = option("", "sha256 that the weights file must have; empty for no check")
    input_size: Positive | Literal["native", "match"] = option(
        "native", "side of its input: a number, native, or match: the grid is the student's", "px"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = our_option(
        "auto",
        "type the frozen encoder computes in; auto: bfloat16 where the device has instructions for it, else float32",
    )
    micro_batch: Count = option(0, "images in one call of the encoder; 0 for all at once", "images")
    bands: tuple[Count, ...] = option(
        tuple,
        "bands of the images that it sees, from 0, in its own order: [3, 2, 1] for red, green and blue of Sentinel-2; empty for all",
    )
    summary_weight: Weight = option(1.0, "weight of the summary loss; 0 for none")
    feature_weight: Weight = option(1.0, "weight of the feature loss")
    summary_loss: SummaryLoss | dict[SummaryLoss, Weight] = option(
        dict, "its own loss between summaries; none for loss.summary"
    )
    feature_loss: FeatureLoss | dict[FeatureLoss, Weight] = option(
        dict, "its own loss between feature maps; none for loss.feature"
    )
    relation: dict[RelationLoss, Weight] = option(
        dict, "its own losses between pairs; none for loss.relation, {arkd: 0} for no such loss"
    )
    feature_normalizer: str = option("", "its own scale; empty for normalizer.name")
    summary_normalizer: str = option("", "its own scale of summaries; empty for normalizer.summary")
    options: dict[str, Any] = option(
        dict, "further arguments of the preset or source, for instance model: vit_base_patch16_224"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadConfig:
    """What brings the student's tokens into a teacher's space: its summaries, or its features."""

    name: str = option(
        "",
        "name in `radio-distill list heads`; of a summary also `shared`, the head of the features; empty: as for all teachers, which is mlp",
    )
    options: dict[str, Any] = option(
        dict, "further arguments of the head, for instance blocks: 1 for attention"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadsConfig:
    """The two heads of one teacher."""

    summary: HeadConfig = option(HeadConfig, "for its summaries")
    features: HeadConfig = option(HeadConfig, "for its features")
    inner: dict[str, Weight] = option(
        dict,
        "blocks of the student, from 0, that are asked for the features too, each by a head of its own that is thrown away, and the weight of that loss beside the last's 1: {5: 0.5}",
    )

    @property
    def upsample(self) -> int:
        """Cells a side that are predicted for each of the student's."""
        asked = self.features.options.get("upsample", 1)
        return asked if isinstance(asked, int) else 1  # which the head's own check refuses


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The model that is trained: a vision transformer, or any other body."""

    body: Literal["vit", "timm"] = option(
        "vit",
        "vit: a plain vision transformer made fit for several teachers; timm: the model as timm has it, of any family with feature maps",
    )
    architecture: str = option("vit_base_patch16_224", "name of a timm model, whose body is used")
    options: dict[str, Any] = option(
        dict, "of `body: timm`: further arguments of the model, for instance img_size: 224"
    )
    map: Literal["last", "second_last", "dilated", "resized"] = option(
        "last",
        "of `body: timm`: the last stage's map, the one before, the last with strides dilated away, or resized to cells of `patch_size` (EUPE)",
    )
    summary: Literal["token", "mean", "pool"] = option(
        "token",
        "of `body: timm`, one for all teachers: the class token, or the mean where the model has none; the mean of the map; what the model itself pools",
    )
    pretrained: str = option(
        "",
        "start of the student: empty for random, `timm` for timm's weights, a timm file or folder, `hf-hub:OWNER/NAME`, a RADIO checkpoint or folder, or a run",
    )
    pretrained_grid: tuple[int, ...] = our_option(
        tuple, "rows and columns of the start's position table, where it is no square", "cells"
    )
    pretrained_sha256: str = our_option("", "sha256 that the start's file must have")
    patch_size: Annotated[int, Range(1, 1024)] = option(
        16, "pixels a side of one token, or of one cell of the map", "px"
    )
    max_size: Side = option(2048, "longest image side that the position table (CPE) spans", "px")
    mean: tuple[float, ...] = option(
        tuple,
        "mean of the pixels in [0, 1], one number for each of data.bands; empty: that of the start or the architecture, which are of RGB",
    )
    std: tuple[AboveZero, ...] = option(tuple, "their standard deviation, likewise")
    registers: SmallCount = our_option(4, "tokens beside the summary tokens", "tokens")
    position_dropout: Share = option(0.1, "share of training samples without position embedding")
    window_size: Count = option(0, "side of the attention windows (ViTDet); 0 for none", "tokens")
    global_blocks: SmallCount = option(4, "blocks that stay global where window_size > 0", "blocks")
    final_norm: bool = option(
        False, "normalise all tokens behind the last block; published RADIO models do not"
    )
    spectral_reparametrization: bool = option(
        False,
        "learn the largest singular value of each matrix of the body apart from its direction; folded at export",
    )
    drop_path: Share = our_option(0.0, "stochastic depth")
    head_hidden: Annotated[int, Range(1, 1 << 20)] = our_option(
        1024, "hidden width of heads whose options name none", "channels"
    )
    head_layers: SmallCount = our_option(0, "residual layers inside each MLP head", "layers")
    summary_head: HeadConfig = option(HeadConfig, "of the summaries of all teachers")
    feature_head: HeadConfig = option(HeadConfig, "of the features of all teachers")
    heads: dict[str, HeadsConfig] = option(dict, "by teacher, where it has others")
    gradient_checkpointing: bool = option(
        False, "recompute blocks in the backward pass, to save memory"
    )

    @property
    def bands(self) -> int:
        """Bands of the images that it takes."""
        return len(self.mean) or 3

    @property
    def foreign_fields(self) -> tuple[str, ...]:
        """Names of the fields that only the other kind of body has."""
        return _TIMM_FIELDS if self.body == "vit" else _VIT_FIELDS

    @property
    def plain(self) -> "StudentConfig":
        """The section of the student that was trained: without a start, its matrices folded."""
        return replace(
            self,
            pretrained="",
            pretrained_sha256="",
            pretrained_grid=(),
            spectral_reparametrization=False,
        )

    def heads_of(self, teacher: str) -> HeadsConfig:
        """Return the heads of a teacher, with a name each."""
        own, mlp = self.heads.get(teacher, HeadsConfig()), HeadConfig(name="mlp")

        def first(*choices: HeadConfig) -> HeadConfig:
            return next(choice for choice in choices if choice.name)

        return HeadsConfig(
            summary=first(own.summary, self.summary_head, mlp),
            features=first(own.features, self.feature_head, mlp),
            inner=own.inner,
        )
