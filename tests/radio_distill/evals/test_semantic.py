"""Linear probes of ADE20K and VOC: chance for noise, the top for labels."""

import pytest

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.evals.run import make

from .probe_sets import perfect_encoder, random_encoder

OPTIONS = {
    "crop": [32, 32],
    "fit": [48, 40],
    "steps": 80,
    "warmup_steps": 10,
    "images_per_step": 4,
    "learning_rate": 0.1,
}


@pytest.mark.parametrize(("name", "quick"), [("ade20k", False), ("ade20k", True), ("voc", True)])
def test_run__perfect_features_at_the_top_and_noise_at_chance(tmp_path, name, quick):
    folder = str(getattr(layouts, name)(tmp_path, train=6, val=3))
    options = {name: {**OPTIONS, "quick": quick}}
    benchmark = make(name, EvaluationConfig(data={name: folder}, options=options))
    (perfect,), (noise,) = benchmark.run(perfect_encoder()), benchmark.run(random_encoder())
    assert perfect.value > 85, "but for borders, across which logits are interpolated"
    shown = perfect.details["classes"]
    assert noise.value < 100 / shown
    assert shown == {"ade20k": 4, "voc": 3}[name]
    assert perfect.protocol.startswith(
        f"{name}-linear-80-quick@" if quick else f"{name}-linear-80@"
    )


def test_voc__trains_on_the_larger_list_where_it_is_there(tmp_path):
    for aug, expected in ((0, 2), (3, 5)):
        folder = layouts.voc(tmp_path / str(aug), train=2, aug=aug)
        training, _ = make("voc", EvaluationConfig(data={"voc": str(folder)})).images()
        assert len(training) == expected
