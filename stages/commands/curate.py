"""Choose the images of shards that are worth training on, by what one teacher says of them.

    radio-distill curate data/images --teacher dinov2_l_reg --output curated
    radio-distill curate data/images --teacher dinov2_l_reg --output curated --images 0.5 \\
      --against imagenet /data/imagenet --against images data/images_held_out
    radio-distill train birds --data.curation curated/curation.jsonl

Images are alike by the cosine of their summaries, less what all have in common. Out go, in this
order: images that cannot be decoded; those that are alike to images of evaluation sets (--against),
with all that are alike to them; of each group of near-duplicates all but the one with most pixels;
and with --images what is too much of one thing, by hierarchical k-means and sampling that is
balanced over its clusters. The shards stay as they are.

Writes curation.jsonl for the field data.curation, left_out.csv with what each copy and each leak is
alike to, and index.html with clusters and pairs to look at: what is a copy depends on the use, so
look. Summaries are kept in the output folder, or in one that --summaries names for several outputs;
a command that was stopped, or is asked with another threshold or number, goes on from there.
Several processes
(torchrun --nproc-per-node 8 -m stages.cli curate …) share the shards out. Fields of the sections
data and engine can be set.
"""

import argparse
import csv
import os
import shlex
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radio_distill.config import DataConfig, EngineConfig, Facts, build, override, resolve_data
from radio_distill.errors import ConfigError

from ..arguments import add_trust_argument, check_output

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import Tensor

    from radio_distill.curation.curate import Curated, Settings
    from radio_distill.data.tar_index import Shard
    from radio_distill.data.tar_scan import Sample
    from radio_distill.evals.encoder import AnyImage, Encoder
    from radio_distill.protocols import Teacher
    from radio_distill.types import Size

TAKES_FIELDS = True
FILE = "curation.jsonl"
_IMAGES = "images"  # in place of the name of a published set: any folder or shards


@dataclass(frozen=True)
class Sections:
    """The sections of a recipe that have a say here."""

    data: DataConfig
    engine: EngineConfig = field(default_factory=EngineConfig)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``radio-distill curate``."""
    add_trust_argument(parser)
    add = parser.add_argument
    add("shards", nargs="+", help="shards, folders or patterns, as data.shards takes them")
    add("--teacher", metavar="TEACHER", help="PRESET or SOURCE:MODEL whose summaries are compared")
    add("--output", type=Path, default=Path("curated"), metavar="DIR", help="(default: curated)")
    add(
        "--summaries", type=Path, metavar="DIR",
        help="where summaries are kept (default: summaries in the output folder)",
    )  # fmt: skip
    add("--size", type=int, default=224, metavar="PX", help="side that it sees (default: 224)")
    add("--batch-size", type=int, default=32, metavar="N", help="images it sees at once (32)")
    add(
        "--duplicates", type=float, default=0.9, metavar="COSINE",
        help="from which two images are near-duplicates (default: 0.9); above 1 for none",
    )  # fmt: skip
    add(
        "--images", type=float, default=0, metavar="N",
        help="images to keep; below 1 a share of those without copies; 0 for all (default: 0)",
    )  # fmt: skip
    add(
        "--clusters", type=int, nargs="+", default=[], metavar="K",
        help="of each level, the lowest first (default: a fifth of the images up to 10,000, or a "
        "fiftieth where that is more; then tenths, down to 1,000)",
    )  # fmt: skip
    add(
        "--against", nargs=2, action="append", default=[], metavar=("NAME", "PATH"),
        help="leave out what is alike to the images that scores are of: a set of `radio-distill "
        f"data list` and its folder, or `{_IMAGES}` and a folder or shards",
    )  # fmt: skip
    add(
        "--leaks", type=float, metavar="COSINE",
        help="from which an image is alike to one of --against (default: as --duplicates)",
    )  # fmt: skip
    add("--seed", type=int, default=0, help="of clusters and draws (default: 0)")


def run(arguments: argparse.Namespace) -> int:
    """Encode, judge every image, write the files, print the numbers."""
    from radio_distill.curation.curate import Settings
    from radio_distill.curation.summaries import encode_shards
    from radio_distill.data.sources import open_sources
    from radio_distill.evals.cache import SummaryCache
    from radio_distill.system.distributed import (
        all_gather_object,
        choose_device,
        join,
        run_on_main,
        world_from,
    )

    settings = Settings(
        duplicates=arguments.duplicates,
        leaks=arguments.duplicates if arguments.leaks is None else arguments.leaks,
        images=arguments.images,
        clusters=tuple(arguments.clusters),
        seed=arguments.seed,
    )
    _check(arguments, settings.leaks)
    check_output(arguments.output, is_folder=True)
    kept = arguments.summaries or arguments.output / "summaries"
    check_output(kept, "--summaries", is_folder=True)
    asked = _sections(arguments)
    sets = [(name, _tested_images(name, path)) for name, path in arguments.against]
    world = world_from(os.environ)
    device = choose_device(asked.engine.device, world)
    join(world, device)
    shards = run_on_main(world, lambda: open_sources(asked.data)).shards
    encoder, digest = _encoder(arguments.teacher, device)
    size = encoder.nearest_size((arguments.size, arguments.size))
    folder = kept / _folder_name(digest, size, asked.data)
    encode_shards(shards, encoder, size, asked.data, folder, arguments.batch_size, world)
    all_gather_object([None])  # all have come as far
    tested = [image for _, images in sets for image in images]
    cache = SummaryCache(kept / "evaluation", digest[:16])
    vectors = _summaries_of_tested(replace(encoder, cache=cache), tested, arguments)
    facts = {"teacher": arguments.teacher, "teacher_digest": digest, "size": size[0]}
    facts |= asdict(settings) | {"against": [[name, len(images)] for name, images in sets]}
    request = _Request(arguments.output, settings, shards, folder, vectors, device, sets, facts)
    run_on_main(world, lambda: _choose(request))
    return 0


@dataclass(frozen=True)
class _Request:
    """What is asked for, when every image has its summary."""

    output: Path
    settings: "Settings"
    shards: "Sequence[Shard]"
    summaries: Path
    tested: "Tensor | None"
    """Summaries of the images of evaluation sets, ``[E, S]``; None for none."""
    device: "torch.device"
    sets: "Sequence[tuple[str, Sequence[AnyImage]]]"
    facts: dict[str, Any]


def _choose(request: _Request) -> None:
    """Judge every image, write the files, print the numbers."""
    from radio_distill.curation.curate import curate
    from radio_distill.curation.summaries import read_summaries, without_mean
    from radio_distill.data.curation import write_curation
    from radio_distill.evals.encoder import open_image
    from radio_distill.report.curation import balance_table, counts_table, write_curation_page
    from radio_distill.report.tables import print_tables

    output, shards, facts = request.output, request.shards, request.facts
    tested = [image for _, images in request.sets for image in images]
    summaries = read_summaries(shards, request.summaries)
    vectors = request.tested
    if vectors is not None:
        vectors = without_mean(vectors, summaries.mean)
    curated = curate(summaries, vectors, request.settings, request.device, output / "work")
    if not curated.kept.any():
        raise ConfigError("curate: no image is left; look at --duplicates, --leaks and --against")
    write_curation(output / FILE, shards, curated.kept, facts)
    numbered = _Numbered(shards)
    names = [f"{name}: {getattr(it, 'key', it)}" for name, images in request.sets for it in images]
    _write_left_out(output / "left_out.csv", curated, numbered, names)
    write_curation_page(
        output / "index.html",
        curated,
        numbered.open,
        lambda number: open_image(tested[number]),
        {name: _text(value) for name, value in facts.items() if name != "teacher_digest"},
    )
    print_tables([counts_table(curated), balance_table(curated)])
    print(f"clusters and pairs to look at: {output / 'index.html'}")
    print("train with", shlex.join(["--data.curation", str(output / FILE)]))


def _check(arguments: argparse.Namespace, leaks: float) -> None:
    if not arguments.teacher:
        raise ConfigError("curate: name the teacher that images are compared by: --teacher NAME")
    for flag, value in (("duplicates", arguments.duplicates), ("leaks", leaks)):
        if not value > 0:  # nor no number
            raise ConfigError(f"--{flag} {value:g}: a cosine above 0; above 1 nothing is alike")
    images = arguments.images
    if not images >= 0 or (images >= 1 and not float(images).is_integer()):
        raise ConfigError(f"--images {images:g}: a number of images, a share below 1, or 0 for all")
    for flag in ("size", "batch_size"):
        if getattr(arguments, flag) < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: at least 1")
    sizes = arguments.clusters
    if any(size < 1 for size in sizes) or sorted(sizes, reverse=True) != sizes:
        raise ConfigError(f"--clusters {sizes}: at least 1 each, and fewer at each level")


def _sections(arguments: argparse.Namespace) -> Sections:
    """Return the sections that fields are of, with a number of workers."""
    from radio_distill.system.distributed import cores_of_process

    given = override({"data": {"shards": arguments.shards}}, arguments.fields)
    asked: Sections = build(Sections, given)
    if asked.data.curation or asked.data.weights:
        raise ConfigError("curate: data.curation and data.weights have no meaning here; drop them")
    data = resolve_data(asked.data, Facts(cores=cores_of_process(os.environ)))
    return replace(asked, data=data)


def _tested_images(name: str, path: str) -> "Sequence[AnyImage]":
    """List the images of an evaluation set."""
    from radio_distill.data.folder import list_images
    from radio_distill.evals.datasets import DATASETS

    if name == _IMAGES:
        return list_images(path)
    if name not in DATASETS.names():
        DATASETS.get(name)  # raises, with the names that there are
    return DATASETS.get(name)(path).tested()


def _encoder(name: str, device: "torch.device") -> "tuple[Encoder, str]":
    """Build the teacher; returns it as an encoder, and a digest of what it is."""
    from radio_distill.evals.encoder import teacher_encoder
    from teachers import build_teacher
    from teachers.names import teacher_named

    config = teacher_named(name)
    teacher: Teacher = build_teacher(name, config, device)
    encoder = teacher_encoder(teacher, device)
    parts = (config.preset, config.options, teacher.spec.weights_hash, str(encoder.dtype))
    return encoder, sha256(repr(parts).encode()).hexdigest()


def _folder_name(digest: str, size: "Size", data: DataConfig) -> str:
    """Name the folder of the summaries after what they depend on besides the images."""
    from radio_distill.data.rendering import PIXELS

    parts = (digest, size, data.min_size, data.max_pixels, PIXELS)
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _summaries_of_tested(
    encoder: "Encoder", images: "Sequence[AnyImage]", asked: argparse.Namespace
) -> "Tensor | None":
    """Encode the images of evaluation sets, or find them again; all processes share them."""
    from radio_distill.evals.encoder import encode_summaries
    from radio_distill.system.distributed import current_world
    from radio_distill.system.progress import Progress

    if not images:
        return None
    with Progress("evaluation sets", len(images), visible=current_world().is_main) as bar:
        return encode_summaries(encoder, images, asked.size, asked.batch_size, bar.report)


def _text(value: object) -> str:
    """Write a setting for the page; lists of pairs and of numbers without brackets."""
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


class _Numbered:
    """The images of shards, numbered through."""

    def __init__(self, shards: "Sequence[Shard]"):
        from radio_distill.data.tar_reader import ShardReader

        self._reader = ShardReader(shards)
        self._starts = [0, *accumulate(shard.num_samples for shard in shards)]

    def name(self, number: int) -> str:
        """Return ``shard:member``."""
        shard, sample = self._sample(number)
        return self._reader.key(shard, sample)

    def open(self, number: int) -> "Image":
        """Read an image."""
        from radio_distill.data.images import decode_image

        return decode_image(self._reader.image_bytes(*self._sample(number)))

    def _sample(self, number: int) -> "tuple[int, Sample]":
        shard = bisect_right(self._starts, number) - 1
        return shard, self._reader.sample(shard, number - self._starts[shard])


def _write_left_out(
    path: Path, curated: "Curated", numbered: _Numbered, tested: Sequence[str]
) -> None:
    """Write what each image is alike to that is left out as a copy, a leak, or cannot be used."""
    from radio_distill.curation.curate import Verdict
    from radio_distill.system.files import replacing

    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("image", "why", "alike to", "cosine"))
        for number, code in enumerate(curated.verdicts.tolist()):
            verdict, like = Verdict(code), int(curated.like[number])
            if verdict in (Verdict.KEPT, Verdict.NOT_DRAWN):
                continue
            other = ""
            if like >= 0:
                other = tested[like] if verdict is Verdict.LEAKED else numbered.name(like)
            cosine = f"{curated.cosine[number]:.4f}" if other else ""
            rows.writerow((numbered.name(number), verdict.name.lower(), other, cosine))
