"""The files of examples/my_package, which docs/extending.md shows, run as an installed package."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "extending.md"
PACKAGE = ROOT / "examples" / "my_package"

RUN = """
import sys
from pathlib import Path
import torch
from PIL import Image
from safetensors.torch import save_file

from my_package.encoder import Encoder
from radio_distill import from_config
from radio_distill.config import (EvaluationConfig, HeadConfig, HeadsConfig, StudentConfig,
                                  TeacherConfig, UpsamplerConfig)
from radio_distill.evals.encoder import teacher_encoder
from radio_distill.evals.run import evaluate
from radio_distill.models.heads import Head
from teachers import build_teacher
from upsamplers import build_upsampler, is_fitted
from upsamplers.fitted import FittedUpsampler
from upsamplers.networks import Observation, build_network
from upsamplers import UPSAMPLERS

save_file(Encoder(8).state_dict(), "w.safetensors")
config = TeacherConfig(preset="my_encoder", weights="w.safetensors", options={"width": 8})
teacher = build_teacher("mine", config)
assert (teacher.spec.patch_size, teacher.spec.channels, teacher.spec.summary_channels) == (16, 8, 8)
pixels = torch.rand(2, 3, 64, 96)
assert teacher.encode(pixels).spatial.shape == (2, 8, 4, 6)

head = HeadsConfig(features=HeadConfig(name="my_head", options={"bias": False}))
config = StudentConfig(architecture="test_vit", heads={"mine": head})
tokens, spatial = from_config(config).student(pixels[:, :, :64, :64])
found = Head(64, teacher.spec, config)(tokens[:, 0], spatial)
assert found.spatial.shape == (2, 8, 4, 4)

config = UpsamplerConfig(name="my_upsampler", factor=2, options={"share": 1.0})
fine = build_upsampler(config, {"mine": teacher})(teacher, pixels, (8, 12)).spatial
assert torch.equal(fine[..., ::2, ::2], fine[..., 1::2, 1::2])
assert is_fitted("my_network") and not is_fitted("my_upsampler")
network = build_network("my_network", 8, 2, {"kernel": 5})
seen = network(Observation(pixels, teacher.encode(pixels).spatial))
assert seen.shape == (2, 8, 8, 12)
untrained = UPSAMPLERS.get("my_network").untrained("my_network", 2, {"mine": teacher.spec})
assert untrained(teacher, pixels, (8, 12)).spatial.shape == (2, 8, 8, 12)

Path("images").mkdir()
for number in range(3):
    Image.effect_noise((80, 64), 60).convert("RGB").save(f"images/{number}.png")
evaluation = EvaluationConfig(benchmarks=("my_benchmark",), images="images",
                              options={"my_benchmark": {"size": 64}})
(score,) = evaluate(teacher_encoder(teacher, torch.device("cpu")), evaluation)
assert (score.name, score.num_samples) == ("my_benchmark/cosine", 3)
assert -100 <= score.value <= 100
"""

BROKEN = """
from radio_distill.config import EvaluationConfig, TeacherConfig, UpsamplerConfig
from radio_distill.errors import ConfigError
from radio_distill.evals.run import make
from teachers import teacher_spec
from upsamplers import build_upsampler
from upsamplers.networks import build_network

def teacher(name):
    return lambda: teacher_spec("t", TeacherConfig(preset=name, weights="w.safetensors"))

def upsampler(name):
    return lambda: build_upsampler(UpsamplerConfig(name=name, factor=2), {})

def benchmark(name):
    return lambda: make(name, EvaluationConfig(images="here"))

def network(name):
    return lambda: build_network(name, 8, 2, {})

for ask, message in (
    (teacher("no_arguments"), "source 'broken.no_arguments' lacks ARGUMENTS; it needs ARGUMENTS, "),
    (teacher("takes_less"), "'broken.takes_less': complete is called with (preset, weights)"),
    (teacher("no_module"), "source 'broken.nowhere' cannot be imported: ModuleNotFoundError"),
    (teacher("no_preset"), "preset no_preset is a dict, not a teachers.presets.Preset"),
    (teacher("no_map"), "gives a Tensor, not a tuple of a summary (or None) and a map"),
    (teacher("no_mean"), "options.mean is missing"),
    (upsampler("no_factor"), "upsampler 'no_factor' is called with (factor=…, micro_batch=…)"),
    (upsampler("no_cost"), "upsampler 'no_cost' lacks cost; it needs cost, __call__"),
    (upsampler("no_class"), "upsampler 'no_class' (broken.parts:NOWHERE): broken.parts has no"),
    (network("no_levels"), "network 'no_levels' lacks tile_levels"),
    (network("no_channels"), "network 'no_channels' is called with (channels, factor)"),
    (benchmark("a_tuple"), "benchmark 'a_tuple': sources is a tuple, not a mapping"),
    (benchmark("no_sources"), "benchmark 'no_sources' lacks sources; it needs name, sources, run"),
    (benchmark("other_field"), "there is no field 'image' (did you mean 'images'?)"),
    (benchmark("plain_class"), "benchmark 'plain_class' is no dataclass"),
    (benchmark("short_run"), "benchmark 'short_run': run is called with (self, encoder, limit, pr"),
):
    try:
        ask()
    except ConfigError as error:
        assert message in str(error), (message, str(error))
        assert "\\n" not in str(error), str(error)
    else:
        raise AssertionError(f"accepted: {message}")
"""

PARTS = """
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from teachers.presets import Preset

HALF = (0.5, 0.5, 0.5)
NO_ARGUMENTS = Preset(source="broken.no_arguments", model="m", mean=HALF, std=HALF, native_size=64)
TAKES_LESS = Preset(source="broken.takes_less", model="m", mean=HALF, std=HALF, native_size=64)
NO_MODULE = Preset(source="broken.nowhere", model="m")
NO_PRESET = {"source": "timm"}
NO_MAP = Preset(source="broken.whole", model="m", mean=HALF, std=HALF, native_size=64)
NO_MEAN = Preset(source="broken.whole", model="tuple", native_size=64)

class NoFactor:
    def __call__(self, teacher, pixels, grid): ...
    def cost(self, grid): return 1

class NoCost:
    def __init__(self, factor, micro_batch=0): ...
    def __call__(self, teacher, pixels, grid): ...

class NoLevels(nn.Module):
    def __init__(self, channels, factor): super().__init__()
    def forward(self, observation): ...

class NoChannels(nn.Module):
    tile_levels = ()
    def __init__(self): super().__init__()

@dataclass
class Tuple:
    images: str
    name: ClassVar[str] = "a_tuple"
    sources: ClassVar = ("images",)
    def run(self, encoder, limit=None, progress=None): return []

@dataclass
class NoSources:
    name: ClassVar[str] = "no_sources"
    def run(self, encoder, limit=None, progress=None): return []

@dataclass
class OtherField:
    images: str
    name: ClassVar[str] = "other_field"
    sources: ClassVar = {"images": "image"}
    def run(self, encoder, limit=None, progress=None): return []

class Plain:
    name = "plain_class"
    sources = {}
    def run(self, encoder, limit=None, progress=None): return []

@dataclass
class ShortRun:
    name: ClassVar[str] = "short_run"
    sources: ClassVar = {}
    def run(self, encoder): return []
"""

SOURCE = """
from torch import nn

class Tower(nn.Conv2d):
    def __init__(self, as_tuple):
        super().__init__(3, 4, 16, 16)
        self.as_tuple = as_tuple
    def forward(self, pixels):
        spatial = super().forward(pixels)
        return (None, spatial) if self.as_tuple else spatial

def complete(preset, weights): return preset
def build(preset): return Tower(preset.model == "tuple")
def locate(preset): ...
def load(preset, path): ...
"""

BROKEN_POINTS = """
[radio_distill.teachers]
no_arguments = broken.parts:NO_ARGUMENTS
takes_less = broken.parts:TAKES_LESS
no_module = broken.parts:NO_MODULE
no_preset = broken.parts:NO_PRESET
no_map = broken.parts:NO_MAP
no_mean = broken.parts:NO_MEAN
[radio_distill.upsamplers]
no_factor = broken.parts:NoFactor
no_cost = broken.parts:NoCost
no_class = broken.parts:NOWHERE
[radio_distill.networks]
no_levels = broken.parts:NoLevels
no_channels = broken.parts:NoChannels
[radio_distill.benchmarks]
a_tuple = broken.parts:Tuple
no_sources = broken.parts:NoSources
other_field = broken.parts:OtherField
plain_class = broken.parts:Plain
short_run = broken.parts:ShortRun
"""


def install(folder: Path, name: str, files: dict[str, str], entry_points: str) -> None:
    (folder / name).mkdir()
    for file, text in {"__init__.py": "", **files}.items():
        (folder / name / file).write_text(text, encoding="utf-8")
    described = folder / f"{name}-1.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (described / "entry_points.txt").write_text(entry_points)


def run(folder: Path, code: str) -> None:
    (folder / "run.py").write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "run.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_page__shows_the_files_as_they_are():
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    shown = dict(
        text.removeprefix("# my_package/").split("\n", 1)
        for language, text in blocks
        if language == "python"
    )
    files = {path.name: path.read_text() for path in (PACKAGE / "my_package").glob("[a-z]*.py")}
    assert shown == files
    assert set(files) == {"encoder.py", "head.py", "upsampler.py", "network.py", "benchmark.py"}
    (points,) = [text for language, text in blocks if language == "toml"]
    assert points in (PACKAGE / "pyproject.toml").read_text()


def test_package__runs_where_it_is_installed(tmp_path):
    files = {path.name: path.read_text() for path in (PACKAGE / "my_package").glob("[a-z]*.py")}
    points = (PACKAGE / "pyproject.toml").read_text().partition("[project.entry-points")[2]
    points = f"[project.entry-points{points}".replace('project.entry-points."', "")
    install(tmp_path, "my_package", files, points.replace('"', ""))
    run(tmp_path, RUN)


def test_files__that_are_not_whole_are_one_line(tmp_path):
    whole = f"ARGUMENTS = {{}}\n{SOURCE}"
    files = {
        "parts.py": PARTS,
        "no_arguments.py": SOURCE,
        "whole.py": whole,
        "takes_less.py": whole.replace("complete(preset, weights)", "complete(preset)"),
    }
    install(tmp_path, "broken", files, BROKEN_POINTS)
    run(tmp_path, BROKEN)
