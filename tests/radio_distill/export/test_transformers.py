"""transformers' own RadioModel, loaded from the exported folder, is the student."""

import json
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.layers import GELUTanh, QuickGELU, SwiGLUPacked
from torch import nn

from radio_distill.errors import ExportError
from radio_distill.export import transformers as format_
from radio_distill.export.transformers import Transformers
from radio_distill.export.write import export as write

transformers = pytest.importorskip("transformers")
SIZES = [(224, 224), (224, 192), (160, 320), (512, 512), (768, 512)]


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def export(student, folder):
    return write(student, folder, Transformers())


def loaded(folder):
    model = transformers.AutoModel.from_pretrained(folder)
    assert type(model) is transformers.RadioModel
    return model.eval()


@torch.no_grad()
def check_equal(student, model, size):
    pixels = torch.rand(2, 3, *size)
    tokens, spatial = student.model.student(pixels)
    found = model(pixels)
    summary = torch.cat([tokens[:, 0], tokens[:, 2]], dim=1)  # clip and dino; sam has none
    torch.testing.assert_close(found.summary, summary, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        found.features, spatial.flatten(2).transpose(1, 2), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"architecture": "test_vit2", "registers": 0},  # LayerScale, which transformers can drop
        {"patch_size": 32, "spectral_reparametrization": True},
    ],
    ids=["plain", "layer scale", "spectral"],
)
def test_export__auto_model_equals_the_student(make_student, tmp_path, fields):
    student = make_student(**fields)
    folder = export(student, tmp_path / "out")
    model = loaded(folder)
    for size in SIZES:
        check_equal(student, model, size)


def test_export__published_width_equals_the_student(make_student, tmp_path):
    student = make_student(architecture="vit_tiny_patch16_224", registers=7)
    model = loaded(export(student, tmp_path / "out"))
    assert (model.config.hidden_size, model.config.num_hidden_layers) == (192, 12)
    for size in SIZES[:3]:
        check_equal(student, model, size)


def test_export__layer_scale_under_the_published_name_would_be_lost(make_student, tmp_path):
    """The trap exists: transformers reads such a file without an error, as another model."""
    student = make_student(architecture="test_vit2")
    folder = export(student, tmp_path / "out")
    tensors = load_file(folder / "model.safetensors")
    scales = [key for key in tensors if key.endswith(".layer_scale1.lambda1")]
    assert len(scales) == 8
    trapped = {
        key.replace("layer_scale", "ls").replace("lambda1", "grandma"): value
        for key, value in tensors.items()
    }
    save_file(trapped, folder / "model.safetensors", metadata={"format": "pt"})
    loaded(folder)
    with pytest.raises(ExportError, match="take all"):
        list(Transformers().read_back(student, folder))


def test_export__without_a_transformers_that_knows_radio(make_student, tmp_path, monkeypatch):
    student = make_student()
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    sys.modules["transformers"].__version__ = "5.0"
    with pytest.raises(ExportError, match=r"transformers 5\.0"):
        export(student, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match="transformers"):
        export(student, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", ["another value", "another epsilon", "another activation"])
def test_export__what_reads_back_differently_gets_no_folder(
    make_student, tmp_path, monkeypatch, damage
):
    student = make_student()
    config, tensors = format_._config(student), format_._tensors(student)
    if damage == "another value":
        key = "radio_model.model.blocks.3.attn.proj.bias"
        tensors[key] = tensors[key] + 0.1
    elif damage == "another epsilon":
        config.layer_norm_eps = 1e-2
    else:
        config.hidden_act = "relu"
    monkeypatch.setattr(format_, "_tensors", lambda _: tensors)
    monkeypatch.setattr(format_, "_config", lambda _: config)
    with pytest.raises(ExportError, match="differs"):
        export(student, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def swiglu(student, hidden):
    """Give a student the MLP of DINOv2's giant."""
    for block in student.model.student.blocks:
        block.mlp = SwiGLUPacked(64, 2 * hidden)
        for parameter in block.mlp.parameters():
            nn.init.normal_(parameter, std=0.1)
    return student


def test_export__swiglu(make_student, tmp_path):
    student = swiglu(make_student(), hidden=168)
    check_equal(student, loaded(export(student, tmp_path / "out")), (64, 96))
    with pytest.raises(ExportError, match=r"SwiGLU.* 172.* 8"):
        Transformers().check(swiglu(student, hidden=172))


@pytest.mark.parametrize("activation", [GELUTanh, QuickGELU])
def test_export__activation(make_student, tmp_path, activation):
    student = make_student()
    for block in student.model.student.blocks:
        block.mlp.act = activation()
    check_equal(student, loaded(export(student, tmp_path / "out")), (64, 96))


def test_export__every_width_of_mlp_survives_the_ratio(make_student):
    """RadioModel keeps no width of the MLP but a ratio, and cuts the product down."""
    for width, hidden in [(1152, 4304), (1152, 4320), (320, 1792), (832, 2176), (64, 192)]:
        shape = format_.BlockShape(2, hidden, "gelu", 1e-6, True, False, False)
        assert int(width * format_._mlp_ratio(shape, width)) == hidden


def test_export__preprocessor_gives_pixels_in_zero_to_one(make_student, tmp_path):
    from PIL import Image

    folder = export(make_student(), tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    pixels = processor(Image.new("RGB", (100, 70), (255, 51, 0)), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 48)  # the size that the stage trained at
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, 0.2, 0.0]))


def test_export__heads_and_their_description(make_student, tmp_path):
    student = make_student()
    folder = export(student, tmp_path / "out")
    heads = load_file(folder / "adaptors.safetensors")
    assert heads.keys() == student.model.adaptors.state_dict().keys()
    assert torch.equal(
        heads["sam.spatial.final.2.weight"],
        student.model.heads["sam"].spatial.final[2].weight,
    )
    described = json.loads((folder / "radio_distill.json").read_text())
    assert described["summary_slots"] == {"clip": 0, "dino": 2}
    assert list(described["teachers"]) == ["clip", "sam", "dino"]
    assert described["student"]["architecture"] == "test_vit"
    assert (described["recipe"], described["stage"], described["step"]) == ("tiny", "stage1", 7)


def test_export__no_teacher_has_a_summary(make_student, tmp_path):
    student = make_student(teachers=("sam",))
    model = loaded(export(student, tmp_path / "out"))
    assert model(torch.rand(1, 3, 32, 32)).summary.shape == (1, 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"window_size": 2, "global_blocks": 2}, "student.window_size 2"),
        ({"final_norm": True}, "student.final_norm"),
        ({"architecture": "test_vit4"}, "its norms are RmsNorm"),
        ({"architecture": "vit_xsmall_patch16_clip_224"}, "a norm before its blocks"),
        ({"architecture": "vit_pwee_patch16_reg1_gap_256"}, "its blocks are ParallelScalingBlock"),
    ],
)
def test_check__what_radio_model_cannot_hold(make_student, tmp_path, fields, reason):
    student = make_student(**fields)
    with pytest.raises(ExportError) as caught:
        export(student, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith("transformers cannot hold student.")
    assert reason in message
    assert message.endswith("export it as onnx")
    assert not (tmp_path / "out").exists()


def test_check__norms_of_queries_and_keys(make_student):
    student = make_student()
    student.model.student.blocks[1].attn.q_norm = nn.LayerNorm(32)
    with pytest.raises(ExportError, match="queries and keys"):
        Transformers().check(student)
