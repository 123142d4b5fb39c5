"""Suites: which benchmarks are asked, and how, by one word.

published
    Every benchmark of FeatSharp's Table 2 (but the group VILA, whose harness is outside), NYU depth
    and detection on COCO, as their protocols have it, of the data sets that are named.
quick
    Every benchmark there is, at small size on whatever small sets are named: some minutes an
    encoder on a CPU. Its scores are of protocols whose names end in ``-quick``: they
    order encoders, and are no published value.

A benchmark whose data is not named is left out, and said to be.
"""

from collections.abc import Collection
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

from ..config import EvaluationConfig
from ..errors import ConfigError
from ..registry import nearest
from ..types import Suite
from .headlines import HEADLINES
from .protocol import DATA
from .run import BENCHMARKS, source_value

PUBLISHED = (
    *dict.fromkeys(n.partition("/")[0] for n, m in HEADLINES.items() if m.group != "VILA"),
    "nyu_depth",
    "coco_detection",
)
QUICK_SIZE = 224
"""Longest side of a quick benchmark's images, in pixels: whole patches of 14 and of 16."""
QUICK_LIMIT = 60
"""Most images of each split."""
QUICK: dict[str, Any] = {
    "quick": True,
    "steps": 400,
    "warmup_steps": 40,
    "images_per_step": 4,
    "crop": (QUICK_SIZE, QUICK_SIZE),
    "fit": (2 * QUICK_SIZE, QUICK_SIZE),
    "size": QUICK_SIZE,
}
"""Own fields of a quick benchmark of a data set, where it has them."""
QUICK_PYRAMID: dict[str, Any] = {
    "steps": 200,
    "crop": (QUICK_SIZE // 2, QUICK_SIZE // 2),
    "hidden": 32,
    "bins": 64,
}
"""Those of one whose head has a width: its maps are 16 times as fine as the encoder's."""
QUICK_DETECTOR: dict[str, Any] = {"width": 64, "learning_rate": 3e-3, "gradient_clip": 10.0}
"""Those of a detector, whose own rate is one for epochs."""


def with_suite(
    config: EvaluationConfig, suite: Suite, among: Collection[str] = ()
) -> tuple[EvaluationConfig, dict[str, str]]:
    """Return what a suite asks, and why each benchmark that it leaves out is.

    Options of the recipe hold, and its limit where it sets one; sizes do where they are quick.

    Args:
        config: data, options and sizes of the recipe.
        suite: its name.
        among: benchmarks that may be asked; empty for all.

    Raises:
        ConfigError: no data of the suite is named; a benchmark that it has not.
    """
    asked, left_out = list[str](), dict[str, str]()
    every = (*PUBLISHED, *BENCHMARKS.names()) if suite == "quick" else PUBLISHED
    if strange := set(among) - set(every):
        raise ConfigError(
            f"suite {suite!r} has no {', '.join(sorted(strange))}; take it out of "
            f"evaluation.benchmarks ({nearest(min(strange), list(every))})"
        )
    for name in dict.fromkeys(among or every):
        if reason := _reason_against(name, config):
            left_out[name] = reason
        else:
            asked.append(name)
    if not asked:
        raise ConfigError(
            f"suite {suite!r}: no data is named; set evaluation.data, for instance "
            "--evaluation.data '{ade20k: PATH}'"
        )
    if suite == "published":
        return replace(config, benchmarks=tuple(asked)), left_out
    options = {name: own for name in asked if (own := _quick_options(name))}
    for name, own in config.options.items():
        options[name] = options.get(name, {}) | own
    quick = replace(
        config,
        benchmarks=tuple(asked),
        options=options,
        limit=config.limit or QUICK_LIMIT,
        size=min(config.size, QUICK_SIZE),
        dense_size=min(config.dense_size, QUICK_SIZE),
    )
    return quick, left_out


def _reason_against(name: str, config: EvaluationConfig) -> str:
    """Return why a benchmark cannot be asked; empty where it can."""
    if name == "stereo" and find_spec("skimage") is None:
        return "needs scikit-image"
    if name == "sam_coco" and not config.options.get(name, {}).get("decoder"):
        return "needs evaluation.options.sam_coco.decoder"
    sources = BENCHMARKS.get(name).sources.values()
    lacking = [source for source in sources if source_value(config, source) == ""]
    return f"needs evaluation.{lacking[0]}" if lacking else ""


def _quick_options(name: str) -> dict[str, Any]:
    kind = BENCHMARKS.get(name)
    if not any(source.startswith(DATA) for source in kind.sources.values()):
        return {"scales": (1.0, 2.0)} if name == "agreement" else {}
    own = {field.name for field in fields(kind)} - kind.sources.keys()
    values = QUICK | (QUICK_PYRAMID if "hidden" in own else {})
    values |= QUICK_DETECTOR if "width" in own else {}
    return {field: value for field, value in values.items() if field in own}
