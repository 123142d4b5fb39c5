from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import layouts
from radio_distill.errors import ConfigError
from radio_distill.evals import sam
from radio_distill.evals.encoder import Encoder, Heads, Target
from radio_distill.evals.sam import SamCoco, fitted, load_decoder, padded
from radio_distill.types import Features

transformers = pytest.importorskip("transformers")
pytest.importorskip("faster_coco_eval")


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> str:
    return str(layouts.coco(tmp_path_factory.mktemp("coco")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(layouts.sam(tmp_path_factory.mktemp("sam"), width=32))


class Boxes:
    """A decoder that fills each box: right on generated images, the floor on real ones."""

    side, width, digest = 64, 32, "boxes"

    def __call__(self, spatial, boxes, size):
        x, y = torch.arange(size[0]) + 0.5, (torch.arange(size[1]) + 0.5)[:, None]
        left, top, right, bottom = boxes[:, :, None, None].unbind(dim=1)
        return (x >= left) & (x < right) & (y >= top) & (y < bottom)


def _encoder(channels=32):
    return Encoder("ones", lambda x: Features(None, torch.ones(len(x), channels, 4, 4)), 16)


def _before_neck(model):
    """The map of transformers' own encoder, before its neck."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def encode(pixels):
        kept = []
        hook = model.vision_encoder.neck.register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0])
        )
        model.vision_encoder((pixels - mean[:, None, None]) / std[:, None, None])
        hook.remove()
        return Features(None, kept[0].permute(0, 3, 1, 2))

    return Encoder("sam", encode, 16)


def test_decoder__masks_are_those_of_transformers(folder):
    model = transformers.SamModel.from_pretrained(folder).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    boxes = torch.tensor([[4.0, 3.0, 30.0, 33.0], [10.0, 12.0, 50.0, 20.0], [0.0, 0.0, 56.0, 40.0]])
    processor = transformers.SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )
    inputs = processor(picture, return_tensors="pt")
    with torch.inference_mode():
        output = model(
            inputs["pixel_values"], input_boxes=(boxes * torch.tensor([64 / 56, 46 / 40] * 2))[None]
        )
    every = processor.post_process_masks(
        output.pred_masks, inputs["original_sizes"], inputs["reshaped_input_sizes"]
    )[0]  # [N, 3, H, W]
    expected = every[torch.arange(3), output.iou_scores[0].argmax(dim=1)]

    spatial = _before_neck(model)(padded(picture, 64)).spatial
    ours = load_decoder(folder)(spatial, boxes, picture.size)
    assert ours.shape == (3, 40, 56)
    assert (ours != expected).float().mean() < 0.01
    assert ours.any()


def test_padded__is_what_transformers_makes_of_it_before_its_mean_is_taken_off():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8))
    pixels = padded(picture, 28)
    assert pixels.shape == (1, 3, 28, 28)
    assert fitted((56, 40), 28) == (28, 20)
    torch.testing.assert_close(
        pixels[0, :, 20:].mean(dim=(1, 2)), torch.tensor([0.485, 0.456, 0.406])
    )


def test_sam_coco__masks_that_are_right_are_at_the_top(coco, monkeypatch):
    """Generated people and crowds fill their boxes."""
    monkeypatch.setattr(sam, "load_decoder", lambda *_: Boxes())
    scores = SamCoco(coco).run(_encoder())
    assert [(score.metric, round(score.value, 3), score.headline) for score in scores] == [
        ("iou", 100.0, True), ("iou/small", 100.0, False)
    ]  # fmt: skip
    assert scores[0].details == {"masks": 4}
    assert scores[0].num_samples == 2
    assert SamCoco(coco).run(_encoder(), limit=1)[0].details == {"masks": 2}


def scores_on_rank(rank, coco, channels):
    with patch.object(sam, "load_decoder", lambda *_: Boxes()):
        return SamCoco(coco).run(_encoder(channels))


@pytest.mark.distributed
def test_sam_coco__two_processes_equal_one(coco, two_processes):
    """Each has an image; both pass over an encoder of another width."""
    expected = scores_on_rank(0, coco, 32)
    assert expected[0].num_samples == 2
    assert two_processes(scores_on_rank, coco, 32) == [expected, expected]
    assert two_processes(scores_on_rank, coco, 5) == [[], []]


def test_sam_coco__shows_masks_of_which_the_smaller_lie_above(coco, monkeypatch):
    monkeypatch.setattr(sam, "load_decoder", lambda *_: Boxes())
    shown = []
    SamCoco(coco).run(_encoder(), show=shown.append)
    assert len(shown) == 2
    for example in shown:
        assert torch.equal(example.truth["masks"], example.prediction["masks"])
        assert example.truth["masks"].shape == example.pixels.shape[1:]
        assert example.truth["masks"].unique().tolist() == [0, 1, 2]
    large = torch.ones(4, 4, dtype=torch.bool)
    small = large & (torch.arange(4) < 2)
    masks = torch.stack([small, large])
    assert sam.numbered(masks, masks).tolist() == 4 * [[1, 1, 2, 2]]


def test_sam_coco__an_untrained_decoder_is_far_from_it(coco, folder):
    scores = SamCoco(coco, folder).run(_encoder())
    assert scores[0].value < 50
    assert SamCoco(coco, folder).run(_encoder()) == scores


def test_sam_coco__a_map_of_another_width_is_passed_over(coco, folder):
    assert SamCoco(coco, folder).run(_encoder(channels=5)) == []


def test_sam_coco__the_head_of_a_student_goes_first_and_leaves_its_normalised_space(coco, folder):
    class Halved:
        def invert(self, spatial):
            return 2 * spatial

    def predict(pixels):
        generator = torch.Generator().manual_seed(0)
        return {"sam": Features(None, torch.randn(1, 32, 4, 4, generator=generator) / 2)}

    target = Target(None, (64, 64), Halved())
    student = replace(_encoder(channels=5), heads=Heads(predict, {"sam": target}))
    plain = Encoder("map", lambda x: Features(None, 2 * predict(x)["sam"].spatial), 16)
    assert SamCoco(coco, folder).run(student) == SamCoco(coco, folder).run(plain) != []


def test_load_decoder__what_is_wrong_is_one_line(tmp_path, folder):
    for wrong, words in (("", "is empty"), (str(tmp_path), "no config.json")):
        with pytest.raises(ConfigError, match=words):
            load_decoder(wrong)
    layouts.write(tmp_path / "config.json", '{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="of type 'bert'"):
        load_decoder(str(tmp_path))
    layouts.write(tmp_path / "config.json", '{"model_type": "sam"}')
    with pytest.raises(ConfigError) as caught:
        load_decoder(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_sam_coco__a_box_is_no_mask_on_real_pictures(real, monkeypatch):
    coco51 = real("evaluation/coco51")
    monkeypatch.setattr(sam, "load_decoder", lambda *_: Boxes())
    scores = {score.metric: score.value for score in SamCoco(str(coco51)).run(_encoder())}
    assert scores.keys() == {"iou", "iou/small", "iou/medium", "iou/large"}
    assert 50 < scores["iou"] < 65
