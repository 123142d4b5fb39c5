"""Verdicts on planted vectors, in which what is alike, leaked and frequent is known."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from radio_distill.curation import curate as module
from radio_distill.curation.curate import Settings, Verdict, curate
from radio_distill.curation.summaries import Summaries
from radio_distill.errors import DataError

CPU = torch.device("cpu")
OFF = 2.0


def summaries_of(vectors: torch.Tensor, pixels: np.ndarray | None = None) -> Summaries:
    pixels = np.full(len(vectors), 100) if pixels is None else pixels
    vectors = F.normalize(vectors, dim=1) * torch.from_numpy(pixels > 0)[:, None]
    return Summaries(vectors.half(), pixels, torch.zeros(vectors.shape[1]), "digest")


@pytest.fixture
def tail() -> tuple[Summaries, np.ndarray]:
    """Concepts of 600, 200, 60, 20 and 20 images, each around a direction of its own."""
    generator = torch.Generator().manual_seed(0)
    concepts = np.repeat(np.arange(5), [600, 200, 60, 20, 20])
    centres = F.normalize(torch.randn(5, 32, generator=generator), dim=1)
    noise = 0.08 * torch.randn(len(concepts), 32, generator=generator)
    return summaries_of(centres[torch.from_numpy(concepts)] + noise), concepts


def test_a_long_tail_is_drawn_evenly(tail, tmp_path):
    summaries, concepts = tail
    settings = Settings(duplicates=OFF, leaks=OFF, images=150, clusters=(60, 10), seed=1)
    curated = curate(summaries, None, settings, CPU, tmp_path)
    drawn = np.bincount(concepts[curated.kept], minlength=5)
    assert drawn.sum() == 150
    before, after = (counts.max() / counts.sum() for counts in (np.bincount(concepts), drawn))
    assert before == pytest.approx(2 / 3)
    assert after < 0.35
    assert (drawn[3:] >= 10).all()  # at random they would be 3 each
    lowest = curated.at_level(0)
    assert all(len(np.unique(concepts[lowest == node])) == 1 for node in np.unique(lowest))


def test_verdicts(tmp_path):
    """0 and 1 are copies, 2 and 3 too, 3 is leaked, 4 is bad, 5 stands alone."""
    axes = torch.eye(8)
    vectors = axes[[0, 0, 1, 1, 2, 3]].clone()
    vectors[3] += 0.1 * axes[4]  # which the evaluation set has more of
    pixels = np.array([50, 80, 90, 70, 0, 60])
    tested = F.normalize(torch.stack([axes[6], axes[1] + 0.3 * axes[4]]), dim=1).half()
    settings = Settings(duplicates=0.99, leaks=0.97)
    curated = curate(summaries_of(vectors, pixels), tested, settings, CPU, tmp_path)
    assert [Verdict(code).name for code in curated.verdicts] == [
        *("DUPLICATE", "KEPT", "LEAKED", "LEAKED", "BAD", "KEPT")
    ]
    assert curated.like.tolist() == [1, -1, 1, 1, -1, -1]
    assert curated.cosine[0] == pytest.approx(1)
    exact = F.cosine_similarity(vectors[2:4], tested[1:].float()).tolist()
    assert curated.cosine[2:4] == pytest.approx(exact, abs=1e-3)
    assert exact[0] < 0.97 < exact[1]  # the first goes with its group
    assert curated.candidates.tolist() == [1, 5]


def test_nothing_left_to_draw_is_one_line(tmp_path):
    nothing = summaries_of(torch.eye(8)[:3], np.array([0, 0, 0]))
    with pytest.raises(DataError, match="none of 3 images is left to draw: 3 bad"):
        curate(nothing, None, Settings(duplicates=0.99, leaks=OFF), CPU, tmp_path)


def test_a_share_is_of_what_is_left_without_copies(tail, tmp_path):
    summaries, _ = tail
    vectors, pixels = summaries.vectors.repeat(2, 1), np.tile(summaries.pixels, 2)
    twice = Summaries(vectors, pixels, summaries.mean, "twice")
    settings = Settings(duplicates=0.99999, leaks=OFF, images=0.5)
    curated = curate(twice, None, settings, CPU, tmp_path)
    left = len(curated.candidates)
    assert left <= 900
    assert curated.kept.sum() == pytest.approx(left / 2, abs=1)
    assert not curated.kept[900:].any()


def test_what_was_made_before_is_not_made_again(tail, tmp_path, monkeypatch):
    summaries, _ = tail
    settings = Settings(duplicates=0.995, leaks=OFF, images=100, clusters=(60, 5))
    first = curate(summaries, None, settings, CPU, tmp_path)
    (pairs,) = tmp_path.glob("pairs-*")
    level = max(tmp_path.glob("clusters-*"), key=lambda path: path.stat().st_size)
    level.write_bytes(level.read_bytes()[:1000])  # a disk that was full

    def never(*arguments):
        raise AssertionError("the pairs are there")

    monkeypatch.setattr(module, "near_pairs", never)
    again = curate(summaries, None, settings, CPU, tmp_path)
    assert (first.verdicts == again.verdicts).all()
    pairs.unlink()
    with pytest.raises(AssertionError, match="the pairs are there"):
        curate(summaries, None, settings, CPU, tmp_path)
