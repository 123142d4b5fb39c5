"""The table of presets against the libraries, the issue's list, and its cost to import."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import teachers
from radio_distill.config import TeacherConfig
from radio_distill.errors import UnknownNameError
from teachers.measuring import measured
from teachers.presets import FAMILIES, FULL_SIZE, PACKAGED, PRESETS, TINY, Preset
from teachers.sources import find_source

MEASURED = ("patch_size", "native_size", "channels", "summary_channels")
PUBLISHED = {**FULL_SIZE, **FAMILIES}
GATED = ("uni2_h", "virchow2", "h_optimus_0", "h_optimus_1")
"""Whose names no library knows."""


def shallow(preset: Preset) -> Preset:
    """Return the model with few blocks, which have no part in any size, of nothing measured."""
    import open_clip

    given = dict(preset.arguments)
    if preset.source == "open_clip":
        config = open_clip.get_model_config(preset.model.partition("/")[0])
        towers = {key: {**config[key], "layers": 1} for key in ("vision_cfg", "text_cfg")}
        given["config"] = {**config, **towers}
    elif "config" in given:
        given["config"] = {**given["config"], "num_hidden_layers": 1}
    elif "blocks" not in given and "stage" not in given:
        few = {"depths": (1, 1, 1, 1)} if preset.model.startswith("convnext") else {"depth": 1}
        given["create"] = {**given.get("create", {}), **few}
    return replace(preset, arguments=given)


@pytest.mark.parametrize("name", [*PUBLISHED, *PACKAGED, *TINY])
def test_presets__sizes_are_those_of_the_model(name):
    preset = PRESETS[name]
    convolutional = name in ("efficientnet_lite0_packaged", "tiny_cnn")
    few = preset if preset.random or convolutional else shallow(preset)
    blank = replace(few, channels=0, summary_channels=None, patch_size=0)
    source = find_source(preset.source)
    found = measured(source.complete(blank, ""), source.build)
    assert [getattr(found, key) for key in MEASURED] == [getattr(preset, key) for key in MEASURED]


ON_TIMM = [key for key, item in PUBLISHED.items() if item.source == "timm" and key not in GATED]


@pytest.mark.parametrize("name", ON_TIMM)
def test_presets__normalisation_and_licence_are_timm_s(name):
    import timm

    preset = PRESETS[name]
    config = timm.get_pretrained_cfg(preset.model, allow_unregistered=False)
    assert (config.mean, config.std) == (preset.mean, preset.std)
    assert config.input_size[-1] // preset.patch_size * preset.patch_size == preset.native_size
    assert f"hub: {config.hf_hub_id}" == preset.weights
    if name != "paligemma_448":  # timm lists its code's licence; Gemma's terms govern the weights
        assert config.license == preset.licence


@pytest.mark.parametrize(
    ("name", "millions"), [("uni2_h", 681), ("virchow2", 631), ("h_optimus_0", 1134)]
)
def test_presets__of_gated_models_have_the_parameters_of_their_cards(name, millions):
    model = teachers.build_module(TeacherConfig(preset=name))
    assert sum(item.numel() for item in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)


@pytest.mark.parametrize("name", [key for key in FAMILIES if key.startswith("c_radio")])
def test_presets__c_radio_has_the_body_that_timm_has_of_it(name):
    import timm

    _, _, version, size = name.split("_")
    full = {"b": "base", "l": "large", "h": "huge", "g": "giant"}.get(size, size)
    few = {"depth": 1, "num_classes": 0}
    with torch.device("meta"):
        model = timm.create_model(f"vit_{full}_patch16_radio_{version}", **few)
    config = PRESETS[name].arguments["config"]
    block = model.blocks[0]
    assert block.attn.num_heads == config["num_attention_heads"]
    width = config["hidden_size"]
    assert block.mlp.fc1.weight.shape == (round(config.get("mlp_ratio", 4) * width), width)
    assert model.num_prefix_tokens == config["num_cls_tokens"] + config["num_registers"]


@pytest.mark.parametrize("name", ["dfn_clip_h14_378", "openai_clip_l14_336"])
def test_presets__open_clip_names_weights_and_normalisation(name):
    import open_clip

    preset = PRESETS[name]
    published = open_clip.get_pretrained_cfg(*preset.model.split("/"))
    assert tuple(published["mean"]) == preset.mean
    assert tuple(published["std"]) == preset.std


@pytest.mark.parametrize("name", [key for key, item in PRESETS.items() if item.text])
def test_presets__text_towers_exist(name):
    import open_clip

    model, tag = PRESETS[name].text.split("/")
    assert tag in open_clip.list_pretrained_tags_by_model(model)


def test_presets__each_says_licence_origin_and_summary():
    for preset in {**PUBLISHED, **PACKAGED}.values():
        assert preset.licence != "unknown"
        assert preset.weights
        assert bool(preset.summary) == (preset.summary_channels is not None)


def test_teacher_spec__reads_no_weights_and_knows_the_name():
    spec = teachers.teacher_spec("clip", TeacherConfig(preset="dfn_clip_h14_378"))
    assert (spec.name, spec.grid((378, 756)), spec.weights_hash) == ("clip", (27, 54), "")


def test_resolve__a_generic_source_takes_the_library_s_figures():
    options = {"model": "vit_base_patch16_clip_224.openai"}
    spec = teachers.teacher_spec("clip", TeacherConfig(preset="timm", options=options))
    assert (spec.channels, spec.patch_size, spec.native_size) == (768, 16, (224, 224))
    assert spec.mean == PRESETS["openai_clip_l14_336"].mean
    options = {"model": "ViT-B-16/openai"}
    spec = teachers.teacher_spec("clip", TeacherConfig(preset="open_clip", options=options))
    assert (spec.channels, spec.summary_channels, spec.patch_size) == (768, 512, 16)


def test_teachers__a_misspelt_name_gets_the_nearest():
    with pytest.raises(UnknownNameError, match="'dinov2_l_reg'"):
        teachers.teacher_spec("dino", TeacherConfig(preset="dinov2_l_regs"))


def test_import__listing_names_needs_neither_torch_nor_a_model_library():
    code = (
        "import sys; from teachers import TEACHERS; from upsamplers import UPSAMPLERS;"
        "print([TEACHERS.get(name).licence for name in TEACHERS.names()], UPSAMPLERS.names());"
        "sys.exit(bool({'torch', 'timm', 'open_clip', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
