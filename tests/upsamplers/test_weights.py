"""The fitted files that come with the project: small enough, whole, and as their card says."""

import pytest
import torch

from radio_distill.config import TeacherConfig, UpsamplerConfig
from radio_distill.errors import WeightsError
from teachers import build_teacher
from upsamplers import build_upsampler
from upsamplers.fitted import load_model
from upsamplers.fitted_files import SHIPPED, read_header

FILES = sorted(SHIPPED.glob("*.safetensors"))
MEGABYTE = 1_000_000
OPTIONS = {"efficientnet_lite0_packaged": {"stage": -2}}


def test_files__fit_the_budget():
    sizes = [path.stat().st_size for path in FILES]
    assert len(FILES) == 8
    assert max(sizes) <= 12 * MEGABYTE
    assert sum(sizes) <= 40 * MEGABYTE


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file__is_what_its_name_and_the_card_say(path):
    header = read_header(path)
    assert path.stem == f"{header.teacher}-{header.upsampler}-{header.factor}x"
    card = (SHIPPED / "README.md").read_text(encoding="utf-8")
    row = next(line for line in card.splitlines() if f"`{path.name}`" in line)
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0] == f"{header.size[0]} px"
    assert float(cells[1]) == round(path.stat().st_size / MEGABYTE, 1)
    names = ("fidelity", "total_variation", "crf", "mmd")
    for cell, name in zip(cells[2:], names, strict=True):
        digits = len(cell.partition(".")[2])
        assert float(cell) == round(header.measures[name], digits), name
    assert "CC BY" in header.fit["images"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file__fits_its_teacher_and_gives_its_grid(path):
    header = read_header(path)
    config = TeacherConfig(preset=header.teacher, options=OPTIONS.get(header.teacher, {}))
    try:
        teacher = build_teacher(header.teacher, config, torch.device("cpu"))
    except WeightsError as error:
        pytest.skip(str(error))
    upsampler = build_upsampler(
        UpsamplerConfig(name=header.upsampler, factor=header.factor), {header.teacher: teacher}
    )
    height, width = teacher.spec.grid(header.size)
    grid = (height * header.factor, width * header.factor)
    with torch.no_grad():
        features = upsampler(teacher, torch.rand(1, 3, 96, 96), grid)
    assert features.spatial.shape == (1, header.channels, *grid)
    assert features.spatial.isfinite().all()


def test_file__carries_a_bias_that_was_learned():
    for path in FILES:
        bias = load_model(path).bias
        assert bias is not None
        assert float(bias.detach().abs().max()) > 0.01
