"""Images of five bands: from a folder of arrays to shards, stages, exports and ``load``."""

import shutil

import numpy as np
import pytest
import timm
import torch
import yaml

import radio_distill
from e2e import RECIPE, assert_equal, one_line, rows, run, tensors
from stages import stage1
from stages.cli import main as cli

BANDS = 5
HALF = [0.5] * BANDS
CREATE = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2, "in_chans": BANDS}
HIGH = {"teachers": "[every]", "upsample": "[every]", "teacher_sizes": "{every: 64}"}


@pytest.fixture
def arrays(tmp_path):
    """Ten scenes, half of them as .npy with the bands first, half as compressed .npz, uint16."""
    folder = tmp_path / "scenes"
    folder.mkdir()
    for number in range(10):
        scene = np.random.default_rng(number).integers(0, 4000, (BANDS, 70, 80), dtype=np.uint16)
        if number % 2:
            np.savez_compressed(folder / f"{number}.npz", scene.transpose(1, 2, 0))
        else:
            np.save(folder / f"{number}.npy", scene)
    return folder


@pytest.fixture
def recipe_file(tmp_path, arrays):
    flags = ["--data.bands", str(BANDS), "--data.band_range", "[[0, 4000]]"]
    assert cli(["shards", str(arrays), str(tmp_path / "shards"), *flags]) == 0
    random = {"preset": "tiny_vit", "input_size": "match", "dtype": "float32"}
    every = {"create": CREATE, "mean": HALF, "std": HALF}
    recipe = {
        **RECIPE,
        "data": {
            **RECIPE["data"],
            "shards": [str(tmp_path / "shards")],
            "bands": BANDS,
            "band_range": [[0, 4000]],
        },
        "output": str(tmp_path / "runs"),
        "student": {**RECIPE["student"], "mean": HALF, "std": HALF},
        "teachers": {
            "rgb": {**random, "bands": [3, 2, 1]},
            "every": {**random, "options": every},
        },
        "augmentation": {"shift": 1, "jitter": [0.4, 0.4, 0, 0], "blur_share": 0.5},
        "stages": {
            "stage1": {
                **RECIPE["stages"]["stage1"],
                "upsampler": {"name": "bilinear", "factor": 2},
                "partitions": [
                    {"name": "low", "size": 64, "teachers": ["rgb", "every"], "batch_size": 4},
                    {"name": "high", "size": 128, "teachers": ["rgb"], "upsample": ["rgb"],
                     "teacher_sizes": {"rgb": 64}, "batch_size": 2},
                ],
            }
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def test_run__from_shards_to_exports(recipe_file, tmp_path):
    steps = ("--stage.steps", "3", "--log.save_every", "1")
    assert run(stage1, recipe_file, *steps) == 0
    folder = tmp_path / "runs" / "tiny" / "stage1-bilinear"
    whole = {part: tensors(folder, 3, part) for part in ("student", "ema", "optimizer")}
    assert whole["student"]["student.patch_embedding.weight"].shape == (64, BANDS * 16 * 16)
    assert all(row["gradient_norm"] > 0 for row in rows(folder))
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    assert run(stage1, recipe_file, *steps, "--resume") == 0
    for part, values in whole.items():
        assert_equal(values, tensors(folder, 3, part), part)

    model = radio_distill.load(folder)
    pixels = torch.rand(1, BANDS, 64, 96)
    expected = model(pixels, ("rgb", "every"))
    assert expected.features.shape == (1, 64, 4, 6)
    assert expected.heads["rgb"].spatial.shape == (1, 32, 4, 6)
    for form in ("transformers", "timm"):
        out = tmp_path / form
        assert cli(["export", str(folder), "--format", form, "--output", str(out)]) == 0, form
        card = (out / "README.md").read_text()
        assert "5 bands in [0, 1] (0 and 1 are [[0.0, 4000.0]]" in card
    loaded = radio_distill.load(tmp_path / "transformers")(pixels, ("every",))
    torch.testing.assert_close(loaded.heads["every"].spatial, expected.heads["every"].spatial)
    body = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    tokens = body.forward_features((pixels - 0.5) / 0.5)[:, model.student.num_prefix_tokens :]
    torch.testing.assert_close(tokens, expected.features.flatten(2).mT, atol=1e-5, rtol=1e-4)
    assert cli(["plan", str(recipe_file)]) == 0


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        (("--student.mean", "[]", "--student.std", "[]"), "student.mean: missing"),
        (("--student.std", "[0.5]"), "student.std 1"),
        (("--teachers.rgb.bands", "[]"), "teachers.rgb: sees 3 bands and is shown 5"),
        (("--teachers.rgb.bands", "[3, 2, 5]"), "teachers.rgb.bands: no band 5"),
        (("--teachers.every.bands", "[3, 2, 1]"), "teachers.every: sees 5 bands and is shown 3"),
        (("--augmentation.grey_share", "0.1"), "augmentation.grey_share"),
        (("--augmentation.jitter", "[0, 0, 0.1, 0]"), "augmentation.jitter"),
        (("--evaluation.every", "2"), "evaluation.every"),
        (("--data.band_range", "[[0, 1], [0, 1]]"), "data.band_range: 2 pairs for 5 bands"),
        ((*(f"--stages.stage1.partitions.high.{key}={value}" for key, value in HIGH.items()),),
         "teachers.every: upsamplers"),
    ],
)  # fmt: skip
def test_what_is_not_for_these_bands_is_refused_in_one_line(recipe_file, capfd, fields, what):
    assert run(stage1, recipe_file, *fields) != 0
    assert what in one_line(capfd)


def test_what_reads_rgb_refuses_such_a_student_in_one_line(recipe_file, tmp_path, capfd, images):
    assert run(stage1, recipe_file, "--stage.steps", "1") == 0
    runs = str(tmp_path / "runs" / "tiny")
    for command in (
        ["eval", runs, "--evaluation.images", str(images / "held_out")],
        ["export", runs, "--format", "radio", "--output", str(tmp_path / "out")],
    ):
        assert cli(command) != 0
        assert "5 bands" in one_line(capfd)
