"""A start that cannot go well touches nothing of a run that is there, finished or going on."""

import os
import shutil
import signal
from pathlib import Path

import pytest
import yaml

from e2e import one_line, run, run_folder
from radio_distill.errors import TakenOverError
from radio_distill.normalize.statistics import Moments
from radio_distill.train.run_dir import FRESH, RunLock, read_status
from stages import fit_upsampler, stage1, stage2, stage3

SHORT = ["--stage.steps", "2", "--stage.freeze_body_steps", "0"]
FIT = ["--teacher", "vit", "--upsampler", "featup", "--fit.steps", "2", "--fit.batch_size", "2"]
FIT += ["--fit.downsampler_kernel", "4", "--fit.images_every", "0"]


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Return bytes and time of every file; statistics, which are shared, are left out."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "statistics"
    }


def cut_weights(folder: Path) -> str:
    (folder / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    return str(folder / "cut.safetensors")


def cut_shard(folder: Path) -> str:
    (folder / "cut.tar").write_bytes(b"x" * 1000)
    return str(folder / "cut.tar")


CANNOT_START = [
    pytest.param(lambda _: ["--data.shards", "[/no/such]"], "/no/such", id="no shards"),
    pytest.param(
        lambda folder: ["--data.shards", f"[{cut_shard(folder)}]"], "cut.tar", id="cut shard"
    ),
    pytest.param(lambda _: ["--teachers.cnn.weights", "/no/such"], "/no/such", id="no weights"),
    pytest.param(
        lambda folder: ["--teachers.vit.weights", cut_weights(folder)], "cut.safetens", id="cut"
    ),
    pytest.param(lambda _: ["--stage.start_from", "/no/run"], "/no/run", id="no start"),
    pytest.param(
        lambda folder: [
            *("--stage.start_from", str(folder / "runs/tiny/stage1")),
            *("--student.registers", "5"),
        ],
        "step-00000002",
        id="another start",
    ),
    pytest.param(lambda _: ["--override", "/no/file.yaml"], "/no/file.yaml", id="no override"),
    pytest.param(lambda _: ["--student.pretrained", "/no/start"], "/no/start", id="no student"),
]


@pytest.mark.parametrize(("wrong", "expected"), CANNOT_START)
def test_finished_run__is_left_alone_by_what_cannot_start(
    recipe_file, two_steps, capfd, wrong, expected
):
    arguments = wrong(recipe_file.parent)
    before = contents(run_folder(recipe_file))
    capfd.readouterr()
    assert run(stage1, recipe_file, *arguments) == 2
    assert expected in one_line(capfd)
    assert contents(run_folder(recipe_file)) == before
    assert run(stage1, recipe_file, *SHORT, "--resume") == 0, "it is complete as it was"
    assert contents(run_folder(recipe_file)) == before


def test_finished_stage3__is_left_alone_where_an_upsampler_is_missing(recipe_file, capfd):
    anew = [*SHORT, "--stage.start_from", ""]
    assert run(stage3, recipe_file, *anew) == 0
    folder = run_folder(recipe_file)
    (folder / "stage3-bilinear").rename(folder / "stage3-featup")
    before = contents(folder)
    assert run(stage3, recipe_file, *anew, "--teacher-upsampler", "featup") == 2
    assert "featup 2x is fitted to teacher 'vit'" in one_line(capfd)
    assert contents(folder) == before


def test_stage2__whose_start_is_missing_leaves_no_folder(recipe_file, capfd):
    assert run(stage2, recipe_file) == 2
    line = one_line(capfd)
    assert "stage2 starts from stage1" in line
    assert f"radio-distill train {recipe_file} --stages stage1" in line
    assert not run_folder(recipe_file).exists()


@pytest.mark.parametrize("free", [0, 2_000])
def test_no_room_for_one_checkpoint__is_told_before_the_statistics(
    recipe_file, two_steps, capfd, monkeypatch, free
):
    before = contents(run_folder(recipe_file))
    shutil.rmtree(run_folder(recipe_file) / "statistics", ignore_errors=True)
    usage = shutil.disk_usage(recipe_file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    for stage, arguments in ((stage1, SHORT), (fit_upsampler, FIT)):
        assert run(stage, recipe_file, *arguments) == 2
        line = one_line(capfd)
        assert "no space left" in line
        assert "statistics" not in line
    assert contents(run_folder(recipe_file)) == before


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_folder_that_cannot_be__is_one_line(recipe_file, capfd, kind):
    place = recipe_file.parent / "place"
    if kind == "file":
        place.write_text("mine")
    else:
        place.symlink_to(recipe_file if kind == "link to a file" else "/no/such/place")
    for stage, arguments in ((stage1, SHORT), (fit_upsampler, FIT)):
        assert run(stage, recipe_file, *arguments, "--output", str(place)) == 2
        line = one_line(capfd)
        assert f"cannot write to {place}/tiny" in line
        assert "is not a folder" in line or "a link to /no/such/place, which is not there" in line


def test_living_run__is_refused_to_unless_it_is_taken_over(recipe_file, two_steps, capfd):
    folder = run_folder(recipe_file) / "stage1"
    living = RunLock.take(folder)
    before = contents(run_folder(recipe_file))
    for more in ([], ["--resume", "--stage.steps", "2"], ["--data.shards", "[/no/such]"]):
        changed = ["--stage.learning_rate", "1e-5"] if not more else []
        status = run(stage1, recipe_file, *SHORT, *more, *changed)
        assert status == (0 if "--resume" in more else 2), "complete, so nothing is to be done"
        assert status == 0 or f"process {os.getpid()} on" in one_line(capfd)
        assert contents(run_folder(recipe_file)) == before
        living.check()

    assert run(stage1, recipe_file, *SHORT, "--take-over") == 0
    with pytest.raises(TakenOverError):
        living.check()
    assert (folder.with_name("stage1.1") / "checkpoints" / "step-00000002").is_dir()
    living.release()
    assert run(stage1, recipe_file, *SHORT) == 0, "the one that took over is over"


def test_living_fit__is_refused_to_and_a_finished_one_is_left_alone(recipe_file, capfd):
    assert run(fit_upsampler, recipe_file, *FIT) == 0
    folder = run_folder(recipe_file) / "fit" / "vit-featup-2x"
    before = contents(folder)
    for wrong in (["--data.shards", "[/no/such]"], ["--evaluation.images", "/no/such"]):
        assert run(fit_upsampler, recipe_file, *FIT, *wrong) == 2
        assert "/no/such" in one_line(capfd)
        assert contents(folder) == before
        assert not folder.with_name("vit-featup-2x.1").exists()
    living = RunLock.take(folder)
    before = contents(folder)
    assert run(fit_upsampler, recipe_file, *FIT) == 2
    assert f"process {os.getpid()} on" in one_line(capfd)
    assert contents(folder) == before
    living.release()
    assert run(fit_upsampler, recipe_file, *FIT) == 0


def test_start_anew__what_is_moved_aside_takes_no_stages_name(recipe_file, two_steps):
    recipe = yaml.safe_load(recipe_file.read_text())
    recipe["stages"]["stage1.1"] = {**recipe["stages"]["stage1"], "start_from": "stage1"}
    recipe_file.write_text(yaml.safe_dump(recipe))
    assert run(stage1, recipe_file, *SHORT) == 0
    folder = run_folder(recipe_file)
    assert (folder / "stage1.2" / "checkpoints" / "step-00000002").is_dir()
    assert not (folder / "stage1.1").exists()


@pytest.mark.parametrize("empty", ["gone", "begun"])
def test_resume__names_the_run_that_was_moved_aside(recipe_file, two_steps, capfd, empty):
    folder = run_folder(recipe_file) / "stage1"
    folder.rename(folder.with_name("stage1.1"))
    shutil.copytree(folder.with_name("stage1.1"), folder.with_name("stage1.2"))
    if empty == "begun":
        (folder / "checkpoints").mkdir(parents=True)
    before = contents(run_folder(recipe_file))
    assert run(stage1, recipe_file, *SHORT, "--resume") == 2
    line = one_line(capfd)
    assert f"{folder} has no whole checkpoint to resume, but {folder}.2 has" in line
    assert contents(run_folder(recipe_file)) == before
    assert os.system(line.split("`")[1]) == 0
    assert run(stage1, recipe_file, *SHORT, "--resume") == 0
    assert (folder / "checkpoints" / "step-00000002").is_dir()


def test_resume__a_requeued_job_goes_on_with_what_it_began_itself(
    recipe_file, two_steps, monkeypatch, caplog
):
    """It was submitted to start anew; whatever else lies there is none of its."""
    folder = run_folder(recipe_file) / "stage1"
    monkeypatch.setenv("SLURM_JOB_ID", "41")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.setenv(FRESH, "1")
    caplog.set_level("INFO")
    assert run(stage1, recipe_file, "--stage.steps", "3", "--resume") == 0
    assert "start anew" in caplog.text
    assert (folder.with_name("stage1.1") / "checkpoints" / "step-00000002").is_dir()
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    caplog.clear()
    assert run(stage1, recipe_file, "--stage.steps", "3", "--resume") == 0
    assert "resuming stage1 after step 2" in caplog.text
    shutil.rmtree(folder / "checkpoints")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert run(stage1, recipe_file, "--stage.steps", "1", "--resume") == 0, "lost before it saved"
    assert not folder.with_name("stage1.2").exists()


@pytest.fixture
def press(monkeypatch):
    """Press Ctrl-C a number of times when targets are asked for the ``call``-th time."""
    from radio_distill.distill.targets import TargetMaker

    def install(method: str, call: int, times: int, of: type = TargetMaker) -> None:
        make, calls = getattr(of, method), []

        def pressed(self, *arguments):
            calls.append(1)
            for _ in range(times if len(calls) == call else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return make(self, *arguments)

        monkeypatch.setattr(of, method, pressed)

    return install


NEVER = ["--log.save_every", "100"]


def test_ctrl_c__before_the_first_save_saves(recipe_file, press, capfd):
    press("__call__", 2, 1)
    assert run(stage1, recipe_file, *NEVER) == 75
    folder = run_folder(recipe_file) / "stage1"
    saved = folder / "checkpoints" / "step-00000002"
    assert f"asked to stop by SIGINT after step 2 of 6; saved {saved}" in one_line(capfd)
    assert saved.is_dir()
    assert run(stage1, recipe_file, *NEVER, "--resume") == 0


def test_ctrl_c__with_the_last_step_completes_and_begins_nothing_else(recipe_file, press, capfd):
    from stages.cli import main as cli

    press("__call__", 6, 1)
    assert cli(["train", str(recipe_file), *NEVER]) == 75
    folder = run_folder(recipe_file)
    assert "stage1: asked to stop by SIGINT after its last step; it is complete" in one_line(capfd)
    assert read_status(folder / "stage1").state == "complete"
    assert not (folder / "stage2").exists()


@pytest.mark.parametrize(
    ("saves", "before", "expected"),
    [
        ("2", False, "--resume goes on from {folder}/checkpoints/{newest}"),
        ("100", False, "before its first checkpoint: --resume would start anew"),
        ("100", True, "start it anew without --resume (the run before is in {folder}.1)"),
    ],
)
def test_ctrl_c__twice_aborts_and_promises_nothing(
    recipe_file, press, capfd, saves, before, expected
):
    folder = run_folder(recipe_file) / "stage1"
    if before:
        assert run(stage1, recipe_file, *SHORT) == 0
    press("__call__", 6, 2)
    assert run(stage1, recipe_file, "--log.save_every", saves) == 130
    line = one_line(capfd)
    found = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert bool(found) == (saves == "2")
    assert "stage1: aborted without saving" in line
    assert expected.format(folder=folder, newest=found[-1] if found else "") in line
    assert read_status(folder).state == "interrupted"
    assert run(stage1, recipe_file, "--resume") == (2 if before else 0), "as the line said"


@pytest.mark.parametrize("before", [False, True])
def test_ctrl_c__before_the_first_step_ends_and_touches_nothing(recipe_file, press, capfd, before):
    folder = run_folder(recipe_file) / "stage1"
    if before:
        assert run(stage1, recipe_file, *SHORT) == 0
    kept = contents(run_folder(recipe_file))
    press("update", 1, 1, Moments)
    assert run(stage1, recipe_file, "--normalizer.images", "12") == 130
    line = one_line(capfd)
    assert f"stage1: stopped before its first step; {folder} is as it was" in line
    assert ("--resume would go on from" in line) == before
    assert contents(run_folder(recipe_file)) == kept


def test_ctrl_c__in_a_fit_saves_and_goes_on(recipe_file, capfd, monkeypatch):
    from upsamplers.fit.consistency import Consistency

    forward, calls = Consistency.forward, []

    def pressed(self, *arguments):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *arguments)

    monkeypatch.setattr(Consistency, "forward", pressed)
    assert run(fit_upsampler, recipe_file, *FIT, *NEVER) == 75
    assert "vit-featup-2x: asked to stop by SIGINT after step 1 of 2; saved" in one_line(capfd)
    assert run(fit_upsampler, recipe_file, *FIT, *NEVER, "--resume") == 0
