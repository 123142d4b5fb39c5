"""Linear probes of ADE20K and VOC: chance for noise, the top for labels."""

import pytest
import torch

import layouts
from radio_distill.config import EvaluationConfig
from radio_distill.evals.probe_training import ProbeHeads
from radio_distill.evals.run import make
from radio_distill.evals.semantic import Ade20k

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


def test_windows__are_those_of_mmsegmentation():
    """Its ``slide_inference``, crop 512 and stride 341."""
    probe = Ade20k(data="")
    for size in ((512, 683), (512, 512), (683, 512), (512, 2048), (400, 512), (520, 900)):
        expected = []
        rows, columns = ((max(side - 512 + 341 - 1, 0) // 341 + 1) for side in size)
        for row in range(rows):
            for column in range(columns):
                bottom, right = min(row * 341 + 512, size[0]), min(column * 341 + 512, size[1])
                top, left = max(bottom - 512, 0), max(right - 512, 0)
                expected.append((range(top, bottom), range(left, right)))
        assert probe.windows(size) == expected
    assert probe.test_views() == {(512, 512): 2}
    assert Ade20k(data="", slide=0).test_views() == {(512, 682): 1}


def test_predict__is_the_mean_of_the_windows_that_show_a_pixel():
    probe, whole = (Ade20k(data="", crop=(32, 32), slide=slide) for slide in (2 / 3, 0))
    generator = torch.Generator().manual_seed(0)
    heads = ProbeHeads(probe.heads([11])).eval()
    pixels = torch.randint(256, (3, 40, 75), generator=generator, dtype=torch.uint8)

    def predict(probe, pixels):
        return probe.predict(random_encoder(), heads, pixels)["segmentation"][0]

    windows = []
    for top, left in ((0, 0), (0, 21), (0, 42), (0, 43), (8, 0), (8, 21), (8, 42), (8, 43)):
        canvas = torch.full((150, 40, 75), torch.nan)
        part = predict(whole, pixels[:, top : top + 32, left : left + 32])
        canvas[:, top : top + 32, left : left + 32] = part
        windows.append(canvas)
    torch.testing.assert_close(predict(probe, pixels), torch.stack(windows).nanmean(dim=0))
    small = pixels[:, :32, :30]
    assert torch.equal(predict(probe, small), predict(whole, small))
