"""Posed RGB-D frames as Redwood and Open3D keep them: a room that a camera walks through."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..masks import class_numbers
from . import Dataset
from .files import read_json, read_lines, same_stems

_MILLIMETRES = 1000.0


@dataclass(frozen=True, slots=True)
class RgbdFrame:
    """A frame; neither its image nor its depth is read yet."""

    key: str
    image: Path
    depth: Path
    intrinsics: Tensor
    """``[3, 3]``, in pixels of the image, 0 at the centre of the first."""
    pose: Tensor
    """``[4, 4]``, from the world's to the camera's frame, in metres."""

    def labels(self) -> dict[str, Tensor]:
        """Read ``depth``: ``[H, W]`` float32 in metres, 0 where unknown."""
        millimetres = class_numbers(self.depth).astype(np.float32)
        return {"depth": torch.from_numpy(millimetres / _MILLIMETRES)}


@dataclass(frozen=True)
class Redwood(Dataset):
    """A sequence of Redwood's or Open3D's.

    ``color/NAME.jpg``, ``depth/NAME.png`` (millimetres), one ``camera*.json``, and in
    ``trajectory.log`` of each frame a line of numbers and its camera's place in the world, 4 x 4.
    """

    name: ClassVar[str] = "redwood"
    layout: ClassVar[str] = "color/, depth/, trajectory.log and a camera*.json"
    licence: ClassVar[str] = "that of the sequence"
    published: ClassVar[Mapping[str, int]] = {"frames": 5}
    """As many as Open3D's sample has; any sequence will do."""

    def frames(self) -> list[RgbdFrame]:
        """List the frames, in order."""
        color, depth = self.folder("color"), self.folder("depth")
        names = same_stems(color, depth, (".jpg", ".png"))
        poses, intrinsics = self._poses(), self._intrinsics()
        if len(poses) != len(names):
            raise DataError(
                f"{self.root / 'trajectory.log'} has {len(poses)} poses, and {color} "
                f"{len(names)} images; copy the sequence again"
            )
        return [
            RgbdFrame(name, color / f"{name}.jpg", depth / f"{name}.png", intrinsics, pose)
            for name, pose in zip(names, poses, strict=True)
        ]

    def count(self, part: str) -> int:
        """Count the frames."""
        del part
        return len(self.frames())

    def tested(self) -> list[Path]:
        """List the frames' images."""
        return [frame.image for frame in self.frames()]

    def _poses(self) -> list[Tensor]:
        path = self.root / "trajectory.log"
        lines = read_lines(path)
        try:
            rows = [[float(word) for word in line.split()] for line in lines]
            places = [torch.tensor(rows[at + 1 : at + 5]) for at in range(0, len(rows), 5)]
            return [place.reshape(4, 4).double().inverse().float() for place in places]
        except (ValueError, RuntimeError, TypeError) as error:
            raise DataError(f"{path} is no trajectory of 4 x 4 matrices; copy it again") from error

    def _intrinsics(self) -> Tensor:
        paths = sorted(self.root.glob("camera*.json"))
        if not paths:
            raise DataError(f"no camera*.json in {self.root}; it comes with the sequence")
        try:
            return torch.tensor(read_json(paths[0])["intrinsic_matrix"]).reshape(3, 3).T
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise DataError(f"{paths[0]} has no intrinsic_matrix of nine numbers") from error
