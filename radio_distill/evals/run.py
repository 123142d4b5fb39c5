"""One harness for every encoder: a student, a teacher, or a teacher behind an upsampler.

Benchmarks are asked one after another. None needs a recipe, none draws from torch's or numpy's
global generators (every draw has a seeded generator of its own), so an evaluation may run inside a
training process and changes nothing in it.

Left out: fine-tuning, and data sets that must be downloaded.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from hashlib import sha256
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import EvaluationConfig, build
from ..config.rules import elsewhere, places_of_evaluation
from ..data.folder import labelled_images, list_images
from ..errors import ConfigError, NoLayersError, RadioDistillError
from ..protocols import Benchmark
from ..registry import Registry, check_has, check_takes, nearest
from ..system.memory import is_out_of_memory
from ..types import Score, Size, format_size, unheard
from .cache import SummaryCache
from .datasets import DATASETS
from .encoder import Encoder
from .masks import open_set
from .protocol import DATA, protocol_of, quick

if TYPE_CHECKING:
    from .examples import Shown

logger = logging.getLogger(__name__)

BENCHMARKS = Registry(
    "benchmark",
    {
        "ade20k": "radio_distill.evals.semantic:Ade20k",
        "agreement": "radio_distill.evals.agreement:Agreement",
        "cam": "radio_distill.evals.cam:ClassActivation",
        "coco_detection": "radio_distill.evals.detection:CocoDetection",
        "coco_retrieval": "radio_distill.evals.retrieval:CocoCaptions",
        "correspondence": "radio_distill.evals.correspondence:Correspondence",
        "feature_preservation": "radio_distill.evals.segmentation:FeaturePreservation",
        "fidelity": "radio_distill.evals.fidelity:Fidelity",
        "flickr_retrieval": "radio_distill.evals.retrieval:FlickrCaptions",
        "imagenet_cam": "radio_distill.evals.cam:ImagenetClassActivation",
        "imagenet_knn": "radio_distill.evals.knn:ImagenetKnn",
        "imagenet_zero_shot": "radio_distill.evals.zero_shot:ImagenetZeroShot",
        "knn": "radio_distill.evals.knn:Knn",
        "navi_correspondence": "radio_distill.evals.posed:NaviMatching",
        "navi_depth": "radio_distill.evals.depth_probes:NaviDepth",
        "navi_normals": "radio_distill.evals.depth_probes:NaviNormals",
        "nyu_depth": "radio_distill.evals.depth_probes:NyuDepth",
        "nyud": "radio_distill.evals.multi_task:Nyud",
        "pascal_context": "radio_distill.evals.multi_task:PascalContext",
        "rgbd_correspondence": "radio_distill.evals.posed:RgbdMatching",
        "sam_coco": "radio_distill.evals.sam:SamCoco",
        "segmentation": "radio_distill.evals.segmentation:Segmentation",
        "spair": "radio_distill.evals.spair:KeypointTransfer",
        "stereo": "radio_distill.evals.correspondence:Stereo",
        "voc": "radio_distill.evals.semantic:Voc",
    },
)


def make(name: str, config: EvaluationConfig) -> Benchmark:
    """Make a benchmark from the recipe; ``evaluation.options.NAME`` overrides its own fields.

    Raises:
        UnknownNameError: no such benchmark.
        ConfigError: the data it needs is not named, or an option is unknown.
    """
    kind = BENCHMARKS.get(name)
    _check_benchmark(name, kind)
    for dataset in config.data.keys() - DATASETS.names():
        known = nearest(dataset, DATASETS.names())
        raise ConfigError(f"evaluation.data has {dataset!r}, which is no data set ({known})")
    values = {own: source_value(config, field) for own, field in kind.sources.items()}
    values |= config.options.get(name, {})
    for own, field in kind.sources.items():
        if values[own] == "":
            raise ConfigError(
                f"evaluation.{field} is empty and benchmark {name!r} needs it; "
                "name its data, or take it out of evaluation.benchmarks"
            )
    benchmark: Benchmark = build(kind, values, f"evaluation.options.{name}")
    return benchmark


def check_data(config: EvaluationConfig) -> None:
    """Check that each benchmark's data can be found, before anything is scored.

    Raises:
        ConfigError: a benchmark that does not exist, or that lacks its data; an address, where a
            folder is meant.
        DataError: data that cannot be used.
    """
    if problems := [*elsewhere(places_of_evaluation(config))]:
        raise ConfigError(*problems)
    fields = set[str]()
    for name in config.benchmarks:
        make(name, config)
        fields |= set(BENCHMARKS.get(name).sources.values())
    if "images" in fields:
        list_images(config.images)
    if "labels" in fields:
        labelled_images(config.labels)
    if "segmentation" in fields:
        open_set(config.segmentation, config.limit or None, config.segmentation_ignore)
    for dataset in {field.removeprefix(DATA) for field in fields if field.startswith(DATA)}:
        DATASETS.get(dataset)(config.data[dataset]).check()


def source_value(config: EvaluationConfig, field: str) -> Any:
    """Return a field of ``evaluation``, or with ``data.NAME`` the path of a data set."""
    if field.startswith(DATA):
        return config.data.get(field.removeprefix(DATA), "")
    return getattr(config, field)


def _check_benchmark(name: str, kind: Any) -> None:
    """Raise ConfigError, in one line, for a class of the user's that is no benchmark."""
    what = f"benchmark {name!r}"
    check_has(what, kind, ("name", "sources", "run"))
    sources = kind.sources
    check_takes(f"{what}: run", kind.run, ("self", "encoder", "limit", "progress"))
    if not is_dataclass(kind):
        raise ConfigError(f"{what} is no dataclass; its fields are what a recipe can set")
    own = {field.name for field in fields(kind)}
    known = {field.name for field in fields(EvaluationConfig)} - {"data"}
    known |= {DATA + dataset for dataset in DATASETS.names()}
    if not isinstance(sources, Mapping):
        raise ConfigError(
            f"{what}: sources is a {type(sources).__name__}, not a mapping of its own fields to "
            "those of `evaluation`, such as {'images': 'images'} or {'data': 'data.ade20k'}"
        )
    for field, source in sources.items():
        if field not in own or source not in known:
            wrong, among = (field, own) if field not in own else (source, known)
            raise ConfigError(
                f"{what}: sources has {field!r}: {source!r}, and there is no field {wrong!r} "
                f"({nearest(str(wrong), sorted(among))})"
            )


def evaluate(
    encoder: Encoder,
    config: EvaluationConfig,
    progress: Callable[[str, int, int], object] | None = None,
    asked: Mapping[str, str] | None = None,
    write: Callable[[list[Score]], None] | None = None,
    show: "Callable[[str, Shown], None] | None" = None,
    failed: Callable[[str, Exception], None] | None = None,
) -> list[Score]:
    """Score ``encoder`` on the benchmarks of ``config``.

    Fidelity is asked of an encoder with heads (:class:`.encoder.Heads`), zero-shot classification
    and retrieval of one with a text tower, probes of several depths of one with inner layers,
    feature preservation of one behind an upsampler; they are passed over for any other. All
    benchmarks are made before the first runs, so a missing folder costs no time. Each score says
    which sizes the encoder was given, which are not those asked for where it cannot take them, and
    under which protocol: that of the benchmark's fields where it names none, a quick one where
    `evaluation.limit` leaves a part of the data.

    Args:
        encoder: in evaluation mode.
        config: a recipe's section ``evaluation``.
        progress: called with (benchmark, done, total).
        asked: by benchmark, what its scores say of how it was asked (:func:`asked_of`).
        write: called with the scores of each benchmark as soon as they are there.
        show: called before that with (benchmark, example) by benchmarks that show some.
        failed: called with a benchmark and what it raised that is no error of the user's; it has no
            scores then. Without it, and where memory was not enough, the error escapes.

    Raises:
        ConfigError: a benchmark that does not exist, or that lacks its data.
        DataError: data that cannot be used.
    """
    benchmarks = [make(name, config) for name in config.benchmarks]
    if config.cache and encoder.weights:
        kind = torch.device(encoder.device).type
        digest = sha256(f"{encoder.weights} {encoder.dtype} {kind}".encode()).hexdigest()[:16]
        cache = SummaryCache(Path(config.cache).expanduser(), digest)
        encoder = replace(encoder, cache=cache)
    scores = []
    for name, benchmark in zip(config.benchmarks, benchmarks, strict=True):
        report = partial(progress, benchmark.name) if progress else unheard
        sizes: dict[Size, None] = {}
        ask: Callable[..., list[Score]] = benchmark.run
        if show is not None and "show" in signature(ask).parameters:
            ask = partial(ask, show=partial(show, benchmark.name))
        try:
            result = ask(_noting(encoder, sizes), config.limit or None, report)
        except NoLayersError as error:
            logger.warning("%s is passed over: %s", name, error)
            continue
        except Exception as error:  # a benchmark of the user's may fail with any
            if failed is None or isinstance(error, RadioDistillError) or is_out_of_memory(error):
                raise
            failed(name, error)
            continue
        if not isinstance(result, list) or not all(isinstance(score, Score) for score in result):
            raise ConfigError(
                f"benchmark {benchmark.name!r}: run returns {result!r:.80}, not a list of "
                "radio_distill.types.Score"
            )
        pixels, named = ", ".join(map(format_size, sizes)), quick if config.limit else str
        how = (asked or {}).get(name, "")
        result = [
            replace(
                score,
                pixels=pixels,
                protocol=named(score.protocol or protocol_of(benchmark)),
                asked=how,
            )
            for score in result
        ]
        if write is not None and result:
            write(result)
        scores += result
    return scores


def asked_of(name: str, config: EvaluationConfig, against: Sequence[str] = ()) -> str:
    """Return a digest of a benchmark as it is asked: its fields, its data, how many images.

    Data is known by its path and the time of change of that folder or file: what changes below it
    is not seen. ``against`` is what encoders are compared with, for fidelity.

    Raises:
        ConfigError: see :func:`make`.
    """
    benchmark: Any = make(name, config)
    values = {field.name: getattr(benchmark, field.name) for field in fields(benchmark)}
    for own in BENCHMARKS.get(name).sources:
        path = os.path.realpath(os.path.expanduser(str(values[own])))
        if os.path.exists(path):
            values[own] = [path, os.stat(path).st_mtime_ns]
    version = getattr(benchmark, "version", 1)
    parts = [name, version, values, config.limit, sorted(against) if name == "fidelity" else []]
    text = json.dumps(parts, sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()[:16]


def _noting(encoder: Encoder, sizes: dict[Size, None]) -> Encoder:
    """Return the encoder, which now puts down each size that it is given, once."""

    def noted(encode: Callable[..., Any]) -> Callable[..., Any]:
        def call(pixels: Tensor, *further: Any) -> Any:
            sizes[(pixels.shape[-2], pixels.shape[-1])] = None
            return encode(pixels, *further)

        return call

    heads = encoder.heads and replace(encoder.heads, predict=noted(encoder.heads.predict))
    inner = encoder.inner and noted(encoder.inner)
    kept = encoder.cache and replace(encoder.cache, note=sizes.setdefault)
    return replace(encoder, encode=noted(encoder.encode), heads=heads, inner=inner, cache=kept)
