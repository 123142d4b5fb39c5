"""A student starts as what it starts from: the features are equal before any training."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from radio_distill.config import StudentConfig
from radio_distill.errors import CheckpointError, WeightsError
from radio_distill.export.folded import folded
from radio_distill.models.student import Student
from radio_distill.train import checkpoint as checkpoints
from radio_distill.weights.pretrained import (
    PretrainedWeights,
    check_architecture,
    initialise,
)

SIZES = [(64, 64), (64, 96), (48, 32)]


def start(path, num_summary_tokens=3, **fields):
    defaults = {"architecture": "test_vit", "max_size": 256, "registers": 2}
    config = StudentConfig(**{**defaults, "pretrained": str(path), **fields})
    return Student(config, num_summary_tokens, initialise=initialise).eval()


@torch.no_grad()
def check_equal(student, reference, sizes=SIZES):
    """``reference`` maps pixels to (summary tokens, map)."""
    for size in sizes:
        pixels = torch.rand(1, 3, *size)
        for found, expected in zip(student(pixels), reference(pixels), strict=True):
            assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def write_radio(folder, architecture="test_vit"):
    """Write a RadioModel of the body of one of timm's models, with LayerScale that is not 1."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    body = timm.create_model(architecture)
    config = transformers.RadioConfig(
        hidden_size=body.embed_dim,
        num_hidden_layers=len(body.blocks),
        num_attention_heads=body.blocks[0].attn.num_heads,
        mlp_ratio=body.blocks[0].mlp.fc1.out_features / body.embed_dim,
        patch_size=16,
        max_img_size=256,
        num_cls_tokens=3,
        num_registers=2,
        norm_mean=(0.1, 0.2, 0.3),
        norm_std=(0.4, 0.5, 0.6),
        initializer_range=0.1,
    )
    model = transformers.RadioModel(config).eval()
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            parameter.data.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture
def radio_folder(tmp_path):
    return write_radio(tmp_path / "radio")


def radio_outputs(model):
    def run(pixels):
        tokens = model(pixels).last_hidden_state
        grid = pixels.shape[-2] // 16, pixels.shape[-1] // 16
        return tokens[:, :3], tokens[:, 5:].transpose(1, 2).unflatten(2, grid)

    return run


@pytest.mark.parametrize(
    ("architecture", "has_layer_scale"), [("test_vit", False), ("test_vit2", True)]
)
def test_radio_folder__gives_its_features(tmp_path, architecture, has_layer_scale):
    """LayerScale is folded into a body without it, and kept by one with it."""
    folder, model = write_radio(tmp_path, architecture)
    student = start(folder, architecture=architecture)
    assert any("ls1.gamma" in key for key in student.state_dict()) == has_layer_scale
    check_equal(student, radio_outputs(model))
    assert student.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert student.std.flatten().tolist() == pytest.approx([0.4, 0.5, 0.6])


def test_radio_folder__a_smaller_table_gives_the_same_at_its_size(radio_folder):
    folder, model = radio_folder
    check_equal(start(folder, max_size=64), radio_outputs(model), sizes=[(64, 64), (64, 32)])


@torch.no_grad()
def test_radio_folder__tokens_are_taken_in_order(radio_folder):
    folder, model = radio_folder
    tokens = model.embeddings.cls_register_token
    fewer = start(folder, num_summary_tokens=2, registers=1).prefix_tokens
    torch.testing.assert_close(fewer, tokens[[0, 1, 3]])
    more = start(folder, num_summary_tokens=5, registers=3).prefix_tokens
    torch.testing.assert_close(more[:7], tokens[[0, 1, 2, 0, 0, 3, 4]])
    assert more[7].std() > 0.01


def test_radio_folder__another_number_of_heads_is_refused(radio_folder):
    """No tensor's shape tells it, so the features would be wrong in silence."""
    folder, _ = radio_folder
    settings = json.loads((folder / "config.json").read_text())
    settings["num_attention_heads"] //= 2
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match=r"1 attention heads.* 2"):
        start(folder)


def test_radio_folder__settings_that_are_missing_are_named(radio_folder):
    folder, _ = radio_folder
    settings = json.loads((folder / "config.json").read_text())
    del settings["patch_size"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(WeightsError, match="patch_size"):
        start(folder)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_radio_folder__another_architecture_is_refused(radio_folder, architecture):
    folder, _ = radio_folder
    message = f"{folder} does not hold weights of {architecture}: "
    with pytest.raises(WeightsError, match=message) as caught:
        start(folder, architecture=architecture)
    assert "\n" not in str(caught.value)


def timm_radio(tmp_path):
    """A small model in the arrangement of timm's RADIO models: one class token, seven registers."""
    torch.manual_seed(2)
    model = timm.create_model(
        "test_vit",
        img_size=64,
        num_classes=0,
        reg_tokens=7,
        no_embed_class=True,
        final_norm=False,
        init_values=1e-5,
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim < 4:
            parameter.data.normal_(0.0 if parameter.ndim > 1 else 1.0, 0.2)
    torch.nn.init.zeros_(model.patch_embed.proj.bias)
    save_file(model.state_dict(), tmp_path / "radio.safetensors")
    return tmp_path / "radio.safetensors", model


def test_timm_radio__gives_its_features(tmp_path):
    path, model = timm_radio(tmp_path)
    student = start(path, num_summary_tokens=1, registers=7, max_size=64)

    def run(pixels):
        tokens = model.forward_features((pixels - student.mean) / student.std)
        return tokens[:, :1], tokens[:, 8:].transpose(1, 2).unflatten(2, (4, 4))

    check_equal(student, run, sizes=[(64, 64)])


def test_timm_radio__is_a_start_of_timm_s_own_architecture():
    """With it come LayerScale and the mean and std that RADIO was trained with."""
    with torch.device("meta"):
        body = timm.create_model("vit_base_patch16_radio_v3", num_classes=0)
    from timm.data import resolve_model_data_config

    check_architecture(
        PretrainedWeights(body.state_dict()), body, "it", "vit_base_patch16_radio_v3"
    )
    assert resolve_model_data_config(body)["mean"] == timm.data.OPENAI_CLIP_MEAN


@pytest.mark.parametrize("spectral", [False, True])
def test_run__gives_its_features(write_run, spectral):
    run = write_run(spectral_reparametrization=spectral)
    student = start(run)
    check_equal(student, folded(checkpoints.find(run / "stage1")).model.student)
    check_equal(start(run / "stage1", spectral_reparametrization=True), student)


def test_run__with_a_final_norm_keeps_it(write_run):
    run = write_run(final_norm=True)
    reference = folded(checkpoints.find(run / "stage1")).model.student
    check_equal(start(run, final_norm=True), reference)
    assert isinstance(start(run).norm, torch.nn.Identity)


def test_run__of_another_architecture_is_refused(write_run):
    run = write_run(architecture="test_vit2")
    with pytest.raises(WeightsError, match=r"test_vit: blocks\.6\..* unexpected"):
        start(run)


def test_run__takes_over_mean_and_std(write_run, radio_folder):
    run = write_run(pretrained=str(radio_folder[0]))
    assert start(run).mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_export__gives_the_features_of_its_run(write_run, tmp_path):
    from radio_distill.export.transformers import Transformers
    from radio_distill.export.write import export

    run = write_run()
    export(folded(checkpoints.find(run / "stage1")), tmp_path / "export", Transformers())
    check_equal(start(tmp_path / "export"), start(run))


def test_timm_export__gives_the_features_of_its_run(write_run, tmp_path):
    """timm calls all prefix tokens but the first registers."""
    from radio_distill.export.timm import Timm
    from radio_distill.export.write import export

    run = write_run()
    export(folded(checkpoints.find(run / "stage1")), tmp_path / "timm", Timm())
    whole = start(run)

    def with_first_token(pixels):
        tokens, spatial = whole(pixels)
        return tokens[:, :1], spatial

    student = start(tmp_path / "timm", num_summary_tokens=1, registers=4)
    check_equal(student, with_first_token)


def test_folder__that_is_no_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run"):
        start(tmp_path)
