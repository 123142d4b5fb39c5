"""Models under test by name, beside runs or instead of them, and any of them behind an upsampler.

``[NAME=]MODEL[+UPSAMPLER:FACTOR[:FILE]]``, where MODEL is a teacher of a recipe, or what
:func:`teachers.names.teacher_named` reads: ``dinov2_l_reg``, ``timm:resnet50.a1_in1k``,
``student:runs/mine``.

Behind an upsampler the image as it is asked for goes in, the model sees it ``1 / factor`` as large
a side, and the map is ``factor`` times finer than the model's own; summary and texts are the
model's own.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from radio_distill.config import TeacherConfig, UpsamplerConfig
from radio_distill.errors import ConfigError, WeightsError
from radio_distill.evals.checkpoint_subjects import model_subject
from radio_distill.evals.encoder import Encoder, teacher_encoder
from radio_distill.evals.subjects import Subject
from radio_distill.protocols import Teacher, Upsampler
from radio_distill.system.files import sha256_of
from radio_distill.types import Features, TeacherSpec, format_size
from teachers import build_teacher, teacher_spec
from teachers.names import split_name, teacher_named
from teachers.text import text_tower
from upsamplers import UPSAMPLERS, build_upsampler, check_config, is_fitted

logger = logging.getLogger(__name__)

_UPSAMPLED = re.compile(r"(?P<model>.+)\+(?P<upsampler>[a-z]\w*):(?P<factor>\d+)(?::(?P<file>.+))?")


@dataclass(frozen=True)
class NamedModel:
    """A model that was named on a command line."""

    name: str
    """What tables call it."""
    text: str
    """What it is, as it was written."""
    teacher: TeacherConfig
    upsampler: UpsamplerConfig | None = None


def named_models(
    texts: Sequence[str], teachers: Mapping[str, TeacherConfig] = MappingProxyType({})
) -> list[NamedModel]:
    """Read names of models, which may be those of some teachers of a recipe.

    Raises:
        ConfigError: an unknown model or upsampler, or two models of one name.
    """
    models: dict[str, NamedModel] = {}
    for text in texts:
        name, what = split_name(text)
        name = name or what
        if name in models:
            raise ConfigError(f"--models: two are called {name!r}; say NAME={what}")
        found = _UPSAMPLED.fullmatch(what)
        model = found["model"] if found else what
        teacher = teachers.get(model) or teacher_named(model)
        upsampler = None
        if found:
            factor = int(found["factor"])
            UPSAMPLERS.get(found["upsampler"])
            weights = {name: found["file"]} if found["file"] else {}
            upsampler = UpsamplerConfig(name=found["upsampler"], factor=factor, weights=weights)
        models[name] = NamedModel(name, what, teacher, upsampler)
    return list(models.values())


def check_model(model: NamedModel) -> None:
    """Raise ConfigError or WeightsError for a model that cannot be, before any weights are read."""
    with _naming(model):
        teacher_spec(model.name, model.teacher)
    if model.upsampler is not None:
        options = {"any_size": True} if is_fitted(model.upsampler.name) else {}
        check_config(replace(model.upsampler, options=options))


@contextmanager
def _naming(model: NamedModel) -> Iterator[None]:
    """Say in an error which model it is about, as it was written."""
    try:
        yield
    except (ConfigError, WeightsError) as error:
        reason = str(error).removeprefix(f"teachers.{model.name}: ")
        raise type(error)(f"--models {model.text}: {reason}") from error


def model_under_test(
    model: NamedModel, device: torch.device, folder: Path
) -> tuple[Subject, Encoder]:
    """Build a named model with its weights and its upsampler; raises as its parts do.

    Args:
        model: what was named.
        device: where it runs.
        folder: where its scores lie.
    """
    with _naming(model):
        teacher = build_teacher(model.name, model.teacher, device)
    encoder = encoder_with_text(model.name, model.teacher, teacher, device)
    config, spec = model.teacher, teacher.spec
    parts: list[object] = [config.preset, spec.weights_hash or config.weights, config.options]
    if model.upsampler is not None:
        file = _file_of(model, spec)
        options = {"any_size": True} if file else {}
        weights = {model.name: str(file)} if file else {}
        asked = replace(model.upsampler, weights=weights, options=options)
        encoder = behind(build_upsampler(asked, {model.name: teacher}), teacher, encoder)
        parts += [asked.name, asked.factor, sha256_of(file) if file else ""]
    return model_subject(model.name, model.text, folder, spec, parts), encoder


def _file_of(model: NamedModel, spec: TeacherSpec) -> Path | None:
    """Return the file of a fitted upsampler; None for one that has no weights."""
    from upsamplers.fitted_files import path_of, read_header, shipped

    config = model.upsampler
    if config is None or not is_fitted(config.name):
        return None
    named = config.weights.get(model.name)
    path = path_of(named) if named else shipped(config.name, config.factor, spec)
    if path is None:
        raise ConfigError(
            f"--models {model.text}: no {config.name} {config.factor}x for this model comes with "
            f"the project; name the file of a fit: +{config.name}:{config.factor}:FILE"
        )
    fitted = read_header(path).size
    whole = format_size([side * config.factor for side in fitted])
    logger.info(
        "%s: fitted for images of %s px, seen at %s", model.name, whole, format_size(fitted)
    )
    return path


def encoder_with_text(
    name: str, config: TeacherConfig, teacher: Teacher, device: torch.device
) -> Encoder:
    """Present a teacher as an encoder, with the text tower that goes with its summary, if any."""
    return replace(teacher_encoder(teacher, device), text=text_tower(name, config, device))


def behind(upsampler: Upsampler, teacher: Teacher, encoder: Encoder) -> Encoder:
    """Return ``encoder``, which is ``teacher`` as it is, behind an upsampler.

    It takes images ``factor`` times as large as the teacher, whose inner layers are not read.
    """
    spec, factor = teacher.spec, upsampler.factor

    def encode(pixels: Tensor) -> Features:
        return upsampler(teacher, pixels, spec.grid((pixels.shape[-2], pixels.shape[-1])))

    fixed, longest = encoder.fixed_size, encoder.max_size
    return replace(
        encoder,
        encode=encode,
        before=encoder,
        size_multiple=encoder.size_multiple * factor,
        max_size=longest and longest * factor,
        fixed_size=fixed and (fixed[0] * factor, fixed[1] * factor),
        inner=None,
    )
