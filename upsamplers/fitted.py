"""Fitted upsamplers: their model, and the upsampler that runs it.

::

    teacher's maps ──► PHI-S ──► + bias ──► network ──► PHI-S back ──► fine map, teacher's space

A model is a network (:mod:`upsamplers.networks`), the normalizer in whose space it works, and a
bias: one learned map at the teacher's own grid, which takes away what the encoder adds to each
position whatever it sees (FeatSharp, arXiv 2502.16025, section 3.4). The bias comes before the
network, so it works for any. Files are :mod:`.fitted_files`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from radio_distill.distill.views import resize
from radio_distill.errors import CheckpointError, ConfigError, WeightsError
from radio_distill.normalize import NORMALIZERS
from radio_distill.normalize.affine import converted
from radio_distill.normalize.phi_s import PhiS
from radio_distill.protocols import Normalizer, Teacher
from radio_distill.system.precision import autocast
from radio_distill.types import Features, Size, TeacherSpec, format_size

from .fitted_files import FittedHeader, hash_of, read_header, read_tensors, write
from .methods import tiling
from .networks import Observation, build_network


class TeacherOutput(NamedTuple):
    """A teacher's output for a batch of images, normalised and not yet de-biased."""

    summary: Tensor | None
    observation: Observation
    further: Tensor
    """``[N, C, h, w]`` of the further images that were encoded along."""
    halves: tuple[Tensor, ...] = ()
    """``[B, C, h / 2, w / 2]`` of the images halved once, and so on."""


class UpsamplerModel(nn.Module):
    """A network with its teacher's normalizer and bias.

    Args:
        network: see :mod:`upsamplers.networks`.
        normalizer: a fitted one.
        channels: C.
        grid: the teacher's own grid (h, w) that the bias is learned at; None for no bias.
    """

    bias: nn.Parameter | None
    """``[1, C, h, w]``, in the normalised space."""

    def __init__(
        self, network: nn.Module, normalizer: Normalizer, channels: int, grid: Size | None
    ):
        super().__init__()
        self.network = network
        self.normalizer = normalizer
        bias = None if grid is None else nn.Parameter(torch.zeros(1, channels, *grid))
        self.register_parameter("bias", bias)

    @property
    def tile_levels(self) -> tuple[int, ...]:
        """Levels of tiles that the network needs."""
        return tuple(self.network.tile_levels)  # type: ignore[arg-type]

    @torch.no_grad()
    def encode(
        self,
        teacher: Teacher,
        pixels: Tensor,
        grid: Size,
        factor: int,
        micro_batch: int = 0,
        further: Tensor | None = None,
    ) -> TeacherOutput:
        """Encode ``[B, 3, H, W]`` for the fine ``grid``; see :func:`.tiling.encode_with_tiles`."""
        encoded = tiling.encode_with_tiles(
            teacher, pixels, grid, factor, self.tile_levels, micro_batch, further
        )
        guidance = encoded.images.get(factor)
        if guidance is None:
            height, width = tiling.low_resolution(teacher, grid, factor)
            guidance = resize(pixels, (height * factor, width * factor))
        normalise = self.normalizer.apply
        tiles = {level: normalise(maps) for level, maps in encoded.tiles.items()}
        observation = Observation(guidance, normalise(encoded.low.spatial), tiles)
        further_maps = normalise(encoded.further) if len(encoded.further) else encoded.further
        return TeacherOutput(encoded.low.summary, observation, further_maps)

    @torch.no_grad()
    def encode_halves(
        self, teacher: Teacher, pixels: Tensor, size: Size, count: int
    ) -> tuple[Tensor, ...]:
        """Return normalised maps of images of ``size`` halved once, twice ... ``count`` times."""
        sizes = [(size[0] >> times, size[1] >> times) for times in range(1, count + 1)]
        maps = (teacher.encode(resize(pixels, smaller)).spatial for smaller in sizes)
        return tuple(map(self.normalizer.apply, maps))

    def forward(self, observation: Observation) -> Tensor:
        """De-bias, then upsample: ``[B, C, h * factor, w * factor]`` in the normalised space."""
        tiles = {level: self.de_biased(maps, level) for level, maps in observation.tiles.items()}
        de_biased = Observation(observation.guidance, self.de_biased(observation.low), tiles)
        fine: Tensor = self.network(de_biased)
        return fine

    def de_biased(self, maps: Tensor, level: int = 1) -> Tensor:
        """Add the bias to normalised maps of ``level x level`` tiles, resized where they differ."""
        if self.bias is None:
            return maps
        bias = _resized(self.bias, (maps.shape[-2] // level, maps.shape[-1] // level))
        return maps + bias.repeat(1, 1, level, level)

    @torch.no_grad()
    def correct(self, spatial: Tensor) -> Tensor:
        """De-bias maps ``[B, C, h, w]`` in the teacher's own space, at any grid.

        FeatSharp, appendix C: the bias belongs to the teacher, so a partition that sees the teacher
        at its own grid is better off without it too.
        """
        if self.bias is None:
            return spatial
        origin = self.normalizer.invert(torch.zeros_like(self.bias))
        own = self.normalizer.invert(self.bias) - origin
        return spatial + _resized(own, (spatial.shape[-2], spatial.shape[-1])).to(spatial)

    @torch.no_grad()
    def upsample(
        self,
        teacher: Teacher,
        pixels: Tensor,
        grid: Size,
        factor: int,
        micro_batch: int = 0,
        into: Normalizer | None = None,
    ) -> Features:
        """Return features with spatial ``[B, C, *grid]``, in the space of ``into``.

        Without it they are in the teacher's own.
        """
        output = self.encode(teacher, pixels, grid, factor, micro_batch)
        fine = self(output.observation)
        own = self.normalizer
        spatial = own.invert(fine) if into is None else converted(fine, own, into)
        return Features(output.summary, spatial.contiguous(memory_format=torch.channels_last))


def _resized(bias: Tensor, grid: Size) -> Tensor:
    same = tuple(bias.shape[-2:]) == grid
    return bias if same else F.interpolate(bias, grid, mode="bilinear", align_corners=False)


class FittedUpsampler:
    """Upsample each teacher with the network that was fitted to it.

    Args:
        network: a name in :data:`upsamplers.networks.NETWORKS`.
        factor: how much finer than the teacher's own grid.
        micro_batch: teacher images in one call, tiles counted; 0 for the teacher's own setting.
        weights: file of the fitted upsampler, by teacher name.
        any_size: accept teacher inputs of another size than the fit's; the bias is resized.
        precision: of the network's matrix products; auto is bfloat16 where the device has
            instructions for it.

    Raises:
        WeightsError: a file that cannot be read, or does not hold what its header says.
    """

    fitted: ClassVar[bool] = True

    def __init__(
        self,
        network: str,
        factor: int,
        micro_batch: int = 0,
        weights: Mapping[str, str] | None = None,
        any_size: bool = False,
        precision: Literal["auto", "bfloat16", "float32"] = "auto",
    ):
        self.network, self.factor = network, factor
        self._micro_batch, self._any_size, self._precision = micro_batch, any_size, precision
        self._device = torch.device("cpu")
        files = (weights or {}).items()
        self._models = {name: load_model(path).eval() for name, path in files}
        self._sizes = {name: read_header(path).size for name, path in files}

    @classmethod
    def untrained(
        cls,
        network: str,
        factor: int,
        specs: Mapping[str, TeacherSpec],
        options: Mapping[str, Any] | None = None,
    ) -> "FittedUpsampler":
        """Build one with random weights, which costs what a fitted one with its options does."""
        upsampler = cls(network, factor, any_size=True)
        for name, spec in specs.items():
            channels = spec.channels
            identity = {"scale": torch.ones(()), "rotation": torch.eye(channels)}
            normalizer = PhiS().load_state({"mean": torch.zeros(channels), **identity})
            made = build_network(network, channels, factor, options or {})
            model = UpsamplerModel(made, normalizer, channels, spec.grid(spec.native_size))
            upsampler._models[name] = model.eval()
        return upsampler

    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]`` in the teacher's own space.

        Raises:
            ConfigError: a grid that cannot be, or a teacher input of another size than the fit's.
        """
        return self._upsample(teacher, pixels, grid)

    def normalised(
        self, teacher: Teacher, pixels: Tensor, grid: Size, normalizer: Normalizer
    ) -> Features:
        """Return the same in the space of ``normalizer``; the two ways there are one map."""
        return self._upsample(teacher, pixels, grid, normalizer)

    def _upsample(
        self, teacher: Teacher, pixels: Tensor, grid: Size, into: Normalizer | None = None
    ) -> Features:
        name = teacher.spec.name
        self._check_size(name, tiling.low_resolution(teacher, grid, self.factor))
        model = self._model(name, pixels.device)
        with autocast(self._precision, pixels.device):
            return model.upsample(teacher, pixels, grid, self.factor, self._micro_batch, into)

    def correct(self, name: str, spatial: Tensor) -> Tensor:
        """De-bias a teacher's map ``[B, C, h, w]`` at its own grid; others stay as they are."""
        if name not in self._models:
            return spatial
        return self._model(name, spatial.device).correct(spatial)

    def cost(self, grid: Size) -> int:
        """Return the teacher images of one image: the whole, and the tiles that it needs."""
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
            fitted, given = format_size(self._sizes[name]), format_size(size)
            raise ConfigError(
                f"the {self.network} of teacher {name!r} was fitted at {fitted} px, the partition "
                f"shows it {given}; set teacher_sizes.{name} of the partition, fit one at that "
                "size, or set upsampler.options.any_size"
            )


def load_model(path: str | Path) -> UpsamplerModel:
    """Build the model of a fitted file; raises WeightsError where it does not fit together."""
    header, parts = read_header(path), read_tensors(path)
    network, normalizer = parts.get("network", {}), parts.get("normalizer", {})
    try:
        return assemble(header, network, normalizer, parts.get("bias", {}).get(""))
    except (ConfigError, CheckpointError, RuntimeError, TypeError, ValueError, IndexError) as error:
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
    """Build the model that a header describes, of the states of its parts and its bias, if any.

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
    """Write a model, its matrices in bfloat16; raises WeightsError where it cannot."""
    statistics = {name: value.float() for name, value in model.normalizer.state().items()}
    tensors = {f"normalizer.{name}": value for name, value in statistics.items()}
    for name, value in model.network.state_dict().items():
        tensors[f"network.{name}"] = value.bfloat16() if value.ndim > 1 else value
    tensors |= {f"downsampler.{name}": value for name, value in (downsampler or {}).items()}
    if model.bias is not None:
        tensors["bias"] = model.bias
    write(path, tensors, replace(header, statistics_hash=hash_of(statistics)))
