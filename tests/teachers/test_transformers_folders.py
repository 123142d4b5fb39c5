"""Folders of transformers' models: configurations as they come, and models of no known family."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from teachers import build_teacher

transformers = pytest.importorskip("transformers")
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
FLAT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "image_size": 64, "patch_size": 16}  # fmt: skip
STAGED = {"hidden_sizes": [8, 8, 16, 32], "depths": [1, 1, 1, 1]}
SWIN = {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1],
        "window_size": 2}  # fmt: skip
STEM = {**STAGED, "embedding_size": 8}

# Kind: (class that is saved, its tower, configuration, stride, tokens before the patches).
MODELS = {
    "vit": ("ViTForImageClassification", "vit", FLAT, 16, 1),
    "deit": ("DeiTForImageClassificationWithTeacher", "deit", FLAT, 16, 2),
    "beit": ("BeitForImageClassification", "beit", {**FLAT, "use_relative_position_bias": True},
             16, 1),
    "ijepa": ("IJepaModel", "", FLAT, 16, 0),
    "vit_msn": ("ViTMSNModel", "", FLAT, 16, 1),
    "swin": ("SwinForImageClassification", "swin", SWIN, 32, 0),
    "hiera": ("HieraModel", "", {**SWIN, "image_size": [64, 64], "masked_unit_size": [8, 8]},
              32, 0),
    "convnextv2": ("ConvNextV2ForImageClassification", "convnextv2", {**STAGED, "image_size": 64},
                   32, None),
    "resnet": ("ResNetForImageClassification", "resnet", {**STEM, "layer_type": "basic"}, 32, None),
    "regnet": ("RegNetForImageClassification", "regnet", {**STEM, "groups_width": 8}, 32, None),
    "segformer": ("SegformerForImageClassification", "segformer",
                  {**STAGED, "num_attention_heads": [1, 1, 1, 1]}, 32, None),
}  # fmt: skip


def folder_of(model, path, **processor):
    model.save_pretrained(path)
    if processor:
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(path)


def load(folder, **options):
    return build_teacher("t", TeacherConfig(preset="transformers", weights=folder, options=options))


def model_of(kind, name, values):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **values)
    return getattr(transformers, name)(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_generic__equals_the_library_s_last_hidden_state(kind, tmp_path):
    name, tower, values, stride, prefix = MODELS[kind]
    model = model_of(kind, name, values)
    teacher = load(folder_of(model, tmp_path), native_size=64, **HALF)
    assert (teacher.spec.patch_size, teacher.spec.native_size) == (stride, (64, 64))
    pixels = torch.rand(2, 3, 64, 64)
    summary, spatial = teacher.encode(pixels)
    inside = getattr(model, tower or "_", model)
    output = inside((pixels - 0.5) / 0.5, output_hidden_states=True)
    expected = output.last_hidden_state
    if prefix is None:
        torch.testing.assert_close(spatial, expected)
    else:
        torch.testing.assert_close(spatial.flatten(2).mT, expected[:, prefix:])
    if prefix:
        torch.testing.assert_close(summary, expected[:, 0])
        inner, last = teacher.layers(pixels, 2)
        half = (len(output.hidden_states) - 1) // 2  # the first are the embeddings
        expected = inside.layernorm(output.hidden_states[half])[:, 0]
        torch.testing.assert_close(inner.summary, expected)
        torch.testing.assert_close(last.summary, summary)
    assert summary.shape == (2, teacher.spec.summary_channels)
    if not teacher.spec.fixed_size:
        other = teacher.encode(torch.rand(1, 3, 2 * stride, 3 * stride))
        assert other.spatial.shape == (1, teacher.spec.channels, 2, 3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "refused"), [("vit", ["pool"]), ("ijepa", ["token", "token_and_mean"])]
)
def test_generic__summary_is_what_the_option_says(kind, refused, tmp_path):
    name, _, values, _, _ = MODELS[kind]
    folder = folder_of(model_of(kind, name, values), tmp_path)
    for choice in refused:
        with pytest.raises(ConfigError, match=rf"options\.summary: {choice}: "):
            load(folder, summary=choice, **HALF)
    pixels, plain = torch.rand(2, 3, 64, 64), load(folder, **HALF)
    usual, spatial = plain.encode(pixels)
    mean = spatial.mean((2, 3))
    if kind == "vit":
        both = load(folder, summary="token_and_mean", **HALF)
        assert both.spec.summary_channels == 64
        torch.testing.assert_close(both.encode(pixels).summary, torch.cat([usual, mean], 1))
    else:
        pooled = load(folder, summary="pool", **HALF).encode(pixels).summary
        torch.testing.assert_close(pooled, mean)


def test_generic__a_model_that_masks_its_input_is_no_teacher(tmp_path):
    decoder = {"decoder_num_attention_heads": 2, "decoder_hidden_size": 32,
               "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}  # fmt: skip
    model = model_of("vit_mae", "ViTMAEForPreTraining", {**FLAT, **decoder})
    with pytest.raises(ConfigError, match=r"5 tokens.*64x64 px.* 16 px"):
        load(folder_of(model, tmp_path), **HALF)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "bert"}, "'bert'"),
        ({"model_type": "siglip2", "vision_config": {}}, "NaFlex"),
        ({"architecture": "resnet18"}, "preset: timm"),
        ({"model_type": "vit", "image_size": [64, 32]}, r"options\.native_size"),
        ({"model_type": "resnet"}, r"options\.native_size"),
        ({"model_type": "vit", "hidden_act": "none"}, "ViTModel"),
        ({"model_type": "dinov2", "hidden_size": "many"}, "'dinov2'"),
    ],
)
def test_folder__what_cannot_be_a_teacher_is_one_line(settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message) as error:
        load(str(tmp_path), **HALF)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@torch.no_grad()
@pytest.mark.parametrize("inner", [None, 16, 24])
def test_clip__the_width_of_its_projection_is_the_whole_model_s(inner, tmp_path):
    """It may stand at the top of config.json alone, or beside a stale one in vision_config."""
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
            "num_attention_heads": 2, "vocab_size": 50}  # fmt: skip
    config = transformers.CLIPConfig(vision_config=FLAT, text_config=text, projection_dim=24)
    model = transformers.CLIPModel(config).eval()
    folder = folder_of(model, tmp_path, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["projection_dim"] = 24
    settings["vision_config"].pop("projection_dim", None)
    if inner:
        settings["vision_config"]["projection_dim"] = inner
    (tmp_path / "config.json").write_text(json.dumps(settings))
    teacher = load(folder)
    assert teacher.spec.summary_channels == 24
    pixels = torch.rand(1, 3, 64, 64)
    found = model.get_image_features((pixels - 0.5) / 0.5)
    expected = getattr(found, "pooler_output", found)
    torch.testing.assert_close(teacher.encode(pixels).summary, expected)


@pytest.mark.parametrize(
    ("kind", "example"),
    [
        ("clip_vision_model", r"mean: \[0.4815, 0.4578, 0.4082\]"),
        ("siglip_vision_model", r"mean: \[0.5, 0.5, 0.5\], std: \[0.5, 0.5, 0.5\]"),
        ("dinov2", r"mean: \[0.485, 0.456, 0.406\], std: \[0.229, 0.224, 0.225\]"),
        ("vit", r"options: \{mean: \["),
    ],
)
def test_folder__without_normalisation_an_example_is_shown(kind, example, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match=rf"preprocessor_config.json.*{example}") as error:
        load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_folder__normalisation_in_the_file_of_all_processors(tmp_path):
    folder = folder_of(model_of("vit", "ViTModel", FLAT), tmp_path)
    inner = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "rescale_factor": 1 / 255}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    spec = load(folder).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    assert (load(folder).spec.mean, load(folder).spec.std) == ((0, 0, 0), (1, 1, 1))
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"rescale_factor": 1 / 127.5, "image_mean": [1] * 3, "image_std": [1] * 3})
    )
    with pytest.raises(ConfigError, match=r"1/255.*options.mean.*options.std"):
        load(folder)
    assert load(folder, **HALF).spec.mean == (0.5, 0.5, 0.5)


def test_folder__a_tower_inside_a_larger_model(tmp_path):
    """A prefix of another trainer is found, and what is beside the tower is left out."""
    model = model_of("dinov2", "Dinov2Model", {k: FLAT[k] for k in FLAT if k[:5] != "inter"})
    folder = folder_of(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    wrapped = {f"model.vision_tower.{key}": value for key, value in state.items()}
    save_file({**wrapped, "model.text.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    teacher, pixels = load(folder, **HALF), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model((pixels - 0.5) / 0.5).last_hidden_state[:, 1:]
    torch.testing.assert_close(teacher.encode(pixels).spatial.flatten(2).mT, expected)
