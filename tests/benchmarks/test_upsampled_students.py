"""Students of which one thing differs: each in a folder of its own, compared within its seed."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import upsampled_students as benchmark
from radio_distill.evals.scores import write_scores
from radio_distill.evals.subjects import Subject
from radio_distill.types import Score
from stages.recipes import Asked

ASKED = Asked(str(Path(benchmark.__file__).with_name("upsampled_teachers.yaml")))


def run_of(condition, way, seed=0):
    return benchmark.run_of(ASKED, condition, way, seed, Path("fits"))[0]


def test_run_of__no_two_students_share_a_folder():
    asked = [("base", way, 0) for way in benchmark.WAYS]
    asked += [("base", "tile", 1), ("50-steps", "tile", 0), ("50-steps", "tile", 1)]
    assert len({run_of(*one).stage_folder("stage3") for one in asked}) == len(asked)


def without_place(recipe):
    return asdict(replace(recipe, name="", output=""))


def test_run_of__one_thing_differs():
    base = run_of("base", "bilinear")
    stage, low, high = base.stages["stage3"], *base.stages["stage3"].partitions
    expected = {
        "50-steps": replace(stage, steps=50),
        "800-steps": replace(stage, steps=800),
        "grid-24": replace(
            stage,
            partitions=(
                low,
                replace(high, size=384, teacher_sizes={"dino": 168, "efficientnet": 192}),
            ),
        ),
    }
    for condition, changed in expected.items():
        alike = replace(base, stages={**base.stages, "stage3": changed})
        assert without_place(run_of(condition, "bilinear")) == without_place(alike)


def test_run_of__native_teachers_have_the_grid_of_upsampled_ones():
    for condition in ("base", "grid-24"):
        (_, high), (_, upsampled) = (
            run_of(condition, way).stages["stage3"].partitions for way in ("native", "bilinear")
        )
        assert high.upsample == ()
        assert high.teacher_sizes == {name: 2 * n for name, n in upsampled.teacher_sizes.items()}


@pytest.mark.parametrize(
    ("way", "file"),
    [
        ("featup", "upsampled_teachers-600-steps-seed1/fit/dino-featup-2x"),
        ("featsharp-100-step-fit", "upsampled_teachers-100-steps-seed1/fit/dino-featsharp-2x"),
        (
            "featsharp-without-de-bias",
            "upsampled_teachers-600-steps-seed1/fit/dino-featsharp-2x-no_debias",
        ),
    ],
)
def test_run_of__a_fit_of_its_seed(way, file):
    upsampler = run_of("base", way, 1).stages["stage3"].upsampler
    assert upsampler.name == way.split("-")[0]
    expected = Path("fits").absolute() / file / "upsampler.safetensors"
    assert upsampler.weights == {"dino": str(expected)}


def write(folder, way, seed, value):
    run = folder / f"base-{way}-seed{seed}"
    run.mkdir()
    score = Score("knn", "top1", float(value), "%", True, "Classification", 60)
    subject = Subject(folder=str(run), stage="stage3", seed=seed, weights=f"{way}{seed}")
    write_scores(run / "scores.jsonl", subject, [score])


def test_table__differences_within_a_seed(tmp_path):
    """Seeds differ by 30, the two students of one seed by 1 and 3."""
    for seed, (bilinear, tile) in enumerate([(10, 11), (40, 43)]):
        write(tmp_path, "bilinear", seed, bilinear)
        write(tmp_path, "tile", seed, tile)
    write(tmp_path, "s2", 0, 12)
    rows = benchmark.table(tmp_path, "base", ["bilinear", "tile", "s2"], [0, 1, 2])
    assert rows == [
        ["", "seeds", "Δm", "knn/top1"],
        ["bilinear", "2", "", "25.00 ± 21.21"],
        ["tile", "2", "+8.75 ± 1.77", "+2.00 ± 1.41"],
        ["s2", "1", "+20.00", "+2.00"],
    ]
