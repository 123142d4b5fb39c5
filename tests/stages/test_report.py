"""Pages of score files without a run."""

import re
from collections import Counter

import pytest
from PIL import Image

from radio_distill.evals.scores import read_scores, write_scores
from radio_distill.evals.subjects import Subject
from radio_distill.report.charts import size_curves
from radio_distill.report.examples import write_examples
from radio_distill.types import Score
from stages import cli


@pytest.fixture
def files(tmp_path):
    """Two models at three sizes, a file each; the second one has no scores at the largest."""
    paths = []
    for side in (112, 224, 448):
        path = tmp_path / f"at-{side}.jsonl"
        for number, name in enumerate(["dino", "clip"] if side < 448 else ["dino"]):
            subject = Subject(
                folder=str(tmp_path), reference=f"model {name}", name=name, weights=name
            )
            scores = [
                Score("voc", "miou", side / 8 + number, "%", True, "Dense", 9, pixels=pixels)
                for pixels in [f"{side}x{side}, {side}x{2 * side}"]
            ]
            both = f"{side}x{side}, {2 * side}x{2 * side}"
            scores += [Score("agreement", "cosine", 0.5, "1", True, "Agreement", 9, pixels=both)]
            write_scores(path, subject, scores)
            write_examples(
                path, subject, "voc", [Image.new("RGB", (3, 3), (side % 251, 99 * number, 0))] * 4
            )
        paths.append(path)
    return paths


def test_size_curves__a_line_an_encoder_over_the_side_that_all_inputs_share(files):
    [figure] = size_curves(read_scores(files))
    assert figure.title == "voc/miou", "agreement has no one size"
    assert isinstance(figure.image, bytes)
    text = figure.image.decode()
    assert "dino" in text
    assert "clip" in text
    assert "jsonl" not in text, "files are no part of an encoder's name"
    assert size_curves(read_scores(files[:1])) == []


def test_report__score_files_have_a_page_without_a_run(files, tmp_path, capsys):
    texts = [str(path) for path in files]
    assert cli.main(["report", *texts]) == 0
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'section id="(\w+)"', page)) == {"scores", "sizes", "examples"}
    shown = Counter(re.findall(r'data:image/webp[^"]*', page))
    assert sorted(shown.values()) == [2] * 5, "two of four examples, of each model and file"
    assert cli.main(["report", texts[0], "--baseline", "dino"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert set(re.findall(r'section id="(\w+)"', page)) == {"result", "scores", "examples"}
    assert cli.main(["report", texts[0], "--baseline", "other"]) == 2
    assert cli.main(["report", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl" in capsys.readouterr().err


def test_report__a_stage_names_its_run(tmp_path, capsys):
    (tmp_path / "mine" / "stage1" / "checkpoints").mkdir(parents=True)
    assert cli.main(["report", str(tmp_path / "mine" / "stage1")]) == 2
    assert f"is a stage of a run; name the run: {tmp_path / 'mine'}" in capsys.readouterr().err
