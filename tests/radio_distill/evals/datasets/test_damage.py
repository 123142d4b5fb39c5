"""Whatever is wrong with a copy of a data set, its reader says so in one line, or counts less."""

import shutil

import pytest

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets import DATASETS
from radio_distill.evals.encoder import open_image

pytest.importorskip("faster_coco_eval")
pytest.importorskip("scipy")


def read_all(data):
    """Look at everything that benchmarks look at."""
    if data.name == "coco":
        for split in ("train", "val"):
            for item in data.objects(split).objects:
                item.mask()
                open_image(item.image.path)
    elif data.name in ("coco_retrieval", "flickr30k"):
        for path in data.test().images:
            open_image(path)
    elif data.name == "imagenet":
        for path, _ in data.split("train") + data.split("val"):
            open_image(path)
    elif data.name == "spair":
        for pair in data.pairs():
            pair.keypoints()
            open_image(pair.source)
    elif data.name == "redwood":
        for frame in data.frames():
            open_image(frame.image)
            frame.labels()
    else:
        for split in ("train", "trainaug", "val") if data.name == "voc" else ("train", "val"):
            for item in data.split(split):
                open_image(item.image)
                item.labels()


def problems(data) -> list[str]:
    """What is said of a copy, each in one line."""
    said = []
    try:
        contents = data.check()
        said += contents.problems.values()
        said += [f"{part}: {count}" for part, count in contents.counts.items()]
        read_all(data)
    except DataError as error:
        said.append(str(error))
    return said


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "other": lambda path: path.write_bytes(bytes(range(256))),
    "lost": lambda path: path.unlink(),
}


@pytest.fixture(scope="module", params=DATASETS.names())
def whole(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("whole") / request.param
    return DATASETS.get(request.param)(getattr(layouts, request.param)(root))


def test_whole__is_counted_without_a_problem_and_can_be_read(whole):
    contents = whole.check()
    assert not contents.problems
    assert contents.counts.keys() == whole.published.keys()
    assert min(contents.counts.values()) > 0
    assert len(contents.missing) == len(contents.published)
    read_all(whole)


def test_damage__of_one_file_of_each_kind_is_told_in_one_line(whole):
    kinds = {
        (path.parent.relative_to(whole.root).parts[:3], path.suffix): path
        for path in sorted(whole.root.rglob("*.*"))
        if path.is_file()
    }
    sound = problems(whole)
    for path in kinds.values():
        kept = path.read_bytes()
        for damage in DAMAGES.values():
            damage(path)
            said = problems(whole)
            assert said != sound, path
            assert all(line and "\n" not in line for line in said)
            path.write_bytes(kept)


def test_empty__folders_without_files(whole, tmp_path):
    shutil.copytree(whole.root, tmp_path / "empty", ignore=shutil.ignore_patterns("*.*"))
    with pytest.raises(DataError) as error:
        type(whole)(tmp_path / "empty").check()
    assert "\n" not in str(error.value)
