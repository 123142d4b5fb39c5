"""Checkpoints are whole or absent, whatever happens while they are written."""

import errno
import hashlib
import json
import os
import resource
import signal

import pytest
import torch

from radio_distill.config import Recipe, build
from radio_distill.errors import CheckpointError, TakenOverError, WeightsError
from radio_distill.train import checkpoint as checkpoints
from radio_distill.train import checkpointer
from radio_distill.train.checkpoint import Best, Checkpoint
from radio_distill.train.checkpointer import save
from radio_distill.train.run_dir import RunLock
from radio_distill.types import TeacherSpec

RECIPE = build(
    Recipe,
    {
        "name": "r",
        "data": {"shards": ["x"]},
        "teachers": {"t": {"preset": "p"}},
        "stages": {
            "stage1": {
                "partitions": [{"name": "a", "size": 32, "teachers": ["t"], "batch_size": 2}]
            }
        },
    },
)
SPEC = TeacherSpec("t", 8, None, 16, (224, 224), None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def at(root, step, **values):
    return Checkpoint(
        checkpoints.folder_of(root, step), step, "stage1", RECIPE, {"t": SPEC}, **values
    )


def write(root, step, value=0.0, size=16, keep_last=3):
    parts = {
        "student": {"w": torch.full((size,), value)},
        "optimizer": {"step": torch.tensor(step)},
    }
    return save(at(root, step), parts, keep_last)


def test_save__reads_back_equal(tmp_path):
    folder = write(tmp_path, 10, 1.5)
    found = checkpoints.find(folder)
    assert (found.step, found.stage, found.recipe) == (10, "stage1", RECIPE)
    assert found.teachers == {"t": SPEC}
    torch.testing.assert_close(found.student_tensors()["w"], torch.full((16,), 1.5))
    assert not found.has("ema")


def test_save__keeps_the_newest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep_last=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no meta", "cut meta", "no weights"])
def test_newest__passes_over_a_damaged_one_and_says_why(tmp_path, damage, caplog):
    write(tmp_path, 1, 1.0)
    newer = write(tmp_path, 2, 2.0)
    weights, meta = newer / "student.safetensors", newer / "meta.json"
    data = bytearray(weights.read_bytes())
    if damage == "truncated":
        weights.write_bytes(data[:-8])
    elif damage == "flipped":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "no meta":
        meta.unlink()
    elif damage == "cut meta":
        meta.write_text(meta.read_text()[:50])
    else:
        weights.unlink()
    found = checkpoints.newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert "passed over" in caplog.text
    assert "step-00000002" in caplog.text
    with pytest.raises(CheckpointError):
        checkpoints.read(newer)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"sha256": {}}, "names "),
        ({"sha256": {"../../x": "0"}}, "'../../x'"),
        ({"sha256": 3}, "not a whole checkpoint"),
        ({"step": -1}, "meta.json: it is of step -1"),
        ({"step": 1e300}, "meta.json: it is of step 1e+300"),
        ({"step": "2"}, "meta.json: it is of step '2'"),
        ({"world_size": -1}, "-1 is not a count"),
        ({"recipe": "&a [*a]"}, "holds no recipe"),
        ({"recipe": "a: [1"}, "holds no recipe"),
        ({"recipe": "!!python/object/apply:os.system [id]"}, "holds no recipe"),
        ({"recipe": "name: x"}, "holds no recipe"),
        ({"teachers": [1]}, "not a whole checkpoint"),
        ({"teachers": {"t": {"name": 3}}}, "not a whole checkpoint"),
        ({"counts": {"skipped_steps": None}}, "is not a count"),
        ({"best": {"metric": "knn/top1"}}, "not a whole checkpoint"),
    ],
)
def test_read__hostile_meta_is_one_line(tmp_path, change, reason):
    folder = write(tmp_path, 2)
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(checkpoints.sealed({**meta, **change})))
    with pytest.raises(CheckpointError) as caught:
        checkpoints.read(folder)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert checkpoints.newest(tmp_path) is None


def test_read__a_meta_whose_bytes_changed(tmp_path):
    """Every flipped bit of the file is noticed, as it is in the weights."""
    folder = write(tmp_path, 2)
    whole = (folder / "meta.json").read_bytes()
    for place in range(0, len(whole), 97):
        data = bytearray(whole)
        data[place] ^= 1
        (folder / "meta.json").write_bytes(data)
        if json.loads(whole) != _loaded(data):
            with pytest.raises(CheckpointError, match=r"meta\.json"):
                checkpoints.read(folder)


def _loaded(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("name", ["meta.json", "student.safetensors"])
def test_read__a_pipe_in_the_place_of_a_file(tmp_path, name):
    folder = write(tmp_path, 2)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="whole"):
        checkpoints.read(folder)


def test_newest__of_another_stage_is_passed_over(tmp_path, caplog):
    write(tmp_path, 2)
    assert checkpoints.newest(tmp_path, "stage1").step == 2
    assert checkpoints.newest(tmp_path, "stage2") is None
    assert "'stage1', not of stage2" in caplog.text


def test_save__what_is_no_checkpoint_or_a_later_one_costs_none(tmp_path):
    (tmp_path / "step-00000099").mkdir()
    (tmp_path / "step-00000098").write_text("a file")
    write(tmp_path, 1, keep_last=1)
    write(tmp_path, 2, keep_last=1)
    assert checkpoints.newest(tmp_path).step == 2
    assert not (tmp_path / "step-00000001").exists()


def test_read__json_that_is_no_mapping(tmp_path):
    folder = write(tmp_path, 2)
    for text in ("[]", "3", "[" * 100_000):
        (folder / "meta.json").write_text(text)
        with pytest.raises(CheckpointError, match="whole"):
            checkpoints.read(folder)


def test_save__keeps_multiples_too(tmp_path):
    for step in range(2, 14, 2):
        save(at(tmp_path, step), {"student": {"w": torch.zeros(2)}}, keep_last=1, keep_every=4)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [4, 8, 12]


def test_save__keeps_the_best_and_links_it(tmp_path):
    best = Best("knn/top1", 0.5, 2)
    for step in range(1, 6):
        parts = {"student": {"w": torch.zeros(2)}}
        save(at(tmp_path, step, best=best if step >= 2 else None), parts, keep_last=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best", "step-00000002", "step-00000005",
    ]  # fmt: skip
    assert checkpoints.find(tmp_path).best == best
    assert checkpoints.find(tmp_path / "best").step == 2


def test_save__an_old_one_that_cannot_be_deleted_is_warned_of(tmp_path, monkeypatch, caplog):
    """As on NFS while another process reads it: the run goes on, and the next one tries again."""
    busy, delete = write(tmp_path, 1, keep_last=1), checkpointer.shutil.rmtree

    def refuse(path, **options):
        if path == busy:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        delete(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer.shutil, "rmtree", refuse)
        assert write(tmp_path, 2, keep_last=1).is_dir()
    assert "cannot delete" in caplog.text
    write(tmp_path, 3, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_save__deletes_nothing_before_the_new_one_is_verified(tmp_path, monkeypatch):
    """A disk that gives back other bytes than it got."""
    write(tmp_path, 1, keep_last=1)
    written = checkpointer.write_tensors

    def bad_disk(path, tensors):
        digest = written(path, tensors)
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return digest

    monkeypatch.setattr(checkpointer, "write_tensors", bad_disk)
    with pytest.raises(CheckpointError, match="what was written"):
        write(tmp_path, 2, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoints.find(tmp_path).step == 1


def test_save__another_owner_of_the_folder_keeps_it_from_appearing(tmp_path):
    root = tmp_path / "stage1" / "checkpoints"
    root.mkdir(parents=True)
    mine = RunLock(root.parent)
    mine.check()
    RunLock(root.parent)
    with pytest.raises(TakenOverError, match="process"):
        save(at(root, 1), {"student": {"w": torch.zeros(2)}}, 1, may_write=mine.check)
    assert not list(root.iterdir())


def test_clear_unfinished__leaves_whole_ones(tmp_path):
    write(tmp_path, 1)
    (tmp_path / ".step-00000002.77.tmp").mkdir()
    (tmp_path / ".step-00000002.77.tmp" / "student.safetensors").write_bytes(b"half")
    checkpointer.clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_find__none_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="no whole"):
        checkpoints.find(tmp_path)
    assert checkpoints.newest(tmp_path / "absent") is None


def test_save__a_full_disk_leaves_the_former_checkpoint_whole(tmp_path):
    """A limit on the size of files stands for a full disk: writing fails half-way with OSError."""
    write(tmp_path, 1, 1.0, size=1000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(CheckpointError, match="former") as caught:
            write(tmp_path, 2, 2.0, size=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    found = checkpoints.find(tmp_path)
    assert found.student_tensors()["w"].sum() == 1000


def test_save__a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="checkpoint"):
        write(tmp_path / "file", 1)


def test_read__never_runs_code(trap, tmp_path):
    """A checkpoint is safetensors and JSON: a pickle in its place is refused, not executed."""
    import pickle

    folder = write(tmp_path, 1)

    (folder / "student.safetensors").write_bytes(pickle.dumps(trap))
    meta = json.loads((folder / "meta.json").read_text())
    data = (folder / "student.safetensors").read_bytes()
    meta["sha256"]["student.safetensors"] = hashlib.sha256(data).hexdigest()
    (folder / "meta.json").write_text(json.dumps(checkpoints.sealed(meta)))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.find(folder).student_tensors()
    assert not trap.ran.exists()


def test_check_teachers__another_teacher_is_named(tmp_path):
    found = checkpoints.find(write(tmp_path, 1))
    checkpoints.check_teachers(found, {"t": SPEC})
    with pytest.raises(WeightsError, match="'u'"):
        checkpoints.check_teachers(found, {"u": SPEC})
    wider = TeacherSpec("t", 9, None, 16, (224, 224), None, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(WeightsError, match=r"8 channels.* 9"):
        checkpoints.check_teachers(found, {"t": wider})
