"""Upsamplers of others, from the copy that the user has: AnyUp, JAFAR, LoftUp, NAF and UPLiFT.

Each is a network that is handed an image and a low-resolution map. Nothing of theirs is in this
project and nothing is fetched: the user clones the repository and names the folder in
``upsampler.options.repository``. **That runs the code in that folder**, as an import does; name
only one that you trust. Their own entry functions may fetch their weights on first use, unless
``upsampler.options.checkpoint`` names a file of them.

All of them take images normalised by ImageNet's mean and deviation and are run one image at a
time, in float32: they need much memory, and LoftUp scales colours by what else is in the batch.
"""

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from radio_distill.distill.views import resize
from radio_distill.errors import ConfigError, RadioDistillError, WeightsError
from radio_distill.protocols import Teacher
from radio_distill.system.files import reason_of
from radio_distill.system.trust import check_sha256
from radio_distill.types import Features, Size
from radio_distill.weights.files import read_checkpoint

from .methods import tiling
from .networks.guidance import as_imagenet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class External:
    """Encode the whole image, then let another project's network make the map finer.

    Raises:
        ConfigError: its code is not there, or does not load.
        WeightsError: a checkpoint that cannot be read or does not fit.
    """

    factor: int
    micro_batch: int = 0
    """Teacher images in one call; 0 for the teacher's own setting."""
    repository: str = ""
    """Folder of a clone, whose code will run."""
    checkpoint: str = ""
    """File of weights; empty lets the repository's entry function find its own."""
    checkpoint_sha256: str = ""
    """Checksum that the file must have; empty for any."""
    entry: str = ""
    """Function of the clone's ``hubconf.py`` that builds the network."""
    network: nn.Module = field(init=False, repr=False, compare=False)
    name: ClassVar[str]
    source: ClassVar[str]
    """Owner and name of the repository on GitHub."""

    def __post_init__(self) -> None:
        if self.checkpoint_sha256 and not self.checkpoint:
            raise ConfigError(
                f"upsampler {self.name!r}: options.checkpoint_sha256 is given without "
                "options.checkpoint, the file to check"
            )
        network = self._load().eval().requires_grad_(False)
        object.__setattr__(self, "network", network)

    @torch.no_grad()
    def __call__(self, teacher: Teacher, pixels: Tensor, grid: Size) -> Features:
        """Return features with spatial ``[B, C, *grid]``; ConfigError for a grid that cannot be."""
        height, width = tiling.low_resolution(teacher, grid, self.factor)
        low = tiling.encode_low(teacher, pixels, grid, self.factor, self.micro_batch)
        if self.factor == 1:
            return low
        guidance = resize(pixels, (height * self.factor, width * self.factor))
        guidance = guidance.to(low.spatial.device, torch.float32)
        self.network.to(low.spatial.device)
        maps = [
            self._finer(image[None], spatial[None], grid)
            for image, spatial in zip(guidance, low.spatial, strict=True)
        ]
        fine = torch.cat(maps).to(low.spatial.dtype)
        return Features(low.summary, fine.contiguous(memory_format=torch.channels_last))

    def cost(self, grid: Size) -> int:
        """Return 1: the whole image."""
        return 1

    def _finer(self, guidance: Tensor, spatial: Tensor, grid: Size) -> Tensor:
        shown = f"upsampler {self.name!r} on features {list(spatial.shape)}"
        try:
            with torch.autocast(spatial.device.type, enabled=False):
                fine = self._run(guidance, spatial, grid)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # code of others fails in its own ways
            raise ConfigError(f"{shown} failed: {reason_of(error)}") from error
        wanted = (*spatial.shape[:2], *grid)
        if tuple(fine.shape) != wanted:
            raise ConfigError(f"{shown} gave {list(fine.shape)} instead of {list(wanted)}")
        return fine

    def _run(self, guidance: Tensor, spatial: Tensor, grid: Size) -> Tensor:
        """Call the network: image ``[1, 3, H, W]`` in [0, 1], map ``[1, C, h, w]``."""
        return self.network(as_imagenet(guidance), spatial, grid)

    def _load(self) -> nn.Module:
        if not self.repository:
            raise ConfigError(
                f"upsampler {self.name!r} is not part of this project: `git clone "
                f"https://github.com/{self.source}` and name the folder in its option "
                f"`repository` (its code will run)"
            )
        folder = Path(self.repository).expanduser().resolve()
        if not folder.is_dir():
            raise ConfigError(f"upsampler {self.name!r}: repository {folder} is not a folder")
        try:
            with _importing_from(folder):
                return self._build(folder)
        except RadioDistillError:
            raise
        except Exception as error:  # as above
            raise ConfigError(
                f"upsampler {self.name!r} does not load from {folder}: {reason_of(error)}"
            ) from error

    def _build(self, folder: Path) -> nn.Module:
        return self._with_checkpoint(self._from_hub(folder))

    def _from_hub(self, folder: Path, **options: Any) -> Any:
        own = not self.checkpoint
        return torch.hub.load(str(folder), self.entry, source="local", pretrained=own, **options)

    def _with_checkpoint(self, network: nn.Module) -> nn.Module:
        if self.checkpoint:
            _fill(network, _read(self.checkpoint, self.checkpoint_sha256), self.checkpoint)
        return network


@dataclass(frozen=True)
class AnyUp(External):
    """AnyUp (arXiv 2510.12764): one network for the features of any encoder.

    Without ``repository`` an installed package ``anyup`` is used; it has no weights of its own.
    """

    entry: str = "anyup_multi_backbone"
    q_chunk_size: int | None = None
    """Fine cells whose attention is computed at a time; fewer take less memory."""
    name: ClassVar[str] = "anyup"
    source: ClassVar[str] = "wimmerth/anyup"

    def _load(self) -> nn.Module:
        if self.repository or importlib.util.find_spec("anyup") is None:
            return super()._load()
        if not self.checkpoint:
            raise ConfigError(
                f"upsampler 'anyup': the installed package has no weights; name a file from "
                f"https://github.com/{self.source}/releases in its option `checkpoint`"
            )
        return self._with_checkpoint(importlib.import_module("anyup.model").AnyUp())

    def _run(self, guidance: Tensor, spatial: Tensor, grid: Size) -> Tensor:
        chunk = self.q_chunk_size
        return self.network(as_imagenet(guidance), spatial, output_size=grid, q_chunk_size=chunk)


@dataclass(frozen=True)
class Naf(External):
    """NAF (arXiv 2511.18452): neighbourhood attention from the image; needs ``natten``."""

    entry: str = "naf"
    name: ClassVar[str] = "naf"
    source: ClassVar[str] = "valeoai/NAF"


@dataclass(frozen=True)
class LoftUp(External):
    """LoftUp (arXiv 2504.14032), fitted for one encoder, which ``entry`` names.

    Its maps are not in the teacher's own space: a probe that was trained on low-resolution features
    reads them badly (AnyUp, arXiv 2510.12764). Compare images with it; do not distil from it.
    """

    entry: str = "loftup_dinov2s"
    name: ClassVar[str] = "loftup"
    source: ClassVar[str] = "andrehuang/loftup"

    def __post_init__(self) -> None:
        super().__post_init__()
        log.warning("upsampler 'loftup' leaves the teacher's feature space; do not distil from it")

    def _run(self, guidance: Tensor, spatial: Tensor, grid: Size) -> Tensor:
        # The image decides the size of its result.
        return self.network(spatial, as_imagenet(resize(guidance, grid)))


@dataclass(frozen=True)
class Jafar(External):
    """JAFAR (arXiv 2506.11136), fitted for one encoder, which ``checkpoint`` decides; CUDA only."""

    name: ClassVar[str] = "jafar"
    source: ClassVar[str] = "PaulCouairon/JAFAR"

    def _build(self, folder: Path) -> nn.Module:
        if not self.checkpoint:
            raise ConfigError(
                f"upsampler 'jafar' has one file of weights for each encoder: name one from "
                f"https://github.com/{self.source}/releases in its option `checkpoint`"
            )
        state = _read(self.checkpoint, self.checkpoint_sha256)
        first = state.get("key_features_encoder.0.weight")
        if first is None:
            raise WeightsError(f"{self.checkpoint} does not hold JAFAR's weights")
        network = importlib.import_module("src.upsampler.jafar").JAFAR(v_dim=first.shape[1])
        _fill(network, state, self.checkpoint)
        return network


@dataclass(frozen=True)
class UpliftPublished(External):
    """UPLiFT (arXiv 2601.17950) with its authors' weights, for one encoder, which entry names.

    There are DINOv2 ViT-S/14 and, with ``entry: uplift_dinov3_splus16``, DINOv3 ViT-S+/16; its code
    needs ``omegaconf``. The upsampler ``uplift`` is the method fitted to a teacher of one's own.
    """

    entry: str = "uplift_dinov2_s14"
    name: ClassVar[str] = "uplift_published"
    source: ClassVar[str] = "mwalmer-umd/UPLiFT"

    def _build(self, folder: Path) -> nn.Module:
        network = self._from_hub(folder, include_extractor=False)
        network.enable_iterative(max(1, (self.factor - 1).bit_length()))  # each step doubles
        return self._with_checkpoint(network)

    def _run(self, guidance: Tensor, spatial: Tensor, grid: Size) -> Tensor:
        # Its image is what the teacher is shown. Between powers of two it interpolates its result.
        height, width = guidance.shape[-2:]
        image = as_imagenet(resize(guidance, (height // self.factor, width // self.factor)))
        is_power = self.factor & (self.factor - 1) == 0
        return self.network(image, spatial, outsize=None if is_power else list(grid))


@contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Import ``folder``'s modules as though nothing of the same name were loaded, then forget them.

    LoftUp has a package ``upsamplers``, as this project has, and JAFAR and NAF each have ``src``.
    """
    names = {item.stem for item in folder.iterdir() if item.is_dir() or item.suffix == ".py"}
    hidden = _loaded(names)
    for name in hidden:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _loaded(names):
            del sys.modules[name]
        sys.modules.update(hidden)


def _loaded(names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in sys.modules.items() if key.partition(".")[0] in names}


def _read(path: str, sha256: str) -> Mapping[str, Tensor]:
    """Read a checkpoint's tensors, out of the wrappers that these projects use."""
    file = Path(path).expanduser()
    check_sha256([file], sha256, "options.checkpoint_sha256")
    checkpoint: Any = read_checkpoint(file)
    for wrapper in ("state_dict", "jafar"):
        if wrapper in checkpoint:
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, dict):
        raise WeightsError(f"{path} holds a {type(checkpoint).__name__}, not a table of tensors")
    return checkpoint


def _fill(network: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        kind = type(network).__name__
        raise WeightsError(f"{path} holds the weights of another network than {kind}") from error
