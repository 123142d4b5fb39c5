"""Finer feature grids out of frozen teachers: one idea a file, all behind the Upsampler protocol.

An upsampler is handed the teacher, not a feature map, because tiling calls it several times. A
fitted upsampler has the name of its network and a file for each teacher, which names the teacher it
was fitted for (:mod:`upsamplers.fitted`). One of one's own joins through the entry point group
``radio_distill.upsamplers``.

Importing this package does not import torch.
"""

from collections.abc import Mapping
from typing import Any

from radio_distill.config import UpsamplerConfig, build_options
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher, Upsampler
from radio_distill.registry import Registry, check_has, check_takes, nearest
from radio_distill.system.trust import check_sha256

PROJECT = "radio-distill"

FITTED = ("featup", "featsharp", "carafe", "sapa", "resize_conv", "uplift", "lift", "deconvolution",
          "indexnet", "a2u", "fade", "resfu")  # fmt: skip
"""Networks that recipes name as upsamplers."""
UPSAMPLERS = Registry(
    "upsampler",
    {
        **dict.fromkeys(FITTED, "upsamplers.fitted:FittedUpsampler"),
        "bilinear": "upsamplers.methods.interpolate:Bilinear",
        "bicubic": "upsamplers.methods.interpolate:Bicubic",
        "tile": "upsamplers.methods.tile:Tile",
        "s2": "upsamplers.methods.tile:S2",
        "native": "upsamplers.methods.native:Native",
        "strided": "upsamplers.methods.strided:Strided",
        "anyup": "upsamplers.external:AnyUp",
        "jafar": "upsamplers.external:Jafar",
        "loftup": "upsamplers.external:LoftUp",
        "naf": "upsamplers.external:Naf",
        "uplift_published": "upsamplers.external:UpliftPublished",
    },
)

PER_IMAGE = Registry(
    "per-image upsampler",
    {
        "implicit": "upsamplers.implicit:Implicit",
        "deep_image_prior": "upsamplers.deep_image_prior:DeepImagePrior",
    },
)
"""Upsamplers that are fitted to each image anew: to look at, too slow to train a student with."""


def is_fitted(name: str) -> bool:
    """Return whether an upsampler has learned weights, a file for each teacher."""
    return name in UPSAMPLERS.names() and getattr(UPSAMPLERS.get(name), "fitted", False)


def build_upsampler(
    config: UpsamplerConfig, teachers: Mapping[str, Teacher], precision: str = "auto"
) -> Upsampler:
    """Build the upsampler of a stage.

    Args:
        config: name, factor, micro-batch, options, and files of a fitted upsampler.
        teachers: the teachers that it will be used on; a fitted upsampler's files must be theirs.
        precision: of a fitted upsampler's matrix products where its options say nothing, as
            ``engine.precision`` of a recipe.

    Raises:
        ConfigError: an unknown name or option, a factor below 1, no file for a teacher, or files
            for an upsampler without parameters.
        WeightsError: a file that was fitted for another teacher or factor, or has another checksum.
    """
    options = check_config(config)
    arguments: dict[str, Any] = {"factor": config.factor, "micro_batch": config.micro_batch}
    if is_fitted(config.name):
        arguments |= {
            "network": config.name,
            "weights": _files(config, teachers),
            "precision": precision,
        }
    upsampler: Upsampler = UPSAMPLERS.get(config.name)(**(arguments | options))
    check_has(f"upsampler {config.name!r}", upsampler, ("factor", "cost", "__call__"))
    return upsampler


def check_config(config: UpsamplerConfig) -> dict[str, Any]:
    """Return a section's options as its upsampler takes them.

    Raises:
        ConfigError: a section that cannot be right, whatever the teachers are.
    """
    name = config.name
    kind = UPSAMPLERS.get(name)
    of_fit = ("network", "weights", "precision") if is_fitted(name) else ()
    given = ("factor", "micro_batch", *of_fit)
    check_has(f"upsampler {name!r}", kind, ("cost", "__call__"))
    options = _options(name, kind, config.factor, config.options)
    keywords = tuple(dict.fromkeys((*given, *config.options)))
    check_takes(f"upsampler {name!r}", kind, keywords=keywords)
    if is_fitted(name):
        return options
    if config.weights:
        raise ConfigError(f"upsampler {name!r} has no parameters; remove upsampler.weights")
    for field in ("sha256", "sizes"):
        if getattr(config, field):
            raise ConfigError(f"upsampler {name!r} has no file to check; remove upsampler.{field}")
    return options


def build_per_image(name: str, factor: int, options: Mapping[str, Any]) -> Upsampler:
    """Build one of ``PER_IMAGE``; raises ConfigError for an unknown name or option."""
    kind = PER_IMAGE.get(name)
    upsampler: Upsampler = kind(factor=factor, **_options(name, kind, factor, options))
    return upsampler


def _options(name: str, kind: Any, factor: int, options: Mapping[str, Any]) -> dict[str, Any]:
    if factor < 1:
        raise ConfigError(f"upsampler.factor is {factor}; it must be at least 1")
    given = ("network", "factor", "micro_batch", "weights")
    return build_options(kind, options, f"upsampler {name}", given)


def _files(config: UpsamplerConfig, teachers: Mapping[str, Teacher]) -> Mapping[str, str]:
    """Return the files of a fitted upsampler, each checked against its teacher.

    The recipe's file goes before the one that comes with the project.
    """
    from .fitted_files import check_fitted_for, check_size, path_of, read_header, shipped

    for name in config.sha256.keys() - teachers.keys():
        raise ConfigError(
            f"upsampler.sha256.{name}: no file of {name!r} is read here "
            f"({nearest(name, list(teachers))}); remove it"
        )
    files = {}
    for name, teacher in teachers.items():
        named = config.weights.get(name)
        path = path_of(named) if named else shipped(config.name, config.factor, teacher.spec)
        if path is None:
            raise ConfigError(
                f"no {config.name} {config.factor}x is fitted to teacher {name!r}; fit one "
                f"(radio-distill fit-upsampler RECIPE --teacher {name} --upsampler "
                f"{config.name} --factor {config.factor}), or set upsampler.weights.{name}"
            )
        check_sha256([path], config.sha256.get(name, ""), f"upsampler.sha256.{name}")
        header = read_header(path)
        check_fitted_for(header, config.name, teacher.spec, config.factor)
        check_size(header, config.sizes.get(name), f"upsampler.sizes.{name}")
        files[name] = str(path)
    return files
