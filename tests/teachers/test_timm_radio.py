"""timm's RADIO models as teachers: their tokens, and positions as RADIO resizes them."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from teachers import build_teacher

MODEL = "vit_so400m_patch16_radio_v4"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


def classic():
    """timm's plain vision transformer of that name, made small."""
    torch.manual_seed(0)
    model = timm.create_model(MODEL, img_size=128, **SMALL).eval()
    for parameter in (model.cls_token, model.reg_token, model.pos_embed):
        torch.nn.init.normal_(parameter)
    return model


def teacher(path):
    options = {"model": MODEL, "create": SMALL}
    return build_teacher("radio", TeacherConfig(preset="timm", weights=str(path), options=options))


@torch.no_grad()
def test_load__a_plain_file_gives_its_features(tmp_path):
    model = classic()
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    found = teacher(tmp_path / "w.safetensors")
    assert found.spec.mean == timm.data.OPENAI_CLIP_MEAN
    assert model.num_prefix_tokens == 10
    pixels = torch.rand(1, 3, 128, 128)
    mean, std = (torch.tensor(item).view(3, 1, 1) for item in (found.spec.mean, found.spec.std))
    tokens = model.forward_features((pixels - mean) / std)
    summary, spatial = found.encode(pixels)
    torch.testing.assert_close(summary, tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        spatial, tokens[:, 10:].transpose(1, 2).unflatten(2, (8, 8)), rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("size", [(128, 128), (64, 96), (160, 48)])
def test_load__every_size_equals_transformers(tmp_path, size):
    """transformers' RadioModel resizes its table to a square and crops it, and so must this."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.RadioConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2.0,
        patch_size=16, max_img_size=128, num_cls_tokens=1, num_registers=9, summary_idxs=[0],
        initializer_range=0.1,
    )  # fmt: skip
    reference = transformers.RadioModel(config).eval()
    own = reference.state_dict()
    state = {
        "cls_token": own["embeddings.cls_register_token"][None, :1],
        "reg_token": own["embeddings.cls_register_token"][None, 1:],
        "pos_embed": own["embeddings.position_embedding"],
        "patch_embed.proj.weight": own["embeddings.patch_projection.weight"].view(32, 3, 16, 16),
        "patch_embed.proj.bias": torch.zeros(32),
    }
    for key, value in own.items():
        if not key.startswith("encoder.layer") or "layer_scale" in key:
            continue
        key = key.replace("encoder.layer", "blocks").replace("attention.o_proj", "attn.proj")
        if "q_proj" in key:
            source = key.replace("blocks", "encoder.layer")
            value = torch.cat([own[source.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            key = key.replace("attention.q_proj", "attn.qkv")
        if "_proj" not in key:
            state[key] = value
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "w.safetensors")
    pixels = torch.rand(1, 3, *size)
    expected = reference(pixels)
    found = teacher(tmp_path / "w.safetensors").encode(pixels)
    torch.testing.assert_close(found.summary, expected.summary, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        found.spatial.flatten(2).transpose(1, 2), expected.features, rtol=1e-4, atol=1e-5
    )
