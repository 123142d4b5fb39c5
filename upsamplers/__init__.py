"""Finer feature grids out of frozen teachers: one idea a file, all behind the Upsampler protocol.

An upsampler is handed the teacher, not a feature map, because tiling calls it several times. This
version has those without parameters. A fitted upsampler is a class with ``fitted = True`` that
takes ``weights={teacher: path}``; each file names the teacher it was fitted for
(:mod:`upsamplers.fitted`). One of one's own joins through the entry point group
``radio_distill.upsamplers``.

Importing this package does not import torch.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from radio_distill.config import UpsamplerConfig
from radio_distill.errors import ConfigError
from radio_distill.protocols import Teacher, Upsampler
from radio_distill.registry import Registry, nearest

PROJECT = "radio-distill"

UPSAMPLERS = Registry(
    "upsampler",
    {
        "bilinear": "upsamplers.interpolate:Bilinear",
        "bicubic": "upsamplers.interpolate:Bicubic",
        "tile": "upsamplers.tile:Tile",
        "s2": "upsamplers.s2:S2",
    },
)

_TO_COME = ("featup", "featsharp")


def build_upsampler(config: UpsamplerConfig, teachers: Mapping[str, Teacher]) -> Upsampler:
    """Build the upsampler of a stage.

    Args:
        config: name, factor, micro-batch, options, and files of a fitted upsampler.
        teachers: the teachers that it will be used on; a fitted upsampler's files must be theirs.

    Raises:
        ConfigError: an unknown name or option, or files for an upsampler without parameters.
        WeightsError: a file that was fitted for another teacher.
    """
    name, names = config.name, UPSAMPLERS.names()
    if name in _TO_COME and name not in names:
        raise ConfigError(
            f"upsampler {name!r} has learned weights, which this version can neither fit nor load; "
            f"use one of {', '.join(names)}"
        )
    kind = UPSAMPLERS.get(name)
    known = [key for key in signature(kind).parameters if key not in _SET_BY_RECIPE]
    for key in config.options:
        if key not in known:
            hint = nearest(key, known) if known else "it has none"
            raise ConfigError(f"upsampler {name!r} has no option {key!r} ({hint})")
    arguments: dict[str, Any] = {"factor": config.factor, "micro_batch": config.micro_batch}
    if getattr(kind, "fitted", False):
        arguments["weights"] = _files(config, teachers)
    elif config.weights:
        raise ConfigError(f"upsampler {name!r} has no parameters; remove upsampler.weights")
    return kind(**arguments, **config.options)


_SET_BY_RECIPE = ("factor", "micro_batch", "weights")


def _files(config: UpsamplerConfig, teachers: Mapping[str, Teacher]) -> Mapping[str, str]:
    """Return the files of a fitted upsampler, each checked against its teacher."""
    from .fitted import check_fitted_for, read_header

    for name, teacher in teachers.items():
        if name not in config.weights:
            raise ConfigError(
                f"upsampler {config.name!r} needs a fitted file: upsampler.weights.{name}"
            )
        check_fitted_for(read_header(config.weights[name]), config.name, teacher.spec)
    return config.weights
