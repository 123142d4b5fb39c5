"""The file of a fitted upsampler is used on its own teacher or not at all."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import Registry
from radio_distill.types import TeacherSpec
from upsamplers import build_upsampler, fitted

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SPEC = TeacherSpec("siglip", 1152, 1152, 14, (378, 378), None, ZERO, ONE, weights_hash="ab" * 32)
HEADER = fitted.FittedHeader(
    upsampler="learned", teacher="siglip", weights_hash="ab" * 32, channels=1152, factor=3,
    size=(378, 378), options={"window": 5},
)  # fmt: skip


@dataclass(frozen=True)
class Learned:
    """A fitted upsampler, as far as building it goes."""

    factor: int
    micro_batch: int
    weights: dict
    fitted: ClassVar[bool] = True


@pytest.fixture
def learned(monkeypatch, tmp_path):
    registry = Registry("upsampler", {"learned": f"{__name__}:Learned"})
    monkeypatch.setattr("upsamplers.UPSAMPLERS", registry)
    path = tmp_path / "deep" / "siglip.safetensors"
    fitted.write(path, {"w": torch.arange(4.0)}, HEADER)
    return path


def build(path, spec):
    weights = {"siglip": str(path)} if path else {}
    config = UpsamplerConfig(name="learned", factor=3, weights=weights)
    return build_upsampler(config, {"siglip": SimpleNamespace(spec=spec)})


def test_write__read_header_gives_it_back_and_the_tensors_are_plain(learned):
    assert fitted.read_header(learned) == HEADER
    assert torch.equal(load_file(learned)["w"], torch.arange(4.0))
    assert [item.name for item in learned.parent.iterdir()] == ["siglip.safetensors"]


def test_build_upsampler__takes_the_file_of_its_teacher(learned):
    assert build(learned, SPEC).weights == {"siglip": str(learned)}


@pytest.mark.parametrize(
    "change", [{"weights_hash": "cd" * 32}, {"channels": 768}, {"weights_hash": ""}]
)
def test_build_upsampler__refuses_the_file_of_another_teacher(learned, change):
    with pytest.raises(
        WeightsError, match="upsampler for another teacher: fitted for 'siglip'"
    ) as error:
        build(learned, replace(SPEC, **change))
    assert "\n" not in str(error.value)


def test_build_upsampler__the_teacher_s_name_in_the_recipe_is_free(learned):
    assert build(learned, replace(SPEC, name="my_siglip"))


def test_build_upsampler__without_a_file_names_the_field(learned):
    with pytest.raises(ConfigError, match=r"needs a fitted file: upsampler\.weights\.siglip"):
        build(None, SPEC)


def test_check_fitted_for__another_kind_of_upsampler():
    with pytest.raises(WeightsError, match="is a fitted 'learned', the recipe asks for 'featup'"):
        fitted.check_fitted_for(HEADER, "featup", SPEC)


def test_read_header__files_that_are_none(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file(
        {"w": torch.zeros(1)}, tmp_path / "odd.safetensors", {"radio_distill": '{"size": [1, 2]}'}
    )
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("plain", "odd"):
        with pytest.raises(WeightsError, match="not a fitted upsampler"):
            fitted.read_header(tmp_path / f"{name}.safetensors")
    for name in ("broken", "absent"):
        with pytest.raises(WeightsError, match="cannot read upsampler"):
            fitted.read_header(tmp_path / f"{name}.safetensors")


def test_write__a_failure_leaves_the_former_file_whole(learned):
    with pytest.raises(TypeError):
        fitted.write(learned, {"w": torch.zeros(4)}, replace(HEADER, options={"bad": object()}))
    assert torch.equal(load_file(learned)["w"], torch.arange(4.0))


def test_write__where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write upsampler"):
        fitted.write(tmp_path / "file" / "x.safetensors", {"w": torch.zeros(1)}, HEADER)
