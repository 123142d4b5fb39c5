"""What encodes texts into the space of a teacher's summary."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from radio_distill.config import TeacherConfig
from radio_distill.protocols import TextTower

from .options import naming_teacher, resolve
from .sources.open_clip import build_text_encoder


def text_tower(name: str, config: TeacherConfig, device: Any = "cpu") -> TextTower | None:
    """Return what encodes texts into the space of a teacher's summary; None where nothing does.

    It is open_clip's, of the teacher's own file or of the hub, and read when it is first asked.
    """
    with naming_teacher(name):
        preset = resolve(config)
    if not (preset.text or (preset.random and preset.source == "open_clip")):
        return None
    return LateTextTower(partial(build_text_encoder, name, config, device))


class LateTextTower:
    """A text tower that ``load`` builds when the first text is asked for, as few benchmarks do."""

    def __init__(self, load: Callable[[], TextTower]):
        self._load = load
        self._tower: TextTower | None = None

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Encode ``N`` texts to vectors ``[N, S]``, which are not normalised."""
        if self._tower is None:
            self._tower = self._load()
        return self._tower.embed(texts)
