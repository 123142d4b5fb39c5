"""Upsamplers with learned weights, one file a teacher: ``featup``, ``featsharp`` and others.

They differ in their network alone (:mod:`upsamplers.networks`); ``stages/fit_upsampler.py`` makes
the files (:mod:`upsamplers.fitted`).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from radio_distill.errors import CheckpointError, ConfigError, WeightsError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.phi_s import PhiS
from radio_distill.protocols import Teacher
from radio_distill.system.precision import AUTO, autocast
from radio_distill.types import Features, Size, TeacherSpec

from .fitted import FittedHeader, hash_of, read_header, read_tensors, write
from .methods import tiling
from .model import UpsamplerModel
from .networks import build_network


class Learned:
    """Upsample each teacher with the network that was fitted to it.

    Args:
        factor: how much finer than the teacher's own grid.
        micro_batch: teacher images in one call, tiles counted; 0 for the teacher's own setting.
        weights: file of the fitted upsampler, by teacher name.
        any_size: accept teacher inputs of another size than the fit's; the bias is resized.
        precision: of the network's matrix products, bfloat16 or float32; auto is bfloat16 where
            the device has instructions for it.

    Raises:
        ConfigError: another precision.
        WeightsError: a file that cannot be read, or does not hold what its header says.
    """

    fitted: ClassVar[bool] = True
    network: ClassVar[str]

    def __init__(
        self,
        factor: int,
        micro_batch: int = 0,
        weights: Mapping[str, str] | None = None,
        any_size: bool = False,
        precision: str = AUTO,
    ):
        if precision not in (AUTO, "bfloat16", "float32"):
            raise ConfigError(
                f"upsampler option precision: {precision!r} is not {AUTO}, bfloat16 or float32"
            )
        self.factor = factor
        self._micro_batch = micro_batch
        self._any_size = any_size
        self._precision = precision
        self._sizes: dict[str, Size] = {}
        self._models: dict[str, UpsamplerModel] = {}
        self._device = torch.device("cpu")
        for name, path in (weights or {}).items():
            self._models[name] = load_model(path).eval()
            self._sizes[name] = read_header(path).size

    @classmethod
    def untrained(cls, factor: int, specs: Mapping[str, TeacherSpec]) -> "Learned":
        """Build one with random weights, which costs what a fitted one does."""
        made = cls(factor, any_size=True)
        for name, spec in specs.items():
            channels = spec.channels
            normalizer = PhiS().load_state(
                {
                    "mean": torch.zeros(channels),
                    "scale": torch.ones(()),
                    "rotation": torch.eye(channels),
                }
            )
            network = build_network(cls.network, channels, factor, {})
            grid = spec.grid(spec.native_size)
            made._models[name] = UpsamplerModel(network, normalizer, channels, grid).eval()
        return made

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]`` in the teacher's own space.

        Raises:
            ConfigError: a grid that cannot be, or a teacher input of another size than the fit's.
        """
        name = teacher.spec.name
        self._check_size(name, tiling.low_resolution(teacher, grid, self.factor))
        model = self._model(name, pixels.device)
        with autocast(self._precision, pixels.device):
            return model.upsample(teacher, pixels, grid, self.factor, self._micro_batch)

    def correct(self, name: str, spatial: Tensor) -> Tensor:
        """De-bias a teacher's map ``[B, C, h, w]`` at its own grid; others stay as they are."""
        if name not in self._models:
            return spatial
        return self._model(name, spatial.device).correct(spatial)

    def cost(self, grid: Size) -> int:
        """Return the teacher images of one image: the whole, and the tiles that are looked at."""
        levels = {level for model in self._models.values() for level in model.tile_levels}
        return 1 + sum(level**2 for level in levels if level > 1)

    def _model(self, name: str, device: torch.device) -> UpsamplerModel:
        if device != self._device:
            for model in self._models.values():
                model.to(device)
            self._device = device
        return self._models[name]

    def _check_size(self, name: str, size: Size) -> None:
        """Views that are not square keep their longer side, as the recipe's input sizes do."""
        if not self._any_size and max(size) != max(self._sizes[name]):
            fitted, asked = ("x".join(map(str, item)) for item in (self._sizes[name], size))
            raise ConfigError(
                f"the {self.network} of teacher {name!r} was fitted at {fitted} px, the partition "
                f"shows it {asked}; set teacher_sizes.{name} of the partition, fit one at that "
                "size, or set upsampler.options.any_size"
            )


class FeatUp(Learned):
    """FeatUp's joint-bilateral stack (:mod:`upsamplers.networks.featup`)."""

    network = "featup"


class FeatSharp(Learned):
    """Joint-bilateral upsampling refined by tiles (:mod:`upsamplers.networks.featsharp`)."""

    network = "featsharp"


class Carafe(Learned):
    """Content-aware reassembly (:mod:`upsamplers.networks.carafe`)."""

    network = "carafe"


class Sapa(Learned):
    """Similarity-aware point affinity (:mod:`upsamplers.networks.sapa`)."""

    network = "sapa"


class ResizeConv(Learned):
    """Bilinear interpolation and a convolution (:mod:`upsamplers.networks.resize_conv`)."""

    network = "resize_conv"


def load_model(path: str | Path) -> UpsamplerModel:
    """Build the model of a fitted file; raises WeightsError where it does not fit together."""
    header, parts = read_header(path), read_tensors(path)
    try:
        return assemble(
            header,
            parts.get("network", {}),
            parts.get("normalizer", {}),
            parts.get("bias", {}).get(""),
        )
    except (ConfigError, CheckpointError, RuntimeError, TypeError, IndexError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise WeightsError(
            f"upsampler {path} does not hold what its header says: {reason}"
        ) from error


def assemble(
    header: FittedHeader,
    network_state: Mapping[str, Tensor],
    normalizer_state: Mapping[str, Tensor],
    bias: Tensor | None,
) -> UpsamplerModel:
    """Build the model that a header describes, of the states of its parts.

    Args:
        header: names network and normalizer.
        network_state: state of the network.
        normalizer_state: state of the normalizer.
        bias: ``[1, C, h, w]`` in the normalised space, or None for a model without.

    Raises:
        ConfigError: an unknown network, or an option that it does not have.
        CheckpointError: statistics of another normalizer.
        RuntimeError: tensors of another shape.
    """
    network = build_network(header.upsampler, header.channels, header.factor, header.options)
    network.load_state_dict(network_state)
    normalizer = NORMALIZERS.get(header.normalizer)().load_state(normalizer_state)
    grid = None if bias is None else (bias.shape[-2], bias.shape[-1])
    model = UpsamplerModel(network, normalizer, header.channels, grid)
    if bias is not None:
        model.load_state_dict({"bias": bias}, strict=False)
    return model


def save_model(
    path: str | Path,
    model: UpsamplerModel,
    header: FittedHeader,
    downsampler: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model; its matrices in bfloat16, everything that is small in float32."""
    statistics = {name: value.float() for name, value in model.normalizer.state().items()}
    tensors = {f"normalizer.{name}": value for name, value in statistics.items()}
    for name, value in model.network.state_dict().items():
        tensors[f"network.{name}"] = value.bfloat16() if value.ndim > 1 else value
    tensors |= {f"downsampler.{name}": value for name, value in (downsampler or {}).items()}
    if model.bias is not None:
        tensors["bias"] = model.bias
    write(path, tensors, replace(header, statistics_hash=hash_of(statistics)))
