"""Initialises a student with the weights of another vision transformer, at any patch size and grid.

Another may be timm's own, a timm file or folder (NaFlexViT too), a RADIO checkpoint in any known
layout, an exported student, or a run. All are brought under timm's names first. What a student has
no place for (classifier, pooling, heads) is left behind; what the source lacks stays new:

* Summary tokens are taken over in order as far as both have them; further ones start as the first.
  Registers are taken over in order too; further ones stay random.
* timm's patch embedding has a bias and the student's has none: it moves into the position table.
* LayerScale goes into the matrix before it where the student has none, and is 1 where only the
  student has it; both compute the same as before.
* RADIO checkpoints, runs and timm folders bring the mean and std of the images; a bare timm file
  says none, so the architecture's own stay.
* A table of positions is stretched to the student's square. Which grid it has follows from the
  source's configuration, from ``student.pretrained_grid``, or from its being a square.

The heads of a student are always new, also behind a run: their targets are normalised by statistics
that a stage takes anew. ``start_from`` of a stage is what goes on with a run's heads.
"""

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..config import StudentConfig
from ..errors import ConfigError, WeightsError
from ..models.position import CroppedPositions
from ..models.spectral import fold
from ..models.student import Student
from ..models.timm_student import TimmStudent, create_model
from ..system.files import is_there, refuse_unreadable
from ..system.trust import check_sha256
from ..train.restore import load_student
from ..types import Size
from .files import (
    FOLDER,
    HUB,
    checksummed_files,
    find_checkpoint,
    hub_model,
    named_as,
    read_checkpoint,
    read_json,
    refuse_differences,
    tensors_of,
)
from .radio import holds_radio, radio_checkpoint

LEFT_BEHIND = ("norm.", "fc_norm.", "attn_pool.", "pre_logits.", "head.")
TOKENS, PATCHES, POSITIONS = ("cls_token", "reg_token"), "patch_embed.proj.weight", "pos_embed"
PATCH_BIAS = "patch_embed.proj.bias"
_OPTIONAL = (*LEFT_BEHIND, *TOKENS, PATCH_BIAS)
_DINO = {"register_tokens": "reg_token"}
_SCALED = {".ls1.gamma": ".attn.proj.", ".ls2.gamma": ".mlp.fc2."}


@dataclass(frozen=True)
class PretrainedWeights:
    """Weights under the names of timm's vision transformers."""

    weights: Mapping[str, Tensor]
    """``cls_token`` may be several tokens, ``[1, T, D]``."""
    cropped: bool = False
    """Whether ``pos_embed`` is a table of cropped positions, patches alone."""
    num_heads: int | None = None
    """Attention heads, which no shape tells; None where the source does not say."""
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    grid: Size | None = None
    """Rows and columns of patches in ``pos_embed``; None where the source does not say."""
    embeds_class: bool = True
    """False where the source says that its tokens have no positions."""


def initialise(student: Student | TimmStudent, body: Any, config: StudentConfig) -> None:
    """Give a student, whose blocks are not yet reparametrised, the weights of ``pretrained``.

    ``body`` is the timm model of the architecture, with timm's weights for ``timm``. A student that
    is such a model has those already.

    Raises:
        ConfigError: a checksum for ``timm``, whose file is not in our hands.
        WeightsError: where there is nothing, another checksum, or another architecture.
    """
    if isinstance(student, TimmStudent):
        _load_timm(student, _path_of(config), config)
    else:
        load_into(student, read_pretrained(config, body))


def read_pretrained(config: StudentConfig, body: Any) -> PretrainedWeights:
    """Read what a recipe calls ``student.pretrained``; see :func:`initialise`.

    That is ``timm``, the path of a file or folder (also ``local-dir:PATH``), or
    ``hf-hub:OWNER/NAME``.
    """
    name, grid = config.pretrained, tuple(config.pretrained_grid)
    if name == "timm":
        if config.pretrained_sha256:
            raise ConfigError(
                "student.pretrained_sha256: timm reads a file of its own, which cannot be checked; "
                "name a copy of it in student.pretrained, or drop the checksum"
            )
        weights = PretrainedWeights(
            body.state_dict(), grid=getattr(body.patch_embed, "grid_size", None)
        )
    else:
        weights = _read(_path_of(config), body)
    check_architecture(weights, body, name, config.architecture)
    mean, std = config.mean or weights.mean, config.std or weights.std
    return replace(weights, grid=_grid_of(weights, body, grid, name), mean=mean, std=std)


def _path_of(config: StudentConfig) -> Path:
    """Return the checked path of ``student.pretrained``, fetched from the hub where it is there."""
    name, sha256 = config.pretrained, config.pretrained_sha256
    path = Path(os.path.expanduser(name.removeprefix(FOLDER)))
    if name.startswith(HUB):
        path = hub_model(name, "student.pretrained")
    refuse_unreadable(path, WeightsError)
    if not is_there(path):
        raise WeightsError(f"no weights file {path}; correct student.pretrained")
    if sha256:
        check_sha256(checksummed_files(path), sha256, "student.pretrained_sha256")
    return path


def _read(path: Path, body: Any) -> PretrainedWeights:
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").is_file():
        distilled = load_student(find_checkpoint(path), torch.device("cpu"))
        if not isinstance(distilled.student, Student):
            raise WeightsError(f"{path} holds a student of `body: timm`, no vision transformer")
        fold(distilled)
        return weights_of(distilled.student)
    checkpoint = read_checkpoint(path)
    settings = read_json(path / "config.json") if is_folder else checkpoint
    state = tensors_of(checkpoint, path)
    if not holds_radio(state):
        state = named_as(state, body.state_dict(), str(path))
        return _from_timm(state, settings if is_folder else {})
    radio = radio_checkpoint(settings, state, str(path))
    config = radio.config
    return PretrainedWeights(
        radio.timm_tensors(),
        cropped=True,
        num_heads=config.get("num_attention_heads"),
        mean=config["norm_mean"],
        std=config["norm_std"],
        grid=radio.grid,
    )


def _from_timm(state: dict[str, Tensor], settings: Mapping[str, Any]) -> PretrainedWeights:
    """Sort timm's tensors; those of its NaFlexViT (``embeds.*``) get the plain model's names.

    DINOv2's own names of its tokens are read too. ``settings`` are the ``config.json`` of a timm
    folder; empty for a bare file.
    """
    published, arguments = (
        settings.get("pretrained_cfg", settings),
        settings.get("model_args") or {},
    )
    mean, std = published.get("mean"), published.get("std")
    if "embeds.proj.weight" not in state:
        state = {_DINO.get(key, key): value for key, value in state.items() if key != "mask_token"}
        size, grid = arguments.get("img_size") or published.get("input_size"), None
        if size and PATCHES in state:  # the grid of the image size that the configuration names
            height, width = (size, size) if isinstance(size, int) else size[-2:]
            rows, columns = state[PATCHES].shape[-2:]
            grid = height // rows, width // columns
        embeds_class = not arguments.get("no_embed_class", False)
        return PretrainedWeights(state, mean=mean, std=std, grid=grid, embeds_class=embeds_class)
    weights = {key.replace("embeds.", ""): value for key, value in state.items()}
    patches = weights.pop("proj.weight")  # [D, p * p * bands]
    table = weights.pop("pos_embed")  # [1, h, w, D]
    side = math.isqrt(patches.shape[1] // arguments.get("in_chans", 3))
    weights[PATCHES] = rearrange(patches, "d (y x c) -> d c y x", y=side, x=side)
    weights[POSITIONS] = rearrange(table, "1 h w d -> 1 (h w) d")
    if "proj.bias" in weights:
        weights[PATCH_BIAS] = weights.pop("proj.bias")
    grid = (table.shape[1], table.shape[2])
    return PretrainedWeights(weights, cropped=True, mean=mean, std=std, grid=grid)


def weights_of(student: Student) -> PretrainedWeights:
    """Return a student's weights, whose matrices must be plain (folded)."""
    side, num_summary = student.patch_size, student.num_summary_tokens
    patches = student.patch_embedding.weight
    own = {
        f"{name}.{key}": value
        for name in ("blocks", "norm_pre", "norm")
        for key, value in student.get_submodule(name).state_dict().items()
    }
    weights = {
        **own,
        PATCHES: rearrange(patches, "d (c y x) -> d c y x", y=side, x=side),
        POSITIONS: rearrange(student.positions.table, "y x d -> 1 (y x) d"),
        "cls_token": student.prefix_tokens[None, :num_summary],
        "reg_token": student.prefix_tokens[None, num_summary:],
    }
    block: Any = student.blocks[0]
    mean, std = student.mean.flatten().tolist(), student.std.flatten().tolist()
    grid = (student.positions.table.shape[0], student.positions.table.shape[1])
    return PretrainedWeights(weights, True, block.attn.num_heads, mean, std, grid)


def check_architecture(pretrained: PretrainedWeights, body: Any, source: str, name: str) -> None:
    """Raise WeightsError, naming the first difference, where weights are another architecture's.

    That of ``body``, a timm model. Patch size, grid, tokens and LayerScale are free. ``source`` and
    ``name``, of the architecture, stand in the message.
    """
    found, wanted = _fixed_shapes(pretrained.weights), _fixed_shapes(body.state_dict())
    refuse_differences(found, wanted, source, name)
    heads, own_heads = pretrained.num_heads, body.blocks[0].attn.num_heads
    if heads not in (None, own_heads):
        raise WeightsError(
            f"{source} does not hold weights of {name}: its blocks have {heads} attention heads, "
            f"expected {own_heads}"
        )


def _fixed_shapes(weights: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return the shapes of the tensors, with ``*`` where the architecture alone decides nothing."""
    shapes: dict[str, list[Any]] = {
        key: [*value.shape]
        for key, value in weights.items()
        if not key.startswith(_OPTIONAL) and not key.endswith(tuple(_SCALED))
    }
    if PATCHES in shapes:
        shapes[PATCHES][2:] = "*" * len(shapes[PATCHES][2:])
    if POSITIONS in shapes:
        shapes[POSITIONS][:-1] = "*" * len(shapes[POSITIONS][:-1])
    return shapes


def _grid_of(
    pretrained: PretrainedWeights, body: Any, given: tuple[int, ...], source: str
) -> Size | None:
    """Return the rows and columns of a source's position table; None where it has no table.

    Raises:
        WeightsError: a given grid of another number of cells, or none that could be meant.
    """
    if POSITIONS not in pretrained.weights or pretrained.weights[POSITIONS].ndim != 3:
        return None
    num_rows = pretrained.weights[POSITIONS].shape[1]
    counts = [num_rows - tokens for tokens in _token_counts(pretrained, body)]
    if given:
        rows, columns = given
        others = () if pretrained.cropped else (num_rows, num_rows - 1)
        if rows * columns not in (*counts, *others):
            raise WeightsError(
                f"student.pretrained_grid: {rows}x{columns} are {rows * columns} positions, and "
                f"{source} has {counts[0]}"
            )
        return rows, columns
    if pretrained.grid is not None and pretrained.grid[0] * pretrained.grid[1] in counts:
        return pretrained.grid
    for count in counts:
        if math.isqrt(max(count, 0)) ** 2 == count > 0:
            return math.isqrt(count), math.isqrt(count)
    raise WeightsError(
        f"{source}: {POSITIONS} has {counts[0]} patch positions, which is no square grid, and no "
        "config.json says which; set student.pretrained_grid: [ROWS, COLUMNS]"
    )


def _token_counts(pretrained: PretrainedWeights, body: Any) -> list[int]:
    """Return how many rows of a table may be those of tokens, the likeliest first.

    A file of registers may be of a model whose tokens have no positions (timm's RADIO models), or
    only the class token (DINOv2's own files); without registers the architecture decides.
    """
    if pretrained.cropped:
        return [0]
    own = 0 if body.no_embed_class else int(body.num_prefix_tokens)
    if "reg_token" in pretrained.weights or not pretrained.embeds_class:
        return list(dict.fromkeys((own if pretrained.embeds_class else 0, 0, 1)))
    return [own]


@torch.no_grad()
def load_into(student: Student, pretrained: PretrainedWeights) -> None:
    """Give a student, whose blocks are not yet reparametrised, weights of its architecture."""
    from timm.layers import resample_patch_embed

    weights = pretrained.weights
    student.blocks.load_state_dict(_fit_layer_scale(_below("blocks.", weights), student.blocks))
    student.norm_pre.load_state_dict(_below("norm_pre.", weights))
    if (norm := _below("norm.", weights)) and not isinstance(student.norm, nn.Identity):
        student.norm.load_state_dict(norm)
    size = [student.patch_size, student.patch_size]
    patches = resample_patch_embed(weights[PATCHES].float(), size)
    student.patch_embedding.weight.copy_(rearrange(patches, "d c y x -> d (c y x)"))
    num_positioned = 0  # rows of the table that belong to class and register tokens
    if POSITIONS in weights:
        assert pretrained.grid is not None, "a table has one"
        num_positioned = weights[POSITIONS].shape[1] - math.prod(pretrained.grid)
    _place_tokens(student, pretrained, num_positioned)
    if POSITIONS in weights:
        _place_positions(student.positions, pretrained, num_positioned)
    if PATCH_BIAS in weights:
        student.positions.table.add_(weights[PATCH_BIAS])
    for buffer, values in ((student.mean, pretrained.mean), (student.std, pretrained.std)):
        if values is not None:
            buffer.copy_(torch.tensor(values).view(-1, 1, 1))


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def _fit_layer_scale(weights: Mapping[str, Tensor], blocks: nn.Module) -> dict[str, Tensor]:
    """Fold LayerScale into the matrix before it where ``blocks`` have none; add ones where due."""
    expected = blocks.state_dict()
    fitted = dict(weights)
    for key in [key for key in weights if key not in expected]:
        scale = next(end for end in _SCALED if key.endswith(end))
        gamma, layer = fitted.pop(key).float(), key.removesuffix(scale) + _SCALED[scale]
        fitted[f"{layer}weight"] = fitted[f"{layer}weight"].float() * gamma[:, None]
        if f"{layer}bias" in fitted:
            fitted[f"{layer}bias"] = fitted[f"{layer}bias"].float() * gamma
    ones = {key: torch.ones_like(value) for key, value in expected.items() if key not in fitted}
    return fitted | ones


def _place_tokens(student: Student, pretrained: PretrainedWeights, num_positioned: int) -> None:
    weights, num_summary = pretrained.weights, student.num_summary_tokens
    parts = [weights[key][0].float() for key in TOKENS if key in weights]
    if not parts:
        return
    tokens = torch.cat(parts)  # [P, D]
    tokens[:num_positioned] += weights[POSITIONS][0, :num_positioned] if num_positioned else 0
    num_class = weights["cls_token"].shape[1] if "cls_token" in weights else 0
    summaries, registers = tokens[:num_class], tokens[num_class:]
    if num_class:
        student.prefix_tokens[:num_summary] = summaries[0]
        taken = min(num_class, num_summary)
        student.prefix_tokens[:taken] = summaries[:taken]
    taken = min(len(registers), student.num_prefix_tokens - num_summary)
    student.prefix_tokens[num_summary : num_summary + taken] = registers[:taken]


def _place_positions(
    positions: CroppedPositions, pretrained: PretrainedWeights, num_positioned: int
) -> None:
    """Resample ``[1, N, D]`` to the table's ``[side, side, D]``, pixel centres aligned.

    timm's positions belong to one size and are resampled with timm's bicubic filter; a table of
    cropped positions is resized as every forward pass does, so that a smaller one gives the same.
    A table that is no square is stretched to one.
    """
    from timm.layers import resample_abs_pos_embed

    rows, side = pretrained.weights[POSITIONS][:, num_positioned:].float(), positions.table.shape[0]
    assert pretrained.grid is not None, "a table has one"
    if pretrained.cropped:
        table = rearrange(rows, "1 (y x) d -> 1 d y x", y=pretrained.grid[0])
        if pretrained.grid[0] != pretrained.grid[1]:
            longer = max(pretrained.grid)
            table = F.interpolate(table, size=(longer, longer), mode="bilinear")
        source = CroppedPositions(table.shape[1], table.shape[2], dropout=0.0)
        source.table.copy_(rearrange(table, "1 d y x -> y x d"))
        positions.table.copy_(source((side, side))[0])
    else:
        resampled = resample_abs_pos_embed(
            rows, [side, side], old_size=list(pretrained.grid), num_prefix_tokens=0
        )
        positions.table.copy_(rearrange(resampled, "1 (y x) d -> y x d", y=side))


def _load_timm(student: TimmStudent, path: Path, config: StudentConfig) -> None:
    """Load what is at ``path``, which is there; mean and std of pixels too, where it says them.

    Raises:
        WeightsError: where it holds no weights, or those of another architecture.
    """
    is_folder = path.is_dir()
    if is_folder and not (path / "config.json").is_file():
        tensors = load_student(find_checkpoint(path), torch.device("cpu")).student.state_dict()
        own = {name: getattr(student, name) for name in ("mean", "std") if getattr(config, name)}
        _load_whole(student, tensors | own, str(path), config)
        return
    with torch.device("meta"):
        model, _ = create_model(config)
    wanted = model.state_dict()
    state = named_as(tensors_of(read_checkpoint(path), path), wanted, str(path))
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert and any(key not in state or state[key].shape != wanted[key].shape for key in wanted):
        try:
            state = convert(dict(state), model)
        except (KeyError, ValueError, RuntimeError, AttributeError) as error:
            raise WeightsError(
                f"{path} does not hold weights of {config.architecture}: timm cannot read them"
            ) from error
    tensors = student.from_timm(state)
    tensors |= {name: getattr(student, name) for name in ("mean", "std")}
    if is_folder:
        settings = read_json(path / "config.json")
        published = settings.get("pretrained_cfg", settings)
        for name in ("mean", "std"):
            if published.get(name) and not getattr(config, name):
                tensors[name] = torch.tensor(published[name]).view(-1, 1, 1)
    _load_whole(student, tensors, str(path), config)


def _load_whole(
    student: TimmStudent, tensors: Mapping[str, Tensor], where: str, config: StudentConfig
) -> None:
    found, wanted = (
        {key: value.shape for key, value in state.items()}
        for state in (tensors, student.state_dict())
    )
    refuse_differences(found, wanted, where, config.architecture)
    student.load_state_dict(tensors)
