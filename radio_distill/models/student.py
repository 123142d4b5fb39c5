"""The student: a timm vision transformer made fit for any input size and several teachers.

It differs from timm's model in four ways, all of them RADIO's (arXiv 2312.06709): a linear patch
embedding without bias, positions that are cropped and resized (CPE), one summary token a teacher,
and no final norm unless asked for. The last follows the published models, whose format has no place
for such a norm; the heads begin with a linear layer and normalise after it.

Attention may stay in windows, those of ViTDet (arXiv 2203.16527) without its relative positions.
Tokens that are no patches (summary, registers) attend in every window through a copy of their own,
and the copies are averaged afterwards.
"""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange, reduce, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import StudentConfig
from ..errors import ConfigError
from ..types import Size, spread_layers
from .body import Body, check_known, create_timm
from .position import NUM_DRAWS, CroppedPositions
from .spectral import reparametrize

Initialise = Callable[[Any, Any, StudentConfig], None]
"""Gives a student that was just made, of a timm model of its architecture, pretrained weights."""


class Student(Body):
    """Vision transformer with a summary token for each teacher.

    Args:
        config: the recipe's student section.
        num_summary_tokens: T, one a teacher, also for a teacher without summary.
        weight_noise: standard deviation of the noise on the body's matrices in training (DAMP).
        initialise: reads ``config.pretrained``: :func:`radio_distill.weights.pretrained.initialise`
            where that is set.

    Raises:
        ConfigError: where the architecture is unknown or does not fit the other fields.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """

    shares_summary = False

    def __init__(
        self,
        config: StudentConfig,
        num_summary_tokens: int,
        weight_noise: float = 0.0,
        initialise: Initialise | None = None,
    ):
        super().__init__()
        body = create_body(
            config.architecture, config.pretrained == "timm", config.drop_path, config.bands
        )
        self.embed_dim = self.summary_dim = body.embed_dim
        self.depth = len(body.blocks)
        self.patch_size = config.patch_size
        self.num_summary_tokens = num_summary_tokens
        self.num_prefix_tokens = num_summary_tokens + config.registers
        self.window_size = config.window_size
        self.gradient_checkpointing = config.gradient_checkpointing
        num_global = config.global_blocks
        if not config.window_size:  # then windows can only be asked for in training
            num_global = min(num_global, self.depth)
        self.global_blocks = spread_global_blocks(self.depth, num_global)

        self._take_statistics(body, config)
        numbers = config.bands * config.patch_size**2
        self.patch_embedding = nn.Linear(numbers, self.embed_dim, bias=False)
        side = config.max_size // config.patch_size
        self.positions = CroppedPositions(self.embed_dim, side, config.position_dropout)
        tokens = torch.randn(self.num_prefix_tokens, self.embed_dim) * self.embed_dim**-0.5
        self.prefix_tokens = nn.Parameter(tokens)  # summary tokens, then registers
        self.norm_pre: nn.Module = body.norm_pre
        self.blocks = nn.ModuleList(body.blocks)
        self.norm: nn.Module = body.norm if config.final_norm else nn.Identity()
        if config.pretrained:
            assert initialise is not None, "nothing reads config.pretrained"
            initialise(self, body, config)
        reparametrize(self.blocks, config.spectral_reparametrization, weight_noise)

    @property
    def size_step(self) -> int:
        """Pixels that each side of an input must be a multiple of."""
        return self.patch_size * max(self.window_size, 1)

    @property
    def max_size(self) -> int:
        """Longest side that the table of positions spans, in pixels."""
        return len(self.positions.table) * self.patch_size

    @property
    def undecayed(self) -> set[nn.Parameter]:
        """The summary tokens and registers, and the table of positions."""
        return {self.prefix_tokens, self.positions.table}

    def _what_fits(self) -> str:
        windows = f" times window {self.window_size}" if self.window_size else ""
        return f"a multiple of patch {self.patch_size}{windows}"

    def forward(
        self,
        pixels: Tensor,
        draws: Tensor | None = None,
        window_size: int | None = None,
        every_block: bool = False,
    ) -> tuple[Tensor, ...]:
        """Encode images; in evaluation mode ``draws`` are not looked at.

        ``window_size`` must divide the grid; 0 is global attention.
        """
        draws = draws if self.training else None
        assert draws is None or draws.shape == (len(pixels), NUM_DRAWS), "one row of draws an image"

        window = self.window_size if window_size is None else window_size
        tokens = self._start(pixels, draws, window)
        inner: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            tokens = self._run_block(index, block, tokens, window)
            if every_block:
                inner += self._parts(tokens, pixels, window)
        return *self._parts(self.norm(tokens), pixels, window), *inner

    def _parts(self, tokens: Tensor, pixels: Tensor, window: int) -> tuple[Tensor, Tensor]:
        return tokens[:, : self.num_summary_tokens], self._map(tokens, pixels, window)

    def layers(self, pixels: Tensor, count: int) -> list[tuple[Tensor | None, Tensor]]:
        """Return summary tokens and maps of ``count`` blocks, evenly spread over the depth.

        They are of the shapes of :meth:`forward`, whose arguments and errors these are, and whose
        two come last; each has gone through the final norm, where there is one.
        """
        wanted = spread_layers(len(self.blocks), count)
        tokens = self._start(pixels, None, self.window_size)
        found: dict[int, tuple[Tensor | None, Tensor]] = {}
        for index, block in enumerate(self.blocks):
            tokens = self._run_block(index, block, tokens, self.window_size)
            if index in wanted:
                found[index] = self._parts(self.norm(tokens), pixels, self.window_size)
        return [found[index] for index in wanted]

    def _start(self, pixels: Tensor, draws: Tensor | None, window: int) -> Tensor:
        """Return the tokens ``[B, P + N, D]`` that the first block takes."""
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        patches = self._embed(pixels) + self.positions(grid, draws)  # [B, h, w, D]
        patches = to_windows(patches, window or 1)  # [B, N, D]
        prefix = repeat(self.prefix_tokens, "p d -> b p d", b=pixels.shape[0])
        tokens: Tensor = self.norm_pre(torch.cat((prefix, patches), dim=1))
        return tokens

    def _map(self, tokens: Tensor, pixels: Tensor, window: int) -> Tensor:
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        spatial = from_windows(tokens[:, self.num_prefix_tokens :], grid, window or 1)
        return rearrange(spatial, "b h w d -> b d h w")

    def _embed(self, pixels: Tensor) -> Tensor:
        pixels = (pixels - self.mean) / self.std
        side = self.patch_size
        patches = rearrange(pixels, "b c (h y) (w x) -> b h w (c y x)", y=side, x=side)
        embedded: Tensor = self.patch_embedding(patches)
        return embedded

    def _run_block(self, index: int, block: nn.Module, tokens: Tensor, window: int) -> Tensor:
        def run(tokens: Tensor) -> Tensor:
            if not window or index in self.global_blocks:
                attended: Tensor = block(tokens)
                return attended
            return attend_in_windows(block, tokens, self.num_prefix_tokens, window)

        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            recomputed: Tensor = checkpoint(run, tokens, use_reentrant=False)
            return recomputed
        return run(tokens)


def create_body(architecture: str, pretrained: bool, drop_path: float, bands: int = 3) -> Any:
    """Create a timm ``VisionTransformer``; its blocks are wanted, not its head.

    For other than three bands timm repeats the pretrained weights of red, green and blue.

    Raises:
        ConfigError: where the name is not that of a plain vision transformer.
        WeightsError: where pretrained weights cannot be had.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    known = timm.list_models(module=["vision_transformer", "deit"], exclude_filters="*distilled*")
    check_known(
        architecture, known, "a plain vision transformer of timm; other bodies need `body: timm`"
    )
    body = create_timm(architecture, pretrained, drop_path_rate=drop_path, in_chans=bands)
    assert type(body) is VisionTransformer, f"{architecture} is a {type(body).__name__}"
    return body


def spread_global_blocks(depth: int, num_global: int) -> frozenset[int]:
    """Return which of ``depth`` blocks attend globally: evenly spaced, the last one always.

    Raises:
        ConfigError: where there are not that many blocks, or none would be global.
    """
    if not 1 <= num_global <= depth:
        raise ConfigError(
            f"student.global_blocks: {num_global} is not between 1 and {depth}, the blocks that "
            "the architecture has"
        )
    return frozenset(spread_layers(depth, num_global))


def to_windows(patches: Tensor, window: int) -> Tensor:
    """Order patches by window: ``[B, h, w, D]`` to ``[B, windows * window**2, D]``."""
    return rearrange(patches, "b (r y) (c x) d -> b (r c y x) d", y=window, x=window)


def from_windows(patches: Tensor, grid: Size, window: int) -> Tensor:
    """Undo :func:`to_windows`."""
    rows = grid[0] // window
    return rearrange(patches, "b (r c y x) d -> b (r y) (c x) d", r=rows, y=window, x=window)


def attend_in_windows(block: nn.Module, tokens: Tensor, num_prefix: int, window: int) -> Tensor:
    """Run a block on each window by itself.

    Args:
        block: a transformer block, ``[B, N, D]`` to the same.
        tokens: ``[B, num_prefix + windows * window**2, D]``, patches ordered by window.
        num_prefix: tokens before the patches, which attend in every window.
        window: patches a side of a window.
    """
    prefix, patches = tokens[:, :num_prefix], tokens[:, num_prefix:]
    windows = rearrange(patches, "b (k n) d -> (b k) n d", n=window**2)
    num_windows = windows.shape[0] // tokens.shape[0]
    copies = repeat(prefix, "b p d -> (b k) p d", k=num_windows)
    windows = block(torch.cat((copies, windows), dim=1))
    prefix = reduce(windows[:, :num_prefix], "(b k) p d -> b p d", "mean", k=num_windows)
    patches = rearrange(windows[:, num_prefix:], "(b k) n d -> b (k n) d", k=num_windows)
    return torch.cat((prefix, patches), dim=1)
