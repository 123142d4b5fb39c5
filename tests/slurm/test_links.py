"""The jobs of a recipe: its stages in order, what comes after them, and sweeps."""

from pathlib import Path

import pytest

from radio_distill.config import load
from radio_distill.errors import ConfigError
from slurm.chain import Link
from slurm.links import Request, links_of, to_resume
from stages.common import load_recipe


@pytest.fixture
def upsampled(recipe: Path) -> Path:
    """The recipe with a teacher of stage 3 that goes through the upsampler."""
    text = recipe.read_text().replace(
        "start_from: stage2}",
        "start_from: stage2, partitions: [{name: high, size: 64, teachers: [a], batch_size: 2, "
        "upsample: [a]}]}",
    )
    recipe.write_text(text)
    return recipe


def names(links: tuple[Link, ...]) -> list[str]:
    return [link.name for link in links]


def test_links_of__stages_then_export_and_scores(tmp_path, recipe):
    found, links = links_of(Request(recipe=recipe, overrides=("seed=3",)))
    run = tmp_path / "runs" / "tiny"
    assert found.seed == 3
    assert names(links) == ["stage1", "stage2", "stage3", "export", "eval"]
    stage2, export, evaluation = links[1], links[3], links[4]
    assert stage2.target == "stages.stage2:main"
    assert stage2.tasks[0].arguments == (str(recipe), "--seed=3")
    assert stage2.tasks[0].stage_folder == str(run / "stage2")
    assert export.target == evaluation.target == "stages.cli:main"
    assert export.tasks[0].arguments == ("export", str(run), "--format", "transformers")
    assert evaluation.tasks[0].arguments == ("eval", str(run / "stage3"))
    assert [link.is_stage for link in links] == [True, True, True, False, False]


def test_links_of__what_comes_after_may_be_left_out(recipe):
    assert names(links_of(Request(recipe=recipe, export=False))[1])[3:] == ["eval"]
    assert names(links_of(Request(recipe=recipe, evaluate=False))[1])[3:] == ["export"]
    assert names(links_of(Request(recipe=recipe, stages=("stage1", "stage2")))[1]) == [
        "stage1",
        "stage2",
    ]
    assert names(links_of(Request(recipe=recipe, stages=("stage3",)))[1])[1:] == ["export", "eval"]


def test_links_of__upsamplers_are_an_array_and_then_their_gains(tmp_path, upsampled):
    request = Request(
        recipe=upsampled,
        stages=("stage3",),
        upsamplers=("tile", "bilinear"),
        overrides=("stage.steps=7", "output=o"),
    )
    _, (stage3, gain) = links_of(request)
    assert [task.label for task in stage3.tasks] == ["tile", "bilinear"]
    assert [Path(task.stage_folder).name for task in stage3.tasks] == [
        "stage3-tile",
        "stage3-bilinear",
    ]
    assert "--stages.stage3.upsampler.name=tile" in stage3.tasks[0].arguments
    assert gain.tasks[0].arguments == (
        *("sweep", str(upsampled), "--upsamplers", "tile", "bilinear", "--baseline", "bilinear"),
        *("--override", "stages.stage3.steps=7", "--override", "output=o"),
    )
    assert not gain.is_stage


def test_links_of__the_gains_parse_as_the_command_that_they_are(upsampled, monkeypatch):
    from stages import cli
    from stages.commands import sweep

    _, links = links_of(
        Request(recipe=upsampled, upsamplers=("tile", "s2"), overrides=("output=o", "seed=4"))
    )
    seen = []
    monkeypatch.setattr(sweep, "run", seen.append)
    assert cli.main(links[-1].tasks[0].arguments) == 0
    assert (seen[0].upsamplers, seen[0].baseline) == (["tile", "s2"], "tile")
    recipe = load_recipe(seen[0].recipe, seen[0].fields)
    assert (recipe.output, recipe.seed) == ("o", 4)


def test_links_of__a_field_is_swept_in_run_folders_of_their_own(tmp_path, recipe):
    request = Request(recipe=recipe, stages=("stage3",), sweep="stage.steps=5,7")
    _, (stage3,) = links_of(request)
    assert [task.label for task in stage3.tasks] == ["steps-5", "steps-7"]
    runs = tmp_path / "runs"
    assert [Path(task.stage_folder) for task in stage3.tasks] == [
        runs / "tiny-steps-5" / "stage3",
        runs / "tiny-steps-7" / "stage3",
    ]
    overrides = [item[2:] for item in stage3.tasks[1].arguments[1:]]
    changed = load(recipe, overrides, "stage3").stages["stage3"]
    assert (changed.steps, changed.start_from) == (7, str(runs / "tiny" / "stage2"))


def test_links_of__resumes(recipe):
    _, links = links_of(Request(recipe=recipe, resume=True))
    assert [link.tasks[0].arguments[-1] == "--resume" for link in links] == [True] * 3 + [False] * 2


def test_take_over__is_for_stages_and_named_once(recipe):
    _, links = links_of(Request(recipe=recipe, take_over=True))
    again = to_resume(links, set(), take_over=True)
    assert [link.tasks[0].arguments[-2:] for link in again[:3]] == [("--take-over", "--resume")] * 3
    assert not any("--take-over" in link.tasks[0].arguments for link in again[3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ("stage4",)}, "has no stage4"),
        ({"overrides": ("sead=3",)}, "unknown field 'sead' (did you mean 'seed'?)"),
        ({"overrides": ("stage.stepz=3",)}, "did you mean 'steps'?"),
        ({"sweep": "stage.steps"}, "write it as FIELD=VALUE,VALUE"),
        ({"sweep": "stage.steps=,"}, "write it as FIELD=VALUE,VALUE"),
        ({"sweep": "stage.steps=5,5"}, "--sweep: 5 is named twice"),
        ({"sweep": "stage.stepz=5"}, "did you mean 'steps'?"),
        ({"sweep": "seed=1,2", "upsamplers": ("tile",)}, "are two sweeps"),
        ({"upsamplers": ("tile", "tile")}, "--upsamplers: tile is named twice"),
        ({"upsamplers": ("tile", "s2")}, "no partition of stage3 upsamples a teacher"),
        ({"upsamplers": ("tile",), "stages": ("stage1",)}, "a sweep of stage3, but stage1"),
        ({"recipe": "demoo"}, "unknown recipe 'demoo' (did you mean 'demo'?)"),
    ],
)
def test_links_of__bad_input_is_one_line(recipe, changes, message):
    with pytest.raises(ConfigError) as caught:
        links_of(Request(**{"recipe": recipe, **changes}))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_links_of__trust_reaches_every_job(recipe):
    _, links = links_of(Request(recipe=recipe, trust=True))
    assert len(links) == 5
    for link in links:
        assert all(task.arguments[-1] == "--trust-checkpoint" for task in link.tasks)
    _, links = links_of(Request(recipe=recipe))
    assert not any("--trust-checkpoint" in link.tasks[0].arguments for link in links)


def test_to_resume__only_what_is_not_complete(recipe):
    _, links = links_of(Request(recipe=recipe))
    numbered = []
    for number, link in enumerate(links, 41):
        task = link.tasks[0].__class__(**{**vars(link.tasks[0]), "job_id": str(number)})
        numbered.append(link.__class__(**{**vars(link), "tasks": (task,)}))
    again = to_resume(to_resume(numbered, {"41"}), {"41"})
    assert [link.tasks[0].job_id for link in again] == ["41", "", "", "", ""]
    assert again[0] == numbered[0]
    assert again[1].tasks[0].arguments == (*numbered[1].tasks[0].arguments, "--resume")
    assert again[3].tasks[0].arguments == numbered[3].tasks[0].arguments
