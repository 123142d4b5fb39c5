"""RADIO checkpoints of the torch.hub layout, against a plain forward written out here."""

from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import WeightsError
from radio_distill.weights.radio import read_radio
from teachers import build_teacher

WIDTH, PATCH, TABLE = 192, 16, 8
TEACHERS = [
    {"name": "clip"},
    {"name": "siglip"},
    {"name": "clip"},  # a second partition of the same teacher shares its token
    {"name": "sam", "use_summary": False},
]


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=draw) * 0.1

    state = {
        "patch_generator.embedder.weight": random(WIDTH, 3 * PATCH**2),
        "patch_generator.pos_embed": random(1, TABLE**2, WIDTH),
        "patch_generator.cls_token.token": random(5, WIDTH),
    }
    sizes = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH),
             "mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}  # fmt: skip
    for block in ("blocks.0.", "blocks.1."):
        for name, (rows, columns) in sizes.items():
            state[f"{block}{name}.weight"] = random(rows, columns)
            state[f"{block}{name}.bias"] = random(rows)
        for norm in ("norm1", "norm2"):
            state[f"{block}{norm}.weight"] = 1 + random(WIDTH)
            state[f"{block}{norm}.bias"] = random(WIDTH)
    return state


def checkpoint(folder, state, **arguments):
    full = {f"base_model.{key}": value for key, value in state.items()}
    full["_heads.0.fc1.weight"] = torch.zeros(3, WIDTH)
    full["input_conditioner.norm_mean"] = torch.zeros(3, 1, 1)
    settings = {
        "model": "vit_tiny_patch16_224",
        "teachers": TEACHERS,
        "dtype": torch.bfloat16,
        **arguments,
    }
    torch.save(
        {"state_dict": full, "args": Namespace(**settings), "epoch": 1}, folder / "radio.pth.tar"
    )
    return folder / "radio.pth.tar"


def reference(state):
    """A plain forward of the published layout: resized CPE table, prefix tokens, blocks."""
    from timm.models.vision_transformer import Block

    def run(pixels):
        rows, columns = (side // PATCH for side in pixels.shape[-2:])
        patches = torch.nn.functional.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        tokens = patches @ state["patch_generator.embedder.weight"].T
        table = state["patch_generator.pos_embed"].transpose(1, 2).unflatten(2, (TABLE, TABLE))
        side = max(rows, columns)
        table = torch.nn.functional.interpolate(table, (side, side), mode="bilinear")
        tokens = tokens + table[:, :, :rows, :columns].flatten(2).transpose(1, 2)
        prefix = state["patch_generator.cls_token.token"].expand(len(pixels), -1, -1)
        tokens = torch.cat([prefix, tokens], dim=1)
        for index in (0, 1):
            layer_scale = 1.0 if f"blocks.{index}.ls1.gamma" in state else None
            block = Block(WIDTH, 3, qkv_bias=True, init_values=layer_scale).eval()
            for norm in (block.norm1, block.norm2):
                norm.eps = 1e-6
            own = {key.removeprefix(f"blocks.{index}."): value for key, value in state.items()}
            block.load_state_dict({key: own[key] for key in block.state_dict()})
            tokens = block(tokens)
        return tokens[:, [0, 1]].flatten(1), tokens[:, 5:]

    return run


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (48, 96)])
def test_load__a_torch_hub_file_equals_a_plain_forward(tmp_path, size):
    path = checkpoint(tmp_path, tensors())
    teacher = build_teacher("radio", TeacherConfig(preset="radio", weights=str(path)))
    assert (teacher.spec.channels, teacher.spec.summary_channels) == (WIDTH, 2 * WIDTH)
    assert (teacher.spec.patch_size, teacher.spec.max_size) == (PATCH, TABLE * PATCH)
    pixels = torch.rand(2, 3, *size)
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (teacher.spec.mean, teacher.spec.std)
    )
    summary, spatial = reference(tensors())((pixels - mean) / std)
    found = teacher.encode(pixels)
    torch.testing.assert_close(
        found.spatial.flatten(2).transpose(1, 2), spatial, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(found.summary, summary, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_load__layer_scale_is_not_lost(tmp_path):
    """The published name of LayerScale is one that transformers drops without an error."""
    state = tensors()
    scales = {
        f"blocks.{block}.ls{part}.grandma": torch.full((WIDTH,), 0.3)
        for block in (0, 1)
        for part in (1, 2)
    }
    path = checkpoint(tmp_path, {**state, **scales})
    teacher = build_teacher("radio", TeacherConfig(preset="radio", weights=str(path)))
    renamed = {key.replace("grandma", "gamma"): value for key, value in scales.items()}
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (teacher.spec.mean, teacher.spec.std)
    )
    _, spatial = reference({**state, **renamed})((pixels - mean) / std)
    found = teacher.encode(pixels).spatial.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, spatial, rtol=1e-4, atol=1e-4)


def test_read__one_token_for_all_teachers(tmp_path):
    config = read_radio(checkpoint(tmp_path, tensors(), cls_token_per_teacher=False)).config
    assert (config["num_cls_tokens"], config["num_registers"], config["summary_idxs"]) == (
        1,
        4,
        [0],
    )


def test_read__slots_that_the_checkpoint_names(tmp_path):
    slots = [
        {"name": "clip", "token_slot": 2},
        {"name": "dino", "token_slot": 0},
        {"name": "sam", "use_summary": False},
    ]
    config = read_radio(checkpoint(tmp_path, tensors(), teachers=slots)).config
    assert (config["num_cls_tokens"], config["summary_idxs"]) == (3, [0, 2])


def test_load__a_missing_block_and_another_width_are_refused(tmp_path):
    state = tensors()
    del state["blocks.1.mlp.fc2.bias"]
    config = TeacherConfig(preset="radio", weights=str(checkpoint(tmp_path, state)))
    with pytest.raises(WeightsError, match="1 missing"):
        build_teacher("radio", config)
    config = TeacherConfig(preset="radio_v2_5_l", weights=str(checkpoint(tmp_path, tensors())))
    with pytest.raises(WeightsError, match=r"192.*1024.*preset: radio"):
        build_teacher("radio", config)


def test_read__what_is_not_a_radio(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="RADIO"):
        read_radio(tmp_path / "w.safetensors")
