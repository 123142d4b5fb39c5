"""The stride of a teacher is the model's own, and no size goes in that it cannot tile."""

import pytest
import torch
from torch import nn

from radio_distill.config import TeacherConfig
from radio_distill.errors import ConfigError
from radio_distill.teacher_view import input_size
from teachers import build_teacher, teacher_spec
from teachers.measuring import measured, measured_once
from teachers.presets import Preset

HALF = [0.5, 0.5, 0.5]
STRIDES = {  # (stride, native size): the published ones of each architecture and its weights
    "resnet50.tv2_in1k": (32, 160),  # trained at 176 px, where 29 px a cell would fit as well
    "regnety_002.pycls_in1k": (32, 224),
    "convnext_atto.d2_in1k": (32, 224),
    "efficientnet_b3.ra2_in1k": (32, 288),
    "mobilenetv3_small_050.lamb_in1k": (32, 224),
    "densenet121.ra_in1k": (32, 224),
    "vgg11.tv_in1k": (32, 224),
    "swin_tiny_patch4_window7_224.ms_in1k": (32, 224),
    "mobilevit_xxs.cvnets_in1k": (32, 256),
    "vit_small_r26_s32_224.augreg_in21k": (32, 224),
    "vit_tiny_patch16_224.augreg_in21k": (16, 224),
    "eva02_tiny_patch14_224.mim_in22k": (14, 224),
    "xcit_nano_12_p8_224.fb_in1k": (8, 224),
}
FIXED = {
    "maxvit_pico_rw_256": (32, 256),
    "hiera_tiny_224.mae": (32, 224),
    "levit_384_s8": (32, 224),
    "beit_base_patch16_224.in22k_ft_in22k": (16, 224),
}


def timm_teacher(model, **options):
    return TeacherConfig(preset="timm", options={"model": model, **options})


@pytest.mark.parametrize("model", [*STRIDES, *FIXED])
def test_timm__the_stride_is_the_models_own(model):
    spec = teacher_spec("t", timm_teacher(model, mean=HALF, std=HALF))
    side = spec.native_size[0]
    assert (spec.patch_size, side) == {**STRIDES, **FIXED}[model]
    assert spec.native_size == (side, side)
    assert spec.fixed_size == (model in FIXED)


@pytest.mark.parametrize("model", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_encode__a_student_of_another_size_is_matched(model):
    """``input_size: match`` at sizes that are not native: the grids are equal, and it runs."""
    config = timm_teacher(model, native_size=160)
    config.options.update(mean=HALF, std=HALF)
    spec = teacher_spec("t", config)
    from teachers import resolve
    from teachers.base import FrozenTeacher
    from teachers.sources import find_source

    preset = resolve(config)
    teacher = FrozenTeacher(find_source(preset.source).build(preset), spec)
    for view in ((128, 96), (256, 256), (32, 480)):
        size = input_size(spec, "match", view, 16)
        assert teacher.encode(torch.rand(1, 3, *size)).spatial.shape[-2:] == (
            view[0] // 16,
            view[1] // 16,
        )


def test_timm__a_map_that_does_not_tile_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"7x7 .*9x9") as error:
        teacher_spec("t", timm_teacher("inception_v3"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("teachers.t: ")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("pit_ti_224", "options.stage"),
        ("coat_tiny", "options.stage"),
        ("levit_128s", "192x192"),
    ],
)
def test_timm__a_model_without_a_map_names_what_else_can_be_taken(model, message):
    with pytest.raises(ConfigError, match=message) as error:
        teacher_spec("t", timm_teacher(model))
    assert "\n" not in str(error.value)


def test_timm__an_inner_map_has_a_stride_of_its_own():
    assert teacher_spec("t", timm_teacher("coat_tiny", stage=-1)).patch_size == 32
    assert teacher_spec("t", timm_teacher("resnet18", stage=1)).patch_size == 4
    dilated = timm_teacher("resnet18", create={"output_stride": 16})
    assert teacher_spec("t", dilated).patch_size == 16


def test_encode__a_fixed_model_names_its_size():
    small = {"embed_dim": 24, "depth": 1, "num_heads": 2}
    config = timm_teacher("beit_base_patch16_224", create=small, mean=HALF, std=HALF)
    from teachers import resolve
    from teachers.base import FrozenTeacher
    from teachers.sources import find_source

    preset = resolve(config)
    teacher = FrozenTeacher(find_source(preset.source).build(preset), teacher_spec("t", config))
    assert teacher.encode(torch.rand(1, 3, 224, 224)).spatial.shape[-2:] == (14, 14)
    with pytest.raises(ConfigError, match=r"240x224.*224x224"):
        teacher.encode(torch.rand(1, 3, 240, 224))


class Tower(nn.Module):
    """A convolution whose cells are ``step`` pixels, and what it says of them."""

    def __init__(self, step, stride=None, kernel=None, padding=0, channels=5):
        super().__init__()
        self.stated_stride = stride
        self.convolution = nn.Conv2d(3, channels, kernel or step, step, padding)

    def forward(self, pixels):
        return None, self.convolution(pixels)


def measure(tower, native_size=224, **values):
    return measured(Preset(source="mine", native_size=native_size, **values), lambda _: tower())


@pytest.mark.parametrize("step", [1, 7, 12, 14, 16, 20, 32])
@pytest.mark.parametrize("native_size", [97, 176, 224, 235])
@pytest.mark.parametrize("says", [True, False])
def test_measured__any_stride_is_found(step, native_size, says):
    found = measure(lambda: Tower(step, step if says else None), native_size)
    assert (found.patch_size, found.channels, found.fixed_size) == (step, 5, False)
    assert found.native_size == native_size // step * step


@pytest.mark.parametrize("native_size", [176, 224, 240, 300])
def test_measured__a_map_that_is_rounded_up_does_not_mislead(native_size):
    """A padded network of stride 32 gives 8 cells of 225 to 256 pixels."""
    found = measure(lambda: Tower(32, kernel=3, padding=1), native_size)
    assert found.patch_size == 32


def test_measured__the_probe_goes_before_what_is_said():
    with pytest.raises(ConfigError, match=r"16 px.*32 px"):
        measure(lambda: Tower(32, 16))
    with pytest.raises(ConfigError, match=r"14 px.*28 px"):
        measure(lambda: Tower(28), patch_size=14)


def test_measured__cells_that_leave_the_border_out():
    with pytest.raises(ConfigError, match="tile"):
        measure(lambda: Tower(32, 32, kernel=96))


class Picky(Tower):
    def forward(self, pixels):
        assert pixels.shape[-2:] == (224, 224), f"Input height {pixels.shape[-2]} is wrong"
        return super().forward(pixels)


def test_measured__one_size_only_is_found_out():
    assert measure(lambda: Picky(16, 16)).fixed_size
    assert measure(lambda: Picky(16)).patch_size == 16
    with pytest.raises(ConfigError, match="240x240 px: Input height 240 is wrong"):
        measure(lambda: Picky(16, 16), native_size=240)


def test_measured__what_gives_no_map():
    class Flat(Tower):
        def forward(self, pixels):
            return None, super().forward(pixels)[1].mean((2, 3))

    with pytest.raises(ConfigError, match=r"\[1, 5\] .*\[B, C, h, w\]"):
        measure(lambda: Flat(16, 16))


def test_native_size__that_the_patch_does_not_divide_is_refused():
    config = TeacherConfig(preset="dinov2_l_reg", options={"native_size": 224 + 3})
    with pytest.raises(ConfigError, match=r"teachers\.t: options\.native_size: 227 .*224"):
        teacher_spec("t", config)
    with pytest.raises(ConfigError, match=r"options\.native_size: 225 .*32.*224"):
        teacher_spec("t", timm_teacher("test_resnet", native_size=225))
    config = TeacherConfig(preset="tiny_vit", options={"native_size": 64})
    assert build_teacher("t", config).spec.native_size == (64, 64)


def test_measured_once__a_model_that_is_named_and_not_one_in_a_file(monkeypatch):
    asked = []

    def count(preset, build):
        asked.append(preset.model)
        return measured(preset, build)

    monkeypatch.setattr("teachers.measuring.measured", count)
    monkeypatch.setattr("teachers.measuring._MEASURED", {})
    named = [timm_teacher("test_vit"), timm_teacher("test_vit"), timm_teacher("test_vit", blocks=1)]
    first, again, other = (teacher_spec("t", config) for config in named)
    assert first == again
    assert asked == ["test_vit", "test_vit"], "the options are part of the question"
    assert other.channels == first.channels
    for _ in range(2):
        measured_once(Preset(source="mine", model="m", native_size=64), lambda _: Tower(16))
    assert asked[2:] == ["m", "m"]
