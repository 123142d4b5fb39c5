"""Weights of timm models: what arrives, at other patch sizes and grids, and what is refused."""

from dataclasses import replace
from functools import partial
from hashlib import sha256

import pytest
import timm
import torch
from safetensors.torch import save_file

from radio_distill.config import StudentConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.models import student as students
from radio_distill.system.trust import trusting_pickles
from radio_distill.weights.pretrained import initialise, read_pretrained

ARCHITECTURE = "vit_tiny_patch16_224"
Student = partial(students.Student, initialise=initialise)


@pytest.fixture
def reference():
    model = timm.create_model(ARCHITECTURE, num_classes=10, final_norm=False).eval()
    with torch.no_grad():
        model.cls_token.normal_()
        model.pos_embed.normal_()
        model.patch_embed.proj.bias.normal_()
    return model


@pytest.fixture
def weights_file(reference, tmp_path):
    return save(reference.state_dict(), tmp_path / "weights.safetensors")


def save(state, path):
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    return path


@torch.no_grad()
def test_file__same_grid_gives_timms_features(reference, weights_file, student_config):
    """Also class token, its position, and the bias of the patch embedding find their place."""
    config = student_config(pretrained=str(weights_file), max_size=224, registers=0)
    student, pixels = Student(config, num_summary_tokens=1).eval(), torch.rand(2, 3, 224, 224)
    summary, spatial = student(pixels)
    expected = reference.forward_features((pixels - student.mean) / student.std)
    torch.testing.assert_close(summary, expected[:, :1], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        spatial.flatten(2).transpose(1, 2), expected[:, 1:], atol=2e-4, rtol=1e-4
    )


def test_file__torch_and_safetensors_are_read_alike(
    reference, weights_file, student_config, tmp_path
):
    torch.save(reference.state_dict(), tmp_path / "weights.pth")
    students = []
    for name in ("weights.pth", weights_file.name):
        torch.manual_seed(0)  # registers are new
        students.append(Student(student_config(pretrained=str(tmp_path / name)), 2).state_dict())
    torch.testing.assert_close(*students, atol=0, rtol=0)


@torch.no_grad()
def test_file__patch_size_is_resampled_for_a_resized_image(weights_file, student_config):
    """An image of twice the size, in patches of twice the size, has nearly equal embeddings."""
    sizes = {}
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=64, mode="bicubic")
    for patch_size in (16, 32):
        config = student_config(pretrained=str(weights_file), patch_size=patch_size)
        student = Student(config, num_summary_tokens=1)
        factor = patch_size // 16
        pixels = torch.nn.functional.interpolate(smooth, scale_factor=factor, mode="bilinear")
        sizes[patch_size] = student._embed(pixels).flatten()
    similarity = torch.nn.functional.cosine_similarity(sizes[16], sizes[32], dim=0)
    assert similarity > 0.995


@torch.no_grad()
def test_file__positions_are_resampled_to_the_table(reference, weights_file, student_config):
    """Smooth positions survive the way to a larger table and back to timm's grid."""
    rows = torch.linspace(0, 1, 14)
    smooth = (torch.sin(3 * rows)[:, None] + torch.cos(2 * rows)[None, :])[..., None] * torch.randn(
        192
    )
    reference.pos_embed[:, 1:] = smooth.flatten(0, 1)
    save(reference.state_dict(), weights_file)
    student = Student(student_config(pretrained=str(weights_file), max_size=1024), 1)
    found = student.positions((14, 14))[0] - reference.patch_embed.proj.bias
    assert student.positions.table.shape == (64, 64, 192)
    assert (found - smooth).abs().max() < 0.03 * smooth.abs().max()


def test_file__of_another_image_size(student_config, tmp_path):
    larger = timm.create_model(ARCHITECTURE, num_classes=0, img_size=384)
    path = save(larger.state_dict(), tmp_path / "larger.safetensors")
    student = Student(student_config(pretrained=str(path), max_size=384), num_summary_tokens=1)
    expected = larger.pos_embed[0, 1:].view(24, 24, 192) + larger.patch_embed.proj.bias
    torch.testing.assert_close(student.positions.table, expected)


def test_file__registers_take_those_of_the_model(student_config, tmp_path):
    architecture = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(architecture, num_classes=0, img_size=56)
    torch.nn.init.normal_(model.reg_token)
    path = save(model.state_dict(), tmp_path / "registers.safetensors")
    config = student_config(architecture=architecture, pretrained=str(path), registers=6)
    tokens = Student(config, num_summary_tokens=2).prefix_tokens
    torch.testing.assert_close(tokens[0], model.cls_token[0, 0])
    torch.testing.assert_close(tokens[1], model.cls_token[0, 0])
    torch.testing.assert_close(tokens[2:6], model.reg_token[0])
    assert tokens[6:].std() > 0.01  # two new registers


def test_file__without_class_token_leaves_summary_tokens_random(student_config, tmp_path):
    architecture = "vit_wee_patch16_reg1_gap_256"
    model = timm.create_model(architecture, num_classes=0)
    path = save(model.state_dict(), tmp_path / "pooled.safetensors")
    student = Student(student_config(architecture=architecture, pretrained=str(path)), 2)
    assert student.prefix_tokens[:2].std().item() == pytest.approx(256**-0.5, rel=0.1)
    torch.testing.assert_close(student.prefix_tokens[2], model.reg_token[0, 0])
    expected = dict(model.blocks.named_parameters())
    for name, value in student.blocks.named_parameters():
        assert torch.equal(value, expected[name])


def broken(change, path):
    state = timm.create_model(ARCHITECTURE, num_classes=0).state_dict()
    change(state)
    return save(state, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.3.mlp.fc1.weight"), r"blocks\.3\.mlp\.fc1\.weight"),
        (lambda s: s.pop("pos_embed"), "pos_embed"),
        (
            lambda s: s.update({"blocks.12.norm1.bias": torch.ones(1)}),
            r"blocks\.12\.norm1\.bias",
        ),
        (
            lambda s: s.update({"blocks.0.norm1.weight": torch.ones(384)}),
            r"blocks\.0\.norm1\.weight .*\[384\].*\[192\]",
        ),
        (
            lambda s: s.update({"pos_embed": torch.ones(1, 198, 192)}),
            "pos_embed .*197",
        ),
    ],
)
def test_file__wrong_weights_name_the_key(change, message, student_config, tmp_path):
    path = broken(change, tmp_path / "wrong.safetensors")
    with pytest.raises(WeightsError, match=message) as caught:
        Student(student_config(pretrained=str(path)), num_summary_tokens=1)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_file__of_another_architecture(student_config, tmp_path):
    path = save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.safetensors")
    with pytest.raises(WeightsError, match=rf"{path} .*{ARCHITECTURE}: .* missing"):
        Student(student_config(pretrained=str(path)), num_summary_tokens=1)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pth"])
def test_file__missing_or_damaged(name, student_config, tmp_path):
    config = student_config(pretrained=str(tmp_path / name))
    with pytest.raises(WeightsError, match="no weights"):
        Student(config, num_summary_tokens=1)
    (tmp_path / name).write_bytes(b"not weights")
    with pytest.raises(WeightsError, match="weights"):
        Student(config, num_summary_tokens=1)


def test_file__code_in_it_runs_only_where_it_is_trusted(student_config, reference, trap, tmp_path):
    path = tmp_path / "bomb.pth"
    torch.save({"model": reference.state_dict(), "cfg": trap}, path)
    config = student_config(pretrained=str(path))
    with pytest.raises(WeightsError, match=r"io\.open"):
        Student(config, num_summary_tokens=1)
    assert not trap.ran.exists()
    with trusting_pickles():
        Student(config, num_summary_tokens=1)
    assert trap.ran.exists()


def test_read_pretrained__has_the_sum_that_the_recipe_says(reference, write_run, tmp_path):
    file, folder, run = tmp_path / "w.pth", tmp_path / "folder", write_run()
    torch.save(reference.state_dict(), file)
    folder.mkdir()
    save(reference.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    meta = run / "stage1" / "checkpoints" / "step-00000007" / "meta.json"
    body: torch.nn.Module = timm.create_model("test_vit", num_classes=0)
    cases = [
        (file, file, reference),
        (folder, folder / "model.safetensors", reference),
        (run, meta, body),
    ]
    for pretrained, summed, model in cases:
        found = sha256(summed.read_bytes()).hexdigest()
        config = StudentConfig(pretrained=str(pretrained), pretrained_sha256=found)
        assert read_pretrained(config, model).weights
        message = (
            rf"^student\.pretrained_sha256: \S+{summed.name} has sha256 {found}, .* {'0' * 64}"
        )
        with pytest.raises(WeightsError, match=message):
            read_pretrained(replace(config, pretrained_sha256="0" * 64), model)
    config = StudentConfig(pretrained="timm", pretrained_sha256="0" * 64)
    with pytest.raises(ConfigError, match="timm"):
        read_pretrained(config, reference)


def test_file__that_is_no_state_dict(student_config, tmp_path):
    torch.save({"model": {"epoch": 3}}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match="no tensors"):
        Student(student_config(pretrained=str(tmp_path / "empty.pth")), num_summary_tokens=1)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Return an empty hub cache that is the hub's only source."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_timm__weights_come_from_the_hub(hub_cache, reference, student_config):
    state = timm.create_model(ARCHITECTURE).state_dict()
    hub_id = timm.get_pretrained_cfg(ARCHITECTURE).hf_hub_id.removesuffix("/")
    folder = hub_cache / ("models--" + hub_id.replace("/", "--"))
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save(state, snapshot / "model.safetensors")
    student = Student(student_config(pretrained="timm"), num_summary_tokens=1)
    for name, value in student.blocks.named_parameters():
        assert torch.equal(value, state[f"blocks.{name}"])
    expected = state["patch_embed.proj.weight"].flatten(1)
    torch.testing.assert_close(student.patch_embedding.weight, expected)


@pytest.mark.usefixtures("hub_cache")
def test_timm__hub_out_of_reach(student_config):
    with pytest.raises(WeightsError, match=f"{ARCHITECTURE}") as caught:
        Student(student_config(pretrained="timm"), num_summary_tokens=1)
    assert "\n" not in str(caught.value)
