"""Linear layers whose matrix in use is derived from the one that is learned.

Spectral reparametrisation learns the size of a matrix apart from its direction: the matrix in use
is ``W * (softplus(s) + 0.05) / sigma_max(W)``, with a scale ``s`` for each of the Q, K and V blocks
(PHI-S, arXiv 2410.01680, A.7; after sigma-Reparam, arXiv 2303.06296). Weight decay belongs on
``s``, not on ``W``, whose size has no effect. One power iteration a step tracks ``sigma_max``.

DAMP multiplies each weight by its own draw from N(1, std^2) in training, so that a student does
well on images that differ from those it saw (Trinh et al. 2024, arXiv 2406.16540). The gradient
is that of the paper's loss ``E[L(W * xi)]``, so it has the factor ``xi``, which the authors' code
leaves out. They draw anew for each part of a batch; here a step has one draw, so that its numbers
do not depend on how many processes or micro-batches share it. Biases and norms keep still.

The derived matrix lives from forward to backward beside the learned one: under ZeRO-3 too, which
frees only the latter, unless blocks are recomputed (gradient checkpointing).
"""

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..errors import ConfigError

MIN_SCALE = 0.05
"""Least largest singular value that the published formula can express."""


class ReparametrizedLinear(nn.Linear):
    """A linear layer that takes over the parameters of another and computes the same at first.

    Args:
        linear: gives ``weight`` and ``bias``, which keep their names and identity.
        groups: blocks of rows that get a scale of their own; 0 for no spectral reparametrisation.
        noise: standard deviation of the factors on the weights in training.

    Attributes:
        spectral_scale: parameter ``s`` of each group, ``[groups]``; only where ``spectral``.
        left: buffer, estimated singular vectors, ``[groups, out / groups]``; likewise.
        right: the same, ``[groups, in]``.
    """

    spectral_scale: nn.Parameter
    left: Tensor
    right: Tensor

    def __init__(self, linear: nn.Linear, groups: int, noise: float):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.train(linear.training)
        self.groups = groups
        self.noise = noise
        self._iteration_due = False
        self._seed: int | None = None
        if groups:
            self._start_spectral()

    @torch.no_grad()
    def _start_spectral(self) -> None:
        blocks = self._blocks()
        left, right = top_singular_vectors(blocks)
        scale = singular_value(blocks, left, right).double() - MIN_SCALE
        scale.clamp_(min=1e-7)  # no s gives 0
        inverse_softplus = scale + torch.log(-torch.expm1(-scale))
        self.spectral_scale = nn.Parameter(inverse_softplus.to(self.weight.dtype))
        self.register_buffer("left", left.to(self.weight.dtype))
        self.register_buffer("right", right.to(self.weight.dtype))

    @property
    def spectral(self) -> bool:
        """Whether the size of ``weight`` has no effect, so that it should not decay."""
        return self.groups > 0

    def begin_step(self, seed: int) -> None:
        """Let the next training forward refine the singular vectors, once, and fix the noise.

        All forwards until the next call share both, recomputed ones included.
        """
        self._iteration_due = True
        self._seed = seed

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        # Here and not in begin_step, because ZeRO-3 has the whole weight only during forward.
        if self.training and self._iteration_due:
            self._iteration_due = False
            if self.spectral:
                self._refine_singular_vectors()
        matrix = self.matrix()
        if self.training and self.noise:
            matrix = matrix * self._noise_factors()
        return F.linear(input, matrix, self.bias)

    def matrix(self) -> Tensor:
        """Return the matrix in use without noise, differentiable, ``[out, in]``.

        The singular vectors are constants; a group whose sigma is below 0.05 is not enlarged.
        """
        if not self.spectral:
            return self.weight
        with torch.autocast(self.weight.device.type, enabled=False):
            blocks = self._blocks()
            sigma = singular_value(blocks, self.left.to(blocks), self.right.to(blocks))
            scale = F.softplus(self.spectral_scale.to(blocks)) + MIN_SCALE
            # Division by a smaller sigma would make zeros grow without bound at the first update.
            factors = scale / sigma.clamp(min=MIN_SCALE)
            matrix = rearrange(blocks * factors[:, None, None], "g o i -> (g o) i")
        return matrix.to(self.weight.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return a plain layer, in memory of its own, that computes what this one evaluates."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.matrix().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain.train(self.training)

    def _blocks(self) -> Tensor:
        """Divide the weight, in float32 at least, by group: ``[groups, out / groups, in]``."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        return rearrange(weight, "(g o) i -> g o i", g=self.groups)

    @torch.no_grad()
    def _refine_singular_vectors(self) -> None:
        with torch.autocast(self.weight.device.type, enabled=False):
            blocks = self._blocks()
            left, right = power_iteration(blocks, self.left.to(blocks), self.right.to(blocks))
        self.left.copy_(left)
        self.right.copy_(right)

    @torch.compiler.disable  # a generator cannot be traced; and the seed would recompile each step
    def _noise_factors(self) -> Tensor:
        assert self._seed is not None, "weight noise needs begin_step before a training forward"
        generator = torch.Generator(self.weight.device).manual_seed(self._seed)
        return torch.empty_like(self.weight).normal_(1, self.noise, generator=generator)


def top_singular_vectors(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return left ``[g, o]`` and right ``[g, i]`` singular vectors of ``[g, o, i]`` matrices.

    They come from the smaller Gram matrix, in less than half the time of an SVD; the singular value
    is none the worse, as its error is the square of the vectors'.
    """
    if blocks.shape[1] < blocks.shape[2]:
        right, left = top_singular_vectors(blocks.mT)
        return left, right
    right = torch.linalg.eigh(blocks.mT @ blocks).eigenvectors[..., -1]
    left = blocks.new_full(blocks.shape[:2], blocks.shape[1] ** -0.5)
    return power_iteration(blocks, _unit(_multiply(blocks, right), left), right)


def power_iteration(blocks: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Improve estimates of the top singular vectors; a block of zeros leaves them as they are."""
    right = _unit(_multiply(blocks.mT, left), right)
    return _unit(_multiply(blocks, right), left), right


def singular_value(blocks: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return ``left^T W right`` of each block, ``[g]``."""
    return (left * _multiply(blocks, right)).sum(dim=-1)


def reparametrize(body: nn.Module, spectral: bool, noise: float) -> None:
    """Replace every linear layer inside ``body``, in place; what it computes does not change.

    Load weights first. A layer that is spectral already only takes the noise; with neither spectral
    nor noise nothing happens.

    Args:
        body: transformer blocks of timm; Q, K, V and the two halves of a gated layer are groups.
        spectral: learn the largest singular value of each group apart.
        noise: standard deviation of the factors on the weights in training (DAMP).

    Raises:
        ConfigError: where a block fuses matrices of different kinds.
    """
    if not spectral and not noise:
        return
    for parent in list(body.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ReparametrizedLinear) and layer.spectral:
                layer.noise = noise
            elif isinstance(layer, nn.Linear):
                groups = _count_groups(parent, name)
                layer = ReparametrizedLinear(layer, groups if spectral else 0, noise)
                setattr(parent, name, layer)


def begin_step(model: nn.Module, seed: int) -> None:
    """Call ``begin_step`` of every reparametrised layer, each with a stream of its own.

    Args:
        model: the student, with or without heads.
        seed: not negative, equal on all processes, different in each step.
    """
    layers = [module for module in model.modules() if isinstance(module, ReparametrizedLinear)]
    seeds = np.random.SeedSequence(seed).generate_state(len(layers), np.uint64)
    for layer, layer_seed in zip(layers, seeds.tolist(), strict=True):
        layer.begin_step(layer_seed)


def fold(model: nn.Module) -> None:
    """Replace every reparametrised layer by a plain one, in place; evaluation does not change."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, ReparametrizedLinear):
                setattr(parent, name, layer.folded())


def _count_groups(parent: nn.Module, name: str) -> int:
    from timm.layers import GluMlp

    if name == "in_proj":  # and some versions of timm go past its forward
        raise ConfigError(
            f"student.architecture: a {type(parent).__name__} fuses Q, K, V and the MLP in one "
            "matrix, which can have neither spectral_reparametrization nor weight_noise; choose "
            "another architecture, or leave both off"
        )
    if name == "qkv":
        return 3
    return 2 if name == "fc1" and isinstance(parent, GluMlp) else 1


def _multiply(blocks: Tensor, vectors: Tensor) -> Tensor:
    """``[g, o, i]`` times ``[g, i]``, block by block."""
    return (blocks @ vectors[..., None])[..., 0]  # [g, o]


def _unit(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Scale to length 1; take ``otherwise`` for what has no length (zeros, NaN)."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, vectors / length.clamp(min=1e-12), otherwise)
