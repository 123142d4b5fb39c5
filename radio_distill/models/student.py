"""The student: a timm vision transformer made fit for any input size and several teachers.

It differs from timm's model in four ways, all of them RADIO's (arXiv 2312.06709): a linear patch
embedding without bias, positions that are cropped and resized (CPE), one summary token a teacher,
and no final norm unless asked for. The last follows the published models, whose format has no place
for such a norm; the heads begin with a linear layer and normalise after it.
"""

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import StudentConfig
from ..errors import ConfigError
from ..types import Size
from ..weights.pretrained import read_start, start_from
from .position import NUM_DRAWS, CroppedPositions
from .spectral import reparametrize
from .vit import attend_in_windows, create_body, from_windows, spread_global_blocks, to_windows


class Student(nn.Module):
    """Vision transformer with a summary token for each teacher.

    Args:
        config: the recipe's student section.
        num_summary_tokens: T, one a teacher, also for a teacher without summary.
        weight_noise: standard deviation of the noise on the body's matrices in training (DAMP).

    Raises:
        ConfigError: where the architecture is unknown or does not fit the other fields.
        WeightsError: where ``config.pretrained`` is missing, damaged or another model's.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: StudentConfig, num_summary_tokens: int, weight_noise: float = 0.0):
        from timm.data import resolve_model_data_config

        super().__init__()
        body = create_body(config.architecture, config.pretrained == "timm", config.drop_path)
        self.embed_dim: int = body.embed_dim
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

        normalisation = resolve_model_data_config(body)
        self.register_buffer("mean", torch.tensor(normalisation["mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(normalisation["std"]).view(3, 1, 1))
        self.patch_embedding = nn.Linear(3 * config.patch_size**2, self.embed_dim, bias=False)
        side = config.max_size // config.patch_size
        self.positions = CroppedPositions(self.embed_dim, side, config.position_dropout)
        tokens = torch.randn(self.num_prefix_tokens, self.embed_dim) * self.embed_dim**-0.5
        self.prefix_tokens = nn.Parameter(tokens)  # summary tokens, then registers
        self.norm_pre: nn.Module = body.norm_pre
        self.blocks = nn.ModuleList(body.blocks)
        self.norm: nn.Module = body.norm if config.final_norm else nn.Identity()
        if config.pretrained:
            self._load_pretrained(config, body)
        reparametrize(self.blocks, config.spectral_reparametrization, weight_noise)

    def _load_pretrained(self, config: StudentConfig, body: Any) -> None:
        start = read_start(
            config.pretrained,
            body,
            config.architecture,
            config.pretrained_sha256,
            config.pretrained_grid,
        )
        start_from(self, start)

    @property
    def size_step(self) -> int:
        """Pixels that each side of an input must be a multiple of."""
        return self.patch_size * max(self.window_size, 1)

    def grid(self, size: Size) -> Size:
        """Return the feature grid for an input of ``size`` pixels.

        Raises:
            ConfigError: where the patch (or the window) does not divide it, naming sizes that fit.
        """
        step = self.size_step
        if any(side < step or side % step for side in size):
            below = "x".join(str(max(side // step, 1) * step) for side in size)
            above = "x".join(str(-(-side // step) * step) for side in size)
            unit = f"patch {self.patch_size}"
            if self.window_size:
                unit += f" times window {self.window_size}"
            raise ConfigError(
                f"student: an input of {size[0]}x{size[1]} px is not a multiple of {unit} "
                f"(nearest {' and '.join(dict.fromkeys((below, above)))})"
            )
        return size[0] // self.patch_size, size[1] // self.patch_size

    def forward(
        self, pixels: Tensor, draws: Tensor | None = None, window_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Encode images into summary tokens ``[B, T, D]`` and spatial features ``[B, D, h, w]``.

        Args:
            pixels: ``[B, 3, H, W]`` RGB in [0, 1].
            draws: ``[B, NUM_DRAWS]`` uniform numbers for the position augmentation; without them
                positions are as in evaluation. In evaluation mode they are not looked at.
            window_size: side of the attention windows in tokens, which must divide the grid;
                0 for global attention, None for what the recipe says of the student.

        Raises:
            ConfigError: where the size does not fit, naming sizes that do.
        """
        grid = self.grid((pixels.shape[-2], pixels.shape[-1]))
        draws = draws if self.training else None
        assert draws is None or draws.shape == (len(pixels), NUM_DRAWS), "one row of draws an image"

        patches = self._embed(pixels) + self.positions(grid, draws)  # [B, h, w, D]
        window = self.window_size if window_size is None else window_size
        patches = to_windows(patches, window or 1)  # [B, N, D]
        prefix = repeat(self.prefix_tokens, "p d -> b p d", b=pixels.shape[0])
        tokens = self.norm_pre(torch.cat((prefix, patches), dim=1))  # [B, P + N, D]
        for index, block in enumerate(self.blocks):
            tokens = self._run_block(index, block, tokens, window)
        tokens = self.norm(tokens)

        spatial = tokens[:, self.num_prefix_tokens :]
        spatial = from_windows(spatial, grid, window or 1)
        return tokens[:, : self.num_summary_tokens], rearrange(spatial, "b h w d -> b d h w")

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
