import math
from pathlib import Path

import pytest
import torch
from einops import rearrange

import layouts
from radio_distill.errors import DataError
from radio_distill.evals.datasets.navi import Navi
from radio_distill.evals.datasets.redwood import Redwood
from radio_distill.evals.encoder import Encoder
from radio_distill.evals.posed import NaviMatching, RgbdMatching, in_space
from radio_distill.types import Features


@pytest.fixture(scope="module")
def objects(tmp_path_factory) -> str:
    return str(layouts.navi(tmp_path_factory.mktemp("navi")))


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> str:
    return str(layouts.redwood(tmp_path_factory.mktemp("redwood")))


def _values(scores):
    return {score.metric: score.value for score in scores}


def test_in_space__the_ray_through_the_principal_point_and_one_a_focal_length_beside_it():
    intrinsics = torch.tensor([[4.0, 0, 2.5], [0, 4, 1.5], [0, 0, 1]])
    points = in_space(torch.full((4, 8), 2.0), intrinsics)
    assert points[:, 1, 2].tolist() == [0, 0, 2]
    assert points[:, 1, 6].tolist() == [2, 0, 2]
    assert points[:, 2, 2].tolist() == [0, 0.5, 2]


@pytest.mark.parametrize(("kind", "size"), [(NaviMatching, 40), (RgbdMatching, 40)])
def test_views__all_agree_where_a_point_of_the_wall_is(kind, size, objects, room):
    """Colours name places: points of one colour lie at one place of the shared frame."""
    benchmark = kind(objects if kind is NaviMatching else room, size=size, stride=1)
    first, second = (benchmark.view(image) for image in benchmark.pairs()[0])
    shown = []
    for view in (first, second):
        known = (view.points[2] > 0).flatten()
        points = torch.cat([view.points.flatten(1), torch.ones(1, known.numel())])[:, known]
        shown.append((view.pixels.flatten(1)[:, known].T, (view.pose.inverse() @ points)[:3].T))
    (colours, places), (others, theirs) = shown
    distance, index = torch.cdist(colours, others).min(dim=1)
    sure = distance < 0.02
    assert sure.sum() > 100
    assert (places[sure] - theirs[index[sure]]).norm(dim=1).median() < 0.012  # a pixel is 1 cm


def test_navi__colours_of_a_pattern_are_found_and_noise_is_not(hues, noise, objects):
    found = NaviMatching(objects, size=40, stride=1, every=1).run(hues(1))
    values = _values(found)
    assert values["recall@5cm"] > 95
    assert values["recall@50px"] == 100
    recalls = [values[f"recall@{limit}cm"] for limit in (1, 2, 5)]
    assert values["mean_recall"] == pytest.approx(sum(recalls) / 3)
    assert [score.metric for score in found if score.headline] == ["mean_recall"]
    assert {score.group for score in found} == {"Probe3D"}
    by_chance = _values(NaviMatching(objects, size=40, stride=1, every=1).run(noise(1)))
    assert by_chance["recall@5cm"] < 2 * 100 * math.pi * 0.05**2 / 0.24**2  # of the square
    assert by_chance["recall@1cm"] < 3


def test_examples__show_where_the_matches_are_and_where_they_should_be(hues, objects, room):
    """Colours name places, so ends of a line are of one colour, and of that of the truth."""
    for benchmark in (NaviMatching(objects, 40, 1, every=1), RgbdMatching(room, size=40, stride=1)):
        shown = []
        benchmark.run(hues(1), 3, show=shown.append)
        assert len(shown) == 3
        for example in shown:
            assert len(example.points) == len(example.truth) == len(example.found) > 5
            start = colours_at(example.source, example.points)
            for end in (example.found, example.truth):
                off = (start - colours_at(example.target, end)).abs().amax(dim=1)
                assert off.median() < 16
            assert example.within == 25


def colours_at(pixels, points):
    height, width = pixels.shape[1:]
    columns, rows = points.long().unbind(dim=1)
    return pixels[:, rows.clamp(0, height - 1), columns.clamp(0, width - 1)].T.int()


def test_navi__pairs_are_of_one_object_turned_and_the_same_every_time(objects):
    pairs = NaviMatching(objects, every=1).pairs()
    assert len(pairs) == len(Navi(Path(objects)).split("val")) == 10
    assert all(a.object == b.object and a.key != b.key for a, b in pairs)
    assert [a.key for a, _ in NaviMatching(objects).pairs()] == [a.key for a, _ in pairs[::4]]
    keys = [[image.key for image in pair] for pair in pairs]
    assert keys == [[i.key for i in pair] for pair in NaviMatching(objects, every=1).pairs()]
    other = NaviMatching(objects, every=1, seed=9).pairs()
    assert keys != [[image.key for image in pair] for pair in other]


def test_rgbd__colours_of_a_wall_are_found_and_noise_is_not(hues, noise, room):
    values = _values(RgbdMatching(room, size=40, stride=1).run(hues(1)))
    assert values["recall@5cm"] > 95
    assert {"recall@10cm/0-30°", "recall@10cm/30-60°"} <= values.keys()
    by_chance = _values(RgbdMatching(room, size=40, stride=1).run(noise(1)))
    assert by_chance["recall@5cm"] < 6  # a disc of 5 cm on a wall of 72 x 60: 2 in 100


def test_rgbd__frames_without_depth_in_common_are_one_line(hues, room, tmp_path):
    layouts.redwood(tmp_path)
    for path in (tmp_path / "depth").iterdir():
        layouts.save(path, torch.zeros(40, 48).short().numpy().astype("uint16"))
    with pytest.raises(DataError, match="no pair of images has depth in both"):
        RgbdMatching(str(tmp_path), size=40).run(hues(8))


def test_redwood__a_trajectory_of_other_frames_is_one_line(tmp_path):
    layouts.redwood(tmp_path)
    (tmp_path / "color" / "00003.jpg").unlink()
    (tmp_path / "depth" / "00003.png").unlink()
    with pytest.raises(DataError, match="4 poses"):
        Redwood(tmp_path).frames()


def test_rgbd__poses_of_real_frames_bring_depth_to_depth(real):
    """Points of the first frame, moved to the last one's camera, have the depth measured there."""
    folder = real("evaluation/redwood5")
    benchmark = RgbdMatching(str(folder), stride=4)
    frames = Redwood(folder).frames()
    first, last = benchmark.view(frames[0]), benchmark.view(frames[-1])
    points = rearrange(first.points, "c h w -> h w c")[first.points[2] > 0]
    motion = last.pose @ first.pose.inverse()
    moved = points @ motion[:3, :3].T + motion[:3, 3]
    camera = frames[0].intrinsics
    columns = (camera[0, 0] * moved[:, 0] / moved[:, 2] + camera[0, 2]).round().long()
    rows = (camera[1, 1] * moved[:, 1] / moved[:, 2] + camera[1, 2]).round().long()
    inside = (columns >= 0) & (columns < 640) & (rows >= 0) & (rows < 480)
    measured = frames[-1].labels()["depth"][rows[inside], columns[inside]]
    residual = (measured - moved[inside, 2])[measured > 0].abs()
    assert residual.median() < 0.008


def test_rgbd__blind_encoder_scores_on_real_frames(real):
    folder = real("evaluation/redwood5")

    def encode(pixels):
        return Features(None, torch.ones(len(pixels), 2, 24, 32))

    benchmark = RgbdMatching(str(folder), size=96, stride=4)
    values = _values(benchmark.run(Encoder("blind", encode, 4), limit=2))
    assert 0 <= values["mean_recall"] < 40
