"""Linear probes of ADE20K and VOC: chance for noise, the top for labels."""

import pytest

from radio_distill.config import EvaluationConfig
from radio_distill.evals.run import make

from .probe_sets import perfect_encoder, random_encoder, write_voc

OPTIONS = {
    "crop": [48, 48],
    "fit": [80, 64],
    "steps": 60,
    "warmup_steps": 10,
    "images_per_step": 4,
    "learning_rate": 0.1,
}


@pytest.mark.parametrize("quick", [False, True])
def test_voc__perfect_features_at_the_top_and_noise_at_chance(tmp_path, quick):
    folder = str(write_voc(tmp_path))
    config = EvaluationConfig(data={"voc": folder}, options={"voc": {**OPTIONS, "quick": quick}})
    voc = make("voc", config)
    (perfect,), (noise,) = voc.run(perfect_encoder()), voc.run(random_encoder())
    assert perfect.value > 85, "cells of 8 pixels, whose logits are interpolated"
    assert noise.value < 20, "of six classes"
    assert perfect.details == {"classes": 6}
    assert perfect.protocol.startswith("voc-linear-60-quick@" if quick else "voc-linear-60@")


def test_voc__trains_on_the_larger_list_where_it_is_there(tmp_path):
    write_voc(tmp_path)
    config = EvaluationConfig(data={"voc": str(tmp_path)})
    training, test = make("voc", config).pictures()
    assert (len(training), len(test)) == (6, 3)
    (tmp_path / "SegmentationClass").rename(tmp_path / "SegmentationClassAug")
    (tmp_path / "SegmentationClass").symlink_to(tmp_path / "SegmentationClassAug")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.joinpath("trainaug.txt").write_text("train0\ntrain1\nval0\nval1\ntrain2\ntrain3\ntrain4")
    assert len(make("voc", config).pictures()[0]) == 7
