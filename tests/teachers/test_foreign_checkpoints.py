"""Weights under the names of other trainers, hub folders, and what must not be loaded in part."""

import json
import logging
import re
from argparse import Namespace

import pytest
import timm
import torch
from safetensors.torch import save_file

from radio_distill.config import StudentConfig, TeacherConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.models.student import Student
from radio_distill.system.trust import trusting_pickles
from radio_distill.weights.files import named_as, read_state
from radio_distill.weights.pretrained import initialise
from teachers import build_teacher

SMALL = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}


def vit(seed=0, **options):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **{**SMALL, **options}).eval()
    for value in model.parameters():
        value.data.add_(0.1 * torch.randn_like(value))
    return model


def teacher(path, **options):
    options = {"model": "vit_tiny_patch16_224", "create": SMALL, "native_size": 48,
               "mean": [0.5] * 3, "std": [0.5] * 3, **options}  # fmt: skip
    return build_teacher("t", TeacherConfig(preset="timm", weights=str(path), options=options))


@torch.no_grad()
def same(found, model, size=48):
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    expected = model.forward_features((pixels - 0.5) / 0.5)[:, model.num_prefix_tokens :]
    return torch.allclose(found.encode(pixels).spatial.flatten(2).mT, expected, atol=1e-5)


def under(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


PREFIXES = ["model.", "_orig_mod.", "backbone.", "module.", "encoder.", "module._orig_mod.",
            "model.backbone.", "net.visual.trunk.", "teacher.backbone.",
            "student.backbone."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
def test_timm__a_prefix_is_taken_off_and_said(prefix, tmp_path, caplog):
    model = vit()
    state = under(prefix, model.state_dict())
    save_file({**state, "head.mlp.0.weight": torch.zeros(3, 3)}, tmp_path / "w.safetensors")
    with caplog.at_level(logging.INFO):
        assert same(teacher(tmp_path / "w.safetensors"), model)
    if prefix.replace("module.", "").replace("_orig_mod.", ""):
        assert f"took {len(state)} tensors under '{prefix}'" in caplog.text
        assert "left out 1 others (head)" in caplog.text


@pytest.mark.parametrize("prefix", ["", "backbone.", "module.encoder."])
def test_timm__nothing_is_loaded_in_part(prefix, tmp_path):
    state = under(prefix, vit().state_dict())
    first = next(iter(state))
    for kind, changed in {
        "missing": {key: value for key, value in state.items() if key != first},
        "unexpected": {**state, f"{prefix}surplus.weight": torch.zeros(1)},
    }.items():
        save_file(changed, tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=f"1 {kind}") as error:
            teacher(tmp_path / "w.safetensors")
        assert "\n" not in str(error.value)


def test_timm__compiled_blocks(tmp_path):
    model = vit()
    state = {key.replace("blocks.1.", "blocks.1._orig_mod."): value
             for key, value in model.state_dict().items()}  # fmt: skip
    torch.save({"model_ema": state, "model": {"x": torch.zeros(1)}, "epoch": 3}, tmp_path / "w.pt")
    assert same(teacher(tmp_path / "w.pt"), model)


def dino(student, averaged, prefix="backbone."):
    heads = {"head.last_layer.weight": torch.zeros(4, 4), "head.mlp.0.bias": torch.zeros(2)}
    return {
        "student": under("module.", {**under(prefix, student.state_dict()), **heads}),
        "teacher": {**under(prefix, averaged.state_dict()), **heads},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100,
        "args": Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


def test_dino__a_training_checkpoint_gives_its_teacher(tmp_path, caplog):
    student, averaged = vit(1), vit(2)
    torch.save(dino(student, averaged), tmp_path / "checkpoint0100.pth")
    with caplog.at_level(logging.INFO):
        assert same(teacher(tmp_path / "checkpoint0100.pth"), averaged)
    assert "under 'teacher.backbone.'" in caplog.text
    assert "student" in caplog.text
    asked = teacher(tmp_path / "checkpoint0100.pth", prefix="student.module.backbone.")
    assert same(asked, student)
    with pytest.raises(WeightsError, match=r"'techer.'"):
        teacher(tmp_path / "checkpoint0100.pth", prefix="techer.")


def test_dino__as_the_start_of_a_student(tmp_path):
    torch.manual_seed(0)
    averaged = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    teacher_state = under("backbone.", averaged.state_dict())
    student_state = under("module.backbone.", vit().state_dict())
    torch.save({"teacher": teacher_state, "student": student_state}, tmp_path / "c.pth")
    config = StudentConfig(architecture="vit_tiny_patch16_224", pretrained=str(tmp_path / "c.pth"))
    student = Student(config, 1, initialise=initialise)
    for key in ("norm1.weight", "attn.qkv.weight", "mlp.fc2.bias"):
        expected = averaged.blocks[5].state_dict()[key]
        torch.testing.assert_close(student.blocks[5].state_dict()[key], expected)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("chunked", [True, False])
def test_dinov2__a_training_checkpoint_of_either_layout(flat, chunked, tmp_path):
    """With mask token, registers, LayerScale, and blocks in FSDP's chunks."""
    model = vit(3, reg_tokens=2, no_embed_class=True, init_values=0.5)
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    table = torch.randn(1, 1, 32)  # DINOv2's own has a row for the class token, apart from it
    state["pos_embed"] = torch.cat((table, state["pos_embed"]), dim=1)
    state["cls_token"] = state["cls_token"] - table
    state["mask_token"] = torch.zeros(1, 32)
    if chunked:
        state = {key.replace("blocks.", "blocks.0.", 1) if key < "blocks.2" else
                 key.replace("blocks.", "blocks.1.", 1): value
                 for key, value in state.items()}  # fmt: skip
    tensors = {**under("backbone.", state), "dino_head.last_layer.weight": torch.zeros(3, 3)}
    held = under("teacher.", tensors) if flat else {"teacher": tensors}
    torch.save({"model": held} if flat else held, tmp_path / "w.pth")
    found = teacher(
        tmp_path / "w.pth",
        model="vit_small_patch14_reg4_dinov2",
        create={**SMALL, "reg_tokens": 2, "init_values": 0.5, "mlp_ratio": 4.0},
    )
    assert same(found, model)


def test_dino__a_pickled_module_needs_the_flag(tmp_path):
    model = vit()
    torch.save({"teacher": torch.nn.ModuleDict({"backbone": model})}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="--trust-checkpoint"):
        teacher(tmp_path / "w.pth")
    with trusting_pickles():
        assert same(teacher(tmp_path / "w.pth"), model)


def test_timm__two_models_alike_are_not_chosen_from(tmp_path):
    both = {
        **under("base_encoder.", vit(1).state_dict()),
        **under("momentum_encoder.", vit(2).state_dict()),
    }
    save_file(both, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"base_encoder\., momentum_encoder\."):
        teacher(tmp_path / "w.safetensors")
    assert teacher(tmp_path / "w.safetensors", prefix="base_encoder.").spec.channels == 32


def test_timm__a_file_of_another_size_is_not_resampled_twice(tmp_path):
    """Its own table goes to the image's grid in one step, where the recipe says its size too."""
    model = vit(img_size=64, dynamic_img_size=True)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"64x64 px.*options.native_size: 64"):
        teacher(tmp_path / "w.safetensors")
    found = teacher(tmp_path / "w.safetensors", native_size=64)
    assert same(found, model, 64)
    assert same(found, model, 96)


def test_named_as__efficientnet_blocks_are_no_chunks():
    wanted = {"blocks.0.0.bn1.weight", "blocks.1.0.bn1.weight"}
    state = {key: torch.zeros(1) for key in wanted}
    assert named_as(state, wanted, "here").keys() == wanted


def test_read_state__leaves_optimizer_and_arguments_out_and_takes_averages_first(tmp_path):
    torch.save({"net": {"w": torch.ones(1)}, "optimizer": {"state": {0: torch.zeros(1)}}},
               tmp_path / "w.pt")  # fmt: skip
    assert read_state(tmp_path / "w.pt") == {"net.w": torch.ones(1)}
    wrapped = {"state_dict": {"w": torch.zeros(1)}, "state_dict_ema": {"module.w": torch.ones(1)}}
    torch.save(wrapped, tmp_path / "w.pt")
    assert read_state(tmp_path / "w.pt") == {"w": torch.ones(1)}
    torch.save({"epoch": 3, "optimizer": {"state": torch.zeros(1)}}, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match="no tensors"):
        read_state(tmp_path / "w.pt")


def timm_folder(path, model, **settings):
    path.mkdir(parents=True)
    save_file(model.state_dict(), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": SMALL,
        "pretrained_cfg": {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3,
                           "license": "mit"}, **settings}))  # fmt: skip
    return path


def hub_cache(monkeypatch, tmp_path, repository):
    """A hub that cannot be reached, and the snapshot folder of one repository in its cache."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return folder / "snapshots" / ("0" * 40)


def test_timm__a_hub_repository_from_the_cache(monkeypatch, tmp_path):
    model = vit()
    timm_folder(hub_cache(monkeypatch, tmp_path, "someone/tiny"), model)
    config = TeacherConfig(preset="timm", options={"model": "hf-hub:someone/tiny"})
    found = build_teacher("t", config)
    assert same(found, model)
    assert (found.spec.native_size, found.spec.patch_size, found.spec.licence) == (
        (48, 48),
        8,
        "mit",
    )
    config = TeacherConfig(preset="timm", options={"model": "hf-hub:someone/other"})
    with pytest.raises(WeightsError, match="someone/other") as error:
        build_teacher("t", config)
    assert "\n" not in str(error.value)
    config = TeacherConfig(preset="timm", options={"model": "hf-hub:other"})
    with pytest.raises(WeightsError, match="hf-hub:OWNER/NAME"):
        build_teacher("t", config)


@pytest.mark.parametrize("old", [False, True])
def test_timm__a_local_folder(old, tmp_path):
    model = vit()
    flat = {"input_size": [3, 48, 48], "mean": [0.5] * 3, "std": [0.5] * 3}
    folder = timm_folder(tmp_path / "m", model)
    if old:  # timm's first folders had one table for all
        settings = {"architecture": "vit_tiny_patch16_224", "model_args": SMALL, **flat}
        (folder / "config.json").write_text(json.dumps(settings))
    by_path = build_teacher("t", TeacherConfig(preset="timm", weights=str(folder)))
    options = {"model": f"local-dir:{folder}"}
    by_name = build_teacher("t", TeacherConfig(preset="timm", options=options))
    assert same(by_path, model)
    assert same(by_name, model)
    assert by_path.spec == by_name.spec
    with pytest.raises(WeightsError, match="nowhere"):
        build_teacher("t", TeacherConfig(preset="timm", options={"model": "local-dir:nowhere"}))


def test_weights__a_name_in_place_of_a_path(tmp_path):
    config = TeacherConfig(preset="timm", weights="hf-hub:someone/tiny")
    with pytest.raises((WeightsError, ConfigError), match=r"options.model"):
        build_teacher("t", config)


def test_hub__as_the_start_of_a_student(monkeypatch, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=(64, 32))
    snapshot = timm_folder(hub_cache(monkeypatch, tmp_path, "someone/start"), model,
                           model_args={"img_size": [64, 32]})  # fmt: skip
    tables = []
    for place in ("hf-hub:someone/start", f"local-dir:{snapshot}", str(snapshot)):
        config = StudentConfig(
            architecture="vit_tiny_patch16_224", pretrained=place, max_size=64, registers=0
        )
        student = Student(config, 1, initialise=initialise)
        assert torch.equal(student.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)
        tables.append(student.positions.table)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(tables[0], tables[2])
    config = StudentConfig(architecture="vit_tiny_patch16_224", pretrained="hf-hub:someone/else")
    with pytest.raises(WeightsError, match=r"student\.pretrained") as error:
        Student(config, 1, initialise=initialise)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("chunked", [True, False])
def test_dinov2__with_registers_as_the_start_of_a_student(chunked, tmp_path):
    torch.manual_seed(0)
    architecture = "vit_small_patch14_reg4_dinov2"
    model = timm.create_model(architecture, num_classes=0, img_size=56)
    state = dict(model.state_dict())
    state["register_tokens"] = state.pop("reg_token")
    row = torch.randn(1, 1, 384)  # of the class token, which timm adds to the token itself
    state["pos_embed"] = torch.cat((row, state["pos_embed"]), dim=1)
    state["mask_token"] = torch.zeros(1, 384)
    if chunked:
        first = re.compile(r"^blocks\.(\d+)\.")
        state = {
            first.sub(lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}.", key): value
            for key, value in state.items()
        }
    torch.save({"teacher": under("backbone.", state)}, tmp_path / "w.pth")
    config = StudentConfig(architecture=architecture, pretrained=str(tmp_path / "w.pth"),
                           patch_size=14, max_size=56, registers=4)  # fmt: skip
    student = Student(config, 1, initialise=initialise)
    torch.testing.assert_close(student.prefix_tokens[:1], model.cls_token[0] + row[0])
    torch.testing.assert_close(student.prefix_tokens[1:], model.reg_token[0])
    expected = model.pos_embed.view(4, 4, 384) + model.patch_embed.proj.bias
    torch.testing.assert_close(student.positions.table, expected)
    assert torch.equal(student.blocks[10].mlp.fc1.weight, model.blocks[10].mlp.fc1.weight)
