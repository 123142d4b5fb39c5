"""The file of a fitted upsampler is used on its own teacher or not at all."""

from dataclasses import dataclass, replace
from hashlib import sha256
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.registry import Registry
from radio_distill.types import TeacherSpec
from upsamplers import build_upsampler, fitted_files

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SPEC = TeacherSpec("siglip", 1152, 1152, 14, (378, 378), None, ZERO, ONE, weights_hash="ab" * 32)
HEADER = fitted_files.FittedHeader(
    upsampler="learned", teacher="siglip", weights_hash="ab" * 32, channels=1152, factor=3,
    size=(378, 378), options={"window": 5},
)  # fmt: skip


@dataclass(frozen=True)
class OwnFitted:
    """A fitted upsampler, as far as building it goes."""

    network: str
    factor: int
    micro_batch: int
    weights: dict
    precision: str = "auto"
    fitted: ClassVar[bool] = True

    def __call__(self, teacher, pixels, grid):
        raise NotImplementedError

    def cost(self, grid):
        return 1


NETWORK = {"network.w": torch.arange(4.0)}


@pytest.fixture
def learned(monkeypatch, tmp_path):
    registry = Registry(
        "upsampler",
        {"learned": f"{__name__}:OwnFitted", "tile": "upsamplers.methods.tile:Tile"},
    )
    monkeypatch.setattr("upsamplers.UPSAMPLERS", registry)
    path = tmp_path / "deep" / "siglip.safetensors"
    fitted_files.write(path, NETWORK, HEADER)
    return path


def build(path, spec, **values):
    weights = {"siglip": str(path)} if path else {}
    config = UpsamplerConfig(name="learned", factor=3, weights=weights, **values)
    return build_upsampler(config, {"siglip": SimpleNamespace(spec=spec)})


def test_write__read_header_gives_it_back_and_the_tensors_are_plain(learned):
    assert fitted_files.read_header(learned) == HEADER
    assert torch.equal(load_file(learned)["network.w"], torch.arange(4.0))
    assert [item.name for item in learned.parent.iterdir()] == ["siglip.safetensors"]


def test_build_upsampler__takes_the_file_of_its_teacher(learned):
    assert build(learned, SPEC).weights == {"siglip": str(learned)}


def test_build_upsampler__takes_the_file_with_the_sum_that_the_recipe_says(learned):
    found = sha256(learned.read_bytes()).hexdigest()
    assert build(learned, SPEC, sha256={"siglip": found})
    message = (
        rf"^upsampler\.sha256\.siglip: \S+siglip\.safetensors has sha256 {found}, .*{'0' * 64}"
    )
    with pytest.raises(WeightsError, match=message):
        build(learned, SPEC, sha256={"siglip": "0" * 64})


def test_build_upsampler__a_sum_that_nothing_has_is_refused(learned):
    with pytest.raises(ConfigError, match=r"upsampler\.sha256\.dino"):
        build(learned, SPEC, sha256={"dino": "0" * 64})


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
    """And the command that makes one."""
    message = (
        r"no learned 3x is fitted to teacher 'siglip'; fit one \(radio-distill fit-upsampler "
        r"RECIPE --teacher siglip --upsampler learned --factor 3\), "
        r"or set upsampler\.weights\.siglip"
    )
    with pytest.raises(ConfigError, match=message):
        build(None, SPEC)


def test_read_tensors__groups_them_by_part(tmp_path):
    tensors = {
        "network.levels.0.w": torch.ones(2),
        "bias": torch.zeros(1, 2, 3, 3),
        "normalizer.mean": torch.zeros(2),
    }
    header = replace(HEADER, statistics_hash=fitted_files.hash_of({"mean": torch.zeros(2)}))
    fitted_files.write(tmp_path / "x.safetensors", tensors, header)
    parts = fitted_files.read_tensors(tmp_path / "x.safetensors")
    assert {part: list(items) for part, items in parts.items()} == {
        "network": ["levels.0.w"],
        "bias": [""],
        "normalizer": ["mean"],
    }


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_read_tensors__a_number_that_is_not_finite_names_its_tensor(tmp_path, value):
    path = tmp_path / "x.safetensors"
    fitted_files.write(path, {**NETWORK, "network.v": torch.tensor([1.0, value])}, HEADER)
    with pytest.raises(WeightsError, match=r"x\.safetensors.*network\.v"):
        fitted_files.read_tensors(path)


def test_read_tensors__other_statistics_than_the_fit_s_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    header = replace(HEADER, statistics_hash=fitted_files.hash_of({"mean": torch.zeros(2)}))
    for tensors in ({"normalizer.mean": torch.tensor([0.0, 1e-6])}, NETWORK):
        fitted_files.write(path, tensors, header)
        with pytest.raises(WeightsError, match="PHI-S"):
            fitted_files.read_tensors(path)


def test_hash_of__is_of_names_and_values_in_any_order_and_type():
    tensors = {"mean": torch.tensor([1.0, 2.0]), "scale": torch.tensor(3.0)}
    known = fitted_files.hash_of(tensors)
    turned = {"scale": tensors["scale"].double(), "mean": tensors["mean"]}
    assert fitted_files.hash_of(turned) == known
    assert fitted_files.hash_of({**tensors, "scale": torch.tensor(3.001)}) != known
    assert fitted_files.hash_of({"mean": tensors["mean"], "scales": tensors["scale"]}) != known


@pytest.mark.parametrize("length", [0, 7, 60, -3])
def test_read__a_truncated_file_is_one_line(learned, length):
    learned.write_bytes(learned.read_bytes()[:length])
    for read in (fitted_files.read_header, fitted_files.read_tensors):
        with pytest.raises(WeightsError, match="upsampler") as error:
            read(learned)
        assert "\n" not in str(error.value)


def test_shipped__is_found_by_what_it_is_for_not_by_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(fitted_files, "SHIPPED", tmp_path)
    assert fitted_files.shipped("learned", 3, SPEC) is None
    fitted_files.write(tmp_path / "a.safetensors", NETWORK, replace(HEADER, weights_hash="cd" * 32))
    fitted_files.write(tmp_path / "b.safetensors", NETWORK, HEADER)
    assert (
        fitted_files.shipped("learned", 3, replace(SPEC, name="mine")) == tmp_path / "b.safetensors"
    )
    assert fitted_files.shipped("learned", 2, SPEC) is None
    assert fitted_files.shipped("featup", 3, SPEC) is None
    assert fitted_files.shipped("learned", 3, replace(SPEC, channels=768)) is None
    assert fitted_files.shipped("learned", 3, replace(SPEC, weights_hash="ef" * 32)) is None


def test_build_upsampler__takes_what_is_shipped_unless_the_recipe_names_a_file(
    learned, monkeypatch, tmp_path
):
    monkeypatch.setattr(fitted_files, "SHIPPED", tmp_path / "shipped")
    fitted_files.write(tmp_path / "shipped" / "x.safetensors", NETWORK, HEADER)
    expected = str(tmp_path / "shipped" / "x.safetensors")
    assert build(None, SPEC).weights == {"siglip": expected}
    assert build(learned, SPEC).weights == {"siglip": str(learned)}


def test_read_header__files_that_are_none(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_file(
        {"w": torch.zeros(1)}, tmp_path / "odd.safetensors", {"radio_distill": '{"size": [1, 2]}'}
    )
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    for name in ("plain", "odd"):
        with pytest.raises(WeightsError, match="not a fitted"):
            fitted_files.read_header(tmp_path / f"{name}.safetensors")
    for name in ("broken", "absent"):
        with pytest.raises(WeightsError, match="upsampler"):
            fitted_files.read_header(tmp_path / f"{name}.safetensors")


def test_write__a_failure_leaves_the_former_file_whole(learned):
    with pytest.raises(TypeError):
        fitted_files.write(
            learned, {"w": torch.zeros(4)}, replace(HEADER, options={"bad": object()})
        )
    assert torch.equal(load_file(learned)["network.w"], torch.arange(4.0))


def test_write__where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="upsampler"):
        fitted_files.write(tmp_path / "file" / "x.safetensors", {"w": torch.zeros(1)}, HEADER)
