"""The recipes of other papers than RADIO's, with tiny models, images and numbers."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import rows, run
from radio_distill.config import dump
from stages import stage1, stage2, stage3
from stages.recipes import load_recipe

LADDER = {"name": "ladder", "options": {"hidden": 16, "last_hidden": 32}}
EUPE_HEAD = {"name": "ln_mlp", "options": {"hidden": 16}}
EUPE_HEADS = {"summary_head": EUPE_HEAD, "feature_head": EUPE_HEAD}
EUPE_VIT = EUPE_HEADS | {"options": {"embed_dim": 64, "depth": 2, "num_heads": 2}}
CONVNEXT = {"architecture": "test_convnext", "options": {"depths": [1, 1, 1, 1]}}
ADAPTER = {"name": "ln_mlp", "options": {"hidden": 16, "bias": True, "init_std": 0.01}}
STUDENTS: dict[str, dict[str, Any]] = {
    "eupe_b": EUPE_VIT,
    "eupe_convnext_t": EUPE_HEADS
    | {"architecture": "test_convnext", "options": {"depths": [1] * 4}},
    "unic_b": {"architecture": "test_vit", "summary_head": LADDER, "feature_head": LADDER},
    "theia_b": {"architecture": "test_vit"},
    "dune_b": {
        "architecture": "test_vit",
        "patch_size": 16,
        "feature_head": {
            "name": "attention",
            "options": {"blocks": 1, "heads": 2, "prefix": True, "output": "linear"},
        },
    },
    "siglino_dense": {
        # A LayerScale of 1e-5 would leave the summaries of all images alike but for rounding.
        "options": {"embed_dim": 64, "depth": 2, "num_heads": 2, "init_values": 0.5},
        "heads": {name: {"features": ADAPTER} for name in ("siglip2", "dinov3")},
    },
}
TEACHERS = {
    "vit": "tiny_vit",
    "ibot": "tiny_vit",
    "dinov2": "tiny_dinov2",
    "dinov3": "tiny_dinov3",
    "siglip2": "tiny_siglip",
    "mast3r": "tiny_dinov2",
    "multihmr": "tiny_dinov2",
}


def shrunk(name: str, shards: Path, output: Path) -> dict[str, Any]:
    """Return a recipe with tiny models and two steps a stage; everything else is as it was."""
    recipe: dict[str, Any] = yaml.safe_load(dump(load_recipe(name)))
    data = recipe["data"]
    data |= {"shards": [str(shards)] * len(data["shards"]), "workers": 0}
    recipe |= {"output": str(output), "name": name}
    recipe["student"] |= {"head_hidden": 16, "drop_path": 0, **STUDENTS[name]}
    recipe["normalizer"]["images"] = 16
    recipe["engine"] = {"precision": "float32"}
    for teacher, config in recipe["teachers"].items():
        config |= {"dtype": "float32", "input_size": "match"}
        if config["stage"]:
            continue
        config |= {"preset": TEACHERS.get(teacher, "tiny_clip"), "options": {}, "weights": ""}
    for stage in recipe["stages"].values():
        stage |= {"steps": 2, "warmup_steps": 0, "freeze_body_steps": 0, "learning_rate": 1e-6}
        for partition in stage["partitions"]:
            partition["batch_size"] = 3
            sizes = [32, 64] if partition["sizes"] else []
            partition |= {"size": 0 if sizes else 32, "sizes": sizes}
            partition["teacher_sizes"] = dict.fromkeys(partition["teacher_sizes"], sizes)
        if stage["student"]:
            stage["student"] |= EUPE_VIT
    recipe["log"] = {"every": 1, "trackers": []}
    return recipe


def run_here(module: str, path: Path) -> None:
    assert run({"stage1": stage1, "stage2": stage2, "stage3": stage3}[module], path) == 0


@pytest.mark.distributed
@pytest.mark.parametrize("name", STUDENTS)
def test_recipe__all_its_stages_on_two_processes_as_on_one(name, images, tmp_path, crew):
    """Losses of both steps of each stage. AdamW's steps are next to nothing, or what rounding does
    to the sign of a tiny gradient would be in the second."""
    pytest.importorskip("transformers")  # some of the teachers
    runs: dict[str, list[Path]] = {}
    for folder, start in {"one": run_here, "two": crew}.items():
        recipe = shrunk(name, images / "shards", tmp_path / folder)
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        for stage in recipe["stages"]:
            start(stage, path)
            runs.setdefault(stage, []).append(Path(recipe["output"]) / name / stage)
    for stage, (one, two) in runs.items():
        shown = {
            name for item in recipe["stages"][stage]["partitions"] for name in item["teachers"]
        }
        expected = {
            (teacher, kind)
            for teacher in shown
            for kind, weight in (("features", "feature_weight"), ("summary", "summary_weight"))
            if recipe["teachers"][teacher][weight]
        }
        for here, there in zip(rows(one), rows(two), strict=True):
            losses = {key: value for key, value in here.items() if key.startswith("loss/")}
            assert {key: there[key] for key in losses} == pytest.approx(losses, abs=1e-5)
            terms = {tuple(key.split("/")[-2:]) for key in losses}
            assert expected <= terms
