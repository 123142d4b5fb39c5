"""What belongs to somebody else: one true line, before any work is done, and no stack trace."""

import ctypes
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import radio_distill
from e2e import one_line
from radio_distill.errors import CheckpointError, WeightsError
from stages import fit_upsampler, stage1
from stages.cli import main as cli

SHORT = ["--stage.steps", "2", "--stage.freeze_body_steps", "0"]
_DAC = 0b1110
"""Capabilities 1 to 3: passing over the permissions of files."""


@contextmanager
def without_rights() -> Iterator[None]:
    """Be an ordinary user as to permissions, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    before, without = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0, os.strerror(ctypes.get_errno())
    without[:] = before[:]
    without[0] &= ~_DAC  # the effective set, of this thread and those that it starts
    assert libc.capset(header, without) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0, os.strerror(ctypes.get_errno())


@contextmanager
def closed(path: Path, mode: int = 0) -> Iterator[None]:
    """Take rights from a file or folder."""
    before = stat.S_IMODE(path.stat().st_mode)
    path.chmod(mode)
    try:
        with without_rights():
            yield
    finally:
        path.chmod(before)


def listing(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


READING = [
    ["eval", "{run}/stage1"],
    ["eval", "{run}/stage1/checkpoints/step-00000002"],
    ["export", "{run}", "--format", "transformers"],
    ["export", "{run}", "--stage", "stage1", "--format", "transformers"],
    ["report", "{run}"],
    ["mode-switching", "{run}/stage1"],
    ["train", "{recipe}", "--stages", "stage1", "--resume"],
    ["train", "{recipe}", "--stages", "stage2"],
]


@pytest.mark.parametrize("what", ["", "stage1", "stage1/checkpoints/step-00000002/meta.json"])
def test_unreadable_run__is_neither_missing_nor_untrained(two_steps, recipe_file, capfd, what):
    for command in READING:
        arguments = [item.format(run=two_steps, recipe=recipe_file) for item in command]
        with closed(two_steps / what):
            assert cli(arguments) == 2, arguments
        line = one_line(capfd)
        assert str(two_steps / what) in line, line
        assert "permission denied" in line, line
        for untrue in ("not there", "not the folder", "train one first", "run it first"):
            assert untrue not in line, line


@pytest.mark.parametrize("part", ["student", "ema"])
def test_unreadable_weights__of_a_checkpoint_are_not_damaged(two_steps, capfd, part):
    file = two_steps / "stage1" / "checkpoints" / "step-00000002" / f"{part}.safetensors"
    with closed(file):
        assert cli(["eval", str(two_steps / "stage1")]) == 2
    assert f"{file} cannot be read: permission denied" in one_line(capfd)


def test_load__of_what_may_not_be_read(two_steps):
    for folder in (two_steps, two_steps / "stage1"):
        with closed(folder), pytest.raises(CheckpointError, match="permission"):
            radio_distill.load(two_steps)


def test_folder_of_another_user__is_not_written_and_not_changed(two_steps, recipe_file, capfd):
    before = listing(two_steps)
    longer = ["--resume", "--stage.steps", "4", "--allow-changed-recipe"]
    # Whoever may write into the run folder alone may neither go on nor move the run aside.
    for folder, more in (("stage1", []), ("stage1", longer), ("", [])):
        with closed(two_steps / folder, 0o500):
            assert stage1.main([str(recipe_file), *SHORT, *more]) == 2
        assert f"cannot write to {two_steps}/stage1: Permission denied" in one_line(capfd)
        assert listing(two_steps) == before


def test_fit__into_a_folder_of_another_user(two_steps, recipe_file, capfd):
    fit = ["--teacher", "vit", "--upsampler", "featup", "--fit.steps", "1"]
    with closed(two_steps, 0o500):
        assert fit_upsampler.main([str(recipe_file), *fit]) == 2
    assert f"cannot write to {two_steps}/fit/vit-featup-2x: Permission denied" in one_line(capfd)


def test_output__is_probed_before_the_work(two_steps, capfd, monkeypatch):
    """What would do the work must not be reached."""

    def unreachable(*arguments, **settings):
        raise AssertionError("the work was begun")

    monkeypatch.setattr("stages.commands.scoring.evaluate", unreachable)
    monkeypatch.setattr("radio_distill.export.folded.folded", unreachable)
    monkeypatch.setattr("stages.commands.mode_switching.measure", unreachable)
    monkeypatch.setattr("stages.commands.report._sheets", unreachable)
    stage = str(two_steps / "stage1")
    commands = [
        (["eval", stage], two_steps / "scores.jsonl"),
        (["export", stage, "--format", "transformers"], two_steps / "stage1" / "export"),
        (["mode-switching", stage], two_steps / "mode_switching"),
        (["report", str(two_steps)], two_steps / "report.html"),
    ]
    (two_steps / "own").mkdir()
    for arguments, default in commands:
        with closed(two_steps, 0o500), closed(two_steps / "stage1", 0o500):
            assert cli(arguments) == 2, arguments
        line = one_line(capfd)
        assert str(default) in line, line
        assert "Permission denied" in line, line
        with closed(two_steps / "own", 0o500):
            assert cli([*arguments, "--output", str(two_steps / "own" / "here")]) == 2
        line = one_line(capfd)
        assert str(two_steps / "own" / "here") in line, line
        assert "--output" in line, line


def test_export__that_fails_leaves_the_earlier_one_in_its_place(two_steps, capfd, monkeypatch):
    arguments = ["export", str(two_steps), "--format", "transformers"]
    assert cli(arguments) == 0
    earlier = listing(two_steps / "export")
    monkeypatch.setattr("radio_distill.export.write.os.replace", _fails)
    assert cli(arguments) == 2
    assert "No space" in one_line(capfd)
    monkeypatch.undo()
    assert listing(two_steps / "export") == earlier
    assert cli(arguments) == 0
    assert (two_steps / "export" / "transformers.1").is_dir()


def _fails(*paths: object) -> None:
    raise OSError(28, "No space")


def test_data__that_may_not_be_read_is_not_empty(two_steps, recipe_file, images, capfd):
    train = ["train", str(recipe_file), "--stages", "stage1", "--data.shards"]
    score = ["eval", str(two_steps / "stage1"), "--evaluation.images"]
    commands = [
        ("train", ["shards", "{}", str(two_steps / "out")]),
        ("shards", ["shards", "--check", "{}"]),
        ("shards", [*train, "[{}]"]),
        ("shards", [*train, "[{}/*.tar]"]),
        ("shards", [*train, "['{}/shard-{{000000..000003}}.tar']"]),
        ("held_out", [*score, "{}"]),
        ("held_out", ["score", "{}", "--baseline", "bilinear"]),
    ]
    for name, command in commands:
        folder = two_steps / name
        shutil.copytree(images / name, folder, dirs_exist_ok=True)
        arguments = [item.format(folder) for item in command]
        with closed(folder):
            assert cli(arguments) == 2, arguments
        line = one_line(capfd)
        assert "cannot be read: permission denied" in line, line
        assert name in line, line


def test_shards_folder__that_cannot_be_written_trains(recipe_file, images, tmp_path):
    shards = tmp_path / "shards"
    shutil.copytree(images / "shards", shards)
    for index in shards.glob("*.jsonl"):
        index.unlink()
    fields = ["--data.shards", f"[{shards}]"]
    with closed(shards, 0o500):
        assert stage1.main([str(recipe_file), *SHORT, *fields]) == 0
    assert not list(shards.glob("*.jsonl"))


def test_weights__that_may_not_be_read(recipe_file, tmp_path, capfd):
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"")
    for field in ("teachers.cnn.weights", "student.pretrained"):
        with closed(file):
            assert stage1.main([str(recipe_file), f"--{field}", str(file)]) == 2
        assert f"{file} cannot be read: permission denied" in one_line(capfd)


def test_recipe_and_override__that_may_not_be_read(recipe_file, tmp_path, capfd):
    (tmp_path / "private").mkdir()
    override = tmp_path / "private" / "more.yaml"
    override.write_text("seed: 4\n")
    for place in (override, override.parent):
        for arguments in (
            [str(recipe_file), "--override", str(override)],
            [str(override)],
        ):
            with closed(place):
                assert stage1.main(arguments) == 2
            line = one_line(capfd).lower()
            assert str(override) in line
            assert "permission denied" in line


def test_statistics__that_cannot_be_kept_are_not_estimated(tmp_path):
    """Those that others have kept can be read all the same."""
    from radio_distill.normalize import statistics as cache
    from radio_distill.normalize.statistics import Moments

    moments = Moments(2)
    moments.update(torch.ones(1, 2, 1, 3))
    cache.save_statistics(tmp_path / "vit.safetensors", cache.Statistics(moments))
    with closed(tmp_path, 0o500):
        with pytest.raises(CheckpointError, match=r"normalizer\.cache"):
            cache.check_can_save(tmp_path)
        assert cache.load_statistics(tmp_path / "vit.safetensors") is not None


def test_doctor__tells_and_goes_on(tmp_path, capfd, monkeypatch):
    private = tmp_path / "private"
    private.mkdir()
    with closed(private):
        assert cli(["doctor", "--output", str(private / "runs" / "mine")]) == 1
    printed = capfd.readouterr()
    assert "Permission denied" in " ".join(printed.out.split())
    assert "to repair: run folder" in " ".join(printed.out.split())
    assert "Traceback" not in printed.err


def test_home__that_nobody_knows_is_one_line(monkeypatch):
    from teachers.sources import packaged

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user of no list
    with pytest.raises(WeightsError, match="XDG_CACHE_HOME"):
        packaged.cache_folder()
    with pytest.raises(WeightsError, match="nothing at"):
        radio_distill.load("~nobody-of-this-name/run")
