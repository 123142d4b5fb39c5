"""CroCo's encoder out of a file of the whole model, against its forward pass written out here."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import WeightsError
from teachers import build_teacher, resolve
from teachers.sources import croco

WIDTH, HEADS, PATCH, BLOCKS = 48, 3, 16, 2


def tensors() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = {"patch_embed.proj": (WIDTH, 3, PATCH, PATCH), "enc_norm": (WIDTH,)}
    for block in range(BLOCKS):
        shapes |= {
            f"enc_blocks.{block}.norm1": (WIDTH,),
            f"enc_blocks.{block}.attn.qkv": (3 * WIDTH, WIDTH),
            f"enc_blocks.{block}.attn.proj": (WIDTH, WIDTH),
            f"enc_blocks.{block}.norm2": (WIDTH,),
            f"enc_blocks.{block}.mlp.fc1": (4 * WIDTH, WIDTH),
            f"enc_blocks.{block}.mlp.fc2": (WIDTH, 4 * WIDTH),
        }
    state = {}
    for name, shape in shapes.items():
        state[f"{name}.weight"] = torch.randn(shape, generator=draw) * (3 / max(shape) ** 0.5)
        state[f"{name}.bias"] = torch.randn(shape[0], generator=draw)
    return state


def turned(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Turn channels i and i + n / 2 of ``[..., N, n]`` by place · 100^(-2i / n)."""
    half = x.shape[-1] // 2
    angles = places[:, None] * 100.0 ** -(torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def expected(state: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The formulas of CroCo v2 (arXiv 2211.10408), on pixels in [0, 1]."""

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    kernel, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    maps = F.conv2d(pixels * 2 - 1, kernel, bias, stride=PATCH)
    height, width = maps.shape[-2:]
    rows = torch.arange(height).repeat_interleave(width).float()
    columns = torch.arange(width).repeat(height).float()
    x = maps.flatten(2).mT
    for at in range(BLOCKS):
        block = f"enc_blocks.{at}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        q, k, v = qkv.unflatten(2, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
        q, k = (
            torch.cat(
                [turned(it, at) for it, at in zip(z.chunk(2, -1), (rows, columns), strict=True)], -1
            )
            for z in (q, k)
        )
        mixed = torch.softmax(q @ k.mT / (WIDTH // HEADS) ** 0.5, -1) @ v
        x = x + linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "enc_norm").mT.unflatten(2, (height, width))


def encoder(path) -> TeacherConfig:
    create = {"embed_dim": WIDTH, "depth": BLOCKS, "num_heads": HEADS}
    return TeacherConfig(
        preset="croco", weights=str(path), dtype="float32", options={"create": create}
    )


@torch.no_grad()
def test_croco__equals_its_formulas_at_any_size(tmp_path):
    """The file's other half, a decoder, is left out."""
    state = tensors()
    save_file({**state, "dec_blocks.0.norm1.weight": torch.ones(3)}, tmp_path / "croco.safetensors")
    teacher = build_teacher("mast3r", encoder(tmp_path / "croco.safetensors"))
    for size in ((48, 80), (64, 32)):
        pixels = torch.rand(2, 3, *size)
        features = teacher.encode(pixels)
        assert features.summary is None
        torch.testing.assert_close(features.spatial, expected(state, pixels), rtol=1e-4, atol=1e-4)


def test_croco__takes_matrices_of_half_precision_as_they_are(tmp_path):
    half, whole = tmp_path / "half.safetensors", tmp_path / "whole.safetensors"
    state = {key: value.bfloat16() for key, value in tensors().items()}
    save_file(state, half)
    save_file({key: value.float() for key, value in state.items()}, whole)
    block = croco.load(resolve(encoder(half)), half).model.blocks[0]
    assert block.mlp.fc1.weight.dtype == block.attn.qkv.weight.dtype == torch.bfloat16
    assert block.norm1.weight.dtype == torch.float32
    pixels = torch.rand(1, 3, 48, 32)
    maps = [build_teacher("m", encoder(path)).encode(pixels).spatial for path in (half, whole)]
    assert torch.equal(*maps)


def test_croco__error_for_another_file(tmp_path):
    state = tensors()
    del state["enc_blocks.1.attn.qkv.bias"]
    save_file(state, tmp_path / "croco.safetensors")
    with pytest.raises(WeightsError, match=r"blocks\.1\.attn\.qkv\.bias"):
        build_teacher("mast3r", encoder(tmp_path / "croco.safetensors"))
