"""Each source gives the numbers of its library's own forward on the same weights."""

import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.types import IMAGENET_MEAN, IMAGENET_STD
from teachers import build_teacher
from teachers.presets import PRESETS
from teachers.sources import find_source
from teachers.sources.open_clip import build_text_encoder
from teachers.sources.timm import TimmTower
from teachers.text import text_tower


def tower_and_pixels(name, size=None):
    teacher = build_teacher(name, TeacherConfig(preset=name))
    size = size or teacher.spec.native_size
    return teacher.tower, torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def tokens(spatial):
    return spatial.flatten(2).transpose(1, 2)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prefix"), [("tiny_vit", 3), ("tiny_vit_pooled", 0), ("tiny_eva", 5)]
)
@pytest.mark.parametrize("size", [None, (32, 80)])
def test_timm__transformer_equals_forward_features(name, prefix, size):
    tower, pixels = tower_and_pixels(name, size)
    summary, spatial = tower(pixels)
    expected = tower.model.forward_features(pixels)
    assert torch.equal(tokens(spatial), expected[:, prefix:])
    pooled = tower.model.forward_head(expected, pre_logits=True)
    assert torch.equal(summary, expected[:, 0] if prefix else pooled)
    assert tower.model.num_prefix_tokens == prefix


@torch.no_grad()
def test_timm__convolutional_network_equals_forward_features_and_its_pooling():
    tower, pixels = tower_and_pixels("tiny_cnn")
    summary, spatial = tower(pixels)
    assert torch.equal(spatial, tower.model.forward_features(pixels))
    torch.testing.assert_close(summary, spatial.mean((2, 3)))


@torch.no_grad()
def test_timm__a_convnext_s_map_and_mean_share_the_norm_of_its_head():
    """DINOv3 (arXiv 2508.10104): the mean of the map is one token more before the last norm."""
    assert PRESETS["eupe_convnext_t"].arguments == {"final_norm": True}
    model = timm.create_model("test_convnext", num_classes=0).eval()
    norm = model.head.norm
    norm.weight.normal_()
    norm.bias.normal_()
    pixels = torch.randn(2, 3, 64, 96)
    summary, spatial = TimmTower(model, final_norm=True)(pixels)
    raw = model.forward_features(pixels)
    every = torch.cat([raw.mean((2, 3))[:, None], tokens(raw)], dim=1)  # [B, 1 + hw, C]
    every = torch.nn.functional.layer_norm(
        every, norm.normalized_shape, norm.weight, norm.bias, norm.eps
    )
    torch.testing.assert_close(summary, every[:, 0])
    torch.testing.assert_close(tokens(spatial), every[:, 1:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_timm__stage_takes_an_earlier_map_and_keeps_the_summary():
    plain = build_teacher("cnn", TeacherConfig(preset="tiny_cnn"))
    staged = build_teacher("cnn", TeacherConfig(preset="tiny_cnn", options={"stage": -2}))
    assert (staged.spec.patch_size, staged.spec.channels) == (16, 16)
    pixels = torch.rand(1, 3, 64, 96)
    assert staged.encode(pixels).spatial.shape == (1, 16, 4, 6)
    assert torch.equal(staged.encode(pixels).summary, plain.encode(pixels).summary)


@torch.no_grad()
def test_timm__blocks_stops_early_and_keeps_the_final_norm():
    one = build_teacher("vit", TeacherConfig(preset="tiny_vit", options={"blocks": 1}))
    whole, pixels = tower_and_pixels("tiny_vit")
    (expected,) = whole.model.forward_intermediates(
        pixels, indices=[0], norm=True, intermediates_only=True
    )
    assert torch.equal(one.tower(pixels)[1], expected)
    assert len(one.tower.model.blocks) == 1


@torch.no_grad()
def test_timm__summary_is_what_the_option_says():
    pixels = torch.rand(2, 3, 48, 64)
    teachers = {
        mode: build_teacher("vit", TeacherConfig(preset="tiny_vit", options={"summary": mode}))
        for mode in ("token", "pool", "token_and_mean", "none")
    }
    features = {mode: teacher.encode(pixels) for mode, teacher in teachers.items()}
    plain = build_teacher("vit", TeacherConfig(preset="tiny_vit")).encode(pixels)
    assert torch.equal(features["token"].summary, plain.summary)
    both = torch.cat([plain.summary, plain.spatial.mean((2, 3))], 1)
    torch.testing.assert_close(features["token_and_mean"].summary, both)
    assert teachers["token_and_mean"].spec.summary_channels == 64
    assert features["none"].summary is teachers["none"].spec.summary_channels is None
    for mode, (_, spatial) in features.items():
        assert torch.equal(spatial, plain.spatial), mode


@torch.no_grad()
def test_timm__pooled_and_projected_summary_is_the_model_s_own_output():
    """As Perception Encoders have it, whose class token is but an input of the pooling."""
    create = {"img_size": 64, "embed_dim": 32, "depth": 1, "num_heads": 2, "num_classes": 12}
    preset = replace(
        PRESETS["pe_core_t"], arguments={"summary": "pool", "create": create}, native_size=64
    )
    tower = find_source("timm").build(preset).eval()
    pixels = torch.randn(2, 3, 64, 96)
    summary, spatial = tower(pixels)
    assert torch.equal(summary, tower.model(pixels))
    assert summary.shape == (2, 12)
    assert torch.equal(tokens(spatial), tower.model.forward_features(pixels)[:, 1:])


@torch.no_grad()
def test_timm__a_stage_without_a_summary_is_the_same_map_and_runs_nothing_behind_it():
    options = {"stage": -2}
    both = build_teacher("cnn", TeacherConfig(preset="tiny_cnn", options=options))
    options = {**options, "summary": "none"}
    alone = build_teacher("cnn", TeacherConfig(preset="tiny_cnn", options=options))
    pixels = torch.rand(1, 3, 64, 96)
    expected = both.encode(pixels).spatial
    alone.tower.model.layer4 = None
    assert torch.equal(alone.encode(pixels).spatial, expected)


@torch.no_grad()
@pytest.mark.parametrize("by_preset", [True, False])
def test_timm__virchow2_from_a_file_gives_what_its_card_computes(by_preset, tmp_path):
    """The card takes ``model(x)``: token 0, and the mean of those from 5, side by side."""
    import timm
    from timm.layers import SwiGLUPacked

    card = {"img_size": 28, "init_values": 1e-5, "reg_tokens": 4, "mlp_ratio": 5.3375}
    small = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    given = {**card, **small, "num_classes": 0, "global_pool": "", "act_layer": torch.nn.SiLU}
    model = timm.create_model("vit_huge_patch14_224", mlp_layer=SwiGLUPacked, **given).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    layers = {"mlp_layer": "SwiGLUPacked", "act_layer": "silu"}
    if by_preset:
        options = {"create": {**card, **small, **layers}, "native_size": 28}
        config = TeacherConfig(preset="virchow2", weights=str(tmp_path), options=options)
    else:
        published = {"input_size": [3, 28, 28], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
        folder = {"architecture": "vit_huge_patch14_224", "pretrained_cfg": published}
        folder["model_args"] = {**card, **small, "num_classes": 0, "global_pool": ""}
        (tmp_path / "config.json").write_text(json.dumps(folder))
        options = {"create": layers, "summary": "token_and_mean"}
        config = TeacherConfig(preset="timm", weights=str(tmp_path), options=options)
    teacher = build_teacher("virchow", config)
    pixels = torch.rand(2, 3, 28, 28)
    shift, scale = (torch.tensor(item).view(3, 1, 1) for item in (IMAGENET_MEAN, IMAGENET_STD))
    output = model((pixels - shift) / scale)
    summary, spatial = teacher.encode(pixels)
    expected = torch.cat([output[:, 0], output[:, 5:].mean(1)], dim=1)
    torch.testing.assert_close(summary, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens(spatial), output[:, 5:], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_timm__sam_is_taken_before_its_neck():
    tower, pixels = tower_and_pixels("tiny_samvit")
    summary, spatial = tower(pixels)
    assert summary is None
    torch.testing.assert_close(tower.model.neck(spatial), tower.model.forward_features(pixels))


@torch.no_grad()
def test_open_clip__equals_encode_image():
    import open_clip

    tower, pixels = tower_and_pixels("tiny_open_clip")
    whole = open_clip.CLIP(**PRESETS["tiny_open_clip"].arguments["config"]).eval()
    whole.visual.load_state_dict(tower.visual.state_dict())
    summary, spatial = tower(pixels)
    torch.testing.assert_close(summary, whole.encode_image(pixels))
    expected = whole.visual.forward_intermediates(
        pixels, indices=1, normalize_intermediates=True, intermediates_only=True
    )["image_intermediates"][-1]
    torch.testing.assert_close(spatial, expected)


@torch.no_grad()
def test_open_clip__another_size_equals_a_tower_built_for_it():
    """Interpolating inside the call gives what a model with the resized table gives."""
    import open_clip
    from timm.layers import resample_abs_pos_embed

    tower, pixels = tower_and_pixels("tiny_open_clip", (32, 64))
    config = PRESETS["tiny_open_clip"].arguments["config"]
    other = {**config["vision_cfg"], "image_size": (32, 64)}
    whole = open_clip.CLIP(**{**config, "vision_cfg": other}).eval()
    state = tower.visual.state_dict()
    table = resample_abs_pos_embed(state["positional_embedding"][None], [4, 8], [6, 6])[0]
    whole.visual.load_state_dict({**state, "positional_embedding": table})
    torch.testing.assert_close(tower(pixels)[0], whole.encode_image(pixels))
    assert tower.visual.positional_embedding.shape == (37, 32)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("tiny_clip", 1),
        ("tiny_siglip", 0),
        ("tiny_dinov2", 3),
        ("tiny_dinov3", 3),
        ("tiny_radio", 5),
    ],
)
def test_transformers__equals_last_hidden_state_without_its_prefix(name, prefix):
    tower, pixels = tower_and_pixels(name)
    summary, spatial = tower(pixels)
    output = tower.model(pixels)
    assert torch.equal(tokens(spatial), output.last_hidden_state[:, prefix:])
    expected = {
        "tiny_clip": "image_embeds",
        "tiny_siglip": "pooler_output",
        "tiny_dinov2": "pooler_output",
        "tiny_dinov3": "pooler_output",
        "tiny_radio": "summary",
    }[name]
    assert torch.equal(summary, output[expected])


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny_clip", "tiny_dinov2", "tiny_dinov3", "tiny_radio"])
def test_transformers__summary_is_what_the_option_says(name):
    plain, pixels = tower_and_pixels(name)
    teachers = {
        mode: build_teacher(name, TeacherConfig(preset=name, options={"summary": mode}))
        for mode in ("token", "pool", "token_and_mean", "none")
    }
    found = {mode: teacher.tower(pixels) for mode, teacher in teachers.items()}
    usual, spatial = plain(pixels)
    token = plain.model(pixels).last_hidden_state[:, 0]
    if name == "tiny_clip":  # its class token has a norm of its own, before the projection
        token = plain.model.vision_model(pixels).pooler_output
    assert torch.equal(found["token"][0], token)
    assert torch.equal(found["pool"][0], usual)
    both = torch.cat([token, spatial.mean((2, 3))], 1)
    torch.testing.assert_close(found["token_and_mean"][0], both)
    for mode, teacher in teachers.items():
        width = None if mode == "none" else found[mode][0].shape[1]
        assert teacher.spec.summary_channels == width
        assert torch.equal(found[mode][1], spatial), mode
    assert found["none"][0] is None


@torch.no_grad()
def test_transformers__sam_equals_its_encoder():
    tower, pixels = tower_and_pixels("tiny_sam")
    summary, spatial = tower(pixels)
    assert summary is None
    assert torch.equal(spatial, tower.model(pixels).last_hidden_state)


@torch.no_grad()
def test_transformers__radio_normalises_once():
    """The model's own conditioner is taken out: pixels in [0, 1] are normalised by the teacher."""
    from transformers import AutoConfig, RadioModel

    options = {"mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    teacher = build_teacher("radio", TeacherConfig(preset="tiny_radio", options=options))
    config = dict(PRESETS["tiny_radio"].arguments["config"])
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    config.norm_mean, config.norm_std = options["mean"], options["std"]
    whole = RadioModel(config).eval()
    whole.load_state_dict(teacher.tower.model.state_dict(), strict=False)
    pixels = torch.rand(1, 3, 64, 64)
    expected = whole(pixels)
    torch.testing.assert_close(tokens(teacher.encode(pixels).spatial), expected.features)
    torch.testing.assert_close(teacher.encode(pixels).summary, expected.summary)


def test_text_tower__is_of_the_model_whose_summary_the_teacher_gives():
    """What open_clip makes of the same arguments and draws says the same of images and texts."""
    config = TeacherConfig(preset="tiny_open_clip")
    texts = ["a photo of a cat", "a photo of a dog"] * 200
    tower, teacher = text_tower("clip", config), build_teacher("clip", config)
    torch.manual_seed(0)
    whole = open_clip.CLIP(**PRESETS["tiny_open_clip"].arguments["config"]).eval()
    vectors = tower.embed(texts)
    with torch.no_grad():
        tokens = open_clip.SimpleTokenizer()(texts[:2])
        torch.testing.assert_close(vectors[-2:], whole.encode_text(tokens))
        pixels = torch.rand(2, 3, 48, 48)
        spec = teacher.spec
        mean, std = (torch.tensor(three).view(3, 1, 1) for three in (spec.mean, spec.std))
        expected = whole.encode_image((pixels - mean) / std)
    torch.testing.assert_close(teacher.encode(pixels).summary, expected)
    assert vectors.shape == (400, teacher.spec.summary_channels)


@pytest.mark.parametrize("preset", ["tiny_vit", "tiny_clip", "tiny_student"])
def test_text_tower__a_teacher_without_one_has_none(preset):
    assert text_tower("t", TeacherConfig(preset=preset)) is None


def test_text_encoder__a_teacher_without_text_says_so():
    with pytest.raises(ConfigError, match="no text tower"):
        build_text_encoder("dino", TeacherConfig(preset="dinov2_l_reg"))


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("timm", {}, "options.model"),
        ("timm", {"model": "vit_bose_patch16_224"}, "'vit_base_patch16_224'"),
        ("timm", {"model": "vit_base_patch16_clip_224.openia"}, "'openai'"),
        ("open_clip", {"model": "ViT-B-61/openai"}, "'ViT-B-16'"),
        ("open_clip", {"model": "ViT-B-16-SigLIP/webli"}, "preset: timm"),
        ("dinov2_l_reg", {"model": "vit_small_patch14_dinov2"}, "preset: timm"),
        ("tiny_vit", {"block": 1}, "'blocks'"),
        ("tiny_vit", {"blocks": 3}, "1 and 2"),
        ("tiny_cnn", {"blocks": 1}, "`stage`"),
        ("tiny_clip", {"config": {"model_type": "radioo"}}, "radio"),
        ("tiny_clip", {"config": {"model_type": ["clip"]}}, "model_type"),
        ("tiny_open_clip", {"config": {"embed_dim": 8}}, "text_cfg is missing"),
        ("tiny_open_clip", {"config": {"vision_cfg": {}, "text_cfg": {}}}, "embed_dim"),
        ("tiny_student", {"head": "clip"}, "no head 'clip'"),
        ("timm", {"model": "no_such_network"}, "'no_such_network'"),
        ("timm", {"model": "zz"}, "in all"),
        ("timm", {"model": "vit_tiny"}, "'vit_tiny_patch16_224'"),
        ("timm", {"model": "resnet18", "create": 3}, "options.create: 3"),
        ("timm", {"model": "resnet18", "create": {"depth": 3}}, r"timm.create_model.*depth"),
        ("timm", {"model": "resnet18", "stage": 9}, "resnet18"),
        ("timm", {"model": "resnet18", "stage": "last"}, "'last'"),
        ("timm", {"model": ["resnet18"]}, "is not a name"),
        ("dinov2_l_reg", {"mean": 0.5}, "options.mean: 0.5"),
        ("dinov2_l_reg", {"std": [0.5, 0.5, 0]}, "options.std: "),
        ("dinov2_l_reg", {"native_size": "224"}, "'224'"),
        ("dinov2_l_reg", {"fixed_size": 1}, "fixed_size: 1"),
        ("tiny_clip", {"config": "clip"}, "'clip'"),
        ("tiny_vit", {"summary": "cls"}, "token_and_mean"),
        ("tiny_cnn", {"summary": "token"}, "no class token"),
        ("tiny_siglip", {"summary": "token"}, "SiglipVisionModel has no class token"),
        ("tiny_sam", {"summary": "pool"}, "SamVisionModel pools nothing"),
        ("tiny_cnn", {"final_norm": True}, "no norm of maps"),
        ("tiny_vit", {"create": {"mlp_layer": "SwiGluPacked"}}, "'SwiGLUPacked'"),
        ("timm", {"model": "resnet18", "create": {"in_chans": 6}}, "6 bands"),
        ("timm", {"model": "resnet18", "mean": [0.5] * 6}, "a model of 3 bands"),
    ],
)  # fmt: skip
def test_options__a_wrong_one_is_one_line_that_names_teacher_and_mend(preset, options, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_teacher("mine", TeacherConfig(preset=preset, options=options))
    assert str(error.value).startswith("teachers.mine: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pth"])
def test_timm__weights_without_a_model_name_the_option(weights, tmp_path):
    (tmp_path / weights).write_bytes(b"")
    with pytest.raises(ConfigError, match=r"options\.model.*vit_base_patch16_224") as error:
        build_teacher("mine", TeacherConfig(preset="timm", weights=str(tmp_path / weights)))
    assert len(str(error.value)) < 200
