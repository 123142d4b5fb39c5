"""Bodies of other families keep the contract of a student."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from radio_distill.config import StudentConfig
from radio_distill.errors import ConfigError
from radio_distill.models.heads import build_body, build_student
from radio_distill.train.optim import parameter_groups
from radio_distill.types import TeacherSpec, spread_layers
from tools.bodies_page import FAMILIES

BY_NAME = {family.name: family for family in FAMILIES}
CONVNEXT, ROPE, EFFICIENTNET = (
    BY_NAME[name] for name in ("ConvNeXt", "ViT with RoPE: DINOv3, EUPE", "EfficientNet")
)


def make(family, num_summary_tokens=2, **fields):
    torch.manual_seed(0)
    return build_body(family.config(**fields), num_summary_tokens)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_family_gives_a_map_one_summary_and_gradients(family):
    body = make(family).train()
    height, width = body.fixed_size or (body.size_step, 2 * body.size_step)
    grid = (height // family.patch_size, width // family.patch_size)
    pixels = torch.rand(1, 3, height, width)
    tokens, spatial = body(pixels)
    assert (
        spatial.shape
        == (1, body.embed_dim, *grid)
        == (1, body.embed_dim, *body.grid((height, width)))
    )
    assert tokens.shape == (1, 2, body.summary_dim)
    assert torch.equal(tokens[:, 0], tokens[:, 1])
    (tokens.square().sum() + spatial.square().sum()).backward()
    assert [name for name, item in body.named_parameters() if item.grad is None] == []
    with torch.no_grad():
        layers = body.eval().layers(pixels, 3)
        assert {spatial.shape[2:] for _, spatial in layers} == {grid}
        (*_, (last_tokens, last)), (tokens, spatial) = layers, body(pixels)
        torch.testing.assert_close(last, spatial)
        if body.summary == "token":
            torch.testing.assert_close(last_tokens, tokens)
            ((_, prefix),) = body.body.forward_intermediates(
                (pixels - body.mean) / body.std,
                indices=spread_layers(body.level + 1, 3)[:1],
                return_prefix_tokens=True,
                intermediates_only=True,
            )
            torch.testing.assert_close(layers[0][0][:, 1], body.norm(prefix[:, 0]))
        else:
            assert all(token is None for token, _ in layers)
    with torch.device("meta"):  # as `plan` builds it
        assert make(family).embed_dim == body.embed_dim


@pytest.mark.parametrize("size", [(64, 160), (160, 96)])
def test_map__a_cell_sees_its_place(size):
    """Rows and columns are not exchanged: what changes is where the image changed."""
    body = make(CONVNEXT, options={"depths": (1, 1, 1, 1)}).eval()
    pixels = torch.rand(1, 3, *size)
    changed = pixels.clone()
    changed[:, :, 32:64, -32:] = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        change = (body(changed)[1] - body(pixels)[1]).square().sum(1)[0]
    assert divmod(int(change.argmax()), change.shape[1]) == (1, size[1] // 32 - 1)


def test_map__of_other_stages_is_timms():
    pixels = torch.rand(2, 3, 64, 96)
    last = make(CONVNEXT).eval()
    before = make(CONVNEXT, map="second_last", patch_size=16).eval()
    dilated = make(CONVNEXT, map="dilated", patch_size=16).eval()
    resized = make(CONVNEXT, map="resized", patch_size=16).eval()
    assert dilated.body.state_dict().keys() == last.body.state_dict().keys()
    assert before(pixels)[1].shape == (2, 48, 4, 6)
    assert dilated(pixels)[1].shape == (2, 64, 4, 6)
    resized.load_state_dict(last.state_dict())
    tokens, spatial = last(pixels)
    assert torch.equal(resized(pixels)[0], tokens), "the mean is that of the map as it is"
    expected = F.interpolate(spatial, (4, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(resized(pixels)[1], expected)


def test_final_norm__of_a_convnext_is_that_of_its_head():
    """LayerNorm of the mean is timm's own summary, as DINOv3's and EUPE's ConvNeXts have it."""
    body = make(CONVNEXT, final_norm=True).eval()
    nn.init.normal_(body.norm.weight)
    pooled = make(CONVNEXT, summary="pool").eval()
    pooled.body.load_state_dict(body.to_timm())
    pixels = torch.rand(2, 3, 64, 96)
    (tokens, spatial), (expected, raw) = body(pixels), pooled(pixels)
    torch.testing.assert_close(tokens, expected)
    torch.testing.assert_close(spatial, pooled.body.head.norm(raw))


def test_rope__class_token_and_registers_are_no_cells():
    body = make(ROPE, final_norm=True).eval()
    pixels = torch.rand(1, 3, 32, 64)
    model = make(ROPE, summary="pool").eval().body
    model.load_state_dict(body.to_timm(), strict=True)
    expected = model.forward_features((pixels - body.mean) / body.std)
    tokens, spatial = body(pixels)
    torch.testing.assert_close(tokens[:, 0], expected[:, 0])
    torch.testing.assert_close(spatial.flatten(2).mT, expected[:, 5:])
    outputs = body(pixels, every_block=True)
    assert len(outputs) == 2 + 2 * body.depth
    torch.testing.assert_close(body.norm(outputs[-2]), tokens)


def test_pool__has_the_width_of_the_models_head():
    body = make(EFFICIENTNET, summary="pool")
    assert (body.embed_dim, body.summary_dim) == (64, 256)
    half = (0.5,) * 3
    spec = TeacherSpec("t", 6, 4, 16, (64, 64), None, half, half)
    model = build_student(EFFICIENTNET.config(summary="pool"), {"t": spec})
    predicted = model(torch.rand(2, 3, 64, 96), ("t",)).features["t"]
    assert (predicted.summary.shape, predicted.spatial.shape) == ((2, 4), (2, 6, 2, 3))


def test_batch_norm__images_of_a_batch_do_not_meet_and_statistics_stay():
    body = make(EFFICIENTNET).train()
    before = {name: item.clone() for name, item in body.named_buffers()}
    pixels = torch.rand(3, 3, 64, 64)
    whole = body(pixels)[1]
    parts = torch.cat([body(one[None])[1] for one in pixels])
    torch.testing.assert_close(whole, parts)
    for name, item in body.named_buffers():
        assert torch.equal(item, before[name]), name
    norms = [module for module in body.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert not any(module.training for module in norms)
    assert all(module.weight.requires_grad for module in norms)
    with pytest.raises(ConfigError, match=r"student\.pretrained"):
        body.check_start("")
    body.check_start("timm")
    make(CONVNEXT).check_start("")


def test_gradient_checkpointing__gives_equal_gradients():
    pixels, gradients = torch.rand(1, 3, 32, 64), []
    for recompute in (False, True):
        body = make(CONVNEXT, gradient_checkpointing=recompute).train()
        body(pixels)[1].square().sum().backward()
        gradients.append([item.grad for item in body.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_parameter_groups__tokens_do_not_decay():
    half = (0.5,) * 3
    spec = TeacherSpec("t", 6, 4, 16, (64, 64), None, half, half)
    model = build_student(ROPE.config(), {"t": spec})
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 0.1)}
    names = {parameter: name for name, parameter in model.student.named_parameters()}
    kept = {names[parameter] for parameter in groups["body"]}
    assert {"body.cls_token", "body.reg_token"} <= kept
    assert all(parameter.ndim > 1 for parameter in groups["body_decay"])
    assert not {"body.cls_token", "body.reg_token"} & {names[it] for it in groups["body_decay"]}


@pytest.mark.parametrize(
    ("architecture", "fields", "what"),
    [
        ("convnext_ato", {}, "convnext_atto"),
        ("test_convnext", {"patch_size": 16}, "student.patch_size.* 32"),
        ("test_convnext", {"summary": "pool", "final_norm": True, "patch_size": 32}, "final_norm"),
        ("test_convnext", {"options": {"depht": 3}}, "student.options"),
        ("test_convnext", {"options": {"checkpoint_path": "x"}}, "checkpoint_path"),
        ("repvit_m0_9", {"map": "dilated", "patch_size": 16}, "student.options"),
        ("vit_tiny_patch16_dinov3_qkvb", {"map": "second_last"}, "student.map"),
        ("hiera_tiny_224", {"patch_size": 32}, "img_size"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(architecture, fields, what):
    with pytest.raises(ConfigError, match=what) as caught:
        build_body(StudentConfig(body="timm", architecture=architecture, **fields), 1)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="body: timm"):
        build_body(StudentConfig(architecture="convnext_atto"), 1)
