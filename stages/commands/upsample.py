"""Make a teacher's features of photographs finer, and paint them as colours.

    radio-distill upsample cat.jpg
    radio-distill upsample photos/*.jpg --teacher dinov2_l_reg --upsampler tile --factor 2
    radio-distill upsample cat.jpg --upsampler runs/mine/fit/dino-featsharp-3x/upsampler.safetensors
    radio-distill upsample cat.jpg --upsampler implicit --options steps=300 views=300

The shortest way to see what an upsampler does. Each photograph keeps its shape. Two files of it:

    cat-featsharp-4x.safetensors   features [C, h, w], low [C, h / factor, w / factor] as the
                                   teacher gives it, summary [S] if there is one, in float32; the
                                   metadata say of which teacher, weights, upsampler and sizes
    cat-featsharp-4x.png           photograph, the teacher's own map, that made finer by bilinear
                                   interpolation, and by the upsampler; one basis of colours

UPSAMPLER is a name (`radio-distill list upsamplers`), the file of a fit, `shipped:` and one that
comes with the project, or one that is fitted to each photograph by itself, in thousands of steps:
`implicit` to the teacher's answers for thousands of views of it, `deep_image_prior` to the one map.
"""

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.errors import ConfigError, DataError

from ..arguments import add_trust_argument, check_output, side_of, writing

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from radio_distill.config import TeacherConfig
    from radio_distill.protocols import Teacher, Upsampler
    from radio_distill.types import Features

logger = logging.getLogger(__name__)

SIDE = 336
"""Of one image on the sheet, in pixels."""
FACTOR = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill upsample``."""
    add_trust_argument(parser)
    add = parser.add_argument
    add("photos", nargs="+", type=Path, metavar="PHOTO", help="files of images")
    teacher = (
        "a preset, or SOURCE:MODEL such as timm:vit_small_patch16_dinov3 (default: %(default)s)"
    )
    add("--teacher", default="vits14_packaged", help=teacher)
    add(
        "--upsampler",
        default="featsharp",
        help="a name, or the file of a fit (default: %(default)s)",
    )
    add("--factor", type=int, help=f"how much finer (default: the file's, else {FACTOR})")
    size = "longer side of what the teacher sees (default: that of the fit, else the teacher's own)"
    add("--size", type=side_of, metavar="PX", help=size)
    options = (
        "options of the upsampler: steps of implicit and deep_image_prior, repository of anyup ..."
    )
    add("--options", nargs="+", default=[], metavar="KEY=VALUE", help=options)
    add(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder of the files (default: here)",
    )
    add("--overwrite", action="store_true", help="replace files that are there")


def run(arguments: argparse.Namespace) -> int:
    """Check everything that is asked for, then upsample, paint and write photo by photo."""
    from radio_distill.system.distributed import World, choose_device
    from radio_distill.system.progress import Progress
    from teachers import build_teacher
    from teachers.names import named_teachers

    asked = _asked(arguments.upsampler, arguments.factor, arguments.options)
    outputs = _outputs(arguments, asked)
    ((name, config),) = named_teachers([arguments.teacher], "--teacher").items()
    teacher = build_teacher(name, config, choose_device("auto", World()))
    built = _build(asked, teacher, arguments)
    facts = _facts(arguments.teacher, config, teacher, built)
    several = len(outputs) > 1 and not built.is_per_image  # which shows bars of its own
    with Progress("upsample", len(outputs), "photos", visible=several) as bar:
        for number, (photo, output) in enumerate(outputs.items(), 1):
            line = _upsample(photo, output, teacher, built, facts)
            bar.update(number)
            print(line)
    return 0


@dataclass(frozen=True)
class Asked:
    """The upsampler as the command line names it."""

    name: str
    factor: int
    options: Mapping[str, Any]
    file: Path | None = None
    """Of a fit; None for one without, or one that comes with the project."""

    @property
    def label(self) -> str:
        return f"{self.name}-{self.factor}x"


@dataclass(frozen=True)
class Built:
    """An upsampler, and at which size it works."""

    asked: Asked
    upsampler: "Upsampler"
    side: int
    """Longer side of what the teacher sees, in pixels."""

    @property
    def is_per_image(self) -> bool:
        from upsamplers import PER_IMAGE

        return self.asked.name in PER_IMAGE.names()


def _asked(text: str, factor: int | None, options: Sequence[str]) -> Asked:
    """Read ``--upsampler``, ``--factor`` and ``--options``; ConfigError for what cannot be."""
    from upsamplers import PER_IMAGE, UPSAMPLERS
    from upsamplers.fitted_files import SHIPPED_AS, path_of, read_header

    values = dict(map(_option, options))
    if factor is not None and factor < 1:
        raise ConfigError(f"--factor {factor}: it must be at least 1")
    if text.startswith(SHIPPED_AS) or text.endswith(".safetensors"):
        path = path_of(text)
        header = read_header(path)
        if factor not in (None, header.factor):
            raise ConfigError(f"--factor {factor}: {path.name} is fitted for {header.factor}")
        return Asked(header.upsampler, header.factor, values, path)
    known = [*UPSAMPLERS.names(), *PER_IMAGE.names()]
    if text not in known:
        from radio_distill.registry import nearest

        raise ConfigError(f"no upsampler {text!r} ({nearest(text, known)})")
    return Asked(text, FACTOR if factor is None else factor, values)


def _option(text: str) -> tuple[str, Any]:
    from radio_distill.config import parse_yaml

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--options {text}: say KEY=VALUE, such as steps=300")
    try:
        return key, parse_yaml(value)
    except ConfigError as error:
        raise ConfigError(f"--options {text}: {error}") from error


def _outputs(arguments: argparse.Namespace, asked: Asked) -> dict[Path, Path]:
    """Read every photograph, and say where its files go: their common path without a suffix.

    Raises:
        DataError: one that is not an image.
        ConfigError: two of one name, or files that are there.
    """
    from radio_distill.evals.encoder import open_image

    photos = list(dict.fromkeys(arguments.photos))
    check_output(arguments.output, is_folder=True)
    for name, number in Counter(photo.stem for photo in photos).items():
        if number > 1:
            raise ConfigError(f"{number} photographs are called {name}; give each a run of its own")
    outputs = {photo: arguments.output / f"{photo.stem}-{asked.label}" for photo in photos}
    for photo, output in outputs.items():
        if photo.is_dir():
            raise DataError(f"{photo} is a folder; name its images: {photo}/*.jpg")
        open_image(photo)  # one that is none should not end the work of an hour
        taken = [path for path in _files(output) if path.exists()]
        if taken and not arguments.overwrite:
            raise ConfigError(
                f"{taken[0]} is there already; choose another folder with --output, or add "
                "--overwrite"
            )
    return outputs


def _files(output: Path) -> tuple[Path, Path]:
    """Return the paths of features and of colours."""
    return output.with_name(output.name + ".safetensors"), output.with_name(output.name + ".png")


def _build(asked: Asked, teacher: "Teacher", arguments: argparse.Namespace) -> Built:
    """Build the upsampler for a teacher; raises ConfigError and WeightsError as it does."""
    from radio_distill.config import UpsamplerConfig
    from upsamplers import PER_IMAGE, build_per_image, build_upsampler, is_fitted

    spec = teacher.spec
    side = arguments.size or max(spec.native_size)
    if asked.name in PER_IMAGE.names():
        return Built(asked, build_per_image(asked.name, asked.factor, asked.options), side)
    weights, options = {}, dict(asked.options)
    if is_fitted(asked.name):
        file, fitted_side = _fit(asked, teacher, arguments.teacher)
        asked = Asked(asked.name, asked.factor, asked.options, file)
        weights, side = {spec.name: str(file)}, arguments.size or fitted_side
        if side != fitted_side:
            options["any_size"] = True
            logger.info("%s was fitted at %d px, is used at %d", asked.name, fitted_side, side)
    config = UpsamplerConfig(name=asked.name, factor=asked.factor, weights=weights, options=options)
    return Built(asked, build_upsampler(config, {spec.name: teacher}), side)


def _fit(asked: Asked, teacher: "Teacher", text: str) -> tuple[Path, int]:
    """Return the file of a fitted upsampler, and the longer side of the input it was fitted at."""
    from upsamplers.fitted_files import read_header, shipped

    file = asked.file or shipped(asked.name, asked.factor, teacher.spec)
    if file is None:
        name = teacher.spec.name
        raise ConfigError(
            f"no {asked.name} {asked.factor}x for {text} comes with the project; fit one "
            f"(`radio-distill init mine --teacher {text}`, then `radio-distill fit-upsampler mine "
            f"--teacher {name} --upsampler {asked.name} --factor {asked.factor}`) and name its "
            "file: --upsampler FILE"
        )
    return file, max(read_header(file).size)


def _facts(text: str, config: "TeacherConfig", teacher: "Teacher", built: Built) -> dict[str, Any]:
    """Return what the files' metadata say of teacher and upsampler."""
    from radio_distill import __version__
    from radio_distill.system.files import sha256_of

    spec, asked = teacher.spec, built.asked
    return {
        "teacher": text,
        "weights": config.weights,
        "weights_hash": spec.weights_hash,
        "licence": spec.licence,
        "patch_size": spec.patch_size,
        "upsampler": asked.name,
        "factor": asked.factor,
        "options": dict(asked.options),
        "fit": asked.file.name if asked.file else "",
        "fit_sha256": sha256_of(asked.file) if asked.file else "",
        "radio_distill": __version__,
    }


def _upsample(
    photo: Path, output: Path, teacher: "Teacher", built: Built, facts: Mapping[str, Any]
) -> str:
    """Upsample one photograph and write its files; returns a line that says so."""
    import torch

    from radio_distill.evals.encoder import open_image, teacher_encoder, to_pixels
    from radio_distill.system.memory import explain_oom
    from radio_distill.types import format_size
    from upsamplers.methods import tiling

    image, factor = open_image(photo), built.asked.factor
    scale = built.side / max(image.size)
    wanted = (round(image.height * scale), round(image.width * scale))
    size = teacher_encoder(teacher).nearest_size(wanted)
    grid = tiling.fine_grid(teacher, size, factor)
    fine_size = (size[0] * factor, size[1] * factor)
    cells = f"{format_size(grid)} cells of {photo.name}"
    with explain_oom(built.asked.name, cells, "lower --size or --factor"):
        # More than the machine has at all is refused here, before anything is waited for.
        torch.empty(3, *fine_size), torch.empty(teacher.spec.channels, *grid)
        pixels = to_pixels(image, fine_size)[None]
        start = time.monotonic()
        low = tiling.encode_low(teacher, pixels, grid, factor, 0)
        fine = built.upsampler(teacher, pixels, grid)
        seconds = time.monotonic() - start
    about = {**facts, "image": photo.name, "image_size": [image.height, image.width]}
    about |= {"teacher_size": list(size), "grid": list(grid)}
    sheet = paint(pixels[0], low.spatial[0], fine.spatial[0], built.asked.name)
    features, colours = _files(output)
    _write(features, colours, low, fine, about, sheet)
    return (
        f"{photo.name} at {format_size(size)} px: {fine.spatial.shape[1]} channels, "
        f"{format_size(low.spatial.shape[-2:])} cells made {format_size(grid)} by "
        f"{built.asked.name} in {seconds:.1f} s, in {features} and {colours.name}"
    )


def paint(pixels: "Tensor", low: "Tensor", fine: "Tensor", name: str) -> "Image":
    """Return a sheet: the image, the teacher's map, it interpolated, and upsampled.

    Args:
        pixels: ``[3, H, W]`` in [0, 1], which both maps are of.
        low: ``[C, h, w]``, the teacher's own map.
        fine: ``[C, h * factor, w * factor]``.
        name: of the upsampler; the map of ``bilinear`` is shown once.
    """
    from PIL import ImageOps
    from torchvision.transforms.functional import to_pil_image

    from radio_distill.report.feature_images import image_grid, pca_images
    from radio_distill.types import format_size
    from upsamplers.methods.interpolate import enlarge

    grid = (fine.shape[1], fine.shape[2])
    maps = {"teacher": low, "bilinear": enlarge(low[None], grid)[0], name: fine}
    columns = [f"{key}, {format_size(item.shape[1:])} cells" for key, item in maps.items()]
    photograph = ImageOps.contain(to_pil_image(pixels), (SIDE, SIDE))
    images = [photograph, *pca_images(list(maps.values()), SIDE)]
    return image_grid([images], [""], ["photograph", *columns], SIDE)


def _write(
    features: Path,
    colours: Path,
    low: "Features",
    fine: "Features",
    about: Mapping[str, Any],
    sheet: "Image",
) -> None:
    """Write both files, each whole or not at all; ConfigError where they cannot be."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from radio_distill.system.files import replacing

    tensors = {"features": fine.spatial[0], "low": low.spatial[0]}
    if fine.summary is not None:
        tensors["summary"] = fine.summary[0]
    tensors = {key: value.float().cpu().contiguous() for key, value in tensors.items()}
    with writing(features.parent):
        with replacing(features) as draft:
            try:
                save_file(tensors, draft, {"radio_distill": json.dumps(about)})
            except SafetensorError as error:  # as the library calls a full disk
                raise OSError(str(error)) from error
        with replacing(colours) as draft:
            sheet.save(draft, "PNG")
