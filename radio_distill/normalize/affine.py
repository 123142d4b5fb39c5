"""The map that PHI-S and the standardisations share: y = scale · R (x - mean).

The scale is one number or one for each channel, R a rotation or nothing. The map is invertible and
affine, so a trained head can take its inverse in, and a student then speaks in the teacher's space.
Statistics are float64 on the CPU; features are mapped in float32, or float64 where they are that.
"""

from collections.abc import Mapping
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils import skip_init

from ..errors import CheckpointError, ConfigError, DataError
from ..protocols import Normalizer
from .statistics import Moments

Kind = TypeVar("Kind", bound="Affine")


class Affine:
    """Base of the normalizers of this form; they differ in ``fit``."""

    uses_statistics = True
    tensors: tuple[str, ...] = ("mean", "scale")
    """Names in the state: mean ``[C]``, scale ``[]`` or ``[C]``, rotation ``[C, C]`` if any."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
        self._into: tuple[dict[str, Tensor], Affine] | None = None
        """Another's state, and the map into its space."""

    def apply(self, spatial: Tensor) -> Tensor:
        """Bring ``[B, C, h, w]`` from the teacher's space to the normalised space."""
        tensors = self._tensors_for(spatial.shape[1], spatial)
        with torch.autocast(spatial.device.type, enabled=False):
            # The mean goes first: rotated, it could be large against what is left of the tokens.
            tokens = rearrange(spatial.to(tensors["mean"]), "b c h w -> b h w c") - tensors["mean"]
            if "rotation" in tensors:
                tokens = tokens @ tensors["rotation"].T
            return rearrange(tokens * tensors["scale"], "b h w c -> b c h w")

    def invert(self, spatial: Tensor) -> Tensor:
        """Bring ``[B, C, h, w]`` from the normalised space back to the teacher's."""
        tensors = self._tensors_for(spatial.shape[1], spatial)
        with torch.autocast(spatial.device.type, enabled=False):
            tokens = rearrange(spatial.to(tensors["mean"]), "b c h w -> b h w c")
            return rearrange(_unscale(tokens, tensors) + tensors["mean"], "b h w c -> b c h w")

    def into(self, other: "Affine") -> "Affine":
        """Return one map for the way back and on: ``other.apply(self.invert(x))``.

        y = s₂ R₂ (R₁ᵀ x / s₁ + m₁ - m₂) = A (x - s₁ R₁ (m₂ - m₁)),  A = s₂ R₂ R₁ᵀ / s₁, made in
        float64. Kept for next time.
        """
        own, others = self.state(), other.state()
        if self._into is None or self._into[0] is not other._state:
            mean = _scale(others["mean"] - own["mean"], own)
            made, state = Affine(), {"mean": mean, "scale": others["scale"] / own["scale"]}
            if "rotation" in own or "rotation" in others:
                unit = torch.eye(len(mean), dtype=mean.dtype)  # whose rows become A's columns
                columns = _scale(_unscale(unit, own), others)
                state |= {"scale": torch.ones(()), "rotation": columns.T}
            made._set(**state)
            self._into = other._state, made
        return self._into[1]

    @torch.no_grad()
    def fold(self, linear: nn.Linear) -> nn.Linear:
        """Return a linear that predicts in the teacher's space what ``linear`` does in this one.

        PHI-S paper, appendix A.6: the weight becomes Θ W, the bias Θ b + mean, with Θ the
        matrix of the inverse.
        """
        weight, bias = _double(linear)
        tensors = self._tensors_for(len(weight), weight)
        return _linear_like(
            linear, _unscale(weight.T, tensors).T, _unscale(bias, tensors) + tensors["mean"]
        )

    @torch.no_grad()
    def unfold(self, linear: nn.Linear) -> nn.Linear:
        """Return a linear that predicts in this space what ``linear`` does in the teacher's.

        The way back of :meth:`fold`, for another normalizer: a head that was trained against
        earlier statistics goes on where it was under new ones.
        """
        weight, bias = _double(linear)
        tensors = self._tensors_for(len(weight), weight)
        return _linear_like(
            linear, _scale(weight.T, tensors).T, _scale(bias - tensors["mean"], tensors)
        )

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that make an equal normalizer through :meth:`load_state`."""
        return dict(self._fitted())

    def load_state(self: Kind, state: Mapping[str, Tensor]) -> Kind:
        """Take what :meth:`state` returned; raises CheckpointError for another normalizer's."""
        if sorted(state) != sorted(self.tensors):
            raise CheckpointError(
                f"statistics hold {', '.join(sorted(state)) or 'nothing'} where "
                f"{type(self).__name__} has {', '.join(sorted(self.tensors))}: they belong to "
                "another normalizer; restore normalizer.name or start the stage anew"
            )
        self._set(**state)
        return self

    def _set(self, **state: Tensor) -> None:
        self._state = {name: value.detach().cpu().double() for name, value in state.items()}
        self._copies.clear()
        self._into = None

    def _fitted(self) -> dict[str, Tensor]:
        assert self._state, f"{type(self).__name__} has neither been fitted nor loaded"
        return self._state

    def _tensors_for(self, channels: int, like: Tensor) -> dict[str, Tensor]:
        """Return the state for ``like``: its device, and float32 at least. Kept for next time."""
        fitted = len(self._fitted()["mean"])
        if channels != fitted:
            raise ConfigError(
                f"{type(self).__name__} was fitted to {fitted} channels, these features have "
                f"{channels}: the statistics belong to another teacher"
            )
        key = like.device, torch.promote_types(like.dtype, torch.float32)
        if key not in self._copies:
            self._copies[key] = {name: value.to(*key) for name, value in self._state.items()}
        return self._copies[key]


def converted(spatial: Tensor, source: Normalizer, target: Normalizer) -> Tensor:
    """Bring ``[B, C, h, w]`` from the space of one normalizer to another's, at once if they allow.

    A rotation of fine maps costs more than most of what surrounds it, so two are made one.
    """
    if isinstance(source, Affine) and isinstance(target, Affine):
        return source.into(target).apply(spatial)
    return target.apply(source.invert(spatial))


def _double(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return weight ``[C, inputs]`` and bias ``[C]`` in float64, zeros where there is no bias."""
    weight = linear.weight.double()
    return weight, weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.double()


def _linear_like(linear: nn.Linear, weight: Tensor, bias: Tensor) -> nn.Linear:
    """Make a linear of these values, in the dtype and on the device of another."""
    like = linear.weight
    made = skip_init(
        nn.Linear, linear.in_features, len(weight), device=like.device, dtype=like.dtype
    )
    made.weight.copy_(weight)
    made.bias.copy_(bias)
    return made


def _scale(values: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Apply the map, without the mean, to the last axis of ``values``."""
    values = values @ tensors["rotation"].T if "rotation" in tensors else values
    return values * tensors["scale"]


def _unscale(values: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """Apply the inverse, without the mean, to the last axis of ``values``."""
    values = values / tensors["scale"]
    return values @ tensors["rotation"] if "rotation" in tensors else values


def mean_variance(moments: Moments) -> Tensor:
    """Return tr Σ / C, a float64 scalar on the CPU.

    Raises:
        DataError: where the features never vary or are not finite.
    """
    variance, power = moments.covariance.diagonal().mean().cpu(), moments.mean.square().mean().cpu()
    if not torch.isfinite(variance):
        raise DataError(
            "the teacher's features are not finite, so they have no statistics; "
            "compute the teacher in float32 (teachers.NAME.dtype)"
        )
    # 1e-20 of the power is rounding: float32 features that differ at all have over 1e-15 of it.
    if variance <= 1e-20 * power:
        raise DataError(
            "the teacher's features are the same for every token, so they have no scale; "
            "check its weights and the images"
        )
    return variance
