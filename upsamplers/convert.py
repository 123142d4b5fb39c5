"""Checkpoints of FeatUp's and FeatSharp's own programs, brought to the names of this project.

FeatUp publishes ``<teacher>_jbu_stack_cocostuff.ckpt``, Lightning's dictionary with the tensors
under ``state_dict``; its four levels upsample 16 times. FeatSharp has published no weights; its
program writes ``last.pth.tar``, with the tensors under ``model_state`` and the upsampler's options
under ``upsample_args``. What only fitting needs (downsampler, uncertainty, optimiser, FeatUp's copy
of the teacher) stays behind.

A file that holds more than tensors and plain values is refused, or run where its origin is trusted
(:mod:`radio_distill.system.trust`). No real FeatSharp checkpoint could be tried. Of its spectral
reparametrisation the formula is known, not all names: those of ``torch.nn.utils.parametrizations``
are understood, with ``scale`` or ``sn_scale`` for the learned norm, and others are reported.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from radio_distill.errors import ConfigError, WeightsError
from radio_distill.system.files import reason_of
from radio_distill.system.trust import read_torch_file

from .networks import build_network

_INPUTS = {"jbu": "featup", "tiles": "tiles", "bilinear": "bilinear"}
_WRAPPERS = ("module", "inner")
_FITTING_ONLY = ("downsampler", "scale_net")
_PARAMETRISED = ".parametrizations.weight."


@dataclass(frozen=True)
class Converted:
    """A fitted upsampler under our names; what it was fitted to, only its owner knows."""

    network_name: str
    """A name in :data:`upsamplers.networks.NETWORKS`."""
    options: dict[str, Any]
    """Options that build the network."""
    channels: int
    factor: int
    tensors: dict[str, Tensor]
    """State of the network."""
    de_bias: Tensor | None = None
    """``[1, C, h, w]`` in the normalised space, where there is one."""
    normalizer_state: dict[str, Tensor] | None = None
    """State of :class:`~radio_distill.normalize.phi_s.PhiS`; None: features go in as they are."""


def convert_featup(path: str | Path) -> Converted:
    """Convert a published FeatUp checkpoint (16x; the teacher's features go in as they are).

    The files outside ``no_norm/`` were fitted to features after a LayerNorm over channels without
    weights; so should be those that are upsampled.

    Raises:
        WeightsError: a file that is missing, damaged, not finite, or of another model.
    """
    checkpoint = _read(path, "state_dict")
    state = _parts(checkpoint["state_dict"], path).get("upsampler", {})
    tensors = {f"stack.{_featup_name(key)}": value for key, value in state.items()}
    fixup = tensors.get("stack.fixup_proj.1.weight")
    if fixup is None:
        raise WeightsError(
            f"{path} holds no FeatUp stack: upsampler.fixup_proj.1.weight is missing"
        )
    converted = Converted("featup", {"variant": "featup"}, len(fixup), 16, tensors)
    _check_fits(converted, path)
    return converted


def convert_featsharp(path: str | Path) -> Converted:
    """Convert a checkpoint of FeatSharp's training, with de-bias and PHI-S statistics.

    Raises:
        WeightsError: a file that is missing, damaged, not finite, of another model or factor, or
            with keys or options that are not known.
    """
    checkpoint = _read(path, "model_state", "upsample_args")
    parts = _parts(checkpoint["model_state"], path)
    known = ("upsampler", "bias_buffer", "normalizer", *_FITTING_ONLY)
    strange = [f"{part}.{name}" for part in parts if part not in known for name in parts[part]]
    _refuse_keys(path, strange)
    window, inputs, asked = _featsharp_options(checkpoint["upsample_args"], path)
    try:
        options, tensors = from_released_state(
            fold_spectral(parts.get("upsampler", {}), path), window, inputs
        )
    except (WeightsError, ValueError) as error:
        raise WeightsError(f"cannot convert {path}: {reason_of(error)}") from error
    channels, factor = options.pop("channels"), options.pop("factor")
    if factor != asked:
        raise WeightsError(f"{path} says factor {asked}, its tensors are those of factor {factor}")
    bias = parts.get("bias_buffer", {}).get("buffer")
    statistics = phi_s_state(parts.get("normalizer", {}), path)
    converted = Converted("featsharp", options, channels, factor, tensors, bias, statistics)
    _check_fits(converted, path)
    return converted


def from_released_state(
    state: Mapping[str, Tensor], window: int = 7, inputs: Sequence[str] = ()
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate the tensors of a released FeatSharp upsampler, spectral scales already folded in.

    Args:
        state: ``ups.<N>.*`` of a whole upsampler, or the names of one level.
        window: of its attention; no tensor tells.
        inputs: in their order; by default the joint-bilateral map, or the bilinear one where there
            is none, and the tiles.

    Returns:
        Arguments of :class:`FeatSharpNetwork`, and what to load into it. The scalars
        ``range_alpha`` and ``spatial_alpha`` are dropped: the kernel's normalisation cancels them.

    Raises:
        WeightsError: a tensor that no level of FeatSharp has, or one too few.
    """
    ours = {
        _our_name(name): _without_padded_values(name, tensor)
        for name, tensor in state.items()
        if not name.endswith(("range_alpha", "spatial_alpha"))
    }
    last = max((int(name.split(".")[1]) for name in ours), default=0)
    try:
        factor = ours[f"levels.{last}.tile_position"].shape[-1]
        channels, hidden = ours["levels.0.block.mlp.body.w3.weight"].shape
    except KeyError as error:
        raise WeightsError(f"not a released FeatSharp upsampler: it lacks {error}") from error
    both = "levels.0.block.attention.body.qkv.weight" in ours
    first = "featup" if "levels.0.jbu.levels.0.range_temp" in ours else "bilinear"
    arguments = {
        "channels": channels,
        "factor": factor,
        "preset": "released",
        "inputs": tuple(inputs) or (first, "tiles"),
        "block": "both" if both else "mlp",
        "window": window,
        "layer_norm": "levels.0.block.mlp.norm.weight" in ours,
        "layer_scale": None if both else 0.0,
        "mlp_ratio": hidden * 1.5 / channels,
        "progressive": last > 0,
    }
    return arguments, ours


_RELEASED_NAMES = {
    "tile_pos": "tile_position",
    "jbu.ups.": "jbu.levels.",
    "block.norm1.": "block.attention.norm.",
    "block.attn.": "block.attention.body.",
    "block.ls1.gamma": "block.attention.scale",
    "block.norm2.": "block.mlp.norm.",
    "block.mlp.": "block.mlp.body.",
    "block.ls2.gamma": "block.mlp.scale",
    "block.norm.": "block.mlp.norm.",  # these two where there is no attention
    "block.inner.": "block.mlp.body.",
}


def _our_name(name: str) -> str:
    level, rest = re.fullmatch(r"(?:ups\.(\d+)\.)?(.*)", name).groups("0")  # type: ignore[union-attr]
    for theirs, ours in _RELEASED_NAMES.items():
        if rest.startswith(theirs):
            return f"levels.{level}.{ours}{rest.removeprefix(theirs)}"
    raise WeightsError(f"not a released FeatSharp upsampler: it has a tensor {name!r}")


def _without_padded_values(name: str, tensor: Tensor) -> Tensor:
    """Cut rows off ``qkv``: the released code pads the values too, and discards the padding."""
    if not name.endswith("qkv.weight"):
        return tensor
    query, key, value = rearrange(tensor, "(qkv heads d) c -> qkv heads d c", qkv=3, heads=16)
    head = tensor.shape[1] // 16
    return torch.cat([part.flatten(0, 1) for part in (query, key, value[:, :head])])


def fold_spectral(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Replace each reparametrised weight by its value, ``W (softplus(s) + 0.05) / sigma(W)``.

    A weight of several linear maps (``qkv``, ``w12``) is scaled part by part, each with a scale of
    its own. sigma is the power iteration's ``u W v``, as in evaluation, or exact without u and v.
    """
    folded = {key: value for key, value in state.items() if _PARAMETRISED not in key}
    scaled: dict[str, dict[str, Tensor]] = {}
    for key in state.keys() - folded.keys():
        module, _, name = key.partition(_PARAMETRISED)
        scaled.setdefault(module, {})[name] = state[key]
    for module, tensors in scaled.items():
        weight, scales = _spectral_parts(tensors)
        if weight is None or not scales or len(weight) % len(scales):
            _refuse_keys(path, [f"{module}{_PARAMETRISED}{name}" for name in sorted(tensors)])
        else:
            parts = zip(weight.chunk(len(scales)), scales, strict=True)
            folded[f"{module}.weight"] = torch.cat([_rescaled(*part) for part in parts])
    return folded


def _spectral_parts(tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, list[dict[str, Tensor]]]:
    """Return W and, for each part of it, the tensors that scale it; none for unknown names."""
    places: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        place, _, leaf = name.rpartition(".")
        if name != "original":
            places.setdefault(place, {})["scale" if leaf == "sn_scale" else leaf] = value
    if any(part.keys() not in ({"scale"}, {"scale", "_u", "_v"}) for part in places.values()):
        return tensors.get("original"), []
    in_order = sorted(
        places, key=lambda place: [int(digits) for digits in re.findall(r"\d+", place)]
    )
    return tensors.get("original"), [places[place] for place in in_order]


def _rescaled(weight: Tensor, scaling: Mapping[str, Tensor]) -> Tensor:
    if "_u" in scaling:
        sigma = scaling["_u"] @ weight @ scaling["_v"]
    else:
        sigma = torch.linalg.matrix_norm(weight, 2)
    return weight * (F.softplus(scaling["scale"].reshape(())) + 0.05) / sigma


def _read(path: str | Path, *sections: str) -> dict[str, Any]:
    """Read a checkpoint that has these sections."""
    source = Path(path)
    if not source.is_file():
        raise WeightsError(f"no checkpoint at {source}")
    checkpoint = read_torch_file(source)
    for section in sections:
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(section), Mapping):
            raise WeightsError(f"{source} is not a checkpoint of this program: it has no {section}")
    return checkpoint


def _parts(state: Mapping[str, Any], path: str | Path) -> dict[str, dict[str, Tensor]]:
    """Group tensors by what they belong to, wrappers' names gone: ``{"upsampler": {...}, ...}``."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        part, *rest = _unwrapped(key.split("."))
        name = ".".join(_unwrapped(rest))
        if not isinstance(value, Tensor):
            raise WeightsError(f"{path} is damaged: {key} is a {type(value).__name__}")
        if value.is_floating_point() and part not in (*_FITTING_ONLY, "model"):
            value = value.float()
            if not value.isfinite().all():
                raise WeightsError(f"{path} is damaged: {key} is not finite; take an earlier one")
        parts.setdefault(part, {})[name] = value
    return parts


def _unwrapped(names: list[str]) -> list[str]:
    """Drop the names that wrappers put in front."""
    while names[1:] and names[0] in _WRAPPERS:
        names = names[1:]
    return names


def _featup_name(key: str) -> str:
    level = re.match(r"up(\d+)\.", key)
    return key if level is None else f"levels.{int(level[1]) - 1}.{key[level.end() :]}"


def _featsharp_options(
    arguments: Mapping[str, Any], path: str | Path
) -> tuple[int, tuple[str, ...], int]:
    """Return window, inputs (empty for those that the tensors show) and factor."""
    try:
        kind, *options = str(arguments["type"]).split(".")
        factor = int(arguments["factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path}: upsample_args lacks a usable type and factor") from error
    if kind != "featsharp":
        raise WeightsError(f"{path} holds a {kind!r}; of that program only featsharp converts")
    window, inputs = 7, list[str]()
    for option in options:
        name, *values = option.split("-")
        if name == "wnd" and len(values) == 1 and values[0].isdigit():
            window = int(values[0])
        elif name == "inputs" and values and set(values) <= _INPUTS.keys():
            inputs = [_INPUTS[value] for value in values]
        elif option not in ("no-ln", "no-attn", "prog"):  # these show in the tensors
            raise WeightsError(f"{path} was fitted with {option!r}, which has no counterpart here")
    return window, tuple(inputs), factor


def phi_s_state(state: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor] | None:
    """Return FeatSharp's ``normalizer.*`` as :class:`radio_distill.normalize.phi_s.PhiS` has it.

    Both are ``scale * rotation (x - mean)``. None for an empty state; raises WeightsError for keys
    that are not known or missing, and for a matrix that is no rotation.
    """
    if not state:
        return None
    names = {"mean", "alpha", "rotation", "inv_rotation"}
    _refuse_keys(path, [f"normalizer.{key}" for key in sorted(state.keys() - names)])
    try:
        mean, scale = state["mean"].flatten(), state["alpha"].squeeze()
        rotation = state["rotation"]
    except KeyError as error:
        raise WeightsError(f"{path}: normalizer.{error.args[0]} is missing") from error
    square = rotation.shape == (mean.numel(),) * 2
    if not square or not torch.allclose(rotation @ rotation.T, torch.eye(len(mean)), atol=1e-3):
        raise WeightsError(f"{path} is damaged: normalizer.rotation is not a rotation")
    return {"mean": mean, "scale": scale, "rotation": rotation}


def _check_fits(converted: Converted, path: str | Path) -> None:
    """Raise WeightsError unless keys and shapes are those of the network."""
    try:
        with torch.device("meta"):
            network = build_network(
                converted.network_name, converted.channels, converted.factor, converted.options
            )
    except ConfigError as error:
        raise WeightsError(f"cannot convert {path}: {error}") from error
    statistics = converted.normalizer_state
    if statistics is not None and len(statistics["mean"]) != converted.channels:
        raise WeightsError(
            f"{path}: PHI-S has {len(statistics['mean'])} channels, the upsampler "
            f"{converted.channels}"
        )
    bias = converted.de_bias
    if bias is not None and (bias.ndim != 4 or tuple(bias.shape[:2]) != (1, converted.channels)):
        raise WeightsError(f"{path}: bias_buffer.buffer has shape {[*bias.shape]}")
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    given = {key: value.shape for key, value in converted.tensors.items()}
    wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
    if wrong:
        raise WeightsError(
            f"{path} is not a {converted.network_name} of factor {converted.factor}: "
            f"{_listed(wrong)} missing, left over, or of another shape"
        )


def _refuse_keys(path: str | Path, keys: Sequence[str]) -> None:
    if keys:
        raise WeightsError(f"cannot convert {path}: unknown keys {_listed(keys)}")


def _listed(keys: Sequence[str]) -> str:
    return ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
