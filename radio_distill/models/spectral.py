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

A step begins with :func:`begin_step`. Where the weights are whole, :func:`share_matrices` then
derives the matrices once for all passes of the step: leaves, in whose gradients the passes add up,
and :func:`closing_loss` hands the sums on to what is learned. That is exact, since the chain rule
is linear. Layers of one shape are derived together. Under ZeRO-3, which has a whole weight only
while its layer runs, each forward derives its own, which lives until backward beside the learned
one, unless blocks are recomputed (gradient checkpointing).
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext

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
        shared: the matrix of this step's training passes, a leaf; None where each derives its own.
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
        self._seed: int | None = None
        self.shared: Tensor | None = None
        if groups:
            self._start_spectral()

    @torch.no_grad()
    def _start_spectral(self) -> None:
        blocks = _blocks([self])
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
        """Fix the noise of all training forwards until the next call, recomputed ones included."""
        self._seed = seed
        self.shared = None

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        if not self.training:
            matrix = self.matrix()
        elif self.shared is not None:
            matrix = self.shared
        else:
            matrix = self.with_noise(self.matrix())
        return F.linear(input, matrix, self.bias)

    def matrix(self) -> Tensor:
        """Return the matrix in use without noise, differentiable, ``[out, in]``.

        The singular vectors are constants; a group whose sigma is below 0.05 is not enlarged.
        """
        return _matrices([self])[0] if self.spectral else self.weight

    def with_noise(self, matrix: Tensor) -> Tensor:
        """Return a matrix times this step's noise, where there is any; linear."""
        return matrix * self._noise_factors() if self.noise else matrix

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """Return a plain layer, in memory of its own, that computes what this one evaluates."""
        plain = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(self.matrix().clone())
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.clone())
        return plain.train(self.training)

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


def begin_step(
    model: nn.Module,
    seed: int,
    whole: Callable[[Sequence[Tensor]], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Refine the singular vectors of every reparametrised layer once, and fix its noise.

    Args:
        model: the student, with or without heads.
        seed: not negative, equal on all processes, different in each step; each layer has a stream
            of its own.
        whole: gives the context in which weights are whole.
    """
    layers = _layers(model)
    seeds = np.random.SeedSequence(seed).generate_state(len(layers), np.uint64)
    for layer, layer_seed in zip(layers, seeds.tolist(), strict=True):
        layer.begin_step(layer_seed)
    for alike in _alike(layer for layer in layers if layer.spectral):
        with whole([layer.weight for layer in alike]):
            _refine_singular_vectors(alike)


@torch.no_grad()
def share_matrices(model: nn.Module) -> bool:
    """Derive the matrices of a step's training passes; returns whether there are any.

    The passes then leave their gradients in the matrices: see :func:`closing_loss`.
    """
    layers = _layers(model)
    for alike in _alike(layers):
        for layer, matrix in zip(alike, _matrices(alike), strict=True):
            layer.shared = layer.with_noise(matrix).detach().requires_grad_()
    return bool(layers)


def closing_loss(model: nn.Module) -> Tensor:
    """Return a scalar whose gradient is what the passes since :func:`share_matrices` left.

    The matrices are derived once more, so that no graph of them is kept during the passes. Those of
    the step are gone afterwards.
    """
    products = []
    for alike in _alike(layer for layer in _layers(model) if layer.shared is not None):
        matrices = _matrices(alike)  # [L, out, in]
        gradients = [_take_gradient(layer) for layer in alike]
        products.append((torch.stack(gradients) * matrices).sum())
    return torch.stack([product.float() for product in products]).sum()


def _take_gradient(layer: ReparametrizedLinear) -> Tensor:
    """Return the gradient of a layer's matrix without noise, and drop the shared one."""
    shared, layer.shared = layer.shared, None
    assert shared is not None
    if shared.grad is None:  # no pass of this process ran the body
        return torch.zeros_like(shared)
    return layer.with_noise(shared.grad)


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


def _layers(model: nn.Module) -> list[ReparametrizedLinear]:
    return [module for module in model.modules() if isinstance(module, ReparametrizedLinear)]


def _alike(layers: Iterable[ReparametrizedLinear]) -> list[list[ReparametrizedLinear]]:
    """Put layers of one shape together: of each block its qkv, proj, fc1 and fc2."""
    kinds = defaultdict(list)
    for layer in layers:
        kinds[layer.in_features, layer.out_features, layer.groups].append(layer)
    return list(kinds.values())


def _blocks(layers: Sequence[ReparametrizedLinear]) -> Tensor:
    """Divide the weights, in float32 at least, by group: ``[L * groups, out / groups, in]``."""
    weights = [layer.weight for layer in layers]
    stacked = torch.stack(weights) if len(weights) > 1 else weights[0][None]
    stacked = stacked.to(torch.promote_types(stacked.dtype, torch.float32))
    return rearrange(stacked, "l (g o) i -> (l g) o i", g=layers[0].groups or 1)


def _vectors(layers: Sequence[ReparametrizedLinear], blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular vectors, ``[L * groups, out / groups]`` and ``[L * groups, in]``."""
    left = torch.cat([layer.left for layer in layers])
    return left.to(blocks), torch.cat([layer.right for layer in layers]).to(blocks)


def _matrices(layers: Sequence[ReparametrizedLinear]) -> Tensor:
    """Return the matrices of L layers that are alike without noise, ``[L, out, in]``."""
    first = layers[0]
    if not first.spectral:
        return torch.stack([layer.weight for layer in layers])
    with torch.autocast(first.weight.device.type, enabled=False):
        blocks = _blocks(layers)
        sigma = singular_value(blocks, *_vectors(layers, blocks))
        scales = torch.cat([layer.spectral_scale for layer in layers]).to(blocks)
        # Division by a smaller sigma would make zeros grow without bound at the first update.
        factors = (F.softplus(scales) + MIN_SCALE) / sigma.clamp(min=MIN_SCALE)
        matrices = rearrange(
            blocks * factors[:, None, None], "(l g) o i -> l (g o) i", g=first.groups
        )
    return matrices.to(first.weight.dtype)


@torch.no_grad()
def _refine_singular_vectors(layers: Sequence[ReparametrizedLinear]) -> None:
    with torch.autocast(layers[0].weight.device.type, enabled=False):
        blocks = _blocks(layers)
        vectors = power_iteration(blocks, *_vectors(layers, blocks))
    for name, refined in zip(("left", "right"), vectors, strict=True):
        kept = [getattr(layer, name) for layer in layers]
        torch._foreach_copy_(kept, list(refined.split(layers[0].groups)))


def _multiply(blocks: Tensor, vectors: Tensor) -> Tensor:
    """``[g, o, i]`` times ``[g, i]``, block by block."""
    return (blocks @ vectors[..., None])[..., 0]  # [g, o]


def _unit(vectors: Tensor, otherwise: Tensor) -> Tensor:
    """Scale to length 1; take ``otherwise`` for what has no length (zeros, NaN)."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 1e-12, vectors / length.clamp(min=1e-12), otherwise)
