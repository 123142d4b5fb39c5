import argparse
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.evals.scores import write_scores
from radio_distill.evals.subjects import Subject
from radio_distill.types import Score
from stages import cli
from stages.commands import score

ROOT = Path(__file__).resolve().parents[2]
METRICS = """\
top1: {group: Classification, higher_is_better: true, unit: "%"}
rmse: {group: Dense, higher_is_better: false}
"""
SCORES = "model,top1,rmse\nbase,50,4\nnew,55,5\n"


def main(arguments: list[str]) -> int:
    """Run the command; errors are raised."""
    parser = argparse.ArgumentParser()
    score.add_arguments(parser)
    return score.run(parser.parse_args(arguments))


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "metrics.yaml").write_text(METRICS)
    (tmp_path / "scores.csv").write_text(SCORES)
    return [str(tmp_path / "scores.csv"), "--definitions", str(tmp_path / "metrics.yaml")]


def test_main__json_is_right(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--baseline", "base", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[0] == {"Model": "base", "Δm": 0, "Classification": 0, "Dense": 0}
    assert rows[1]["Classification"] == pytest.approx(10)
    assert rows[1]["Dense"] == pytest.approx(-25)
    assert rows[1]["Δm"] == pytest.approx(-7.5)


@pytest.mark.parametrize("form", ["terminal", "markdown", "csv", "latex", "json", "html"])
def test_main__every_format_to_a_file(
    files: list[str], tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "table.txt"
    main([*files, "--baseline", "base", "--format", form, "--output", str(target)])
    assert capsys.readouterr().out == ""
    text = target.read_text(encoding="utf-8")
    assert "7.5" in text
    assert ("baseline" in text) == (
        form != "csv"
    )  # the definition goes with every table for people


def test_main__definitions_override_those_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"benchmark": "b", "metric": "m", "higher_is_better": True, "group": "Old", "unit": ""}
    lines = [{"subject": "base", "value": 2.0} | line, {"subject": "new", "value": 3.0} | line]
    (tmp_path / "scores.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "d.yaml").write_text("b/m: {group: New, higher_is_better: false}\n")
    arguments = [str(tmp_path), "--baseline", "base", "--format", "csv"]
    main(arguments)
    assert next(csv.reader(io.StringIO(capsys.readouterr().out))) == ["Model", "Δm", "Old"]
    main([*arguments, "--definitions", str(tmp_path / "d.yaml")])
    head, _, new = csv.reader(io.StringIO(capsys.readouterr().out))
    assert head == ["Model", "Δm", "New"]
    assert new == ["new", "-50.0", "-50.0"]


def test_main__missing_metric_and_chosen_models(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "scores.csv").write_text(SCORES + "teacher,60,\n")
    arguments = [*files, "--baseline", "base", "--format", "csv"]
    with pytest.raises(ConfigError, match=r"'teacher'.*'rmse'"):
        main(arguments)
    main([*arguments, "--exclude-missing"])
    assert "Dense" not in capsys.readouterr().out
    main([*arguments, "--models", "base", "new"])
    assert "teacher" not in capsys.readouterr().out


def test_main__scores_are_shown_on_demand(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    main([*files, "--baseline", "base", "--scores", "--format", "markdown"])
    text = capsys.readouterr().out
    assert "top1 (%) ↑" in text
    assert "rmse ↓" in text


def run_of(folder: Path, name: str, *stages: str, recipe: str = "r", seed: int = 0) -> Path:
    """A run's scores: each stage's top-1 is 10 above the one's before; its teacher has no more."""
    path = folder / name / "scores.jsonl"
    for number, stage in enumerate(stages):
        student = Subject(folder=str(path.parent), stage=stage, step=4, seed=seed, recipe=recipe,
                          weights=f"{name} {stage}")  # fmt: skip
        top1 = Score("knn", "top1", 50.0 + 10 * number, "%", True, "Classification", 9)
        shift = Score("agreement", "mode_switch", 4.0, "%", False, "Agreement", 9)
        fidelity = Score("fidelity", "fidelity/sam", 1.0 + number, "1", True, "Fidelity", 9,
                         trained_for=True)  # fmt: skip
        write_scores(path, student, [fidelity, top1, shift])
    sam = Subject(folder=str(path.parent), weights="sam", reference="teacher sam")
    write_scores(path, sam, [Score("knn", "top1", 75.0, "%", True, "Classification", 9)])
    return path.parent


def test_main__the_first_example_of_the_help(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline by its upsampler alone; teachers, which have no fidelity, do not stop it."""
    folder = run_of(tmp_path, "demo", "stage3-bilinear", "stage3-tile")
    main([str(folder), "--baseline", "bilinear", "--format", "json"])
    table = json.loads(capsys.readouterr().out)
    assert {row["Model"]: (row["Δm"], row["Classification"]) for row in table["rows"]} == {
        "stage3-bilinear": (0, 0),
        "stage3-tile": (pytest.approx(10), pytest.approx(20)),
        "teacher sam": (None, pytest.approx(50)),
    }
    assert "Fidelity" not in table["rows"][0]
    main([str(folder), "--baseline", "bilinear"])
    printed = capsys.readouterr().out
    assert "Fidelity does not count" in printed
    assert printed.index("Multi-task gain") < printed.index("\nFidelity\n")


def test_main__runs_are_told_apart_and_seeds_are_averaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, recipe, seed in (("mine", "r", 0), ("again", "r", 1), ("other", "another", 0)):
        run_of(tmp_path, name, "stage3-bilinear", recipe=recipe, seed=seed)
    main([str(tmp_path), "--baseline", "other/bilinear", "--format", "json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    labels = [row["Model"] for row in rows]
    assert sorted(labels) == ["again+mine/stage3-bilinear", "other/stage3-bilinear", "teacher sam"]
    seeds = next(row for row in rows if row["Model"].startswith("again"))
    assert seeds["Δm"] == {"mean": 0, "deviation": 0}
    with pytest.raises(RadioDistillError, match=r"again\+mine/stage3-bilinear.*other/"):
        main([str(tmp_path), "--baseline", "bilinear"])


def test_main__models_by_a_part_of_their_label(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(tmp_path, "demo", "stage2", "stage3-bilinear", "stage3-tile")
    arguments = [str(folder), "--baseline", "bilinear", "--format", "csv", "--models", "tile"]
    main(arguments)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert [row[0] for row in rows] == ["Model", "stage3-tile", "stage3-bilinear"]
    with pytest.raises(ConfigError, match="'teacher sam'"):
        main([*arguments, "teacher sam"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "file or folder"),
        (["SCORES"], r"compared with: --baseline NAME \(base, new\)"),
        (["SCORES", "--baseline", "base"], "--definitions FILE"),
        (["SCORES", "--baseline", "bse", "--definitions", "METRICS"], "'base'"),
        (
            ["SCORES", "--baseline", "base", "--definitions", "METRICS", "--models", "nw"],
            "'nw'",
        ),
        (["gone.jsonl", "--baseline", "base"], "gone.jsonl"),
    ],
)
def test_main__bad_arguments_are_one_line(
    files: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {"SCORES": files[0], "METRICS": files[2]}
    arguments = [names.get(item, item) for item in arguments]
    with pytest.raises(RadioDistillError, match=message):
        main(arguments)
    assert cli.main(["score", *arguments]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_main__unwritable_output(files: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    arguments = [*files, "--baseline", "base", "--output", str(tmp_path / "file" / "table.md")]
    with pytest.raises(ConfigError, match="write"):
        main(arguments)


def test_script__runs_as_a_file_from_anywhere_without_torch(
    files: list[str], tmp_path: Path
) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['cli.py', 'score', *{files}, '--baseline', 'base'];"
        f"sys.path[0] = {str(ROOT / 'stages')!r}\n"
        f"try: runpy.run_path({str(ROOT / 'stages' / 'cli.py')!r}, run_name='__main__')\n"
        "except SystemExit as end: print('status', end.code, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "status 0 False", result.stderr
    assert "-7.50" in result.stdout
