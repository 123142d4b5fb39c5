"""The table of presets against the libraries, the issue's list, and its cost to import."""

import subprocess
import sys
from dataclasses import replace

import pytest

import teachers
from radio_distill.config import TeacherConfig
from radio_distill.errors import UnknownNameError
from teachers.measuring import measured
from teachers.presets import FULL_SIZE, PACKAGED, PRESETS, TINY
from teachers.sources import find_source

MEASURED = ("patch_size", "native_size", "channels", "summary_channels")


@pytest.mark.parametrize("name", [*FULL_SIZE, *PACKAGED, *TINY])
def test_presets__sizes_are_those_of_the_model(name):
    preset = PRESETS[name]
    blank = replace(preset, channels=0, summary_channels=None, patch_size=0)
    source = find_source(preset.source)
    found = measured(source.complete(blank, ""), source.build)
    assert [getattr(found, key) for key in MEASURED] == [getattr(preset, key) for key in MEASURED]


@pytest.mark.parametrize("name", [key for key, item in FULL_SIZE.items() if item.source == "timm"])
def test_presets__normalisation_and_licence_are_timm_s(name):
    import timm

    preset = PRESETS[name]
    config = timm.get_pretrained_cfg(preset.model, allow_unregistered=False)
    assert (config.mean, config.std) == (preset.mean, preset.std)
    assert config.input_size[-1] // preset.patch_size * preset.patch_size == preset.native_size
    assert f"hub: {config.hf_hub_id}" == preset.weights
    if name != "paligemma_448":  # timm lists its code's licence; Gemma's terms govern the weights
        assert config.license == preset.licence


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
    for preset in {**FULL_SIZE, **PACKAGED}.values():
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
