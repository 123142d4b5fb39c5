"""A resume passes over damaged checkpoints by name and reason, goes on from the newest whole one,
and ends with the same numbers; it refuses what would change them."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from e2e import assert_equal
from radio_distill.train.checkpoint import newest, read, sealed
from stages import stage1, stage2

STEPS = 6
META = "meta.json"
FILES = [f"{part}.safetensors" for part in ("student", "ema", "optimizer", "statistics")]

Damage = Callable[[Path], None]
"""Done to the newest checkpoint folder."""


def run(recipe_file: Path, *arguments: str) -> int:
    return stage1.main([str(recipe_file), *arguments])


def root_of(recipe_file: Path, stage: str = "stage1") -> Path:
    return recipe_file.parent / "runs" / "tiny" / stage / "checkpoints"


@pytest.fixture
def trained(recipe_file: Path, caplog: pytest.LogCaptureFixture) -> Path:
    """A run with checkpoints after steps 2 and 4; that after the last step is kept aside."""
    assert run(recipe_file) == 0
    shutil.move(root_of(recipe_file) / f"step-{STEPS:08d}", recipe_file.parent / "expected")
    caplog.clear()
    caplog.set_level(logging.INFO)
    return recipe_file


def assert_same_end(recipe_file: Path) -> None:
    """Compare every tensor of the last checkpoint with that of before, bit for bit."""
    for name in FILES:
        found = load_file(root_of(recipe_file) / f"step-{STEPS:08d}" / name)
        assert_equal(load_file(recipe_file.parent / "expected" / name), found, name)


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def flipped(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return damage


def missing(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def beside(name: str, make: Damage) -> Damage:
    """Make something newer than the checkpoint."""
    return lambda folder: make(folder.parent / name)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def meta_with(**values: object) -> Damage:
    def damage(folder: Path) -> None:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
        (folder / META).write_text(json.dumps(sealed(meta | values)), encoding="utf-8")

    return damage


def meta_of(text: str) -> Damage:
    return lambda folder: (folder / META).write_text(text, encoding="utf-8")


DAMAGES = [
    *[(f"{name} cut", cut(name, 0.5), name) for name in [*FILES, META]],
    *[(f"{name} cut to nothing", cut(name, 0), name) for name in (FILES[0], META)],
    *[(f"a byte of {name} flipped", flipped(name), name) for name in [*FILES, META]],
    *[(f"{name} missing", missing(name), "") for name in [*FILES, META]],
    ("an empty folder", empty, ""),
    ("a file of its name", lambda folder: (shutil.rmtree(folder), folder.write_text("")), ""),
    ("a file more", lambda folder: (folder / "x.safetensors").write_text(""), "x.safetensors"),
    ("another step's", lambda folder: folder.rename(folder.with_name("step-00000005")), ""),
    ("no step", meta_with(step=None), ""),
    ("a negative step", meta_with(step=-4), ""),
    ("a huge step", meta_with(step=10**30), ""),
    ("a step that is no number", meta_with(step="4"), ""),
    ("a number too long to read", meta_of('{"step": ' + "9" * 10_000 + "}"), ""),
    ("lists too deep to read", meta_of("[" * 100_000), ""),
    ("a list", meta_of("[]"), ""),
    ("no JSON", meta_of("PK\x03\x04"), ""),
    ("no files", meta_with(sha256={}), ""),
    ("files outside", meta_with(sha256={"../../../../../../etc/passwd": "0" * 64}), META),
    ("an absolute path", meta_with(sha256={"/etc/passwd": "0" * 64}), META),
    ("sums that are a list", meta_with(sha256=FILES), ""),
    ("sums that are no text", meta_with(sha256=dict.fromkeys(FILES, 0)), ""),
    ("teachers that are no specs", meta_with(teachers={"vit": 5}), ""),
    ("a teacher with a field more", meta_with(teachers={"vit": {"evil": 1}}), ""),
    ("a recipe that is a call", meta_with(recipe="!!python/object/apply:os.abort []"), META),
    ("a recipe of nothing", meta_with(recipe=""), META),
    ("a recipe that is a number", meta_with(recipe=5), ""),
]


def test_newest__passes_over_whatever_is_damaged(trained, caplog):
    """It says what and why in one line, and takes the one before."""
    believed, unsaid = [], []
    for name, damage, named in DAMAGES:
        root = trained.parent / "damaged"
        shutil.copytree(root_of(trained), root)
        damage(root / "step-00000004")
        caplog.clear()
        checkpoint = newest(root)
        if checkpoint is None or checkpoint.step != 2:
            believed.append(name)
        elif not is_told(caplog.messages, f"passed over: {root}/step-0000000", named):
            unsaid.append((name, caplog.messages))
        shutil.rmtree(root)
    assert not believed
    assert not unsaid


def is_told(lines: list[str], start: str, named: str) -> bool:
    """Whether there is one record, of one line, that says so."""
    return (
        len("\n".join(lines).split("\n")) == 1 and lines[0].startswith(start) and named in lines[0]
    )


@pytest.mark.parametrize(
    "damage",
    [flipped("optimizer.safetensors"), empty],
    ids=["flipped", "empty"],
)
def test_resume__goes_on_from_the_one_before_a_damaged_one(trained, caplog, damage):
    damage(root_of(trained) / "step-00000004")
    assert run(trained, "--resume") == 0
    assert "resuming stage1 after step 2" in caplog.text
    assert_same_end(trained)
    assert read(root_of(trained) / "step-00000004").step == 4, "written anew, and whole"


def test_newest__a_flipped_byte_anywhere_in_meta(trained):
    """The step it names, or the recipe, would else be believed."""
    path = root_of(trained) / "step-00000004" / META
    content = path.read_bytes()
    believed = []
    places = range(0, len(content), len(content) // 40)
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        checkpoint = newest(root_of(trained))
        assert checkpoint is not None
        if checkpoint.step != 2:
            believed.append(content[place - 20 : place + 5])
    assert not believed, f"{len(believed)} of {len(places)}, for instance {believed[:5]}"


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch], ids=["folder", "file"])
@pytest.mark.parametrize("keep_last", [1, 2])
def test_resume__what_is_not_whole_pushes_nothing_out(trained, make, keep_last):
    """The newest whole ones are kept, whatever claims to be newer."""
    for step in (7, 99):
        make(root_of(trained) / f"step-{step:08d}")
    assert run(trained, "--resume", "--log.keep_last", str(keep_last)) == 0
    assert_same_end(trained)
    checkpoint = newest(root_of(trained))
    assert checkpoint is not None
    assert checkpoint.step == STEPS
    assert (root_of(trained) / "step-00000004").is_dir() == (keep_last == 2)


def test_resume__passes_over_another_stages_checkpoint(trained, caplog):
    """It is whole, newer, and of a student that fits; but not what this stage has learned."""
    arguments = ["--stage.steps", "5", "--log.save_every", "5", "--stage.freeze_body_steps", "0"]
    assert stage2.main([str(trained), *arguments]) == 0
    foreign = root_of(trained) / "step-00000005"
    shutil.copytree(root_of(trained, "stage2") / foreign.name, foreign)
    assert run(trained, "--resume") == 0
    assert "resuming stage1 after step 4" in caplog.text
    line = next(line for line in caplog.messages if line.startswith("passed over: "))
    assert str(foreign) in line
    assert "stage2" in line
    assert_same_end(trained)


def test_resume__nothing_whole_starts_anew_and_keeps_what_there_was(trained, caplog):
    for folder in root_of(trained).iterdir():
        flipped("student.safetensors")(folder)
    assert run(trained, "--resume") == 0
    for step in (2, 4):
        assert f"passed over: {root_of(trained)}/step-0000000{step}" in caplog.text
    assert "nothing to resume" in caplog.text
    aside = root_of(trained).parent.with_name("stage1.1")
    assert f"moved the earlier run to {aside}" in caplog.text
    assert len(list((aside / "checkpoints").iterdir())) == 2
    assert_same_end(trained)


def test_resume__clears_away_what_a_killed_process_left(trained):
    left = root_of(trained) / ".step-00000006.1.tmp"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    assert run(trained, "--resume") == 0
    assert sorted(os.listdir(root_of(trained))) == [f"step-0000000{step}" for step in (2, 4, 6)]
    assert_same_end(trained)


CHANGES = [  # a field, its new value, and how the message names it
    ("--stage.partitions.low.batch_size", "5", "batch_size: 6 -> 5"),
    ("--teachers.vit.input_size", "64", "teachers.vit.input_size: match -> 64"),
]


@pytest.mark.parametrize(("field", "value", "named"), CHANGES)
def test_resume__refuses_what_changes_the_mathematics(trained, caplog, capfd, field, value, named):
    before = sorted(root_of(trained).parent.rglob("*"))
    assert run(trained, "--resume", field, value) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("radio-distill: the recipe differs from that of ")
    assert named in line
    assert "--allow-changed-recipe" in line
    assert sorted(root_of(trained).parent.rglob("*")) == before, "nothing was touched"

    assert run(trained, "--resume", field, value, "--allow-changed-recipe") == 0
    assert any(
        line.startswith("changed since the checkpoint: ") and named in line
        for line in caplog.messages
    )
    assert "resuming stage1 after step 4" in caplog.text
    assert newest(root_of(trained)).step == STEPS


def test_resume__refuses_other_contents_of_the_same_shards(trained, images, caplog, capfd):
    """The recipe is the same; only the fingerprint of what lies there tells."""
    mine = trained.parent / "mine"
    shutil.copytree(images / "shards", mine)
    here = ["--data.shards", f"[{mine}]"]
    assert run(trained, *here) == 0
    shutil.rmtree(root_of(trained) / f"step-{STEPS:08d}")
    (mine / "shard-000000.tar").unlink()
    assert run(trained, "--resume", *here) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "data.shards: " in line
    assert "--allow-changed-recipe" in line
    assert run(trained, "--resume", *here, "--allow-changed-recipe") == 0
    assert "shards changed" in caplog.text


def test_resume__shards_that_moved_are_the_same_shards(trained, images):
    """A path is not what an image is: the order is a function of names and contents."""
    moved = trained.parent / "moved"
    shutil.copytree(images / "shards", moved)
    arguments = ["--resume", "--data.shards", f"[{moved}]", "--allow-changed-recipe"]
    assert run(trained, *arguments) == 0
    assert_same_end(trained)
