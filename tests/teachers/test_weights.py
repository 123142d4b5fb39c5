"""Weights come in whole or not at all, and never run anything."""

import json

import pytest
import torch
from safetensors.torch import save_file

from radio_distill.config import TeacherConfig
from radio_distill.errors import WeightsError
from teachers import build_teacher, resolve
from teachers.presets import PRESETS
from teachers.weights import fingerprint, load_strict


def module_of(teacher):
    return getattr(teacher.tower, "visual", None) or teacher.tower.model


def trained(name):
    """A teacher whose weights are not those of the fixed seed."""
    teacher = build_teacher(name, TeacherConfig(preset=name))
    with torch.no_grad():
        for value in teacher.tower.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)))
    return teacher


def state_of(teacher):
    return {key: value.clone() for key, value in module_of(teacher).state_dict().items()}


def load(name, path, **values):
    return build_teacher("mine", TeacherConfig(preset=name, weights=str(path), **values))


def same(left, right):
    pixels = torch.rand(1, 3, *left.spec.native_size)
    (one, one_map), (two, two_map) = left.encode(pixels), right.encode(pixels)
    pairs = [(one_map, two_map)] if one is None else [(one_map, two_map), (one, two)]
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in pairs)


FAMILIES = ["tiny_vit", "tiny_eva", "tiny_cnn", "tiny_samvit", "tiny_open_clip", "tiny_clip"]


@pytest.mark.parametrize("name", [*FAMILIES, "tiny_siglip", "tiny_dinov2", "tiny_sam"])
def test_load__a_file_gives_the_same_teacher(name, tmp_path):
    teacher = trained(name)
    save_file(state_of(teacher), tmp_path / "w.safetensors")
    torch.save({"state_dict": state_of(teacher), "epoch": 3}, tmp_path / "w.pt")
    first, second = load(name, tmp_path / "w.safetensors"), load(name, tmp_path / "w.pt")
    assert same(first, teacher)
    assert same(second, teacher)
    assert first.spec.weights_hash == second.spec.weights_hash == fingerprint(teacher.tower)


def test_load__a_classifier_in_a_timm_file_is_left_out(tmp_path):
    teacher = trained("tiny_vit")
    heads = {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}
    save_file({**state_of(teacher), **heads}, tmp_path / "w.safetensors")
    assert same(load("tiny_vit", tmp_path / "w.safetensors"), teacher)


def test_load__a_whole_clip_gives_its_image_tower(tmp_path):
    import open_clip

    whole = open_clip.CLIP(**PRESETS["tiny_open_clip"].arguments["config"]).eval()
    pixels = torch.rand(1, 3, 48, 48)
    with torch.no_grad():
        expected = whole.encode_image((pixels - 0.5) / 0.5)
    for prefix in ("", "module.", "model."):
        state = {f"{prefix}{key}": value for key, value in whole.state_dict().items()}
        save_file(state, tmp_path / "open_clip_model.safetensors")
        teacher = load("tiny_open_clip", tmp_path)
        torch.testing.assert_close(teacher.encode(pixels).summary, expected)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_load__a_transformers_folder_of_both_towers(kind, tmp_path):
    import transformers

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    image = {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    config = getattr(transformers, f"{kind}Config")(
        vision_config=image, text_config={**sizes, "vocab_size": 50}, projection_dim=24
    )
    whole = getattr(transformers, f"{kind}Model")(config).eval()
    whole.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]})
    )
    teacher = load("transformers", tmp_path)
    assert teacher.spec.mean == (0.1, 0.2, 0.3)
    assert (teacher.spec.patch_size, teacher.spec.native_size) == (8, (32, 32))
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        output = whole.get_image_features(pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1))
    expected = getattr(output, "pooler_output", output)
    torch.testing.assert_close(teacher.encode(pixels).summary, expected, rtol=1e-4, atol=1e-5)


def test_load__tensors_in_several_files(tmp_path):
    teacher = trained("tiny_clip")
    state = state_of(teacher)
    names, half = sorted(state), len(state) // 2
    parts = {"a.safetensors": names[:half], "b.safetensors": names[half:]}
    for file, keys in parts.items():
        save_file({key: state[key] for key in keys}, tmp_path / file)
    index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load("tiny_clip", tmp_path), teacher)


@pytest.mark.parametrize("name", ["tiny_vit", "tiny_cnn", "tiny_open_clip", "tiny_dinov2"])
def test_load__weights_of_another_model_name_the_first_key(name, tmp_path):
    state = state_of(trained(name))
    first = sorted(state)[0]
    cases = {
        "missing": {key: value for key, value in state.items() if key != first},
        "unexpected": {**state, "surplus.weight": torch.zeros(1)},
        "of another shape": {**state, first: torch.zeros(2, 2, 2, 2, 2)},
    }
    for kind, changed in cases.items():
        save_file(changed, tmp_path / "w.safetensors")
        with pytest.raises(WeightsError, match=rf"teachers\.mine: .*1 {kind} \(first ") as error:
            load(name, tmp_path / "w.safetensors")
        assert ("surplus.weight" if kind == "unexpected" else first) in str(error.value)
        assert "\n" not in str(error.value)


def test_load__a_network_s_weights_for_a_transformer(tmp_path):
    save_file(state_of(trained("tiny_cnn")), tmp_path / "w.safetensors")
    for name in ("tiny_vit", "tiny_eva", "tiny_open_clip", "tiny_siglip"):
        with pytest.raises(WeightsError, match=r"another model.* missing"):
            load(name, tmp_path / "w.safetensors")


def test_load__no_such_file(tmp_path):
    with pytest.raises(WeightsError, match=r"teachers\.mine: .*nothing\.pt"):
        load("tiny_vit", tmp_path / "nothing.pt")
    with pytest.raises(WeightsError, match="no weights"):
        load("tiny_vit", tmp_path)


def test_load__damaged_and_foreign_files(tmp_path):
    for name, content in (("a.safetensors", b"\0" * 100), ("b.pt", b"PK not really")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match="weights") as error:
            load("tiny_vit", tmp_path / name)
        assert "\n" not in str(error.value)
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(WeightsError, match="list"):
        load("tiny_vit", tmp_path / "c.pt")


def test_fingerprint__follows_the_values_not_the_type_of_computation():
    one, other = trained("tiny_vit"), build_teacher("x", TeacherConfig(preset="tiny_vit"))
    assert fingerprint(one.tower) == fingerprint(trained("tiny_vit").tower)
    assert fingerprint(one.tower) != fingerprint(other.tower)


def test_weights_hash__does_not_depend_on_dtype(tmp_path):
    save_file(state_of(trained("tiny_vit")), tmp_path / "w.safetensors")
    hashes = {load("tiny_vit", tmp_path / "w.safetensors", dtype=dtype).spec.weights_hash
              for dtype in ("float32", "bfloat16")}  # fmt: skip
    assert len(hashes) == 1


def test_load_strict__changes_nothing_when_it_refuses():
    layer = torch.nn.Linear(2, 2)
    before = layer.weight.clone()
    with pytest.raises(WeightsError, match=r"1 missing \(first bias\)"):
        load_strict(layer, {"weight": torch.zeros(2, 2)}, "here")
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("dinov2_l_reg", {}),
        ("dfn_clip_h14_378", {}),
        ("sam3", {}),
        ("transformers", {"model": "no-such/model"}),
        ("radio", {"model": "no-such/model"}),
    ],
)
def test_hub__without_one_a_line_says_what_to_do(preset, options, monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=r"teachers\.mine: .*`weights`") as error:
        build_teacher("mine", TeacherConfig(preset=preset, options=options))
    assert "\n" not in str(error.value)


def test_hub__a_timm_model_without_weights():
    options = {"model": "vit_base_patch16_gap_224"}
    with pytest.raises(WeightsError, match="local file"):
        build_teacher("mine", TeacherConfig(preset="timm", options=options))


def test_resolve__arguments_of_the_recipe_join_those_of_the_preset():
    preset = resolve(TeacherConfig(preset="vits14_packaged", options={"blocks": 9}))
    assert preset.arguments["blocks"] == 9
