"""The student against transformers' RADIO, timm's ViT, and itself."""

import pytest
import torch
from torch import nn

from radio_distill.errors import ConfigError
from radio_distill.models.position import NUM_DRAWS
from radio_distill.models.student import (
    Student,
    attend_in_windows,
    create_body,
    from_windows,
    spread_global_blocks,
    to_windows,
)


def radio_model(student):
    """Return transformers' RadioModel with the student's weights; its code is NVIDIA's design."""
    transformers = pytest.importorskip("transformers")
    config = transformers.RadioConfig(
        hidden_size=student.embed_dim,
        num_hidden_layers=len(student.blocks),
        num_attention_heads=3,
        patch_size=student.patch_size,
        max_img_size=student.positions.table.shape[0] * student.patch_size,
        num_cls_tokens=student.num_summary_tokens,
        num_registers=student.num_prefix_tokens - student.num_summary_tokens,
        summary_idxs=list(range(student.num_summary_tokens)),
    )
    state = {
        "input_conditioner.norm_mean": student.mean,
        "input_conditioner.norm_std": student.std,
        "embeddings.patch_projection.weight": student.patch_embedding.weight,
        "embeddings.position_embedding": student.positions.table.flatten(0, 1)[None],
        "embeddings.cls_register_token": student.prefix_tokens,
        "summary_idxs": torch.arange(student.num_summary_tokens),
    }
    for key, value in student.blocks.state_dict().items():
        if ".attn.qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                state["encoder.layer." + key.replace("attn.qkv", f"attention.{name}_proj")] = part
        else:
            key = key.replace("attn.proj", "attention.o_proj")
            state["encoder.layer." + key] = value
    model = transformers.RadioModel(config).eval()
    difference = model.load_state_dict(state, strict=False)
    assert not difference.unexpected_keys
    assert all("layer_scale" in key for key in difference.missing_keys)  # identity, value 1
    return model


@pytest.mark.parametrize("size", [(224, 224), (224, 192), (160, 320), (320, 64)])
@torch.no_grad()
def test_forward__equals_transformers_radio(make_student, size):
    student = make_student(max_size=512, registers=3).eval()
    student.prefix_tokens.mul_(10)  # so that a slip of the tokens shows
    pixels = torch.rand(2, 3, *size)
    summary, spatial = student(pixels)
    expected = radio_model(student)(pixels)
    torch.testing.assert_close(summary.flatten(1), expected.summary, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        spatial.flatten(2).transpose(1, 2), expected.features, atol=1e-5, rtol=0
    )
    assert spatial.shape == (2, 192, size[0] // 16, size[1] // 16)


@torch.no_grad()
def test_forward__images_of_a_batch_do_not_meet(make_student):
    student, pixels = make_student().eval(), torch.rand(3, 3, 64, 96)
    alone = [student(pixels[i : i + 1]) for i in range(3)]
    summary, spatial = student(pixels)
    torch.testing.assert_close(summary, torch.cat([one[0] for one in alone]), atol=1e-5, rtol=0)
    torch.testing.assert_close(spatial, torch.cat([one[1] for one in alone]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("registers", [0, 5])
@pytest.mark.parametrize("cell", [(0, 0), (1, 4), (3, 2), (3, 5)])
@torch.no_grad()
def test_forward__moving_an_object_moves_its_features(make_student, cell, registers):
    """No summary or register token may shift the map by a cell."""
    student = make_student(registers=registers).eval()
    empty = torch.full((1, 3, 64, 96), 0.5)
    image, (row, column) = empty.clone(), cell
    image[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] = torch.rand(3, 16, 16)
    change = (student(image)[1] - student(empty)[1]).norm(dim=1)[0]  # [h, w]
    assert divmod(int(change.argmax()), change.shape[1]) == cell


@torch.no_grad()
def test_forward__spatial_has_one_cell_a_patch_and_no_prefix(make_student):
    """Without blocks, spatial features are embedded patches, whatever the tokens before them."""
    student = make_student(registers=4).eval()
    del student.blocks[:]
    pixels = torch.rand(1, 3, 48, 80)
    before = student(pixels)
    assert before[0].shape == (1, 2, 192)
    assert before[1].shape == (1, 192, 3, 5)
    student.prefix_tokens.add_(100)
    after = student(pixels)
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[0] + 100, after[0])


@torch.no_grad()
def test_forward__input_is_normalised_inside(make_student):
    student = make_student().eval()
    pixels = torch.rand(1, 3, 32, 32)
    expected = student(pixels)[1]
    student.mean.zero_()
    student.std.fill_(1.0)
    torch.testing.assert_close(student((pixels - 0.5) / 0.5)[1], expected, atol=1e-5, rtol=0)


def test_forward__draws_matter_in_training_alone(make_student):
    student, pixels, draws = make_student(), torch.rand(1, 3, 32, 32), torch.rand(1, NUM_DRAWS)
    with torch.no_grad():
        plain = student(pixels)[1]
        assert not torch.allclose(student(pixels, draws)[1], plain, atol=1e-3)
        student.eval()
        assert torch.equal(student(pixels, draws)[1], plain)


@torch.no_grad()
def test_forward__a_split_batch_sees_the_same_crops(make_student):
    student, pixels, draws = make_student(), torch.rand(4, 3, 64, 48), torch.rand(4, NUM_DRAWS)
    whole = student(pixels, draws)
    halves = [student(pixels[part], draws[part]) for part in (slice(0, 1), slice(1, 4))]
    for index in (0, 1):
        joined = torch.cat([half[index] for half in halves])
        torch.testing.assert_close(joined, whole[index], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(60, 64), (64, 8), (65, 33)])
def test_forward__size_that_the_patch_does_not_divide(make_student, size):
    with pytest.raises(ConfigError) as caught:
        make_student()(torch.rand(1, 3, *size))
    message = str(caught.value)
    assert message.startswith(
        f"student: an input of {size[0]}x{size[1]} px is not a multiple of patch 16"
    )
    nearest = {(60, 64): "48x64 and 64x64", (64, 8): "64x16", (65, 33): "64x32 and 80x48"}
    assert message.endswith(f"(nearest {nearest[size]})")
    assert "\n" not in message


def test_forward__size_that_the_window_does_not_divide(make_student):
    student = make_student(window_size=4, global_blocks=1)
    with pytest.raises(ConfigError, match=r"64x128.*128x128"):
        student(torch.rand(1, 3, 96, 128))


@torch.no_grad()
def test_forward__one_window_is_global_attention(make_student):
    student, pixels = make_student(window_size=4, global_blocks=1).eval(), torch.rand(2, 3, 64, 64)
    student.global_blocks = frozenset({2})
    windowed = student(pixels)
    student.window_size = 0
    student.global_blocks = frozenset(range(3))
    for result, expected in zip(windowed, student(pixels), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_forward__windows_see_each_other_through_global_blocks_alone(make_student):
    student = make_student(window_size=2, registers=0).eval()
    student.global_blocks = frozenset()
    del student.blocks[1:]
    pixels = torch.rand(1, 3, 64, 96)
    changed = pixels.clone()
    changed[:, :, :32, 32:64] = 0  # the second window of the first row
    change = (student(changed)[1] - student(pixels)[1]).abs().amax(dim=1)[0] > 0
    expected = torch.zeros(4, 6, dtype=torch.bool)
    expected[:2, 2:4] = True
    assert torch.equal(change, expected)
    student.global_blocks = frozenset({0})
    assert ((student(changed)[1] - student(pixels)[1]).abs().amax(dim=1) > 0).all()


def gradients(student, pixels, draws):
    summary, spatial = student(pixels, draws)
    (summary.square().sum() + spatial.square().sum()).backward()
    found = {name: p.grad for name, p in student.named_parameters()}
    student.zero_grad()
    return found


@pytest.mark.parametrize("global_blocks", [{1}, {0, 1, 2}])
def test_forward__checkpointing_gives_equal_gradients(make_student, global_blocks):
    student = make_student(window_size=2, gradient_checkpointing=True)
    student.global_blocks = frozenset(global_blocks)
    pixels, draws = torch.rand(2, 3, 64, 64), torch.rand(2, NUM_DRAWS)
    recomputed = gradients(student, pixels, draws)
    student.gradient_checkpointing = False
    torch.testing.assert_close(recomputed, gradients(student, pixels, draws))


def test_forward__checkpointing_keeps_fewer_activations(make_student):
    student, pixels = make_student(gradient_checkpointing=True), torch.rand(1, 3, 64, 64)

    def saved_elements():
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            student(pixels)
        return sum(sizes)

    with_checkpoints = saved_elements()
    student.gradient_checkpointing = False
    assert with_checkpoints < saved_elements() / 3


def test_init__drop_path_is_active_in_training_only(make_student):
    student, pixels = make_student(drop_path=0.9), torch.rand(1, 3, 32, 32)
    student.blocks[2].drop_path1.drop_prob = 0.9
    with torch.no_grad():
        trained = [student(pixels)[1] for _ in range(4)]
        assert any(not torch.equal(trained[0], other) for other in trained[1:])
        student.eval()
        assert torch.equal(student(pixels)[1], student(pixels)[1])


def test_init__sizes(student_config):
    config = student_config(registers=3, patch_size=32, max_size=512)
    student = Student(config, num_summary_tokens=4)
    assert (student.embed_dim, student.depth, student.patch_size) == (192, 12, 32)
    assert student.num_prefix_tokens == len(student.prefix_tokens) == 7
    assert student.positions.table.shape == (16, 16, 192)
    with torch.no_grad():
        summary, spatial = student(torch.rand(1, 3, 64, 96))
    assert summary.shape == (1, 4, 192)
    assert spatial.shape == (1, 192, 2, 3)


@pytest.mark.parametrize(
    "architecture",
    ["deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"],
)
def test_init__other_families(student_config, architecture):
    """LayerScale, registers of their own, and pooling without a class token."""
    student = Student(student_config(architecture=architecture), num_summary_tokens=1)
    with torch.no_grad():
        _, spatial = student(torch.rand(1, 3, 32, 48))
    assert spatial.shape == (1, student.embed_dim, 2, 3)
    names = {name for name, _ in student.named_parameters()}
    assert not any(name.startswith(("norm.", "head", "attn_pool", "fc_norm")) for name in names)


@pytest.mark.parametrize(
    ("architecture", "near"),
    [
        ("resnet50", "vit_|known: .* in all"),
        ("vit_bas_patch16_224", "'vit_base_patch16_224'"),
        ("deit_tiny_distilled_patch16_224", "'deit_tiny_patch16_224'"),
        ("vit_tiny", "'vit_tiny_patch16_224'"),
        ("deit3_small", "'deit3_small_patch16_224'"),
    ],
)
def test_create_body__what_is_no_plain_vit(architecture, near):
    with pytest.raises(ConfigError, match=rf"'{architecture}'.*{near}") as error:
        create_body(architecture, pretrained=False, drop_path=0.0)
    assert len(str(error.value)) < 250


def test_create_body__drop_path_grows_with_depth():
    body = create_body("vit_tiny_patch16_224", pretrained=False, drop_path=0.1)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in body.blocks]
    assert rates[0] == 0
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("depth", "num_global", "expected"),
    [
        (12, 4, {2, 5, 8, 11}),
        (24, 4, {5, 11, 17, 23}),
        (12, 1, {11}),
        (5, 2, {1, 4}),
        (3, 3, {0, 1, 2}),
    ],
)
def test_spread_global_blocks__even_and_the_last(depth, num_global, expected):
    assert spread_global_blocks(depth, num_global) == expected


@pytest.mark.parametrize("num_global", [0, 13])
def test_spread_global_blocks__impossible_number(num_global):
    with pytest.raises(ConfigError, match=rf"global_blocks: {num_global} .* 12"):
        spread_global_blocks(12, num_global)


def test_to_windows__each_window_is_a_square_of_neighbours():
    patches = torch.arange(4 * 6).view(1, 4, 6, 1)
    first, second, *_ = to_windows(patches, 2)[0, :, 0].split(4)
    assert first.tolist() == [0, 1, 6, 7]
    assert second.tolist() == [2, 3, 8, 9]


@pytest.mark.parametrize("window", [1, 2, 3])
def test_from_windows__undoes_to_windows(window):
    patches = torch.randn(2, 6, 12, 5)
    assert torch.equal(from_windows(to_windows(patches, window), (6, 12), window), patches)


def test_attend_in_windows__equals_a_loop_over_windows():
    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    tokens = torch.randn(2, 3 + 5 * 4, 8)
    prefix, windows = tokens[:, :3], tokens[:, 3:].split(4, dim=1)
    parts = [block(torch.cat((prefix, window), dim=1)) for window in windows]
    mean_prefix = torch.stack([part[:, :3] for part in parts]).mean(dim=0)
    expected = torch.cat([mean_prefix, *(part[:, 3:] for part in parts)], dim=1)
    torch.testing.assert_close(attend_in_windows(block, tokens, 3, 2), expected)
